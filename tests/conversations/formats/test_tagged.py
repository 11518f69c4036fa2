"""Calls in tags: what a value is, what is malformed and why, and that no text takes long."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from conversations.formats import (
    deepseek_v4,
    glm45,
    hy3,
    minicpm5,
    minimax_m2,
    muse_glimmer,
    qwen3_coder,
    seed_oss,
)
from conversations.formats.blocks import read_turn
from conversations.formats.format import NO_TYPES, ParameterTypes
from conversations.formats.registry import format_named
from conversations.formats.tag_grammar import Grammar, Tags
from conversations.formats.tagged import _Turn
from conversations.messages import MalformedToolCall, ParsedTurn, ToolCall
from tests.conversations.formats.written import CLOSING_TAGS, WRITERS, tool_schema

PARAMETERS = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "temp": {"type": "number"},
    "flag": {"type": "boolean"},
    "opts": {"type": "object"},
    "list": {"type": "array"},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]},
}
TYPES = ParameterTypes.of([tool_schema("look", PARAMETERS), tool_schema("find", PARAMETERS)])
TAGS = {
    "qwen3_coder": qwen3_coder.TAGS,
    "seed_oss": seed_oss.TAGS,
    "minimax_m2": minimax_m2.TAGS,
    "glm45": glm45.TAGS,
    "hy3": hy3.TAGS,
    "deepseek_v4": deepseek_v4.TAGS,
    "minicpm5": minicpm5.TAGS,
    "muse_glimmer": muse_glimmer.TAGS,
}
NAMES = sorted(TAGS)

STRINGS = (
    *("Rome", "true", "42", "null", '{"a": 1}', "[1]", "  lead", "trail  ", "a\nb", "a\n\nb\n"),
    *(
        "\nx",
        "",
        "\n",
        "x</parameter>y",
        "<tool_call>",
        "</tool_call> and",
        "</arg_value>",
        "é漢🙂",
    ),
    *(
        'say "hi"',
        "back\\slash",
        "<b>&amp;</b>",
        "1e5",
        "def f():\n    return 1\n",
        "```json\n{}\n```",
    ),
    *CLOSING_TAGS,
)
TYPED: tuple[dict[str, Any], ...] = (
    *({"days": 3}, {"days": 0}, {"days": -1}, {"temp": 1.5}, {"temp": 2.0}, {"temp": 1e21}),
    *({"flag": True}, {"flag": False}, {"opts": {}}, {"list": []}, {"maybe": "text"}, {"maybe": 7}),
    *({"opts": {"a": [1, {"b": None}], "s": "</x>"}}, {"list": [1, "two", None, {"k": "v"}]}),
    *({"maybe": None}, {"undeclared": "A"}, {}),
)


def read(name: str, text: str) -> ParsedTurn:
    return format_named(name).parse(text, TYPES)


def good(turn: ParsedTurn) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in turn.calls if isinstance(call, ToolCall)]


def only_bad(name: str, text: str) -> MalformedToolCall:
    (call,) = read(name, text).calls
    assert isinstance(call, MalformedToolCall)
    return call


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", STRINGS)
def test_a_string_comes_back_to_the_letter(name: str, text: str) -> None:
    calls = [("look", {"city": text})]
    assert good(read(name, "Text." + WRITERS[name](calls))) == calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arguments", TYPED, ids=str)
def test_a_value_comes_back_with_its_type(name: str, arguments: dict[str, Any]) -> None:
    calls = [("find", arguments)]
    assert json.dumps(good(read(name, WRITERS[name](calls)))) == json.dumps(calls)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_of_a_call_inside_a_value_is_not_run(name: str) -> None:
    example = WRITERS[name]([("find", {"city": "x"}), ("find", {})])
    calls = [("look", {"city": f"Write\n{example}\nto find x.\n", "days": 1})]
    assert good(read(name, WRITERS[name](calls))) == calls


@pytest.mark.parametrize("name", NAMES)
def test_xml_with_the_same_tags_inside_a_value_comes_back(name: str) -> None:
    tags = TAGS[name]
    inside = tags.parameter_close.replace("</", "<").replace(">", ' unit="m">')
    xml = f"<root>\n  {inside}1{tags.parameter_close}\n  {inside}2{tags.parameter_close}\n</root>\n"
    calls = [("look", {"city": xml})]
    assert good(read(name, WRITERS[name](calls))) == calls


@pytest.mark.parametrize("name", NAMES)
def test_source_code_about_the_tags_comes_back(name: str) -> None:
    tags = TAGS[name]
    code = f'CLOSE = "{tags.parameter_close}", "{tags.call_close}", "{tags.block[1]}"\nx = 1\n'
    calls = [("look", {"city": code, "days": 1})]
    assert good(read(name, WRITERS[name](calls))) == calls


def test_dsml_says_itself_what_is_a_string() -> None:
    write = WRITERS["deepseek_v4"]
    assert good(read("deepseek_v4", write([("look", {"days": "3"})]))) == [("look", {"days": "3"})]
    without = write([("look", {"city": "3", "days": 3})]).replace(' string="true"', "")
    without = without.replace(' string="false"', "")
    assert good(read("deepseek_v4", without)) == [("look", {"city": "3", "days": 3})]
    wrong = write([("look", {"city": 3})]).replace(">3<", ">Rome<")
    assert "city" in only_bad("deepseek_v4", wrong).error


# ---------------------------------------------------------------------- what is malformed


def parameter(tags: Tags, key: str, value: str, *, closed: bool = True) -> str:
    """A parameter with any text as its value."""
    behind = re.sub(r"\(\?:.*\)\?|\\s\*", "", tags.parameter[1])
    close = tags.parameter_close if closed else ""
    edge = "\n" if tags.newlines else ""
    return f"{tags.parameter[0]}{key}{behind}{edge}{value}{edge}{close}\n"


def block(tags: Tags, inner: str, name: str = "look") -> str:
    behind = "" if tags.call[1].startswith("(?=") else tags.call[1]
    call = f"{tags.call[0]}{name}{behind}\n{inner}{tags.call_close}"
    return f"{tags.block[0]}{call}\n{tags.block[1]}"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_malformed_and_what_the_model_is_told(name: str) -> None:
    tags = TAGS[name]
    city = parameter(tags, "city", "Rome")
    assert good(read(name, block(tags, city))) == [("look", {"city": "Rome"})]
    cases = {
        tags.block[0] + "\n" + tags.block[1]: "expected",
        f'{tags.block[0]}{{"name": "look", "arguments": {{}}}}{tags.block[1]}': "expected",
        f"{tags.block[0]}\n{city}\n{tags.block[1]}": "expected",
        block(tags, parameter(tags, "city", "Rome", closed=False)): "not closed",
        block(tags, parameter(tags, "city", "Rome", closed=False) + city): "not closed",
        block(tags, f"{city}Oslo\n{tags.parameter_close}\n"): "missing before",
        block(tags, f"{city}{city}"): "twice",
        block(tags, parameter(tags, "days", "three")): "integer",
        block(tags, parameter(tags, "opts", '{"a": ')): "object",
        block(tags, parameter(tags, "days", "")): "integer",
        block(tags, f"{city}and more\n"): "not closed",
        block(tags, f"and more\n{city}"): "expected",
        block(tags, city).removesuffix(tags.block[1]): f"expected {tags.block[1]}",
    }
    for text, reason in cases.items():
        bad = only_bad(name, text)
        assert bad.raw.rstrip() == text.rstrip()
        assert reason in bad.error
        assert tags.example in bad.error
        turn = read(name, f"One.{text}\nTwo.{block(tags, city)}")
        assert good(turn)[-1:] == [("look", {"city": "Rome"})], text


@pytest.mark.parametrize("name", NAMES)
def test_a_malformed_call_has_the_name_it_was_given(name: str) -> None:
    tags = TAGS[name]
    assert only_bad(name, block(tags, parameter(tags, "days", "x"), "find")).name == "find"
    nested = block(tags, parameter(tags, "opts", '{"name": "look"'), "find")
    assert only_bad(name, nested).name == "find"
    assert only_bad(name, f'{tags.block[0]}{{"name": "look"}}{tags.block[1]}').name is None


@pytest.mark.parametrize("name", ["qwen3_coder", "seed_oss", "minimax_m2", "deepseek_v4"])
def test_a_call_without_its_block_is_malformed(name: str) -> None:
    tags = TAGS[name]
    text = block(tags, parameter(tags, "city", "Rome"))[len(tags.block[0]) :]
    bad = only_bad(name, f"Text. {text} More.")
    assert (bad.raw, bad.name) == (text, "look")
    assert f"{tags.block[0]} is missing" in bad.error


@pytest.mark.parametrize("name", ["minimax_m2", "deepseek_v4"])
def test_calls_that_share_a_block_share_its_text(name: str) -> None:
    tags = TAGS[name]
    text = WRITERS[name]([("look", {}), ("find", {"city": "x"}), ("look", {})]).strip()
    turn = read(name, f"One.{text}Two.")
    assert "".join(call.raw for call in turn.calls) == text
    assert turn.content == "One.Two."
    broken = text.replace("find", "")
    assert good(read(name, broken)) == [("look", {}), ("look", {})]
    assert [type(call) for call in read(name, broken).calls] == [
        ToolCall,
        MalformedToolCall,
        ToolCall,
    ]
    cut = read(name, text[: -len(tags.block[1])])
    assert good(cut) == [("look", {}), ("find", {"city": "x"})]
    assert tags.block[1] in cut.calls[2].error  # type: ignore[union-attr]


def test_a_closing_tag_that_closes_nothing_is_content() -> None:
    for name, tags in TAGS.items():
        text = f"a{tags.parameter_close} b{tags.call_close} c{tags.block[1]}"
        assert read(name, text) == ParsedTurn(text)


# ---------------------------------------------------------------------- no text takes long


class Counting:
    """A pattern that counts the characters which it went over."""

    def __init__(self, pattern: re.Pattern[str], work: list[int]) -> None:
        self._pattern, self._work = pattern, work

    def search(self, text: str, position: int) -> re.Match[str] | None:
        found = self._pattern.search(text, position)
        self._work[0] += (found.end() if found else len(text)) - position + 1
        return found

    def match(self, text: str, position: int) -> re.Match[str] | None:
        found = self._pattern.match(text, position)
        self._work[0] += (found.end() - position if found else 0) + 1
        return found

    def finditer(self, text: str) -> Any:
        self._work[0] += len(text)
        return self._pattern.finditer(text)


def work(tags: Tags, text: str) -> int:
    counted = [0]
    grammar = Grammar(tags)
    for name, pattern in vars(grammar).items():
        if isinstance(pattern, re.Pattern):
            setattr(grammar, name, Counting(pattern, counted))
    read_turn(text, grammar.opens, tags.thought, False, _Turn(grammar, text, NO_TYPES).block)
    return counted[0]


def hostile_units(tags: Tags) -> list[str]:
    city, open_city = parameter(tags, "x", "v"), parameter(tags, "x", "v", closed=False)
    whole, unclosed = block(tags, city), block(tags, open_city)
    return [
        *(tags.block[0], tags.block[1], tags.thought.open, tags.parameter_close, " ", city),
        *(whole, unclosed, whole[:-3], unclosed[:-3], block(tags, open_city + whole)[:-3]),
        *(whole.removeprefix(tags.block[0]), unclosed.removeprefix(tags.block[0]), "<", "\n"),
        *(tags.block[0] + whole, open_city, block(tags, city)[: -len(tags.block[1])], "x" + city),
        *(whole + tags.block[0], unclosed + whole, f"{tags.parameter_close}\n3\n"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_work_grows_with_the_text_not_with_its_square(name: str) -> None:
    tags = TAGS[name]
    start = block(tags, parameter(tags, "x", "v", closed=False))[: -len(tags.block[1]) - 3]
    for unit in hostile_units(tags):
        for before in ("", start, tags.block[0]):
            small, large = (work(tags, before + unit * times) for times in (50, 400))
            assert large <= 8 * small * 1.5 + 4096, (before, unit)  # a square would be 64 times


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", [" ", "k", "\n", "\n "])
def test_a_long_run_behind_a_tag_inside_a_value_parses(name: str, run: str) -> None:
    value = TAGS[name].parameter_close + run * 200_000  # a square would take minutes
    assert len(read(name, WRITERS[name]([("look", {"city": value, "days": 1})])).calls) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_long_hostile_text_parses(name: str) -> None:
    for unit in hostile_units(TAGS[name]):
        text = unit * (200_000 // len(unit))  # a square would take many minutes
        assert len(read(name, text).content) <= len(text)


# ---------------------------------------------------------------------- rows of messages


K3_CALL = (
    '<|open|>call tool="look" index="1"<|sep|><|open|>argument key="{}" type="{}"<|sep|>{}'
    "<|close|>argument<|sep|><|close|>call<|sep|>"
)
K3 = "<|open|>tools<|sep|>{}<|close|>tools<|sep|>"


def test_kimi_k3_says_the_types_of_its_values_itself() -> None:
    for kind, text, value in (("string", "42", "42"), ("number", "42", 42), ("null", "null", None)):
        turn = read("kimi_k3", K3.format(K3_CALL.format("undeclared", kind, text)))
        assert good(turn) == [("look", {"undeclared": value})]
    assert "JSON" in only_bad("kimi_k3", K3.format(K3_CALL.format("x", "object", "{a"))).error


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (K3.format(""), "expected"),
        (K3_CALL.format("days", "number", "1"), "missing before the call"),
        (K3.format(K3_CALL.format("days", "number", "1"))[:-21], "expected"),
        (K3.format(K3_CALL.format("days", "number", "1").replace("<|close|>call<|sep|>", "")), ""),
        (
            K3.format(K3_CALL.format("city", "string", "a<|close|>argument<|sep|>b")),
            "missing before",
        ),
    ],
)
def test_what_is_malformed_of_kimi_k3(text: str, word: str) -> None:
    assert word in only_bad("kimi_k3", text).error


def test_what_stands_around_the_messages_of_a_turn_is_not_content() -> None:
    call = K3.format(K3_CALL.format("days", "number", "1"))
    said = "<|open|>response<|sep|>So.<|close|>response<|sep|>"
    kimi = format_named("kimi_k3").parse(
        f"hm<|close|>think<|sep|>{said}{call}<|close|>message<|sep|>", TYPES, in_think=True
    )
    assert (kimi.reasoning, kimi.content, good(kimi)) == ("hm", "So.", [("look", {"days": 1})])
    call = WRITERS["muse_glimmer"]([("look", {"days": 1})])
    thought = " to=self<|message|>hm<|eom|><|start|>assistant"
    muse = read("muse_glimmer", f"{thought}{call}<|eom|><|start|>assistant to=user<|message|>So.")
    assert (muse.reasoning, muse.content, good(muse)) == ("hm", "So.", [("look", {"days": 1})])


def test_a_message_of_muse_glimmer_to_a_tool_without_a_call_is_malformed() -> None:
    assert "missing" in only_bad("muse_glimmer", " to=look<|message|>city=Rome").error
    assert read("muse_glimmer", " to=user<|message|>Rome") == ParsedTurn("Rome")


def test_a_string_of_minicpm5_in_cdata_holds_any_tag() -> None:
    for city in ("a</param>b", "x</param></function>y", '<param name="days">', "]] >", ""):
        text = '<function name="look"><param name="city"><![CDATA[{}]]></param></function>'
        assert good(read("minicpm5", text.format(city))) == [("look", {"city": city})]
    cut = '<function name="look"><param name="city"><![CDATA[a</param></function>'
    assert "not closed" in only_bad("minicpm5", cut).error
    bare = '<function name="look"><param name="city">a</param>3</param></function>'
    assert "missing" in only_bad("minicpm5", bare).error
