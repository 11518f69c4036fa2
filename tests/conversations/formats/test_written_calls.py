"""Every format whose calls `written.WRITERS` writes: what is written comes back, what is broken is
shown."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations.formats.format import NO_TYPES, CallFormat, ParameterTypes
from conversations.formats.registry import FORMATS, format_named
from conversations.formats.thinking import without_thought
from conversations.messages import MalformedToolCall, ParsedTurn, ToolCall
from tests.conversations.formats.written import (
    TAGGED,
    WRITERS,
    Sample,
    random_sample,
    render,
    tool_schema,
)
from tests.formats_fuzz import check, covers, fuzz
from tests.formats_round_trip import came_back, failures

NAMES = sorted(WRITERS)
TRL = {
    "qwen3_coder": (
        *("qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "nemotron_3_nano"),
        *("nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"),
    ),
    "glm45": ("glm4moe",),
    "deepseek_v3": ("deepseekv3",),
    "gpt_oss": ("gptoss",),
    "lfm2": ("lfm2_v2", "lfm2_2_5_vl"),
    "llama3_json": ("llama3_1", "llama3_2"),
    "gemma4": ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"),
}


def trl_template(name: str) -> str:
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_random_calls_come_back(name: str) -> None:
    assert list(failures(name, 300, 1, None)) == []


@pytest.mark.parametrize(
    ("name", "template"), [(name, each) for name in TRL for each in TRL[name]], ids=str
)
def test_random_calls_come_back_from_the_models_own_template(name: str, template: str) -> None:
    assert list(failures(name, 60, 2, trl_template(template))) == []


def test_a_value_that_does_not_come_back_is_seen() -> None:
    sample = Sample([tool_schema("f", {"x": {"type": "string"}})], [("f", {"x": "a"})])
    other = Sample(sample.tools, [("f", {"x": "b"})])
    for name in NAMES:
        assert came_back(format_named(name), WRITERS[name](sample.calls), sample)
        assert not came_back(format_named(name), WRITERS[name](other.calls), sample)
    assert "7f3a" not in render("{{ messages[0].content }}end", sample)


@pytest.mark.parametrize("name", NAMES)
def test_mutated_turns_lose_nothing_and_raise_nothing(name: str) -> None:
    seen = fuzz(name, 600, 3)
    assert seen["good"] > 50
    assert seen["malformed"] > 50


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=300), in_think=st.booleans())
def test_any_text_is_covered(form: CallFormat, text: str, in_think: bool) -> None:
    check(form, text, NO_TYPES, in_think)


# ------------------------------------------------------------------ broken calls beside good ones

PLAIN: list[tuple[str, dict[str, object]]] = [
    ("look", {"city": "Paris", "days": 3}),
    ("code", {"text": "def f():\n    return [1, 2]\n"}),
    ("look", {"city": "Oslo", "days": 4}),
]
TOOLS = [
    tool_schema("look", {"city": {"type": "string"}, "days": {"type": "integer"}}),
    tool_schema("code", {"text": {"type": "string"}}),
]
TYPES = ParameterTypes.of(TOOLS)
TAG = re.compile(r"<[^!<>][^<>]*>|[{}]|call:\w+")


def calls_of(name: str, text: str) -> list[tuple[str, dict[str, object]]]:
    turn = check(format_named(name), text, TYPES, in_think=False)
    return [(call.name, call.arguments) for call in turn.calls if isinstance(call, ToolCall)]


@pytest.mark.parametrize("name", sorted(TAGGED))
def test_without_one_of_its_tags_no_call_runs_with_other_arguments(name: str) -> None:
    text = WRITERS[name](PLAIN)
    tags = list(TAG.finditer(text))
    assert len(tags) > 10
    without_any = 0
    for tag in tags:
        broken = text[: tag.start()] + text[tag.end() :]
        ran = calls_of(name, broken)
        assert all(call in PLAIN for call in ran), tag
        without_any += not ran
    assert without_any <= 2  # the tag that opens the block of all three; Kimi-K3's has two


@pytest.mark.parametrize("name", sorted(TAGGED))
def test_what_was_cut_off_never_runs(name: str) -> None:
    text = WRITERS[name](PLAIN[:1])
    whole = len(text.rstrip())
    for end in range(whole):
        assert calls_of(name, text[:end]) == []
    assert calls_of(name, text[:whole]) == PLAIN[:1]


@pytest.mark.parametrize("name", sorted(TAGGED))
def test_a_good_call_stays_good_beside_a_bad_one(name: str) -> None:
    good = PLAIN[:1]
    call = WRITERS[name](good)
    without_name = WRITERS[name]([("look", {"city": "x"})]).replace("look", "")
    without_end = WRITERS[name](PLAIN[2:])[:-12]
    for bad in (without_name, without_end):
        for text in (f"{bad}\n{call}", f"{call}\n{bad}", bad + bad + call):
            assert calls_of(name, text) == good
            turn = format_named(name).parse(text, TYPES)
            assert any(isinstance(part, MalformedToolCall) for part in turn.calls)


@pytest.mark.parametrize("name", sorted(TAGGED))
def test_text_and_thoughts_stay_where_they_were(name: str) -> None:
    call, form = WRITERS[name](PLAIN[:1]), format_named(name)
    turn = form.parse(f"One. {call} Two.\n{call}\n\nThree.\n", TYPES)
    assert "".join(turn.content.split()) == "One.Two.Three."
    assert calls_of(name, f"One. {call} Two.\n{call}\n\nThree.\n") == PLAIN[:1] * 2
    inside, closing = form.thought.open + call + form.thought.close, form.thought.close
    assert calls_of(name, inside + "No call.") == []
    assert calls_of(name, inside + call) == PLAIN[:1]
    turn = without_thought(form.parse(inside + "No call.", TYPES), form.thought, in_think=False)
    assert (turn.reasoning, turn.content) == (call, "No call.")
    assert form.parse(f"{call}{closing}{call}", TYPES, in_think=True).calls[1:] == ()
    turn = without_thought(form.parse(call, TYPES, in_think=True), form.thought, in_think=True)
    assert turn == ParsedTurn("", (), call)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt_oss"])
def test_a_call_inside_the_formats_own_thought_is_no_call(name: str) -> None:
    thought, call = format_named(name).thought, WRITERS[name](PLAIN[:1])
    assert calls_of(name, f"{thought.open}{call}{thought.close}") == []


def test_random_samples_hold_what_parsers_trip_over() -> None:
    rng = random.Random(5)
    texts = [WRITERS["qwen3_coder"](random_sample(rng, "qwen3_coder").calls) for _ in range(300)]
    for piece in ("a</parameter>b", "a<tool_call>\n<function=g>", "def f(x):\n", "\n\n\n", "漢"):
        assert any(piece in text for text in texts), piece


def test_a_lost_text_is_seen() -> None:
    call = ToolCall("f", {}, "<b>")
    assert covers("a<b>c", ParsedTurn("ac", (call,)))
    assert covers("<b>a<b>c<b>", ParsedTurn("<b>ac<b>", (call,)))
    assert covers("<b><b><b>", ParsedTurn("<b>", (call, call)))
    for content in ("a", "ca", "a c", "a<b>c", ""):
        assert not covers("a<b>c", ParsedTurn(content, (call,)))
    assert not covers("abc", ParsedTurn("abc", (ToolCall("f", {}, ""),)))
