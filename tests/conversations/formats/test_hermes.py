"""Hermes parsing: every choice of the module, what it never does (raise, lose text, take long), and
upstream's cases.
"""

# ruff: noqa: E501 - texts that stand here as they are

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conversations.formats.hermes import CLOSE, OPEN, parse
from conversations.messages import MalformedToolCall, ParsedTurn, ToolCall
from tests.conversations.formats.counted import Counted
from tests.helpers import ODD_TEXTS, call

GOOD = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def good(turn: ParsedTurn) -> list[tuple[str, dict[str, object]]]:
    return [(part.name, part.arguments) for part in turn.calls if isinstance(part, ToolCall)]


def bad(turn: ParsedTurn) -> list[MalformedToolCall]:
    return [part for part in turn.calls if isinstance(part, MalformedToolCall)]


def only_bad(raw: str) -> MalformedToolCall:
    turn = parse(raw)
    assert len(turn.calls) == 1
    (found,) = bad(turn)
    return found


# ---------------------------------------------------------------------- well-formed calls


def test_text_without_a_call_is_content() -> None:
    assert parse("6 times 7 is 42.") == ParsedTurn("6 times 7 is 42.")
    assert parse("") == ParsedTurn("")


def test_calls_keep_their_order_and_their_verbatim_blocks() -> None:
    first, second = call("a", x=1), call("b", y=[2])
    turn = parse(f"One.{first}Two.\n{second}\nThree.")
    assert turn.content == "One.Two.\n\nThree."
    assert [part.raw for part in turn.calls] == [first, second]
    assert good(turn) == [("a", {"x": 1}), ("b", {"y": [2]})]


@pytest.mark.parametrize(
    "raw",
    [
        '<tool_call>{"name":"f","arguments":{"x":1}}</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',  # Qwen2.5 and Qwen3
        '<tool_call>\r\n\t {"arguments": {"x": 1}, "name": "f"} \n\n</tool_call>',
        '<tool_call>{"name": "f", "arguments": {\n  "x": 1\n}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1}, "id": "extra keys are ignored"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>',  # encoded twice
    ],
)
def test_forms_of_one_call(raw: str) -> None:
    assert good(parse(raw)) == [("f", {"x": 1})]
    assert parse(raw).calls[0].raw == raw


def test_no_arguments_at_all_is_an_empty_object() -> None:
    assert good(parse('<tool_call>{"name": "f"}</tool_call>')) == [("f", {})]
    assert good(parse('<tool_call>{"name": "f", "arguments": {}}</tool_call>')) == [("f", {})]
    assert good(parse('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>')) == [("f", {})]


@pytest.mark.parametrize(
    "arguments",
    [
        {"nested": {"list": [{"deep": [1, [2, [3]]]}], "null": None, "t": True}},
        {"quotes": 'say "hi" \\ and \\n', "newline": "a\nb\tc"},
        {"unicode": "漢字 🙂 é \u2028", "": "empty key"},
        {"numbers": [0, -1, 1.5e-7, 10**30]},
        {"markup": "</tool_call>"},
        {"markup": "x</tool_call>y<tool_call>z</think><think>", "</tool_call>": OPEN + CLOSE},
        {"after an escape": 'é</tool_call>🙂<tool_call>\\</tool_call>"</tool_call>'},
    ],
)
@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_any_json_object_as_arguments(arguments: dict[str, object], ensure_ascii: bool) -> None:
    body = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=ensure_ascii)
    turn = parse(f"a {OPEN}{body}{CLOSE} b")
    assert good(turn) == [("f", arguments)]
    assert turn.content == "a  b"


def test_escaped_surrogate_pairs_are_one_character() -> None:
    assert good(
        parse('<tool_call>{"name": "f", "arguments": {"x": "\\ud83d\\ude42"}}</tool_call>')
    ) == [("f", {"x": "🙂"})]


def test_content_is_not_stripped() -> None:
    assert parse(f"  \n{GOOD}\n ").content == "  \n\n "
    assert parse(GOOD).content == ""


# ---------------------------------------------------------------------- malformed calls: named,
# kept, never run


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("<tool_call></tool_call>", "not valid JSON: Expecting value at character 0"),
        ("<tool_call>f(x=1)</tool_call>", "not valid JSON"),
        ("<tool_call>{'name': 'f', 'arguments': {}}</tool_call>", "property name enclosed in double quotes"),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>', "not valid JSON"),
        ('<tool_call>"name": "f", "arguments": {}}</tool_call>', "not followed by"),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "NaN is not JSON"),
        ('<tool_call>{"name": "f", "arguments": {"x": -Infinity}}</tool_call>', "-Infinity is not JSON"),
        ('<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', "out of range"),
        ('<tool_call>{"name": "f", "arguments": {"x": %s}}</tool_call>' % ("9" * 5000), "not valid JSON"),
        ('<tool_call>{"name": "f", "arguments": {"x": "a\nb"}}</tool_call>', "Invalid control character"),
        ('<tool_call>{"name": "f", "arguments": {"x": "\\d"}}</tool_call>', "escape"),
        ('<tool_call>{"name": "f", "arguments": {"x": "\\ud83d"}}</tool_call>', "surrogate"),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": \\"\\\\ud83d\\"}"}</tool_call>', "surrogate"),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}} and more</tool_call>', "not followed by </tool_call>"),
        ('<tool_call>{"name": "f"}{"name": "g"}</tool_call>', "not followed by </tool_call>"),
        ('<tool_call>[{"name": "f", "arguments": {}}]</tool_call>', "must be a JSON object, not an array"),
        ('<tool_call>"f"</tool_call>', "must be a JSON object, not a string"),
        ("<tool_call>42</tool_call>", "must be a JSON object, not a number"),
        ("<tool_call>true</tool_call>", "must be a JSON object, not a boolean"),
        ("<tool_call>null</tool_call>", "must be a JSON object, not null"),
        ('<tool_call>{"arguments": {}}</tool_call>', '"name" must be a non-empty string'),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', '"name" must be a non-empty string'),
        ('<tool_call>{"name": 7, "arguments": {}}</tool_call>', '"name" must be a non-empty string'),
        ('<tool_call>{"name": "f", "argument": {"x": 1}}</tool_call>', "the key is \"arguments\", not 'argument'"),
        ('<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>', "the key is \"arguments\", not 'parameters'"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', '"arguments" must be a JSON object, not an array'),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', '"arguments" must be a JSON object, not null'),
        ('<tool_call>{"name": "f", "arguments": "x = 1"}</tool_call>', '"arguments" must be a JSON object, not a string'),
        ('<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>', '"arguments" must be a JSON object, not an array'),
        ('<tool_call>{"name": "f", "arguments": {"x": %s}}</tool_call>' % ("[" * 70 + "]" * 70), "nested more than 64 deep"),
        ('<tool_call>{"name": "f", "arguments": {"x": %s}}</tool_call>' % ("[" * 99_999 + "]" * 99_999), "nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_not_a_call_says_why(raw: str, reason: str) -> None:
    found = only_bad(raw)
    assert reason in found.error
    assert found.raw == raw
    assert '{"name": ..., "arguments": {...}}' in found.error  # what to do


@pytest.mark.parametrize(
    "raw",
    [GOOD.removesuffix(CLOSE), GOOD[:-1], GOOD[:-12], GOOD[:-20], "<tool_call>", "<tool_call>\n"],
)
def test_an_unclosed_call_at_the_end_is_not_run(raw: str) -> None:
    found = only_bad(f"Wait. {raw}")
    assert found.raw == raw
    assert "</tool_call>" in found.error
    assert parse(f"Wait. {raw}").content == "Wait. "


@pytest.mark.parametrize(
    "broken", ["<tool_call>{oops}</tool_call>", "<tool_call>{oops", '<tool_call>{"name": "g"}']
)
def test_a_good_call_stays_good_beside_a_bad_one(broken: str) -> None:
    for raw in (broken + GOOD, GOOD + broken, GOOD + broken + GOOD):
        turn = parse(raw)
        assert [part.raw for part in bad(turn)] == [broken]
        assert good(turn) == [("f", {"x": 1})] * raw.count(GOOD)
        assert turn.content == ""


def test_the_name_of_a_malformed_call_is_found_where_it_can_be() -> None:
    assert only_bad('<tool_call>{"name": "f", "arguments": {oops}}</tool_call>').name == "f"
    assert only_bad('<tool_call>{"name": "f", "arguments": 1}</tool_call>').name == "f"
    assert only_bad("<tool_call>f(1)</tool_call>").name is None


def test_an_odd_quote_swallows_no_later_call() -> None:
    """The string runs on over the next block; that block must still stand for itself."""
    turn = parse(f'<tool_call>{{"name": "f, "arguments": {{}}}}</tool_call>{GOOD}')
    assert len(bad(turn)) == 1
    assert good(turn) == [("f", {"x": 1})]


def test_a_closing_tag_without_an_opening_one_is_text() -> None:
    assert parse("a</tool_call>b") == ParsedTurn("a</tool_call>b")
    assert parse(f"a</tool_call>{GOOD}</tool_call>b").content == "a</tool_call></tool_call>b"


# ---------------------------------------------------------------------- thoughts


def test_calls_in_thoughts_are_thoughts() -> None:
    turn = parse(f"<think>maybe {call('no')}</think>\n\nYes: {call('yes')}")
    assert good(turn) == [("yes", {})]
    assert turn.content == f"<think>maybe {call('no')}</think>\n\nYes: "


def test_an_unclosed_thought_covers_the_rest() -> None:
    raw = f"{call('yes')}<think>hm {call('no')}"
    assert good(parse(raw)) == [("yes", {})]
    assert parse(raw).content == f"<think>hm {call('no')}"


def test_the_generation_prompt_may_have_opened_the_thought() -> None:
    raw = f"{call('no')}</think>{call('yes')}"
    assert good(parse(raw, in_think=True)) == [("yes", {})]
    assert good(parse(raw)) == [("no", {}), ("yes", {})]
    assert parse(call("no"), in_think=True) == ParsedTurn(call("no"))


def test_a_thought_inside_a_string_argument_is_an_argument() -> None:
    assert good(parse(call("f", x="<think>") + call("g"))) == [("f", {"x": "<think>"}), ("g", {})]


# ---------------------------------------------------------------------- upstream's cases (verl,
# SGLang, vLLM)


def test_verl_two_calls_with_text_before() -> None:
    raw = """Let me get the weather in two cities.
<tool_call>
{"name": "get_current_weather", "arguments": {"location": "San Francisco, CA", "unit": "celsius"}}
</tool_call>
<tool_call>
{"name": "get_temperature_date", "arguments": {"location": "San Francisco, CA, USA", "date": "2024-09-30"}}
</tool_call>"""
    turn = parse(raw)
    assert turn.content == "Let me get the weather in two cities.\n\n"
    assert [name for name, _ in good(turn)] == ["get_current_weather", "get_temperature_date"]
    assert good(turn)[0][1] == {"location": "San Francisco, CA", "unit": "celsius"}


def test_verl_bad_json_beside_good() -> None:
    turn = parse(
        '<tool_call>{"name": "good", "arguments": {}}</tool_call>\n<tool_call>{"name": "bad" "arguments"}</tool_call>'
    )
    assert good(turn) == [("good", {})]
    assert [part.name for part in bad(turn)] == ["bad"]


def test_vllm_nested_and_empty_arguments() -> None:
    turn = parse(
        '<tool_call>\n{"name": "get_final_answer", "arguments": {"trigger": true, "d": {"e": {}}}}\n</tool_call>'
    )
    assert good(turn) == [("get_final_answer", {"trigger": True, "d": {"e": {}}})]
    assert good(parse('<tool_call>\n{"name": "refresh", "arguments": {}}\n</tool_call>')) == [
        ("refresh", {})
    ]


def test_vllm_unclosed_call_is_malformed_here() -> None:
    """vLLM runs it; here nothing that was not finished is run."""
    assert not good(parse('<tool_call>\n{"name": "search", "arguments": {"query": "x"}}'))


def test_sglang_call_after_text_and_before_text() -> None:
    turn = parse(
        'Some text. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call> More.'
    )
    assert (turn.content, good(turn)) == ("Some text.  More.", [("get_weather", {"city": "Paris"})])


# ---------------------------------------------------------------------- for all texts

_PIECES = [
    OPEN, CLOSE, "<think>", "</think>", "\\u00e9", "</tool_call", "<tool_call", '{"name": "g", "arguments": {}}\n' + CLOSE, "\ud83d", "🙂",
    "text",     '{"name": "f", "arguments": {"x": 1}}', '{"name": "f"', "}", "{", '"', "\\", "\\ud83d", "[", "]", ",", ":", "\n",
    '{"name": "f", "arguments": "', "NaN", "1e999",
]  # fmt: skip
hostile = st.lists(st.one_of(st.sampled_from(_PIECES), st.text(max_size=4)), max_size=40).map(
    "".join
)


def interleaves(raw: str, content: str, blocks: list[str]) -> bool:
    """Whether `raw` is `content` with the blocks, in order, put in somewhere."""
    positions = {0}  # of the content, before the k-th block
    shift = 0
    for block in blocks:
        positions = {
            end
            for start in positions
            for end in range(start, len(content) + 1)
            if raw[start + shift : end + shift] == content[start:end]
            and raw.startswith(block, end + shift)
        }
        shift += len(block)
    return any(raw[start + shift :] == content[start:] for start in positions)


@given(hostile, st.booleans())
@example(OPEN * 3, False)
@example(f'{OPEN}{{"a": "{OPEN}', False)
@settings(max_examples=800, deadline=None)
def test_nothing_raises_and_nothing_vanishes(raw: str, in_think: bool) -> None:
    turn = parse(raw, in_think=in_think)
    blocks = [part.raw for part in turn.calls]
    assert interleaves(raw, turn.content, blocks)
    assert all(block.startswith(OPEN) for block in blocks)
    for part in turn.calls:
        if isinstance(part, ToolCall):
            assert part.raw.endswith(CLOSE)
            sendable = json.dumps(part.arguments, ensure_ascii=False, allow_nan=False)
            assert (
                "\ud83d" in raw or sendable.encode()
            )  # decoded ids hold no surrogates, so neither do arguments
        else:
            assert part.error
    if not in_think and "<think>" not in raw:
        assert OPEN not in turn.content


marked = st.lists(
    st.sampled_from([OPEN, CLOSE, "<think>", '"', "\\", "\\u", "é", "🙂", "x", "\n", "{", "}"]),
    max_size=6,
).map("".join)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | marked
    | st.sampled_from(ODD_TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.text(min_size=1),
    st.dictionaries(st.text(), json_values, max_size=4),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_every_written_call_reads_back(
    name: str, arguments: dict[str, object], ascii_only: bool, twice: bool
) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only) if twice else arguments
    block = OPEN + json.dumps({"name": name, "arguments": written}, ensure_ascii=ascii_only) + CLOSE
    turn = parse(f"before {block}{block} after")
    assert good(turn) == [(name, arguments)] * 2
    assert turn.content == "before  after"


# ---------------------------------------------------------------------- linear time, by counting
# work


def hostile_texts() -> Iterator[str]:
    yield from (
        OPEN, OPEN + "{", OPEN + "[", OPEN + '{"', OPEN + '["', OPEN + '{"a": "', OPEN + '"x', OPEN + "{}",
        OPEN + '{"name": "f", "arguments": {}}', OPEN + CLOSE, CLOSE, OPEN + "{}x" + CLOSE, "<think>", "<think></think>", "<think>" + OPEN,
        OPEN + '","', OPEN + '["a","',
        OPEN + "[[[[", OPEN + '{"name"  :', OPEN + "   ", '"name" ' + OPEN, OPEN + '"\\', OPEN + '\\"', "</think>" + OPEN + '{"',
        OPEN + '{"name": "' + CLOSE,
    )  # fmt: skip
    rng = random.Random(7)
    for _ in range(40):
        yield "".join(rng.choice(_PIECES) for _ in range(rng.randrange(2, 7)))


@pytest.mark.parametrize("unit", list(dict.fromkeys(hostile_texts())))
@pytest.mark.parametrize("prefix", ["", OPEN + '{"a": "', OPEN])
def test_work_grows_with_the_text_not_with_its_square(prefix: str, unit: str) -> None:
    def work(repeats: int) -> int:
        text = Counted(prefix + unit * repeats)
        parse(text)
        return text.work

    small, large = work(200), work(1600)
    assert large <= 8 * small * 1.5 + 4096  # a square would be 64 times


@pytest.mark.parametrize(
    "unit",
    [
        OPEN,
        OPEN + '{"a": "',
        OPEN + "[",
        CLOSE,
        OPEN + "{}",
        "<think>" + OPEN,
        OPEN + '{"name": "' + CLOSE,
    ],
)
def test_a_megabyte_of_it_parses(unit: str) -> None:
    parse(unit * (1_000_000 // len(unit)))  # with anything but linear time this would take hours


# ---------------------------------------------------------------------- what the model is told


def test_a_name_inside_the_arguments_is_not_the_calls_name() -> None:
    raw = '<tool_call>{"arguments": {"payload": {"name": "browse"}}, "other": "cut"</tool_call>'
    assert only_bad(raw).name is None
    escaped = (
        r'<tool_call>{"arguments": {"x": "\"name\": \"browse\""}, "name": "look", }</tool_call>'
    )
    assert only_bad(escaped).name == "look"


def test_a_number_of_too_many_digits_is_told_without_python() -> None:
    digits = "9" * 5_000
    malformed = only_bad(f'<tool_call>{{"name": "f", "arguments": {{"x": {digits}}}}}</tool_call>')
    assert "digits" in malformed.error
    assert "sys." not in malformed.error
    assert malformed.name == "f"


@pytest.mark.parametrize("character", ["\n", "\t"])
def test_a_raw_newline_or_tab_in_a_string_says_what_to_write(character: str) -> None:
    raw = f'<tool_call>{{"name": "f", "arguments": {{"x": "a{character}b"}}}}</tool_call>'
    assert r"\n" in only_bad(raw).error
