"""What the formats of JSON and Python calls read, what they answer, and what is only text."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from conversations.formats.format import NO_TYPES, ParameterTypes
from conversations.formats.registry import format_named
from conversations.messages import MalformedToolCall, ParsedTurn, ToolCall
from tests.conversations.formats.counted import Counted
from tests.conversations.formats.written_json import JSON_WRITERS
from tests.formats_fuzz import FRAMES, covers_messages

TYPES = ParameterTypes({"look": {}})
KIMI = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
KIMI_CALL = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
V3 = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
V3_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31_CALL = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
OSS_CALL = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"
LFM = "<|tool_call_start|>{}<|tool_call_end|>"


def read(form: str, text: str, *, in_think: bool = False) -> ParsedTurn:
    return format_named(form).parse(text, TYPES, in_think=in_think)


def good(turn: ParsedTurn) -> list[tuple[str, dict[str, object]]]:
    return [(call.name, call.arguments) for call in turn.calls if isinstance(call, ToolCall)]


def bad(turn: ParsedTurn) -> list[MalformedToolCall]:
    return [call for call in turn.calls if isinstance(call, MalformedToolCall)]


WELL_FORMED = [
    ("kimi_k2", "A" + KIMI.format(KIMI_CALL.format("f", 3, '{"x": 1}')) + "B", "AB"),
    ("kimi_k2", KIMI.format("\n" + KIMI_CALL.format("f", 0, '\n{"x": 1}\n') + "\n"), ""),
    ("deepseek_v3", "A\n" + V3.format(V3_CALL.format("f", '{\n  "x": 1\n}')), "A\n"),
    ("deepseek_r1", V3.format(V3_CALL.format("f", '{"x": 1}').replace("```<", "```\n<")), ""),
    ("deepseek_v31", V3.format(V31_CALL.format("f", '{"x": 1}')), ""),
    ("gpt_oss", OSS_CALL.format("f", '{"x": 1}'), ""),
    ("gpt-oss", OSS_CALL.format("f", '{"x": 1}').removesuffix("<|call|>"), ""),
    ("gpt_oss", ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>', ""),
    ("gpt_oss", '<|channel|>analysis to=functions.f code<|message|>{"x": 1}<|call|>', ""),
    ("gpt_oss", '<|channel|>commentary to=functions.f<|message|> {"x": 1} <|call|>', ""),
    ("mistral", 'A[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "123456789"}]', "A"),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"x": 1} B', " B"),
    ("devstral", '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"x": 1}', ""),
    ("lfm2", "A" + LFM.format("[f(x=1)]") + "B", "AB"),
    ("lfm2", LFM.format("[ f( x = 1 , ) , ]"), ""),
    ("llama4_pythonic", "\n[f(x=1)] B", "\n B"),
    ("llama3_json", '{"name": "f", "parameters": {"x": 1}}', ""),
    ("llama3_json", '{"type": "function", "name": "f", "parameters": {"x": 1}}', ""),
    ("llama3_json", ' {"name": "f", "arguments": {"x": 1}} B', "  B"),
    ("llama3_json", 'A <|python_tag|>{"name": "f", "parameters": {"x": 1}}', "A "),
    ("llama3_json", '{"name": "f", "parameters": "{\\"x\\": 1}"}', ""),
    ("xlam", '[{"name": "f", "arguments": {"x": 1}}]\n', "\n"),
    ("granite", 'A<|tool_call|> [{"name": "f", "arguments": {"x": 1}}] B', "A B"),
    ("granite-20b-fc", '<function_call> {"name": "f", "arguments": {"x": 1}}\nB', "\nB"),
    ("phi4_mini", 'functools[{"name": "f", "arguments": {"x": 1}}]', ""),
    ("nemotron_nano", '<TOOLCALL>[{"name": "f", "arguments": {"x": 1}}]</TOOLCALL>B', "B"),
    (
        "apriel",
        'A\n<tool_calls>[{"name": "f", "arguments": {"x": 1}, "id": "1"}]</tool_calls>',
        "A\n",
    ),
    ("apertus", '<|tools_prefix|>[{"f": {"x": 1}}]<|tools_suffix|>', ""),
    ("apertus", '<|tools_prefix|>[{"f": {"x": 1}}]', ""),
    ("minimax_m1", '<tool_calls>\n{"name": "f", "arguments": {"x": 1}}\n</tool_calls>', ""),
    (
        "internlm2",
        '<|action_start|><|plugin|>\n{"name": "f", "parameters": {"x": 1}}<|action_end|>',
        "",
    ),
    (
        "cohere",
        '<|START_ACTION|>[\n{"tool_call_id": "0", "tool_name": "f", "parameters": {"x": 1}}\n]'
        "<|END_ACTION|>",
        "",
    ),
    ("functionary_v31", 'A<function=f> {"x": 1}\n</function>B', "AB"),
    ("functionary_v32", 'f\n{"x": 1}', ""),
    ("functionary", 'all\nA\n>>>f\n{"x": 1}\n', "A\n"),
    ("functionary", 'f\n{"x": 1}>>>all\nB', "B"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "text", "content"),
    WELL_FORMED,
    ids=[f"{form}-{number}" for number, (form, *_) in enumerate(WELL_FORMED)],
)
def test_a_well_formed_call_is_read(form: str, text: str, content: str) -> None:
    turn = read(form, text)
    assert good(turn) == [("f", {"x": 1})]
    assert (turn.content, bad(turn)) == (content, [])


@pytest.mark.parametrize(
    ("form", "text", "ids"),
    [
        ("kimi_k2", KIMI.format(KIMI_CALL.format("f", 12, "{}")), ["functions.f:12"]),
        (
            "mistral",
            '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "a23456789"}]',
            ["a23456789"],
        ),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]a2345[ARGS]{}[TOOL_CALLS]g[ARGS]{}", ["a2345", None]),
        ("cohere", JSON_WRITERS["cohere"]([("f", {}), ("g", {})]), ["0", "1"]),
        ("deepseek_v31", JSON_WRITERS["deepseek_v31"]([("f", {})]), [None]),
        ("granite", '<|tool_call|>[{"name": "f", "arguments": {}, "id": 7}]', [None]),
    ],
)
def test_ids_that_the_model_wrote_are_kept(form: str, text: str, ids: list[str | None]) -> None:
    assert [call.id for call in read(form, text).calls if isinstance(call, ToolCall)] == ids


# ---------------------------------------------------------------------- what is malformed

MALFORMED: list[tuple[str, str, list[str], str, str | None]] = [
    # format, text, names of the good calls, a word of the reason, the name of the malformed call
    ("kimi_k2", KIMI.format(""), [], "no call", None),
    ("kimi_k2", KIMI.format(KIMI_CALL.format("f", 0, '{"x": ')), [], "JSON", "f"),
    ("kimi_k2", KIMI.format(KIMI_CALL.format("f", 0, "[1]")), [], "object", "f"),
    (
        "kimi_k2",
        KIMI.format(KIMI_CALL.format("f", 0, "{}")).replace("functions.", ""),
        [], "functions.NAME", None,
    ),
    ("kimi_k2", KIMI_CALL.format("f", 0, "{}"), [], "behind", None),
    ("kimi_k2", KIMI.format(KIMI_CALL.format("f", 0, "{}"))[:-26], [], "section_end", "f"),
    (
        "kimi_k2",
        KIMI.format(KIMI_CALL.format("f", 0, "{}") + KIMI_CALL.format("g", 1, "{}"))[:-26],
        ["f"], "section_end", "g",
    ),
    (
        "kimi_k2",
        KIMI.format(KIMI_CALL.format("f", 0, "{}") + KIMI_CALL.format("g", 1, "{oops")),
        ["f"], "JSON", "g",
    ),
    (
        "kimi_k2",
        KIMI.format(KIMI_CALL.format("f", 0, "{oops") + KIMI_CALL.format("g", 1, "{}")),
        ["g"], "JSON", "f",
    ),
    (
        "kimi_k2",
        KIMI.format("and " + KIMI_CALL.format("f", 0, "{}")),
        ["f"], "text in the section", None,
    ),
    ("kimi_k2", KIMI.format(KIMI_CALL.format("f", 0, "{} x")), [], "followed by", "f"),
    ("kimi_k2", KIMI.format(KIMI_CALL.format("f", 0, '{"x": NaN}')), [], "NaN", "f"),
    ("kimi_k2", KIMI.format('{"name": "f", "arguments": {}}'), [], "text in the section", None),
    (
        "deepseek_v3",
        V3.format(V3_CALL.format("f", "{}").replace("```json", "")),
        [], "```json", None,
    ),
    ("deepseek_v3", V3.format(V31_CALL.format("f", "{}")), [], "```json", None),
    (
        "deepseek_v3",
        V3.format(V3_CALL.format("f", "{}").replace("```<", "<")),
        [], "followed by", "f",
    ),
    ("deepseek_v3", V3.format(V3_CALL.format("f", "{}"))[:-17], [], "missing", "f"),
    (
        "deepseek_v31",
        V3.format(V31_CALL.format("f", "{}").replace("<｜tool▁sep｜>", "")),
        [], "NAME", None,
    ),
    (
        "deepseek_v31",
        V3.format(V31_CALL.format("f", "{}") + V31_CALL.format("g", "{a}")),
        ["f"], "JSON", "g",
    ),
    ("gpt_oss", OSS_CALL.format("f", '{"x": '), [], "JSON", "f"),
    ("gpt_oss", OSS_CALL.format("f", "[1]"), [], "object", "f"),
    ("gpt_oss", OSS_CALL.format("f", "{} and"), [], "followed by", "f"),
    ("gpt_oss", OSS_CALL.format("f", "{}").replace("<|call|>", "<|end|>"), [], "followed by", "f"),
    ("gpt_oss", "<|channel|>commentary<|message|>{}<|call|>", [], "to=functions", None),
    ("gpt_oss", "<|channel|>commentary to=functions.f <|constrain|>json", [], "missing", None),
    ("gpt_oss", " to=functions.f<|channel|>commentary", [], "missing", None),
    (
        "gpt_oss",
        OSS_CALL.format("f", "{a}") + "<|start|>assistant" + OSS_CALL.format("g", "{}"),
        ["g"], "JSON", "f",
    ),
    ("mistral", "[TOOL_CALLS]", [], "followed by", None),
    ("mistral", "[TOOL_CALLS]f(x=1)", [], "followed by", None),
    ("mistral", "[TOOL_CALLS]f[ARGS]{oops", [], "JSON", "f"),
    ("mistral", "[TOOL_CALLS]f[ARGS]{oops[TOOL_CALLS]g[ARGS]{}", ["g"], "JSON", "f"),
    ("mistral", "[TOOL_CALLS]f[ARGS]7", [], "object", "f"),
    ("mistral", '[TOOL_CALLS][{"name": "f"}', [], "closed", "f"),
    ("mistral", '[TOOL_CALLS][{"name": "f", "args": {}}]', [], "arguments", "f"),
    ("mistral", '[TOOL_CALLS][{"name": "f"}, {"name": "g", oops}]', ["f"], "JSON", "g"),
    ("mistral", "[TOOL_CALLS][]", [], "no call", None),
    ("lfm2", LFM.format("[f(1)]"), [], "named", "f"),
    ("lfm2", LFM.format("[f(x=y)]"), [], "literal", "f"),
    ("lfm2", LFM.format("[f(x=g())]"), [], "literal", "f"),
    ("lfm2", LFM.format("[f(x=1, x=2)]"), [], "twice", "f"),
    ("lfm2", LFM.format("[f(x='print('a')')]"), [], "followed by", "f"),
    ("lfm2", LFM.format("[f(), g(x='it's', y=[h()])]"), ["f"], "followed by", "g"),
    ("lfm2", LFM.format(f"[f(x={'9' * 5000})]"), [], "digits", "f"),
    ("lfm2", LFM.format("[f(x=1e999)]"), [], "range", "f"),
    ("lfm2", LFM.format("f()"), [], "list", None),
    ("lfm2", LFM.format("[f() g()]"), ["f"], "followed by", None),
    ("lfm2", LFM.format("[f()]")[:-10], [], "followed by", "f"),
    ("lfm2", LFM.format("[f(")[:-17] + LFM.format("[g()]"), ["g"], "named", "f"),
    ("lfm2", LFM.format(f"[f(x={'[' * 70}{']' * 70})]"), [], "deep", "f"),
    ("llama4_pythonic", "[f(x=1), g(x=]", ["f"], "literal", "g"),
    ("llama4_pythonic", "[f(x=1)", [], "closed", "f"),
    ("llama4_pythonic", "[look(1)]", [], "named", "look"),
    ("llama3_json", '{"name": "f", "parameters": {oops}', [], "JSON", "f"),
    ("llama3_json", '{"name": "f", "para', [], "JSON", "f"),
    ("llama3_json", '{"type": "function", "function": {', [], "JSON", None),
    ("llama3_json", '{"function": "f", "parameters": {}}', [], "name", None),
    ("llama3_json", '{"name": "look", "query": "x"}', [], "parameters", "look"),
    ("llama3_json", '{"name": "f", "parameters": [1]}', [], "object", "f"),
    ("llama3_json", '{"name": "f", "parameters": {}}; {"name": "g", oops}', ["f"], "JSON", "g"),
    ("llama3_json", "<|python_tag|>print(1)", [], "JSON", None),
    ("llama3_json", '<|python_tag|>x<|python_tag|>{"name": "g"}', ["g"], "JSON", None),
    ("llama3_json", '{"name": "f", "parameters": {"x": ' + "1" * 5000 + "}}", [], "digits", "f"),
    ("json_list", '[{"name": "f", "argum', [], "JSON", "f"),
    ("json_list", '[{"name": "f", "arguments": {}}', [], "closed", "f"),
    ("json_list", '[{"name": "f", "arguments": {}}, 7]', ["f"], "object", None),
    ("granite", '<|tool_call|>{"name": "f"}', [], "list", None),
    (
        "granite",
        '<|tool_call|>[{"name": "f"}, {"name": "g"} {"name": "h"}]',
        ["f", "g"], "followed by", None,
    ),
    ("granite", "<|tool_call|>" * 2 + '[{"name": "f"}]', ["f"], "list", None),
    ("granite", '<|tool_call|>[{"name": "f", "arguments": {"x": "\n"}}]', [], "newline", "f"),
    ("nemotron_nano", '<TOOLCALL>[{"name": "f"}]', [], "</TOOLCALL>", "f"),
    ("nemotron_nano", '<TOOLCALL>[{"name": "f"}]x</TOOLCALL>', [], "</TOOLCALL>", "f"),
    (
        "nemotron_nano",
        '<TOOLCALL>[oops]</TOOLCALL><TOOLCALL>[{"name": "f"}]</TOOLCALL>',
        ["f"], "JSON", None,
    ),
    ("apertus", '<|tools_prefix|>[{"f": {}}] x', [], "suffix", "f"),
    ("apertus", "<|tools_prefix|>[{}]<|tools_suffix|>", [], "one key", None),
    ("apertus", '<|tools_prefix|>[{"": {}}]<|tools_suffix|>', [], "name", None),
    ("apertus", '<|tools_prefix|>[{"f": 1}]<|tools_suffix|>', [], "object", "f"),
    ("minimax_m1", "<tool_calls></tool_calls>", [], "JSON", None),
    ("minimax_m1", '<tool_calls>{"name": "f"}\n{"name": "g"}', ["f"], "</tool_calls>", "g"),
    ("internlm2", '<|action_start|><|plugin|>{"name": "f"}x<|action_end|>', [], "missing", "f"),
    ("phi4_mini", "functools[]", [], "no call", None),
    (
        "cohere",
        '<|START_ACTION|>[{"name": "f", "parameters": {}}]<|END_ACTION|>',
        [], "tool_name", None,
    ),
    ("granite_20b_fc", "<function_call> f()", [], "JSON", None),
    ("functionary_v31", "<function=>{}</function>", [], "name", None),
    (
        "functionary_v31",
        "<function=f>{oops</function><function=g>{}</function>",
        ["g"], "JSON", "f",
    ),
    ("functionary_v31", "<function=g>{}</function><function=f>{}", ["g"], "</function>", "f"),
    ("functionary_v31", "<function=f>[1]</function>", [], "object", "f"),
    ("functionary_v32", "f\n{oops", [], "JSON", "f"),
    ("functionary_v32", "f\n{oops>>>g\n{}", ["g"], "JSON", "f"),
    ("functionary_v32", "g\n{}>>>f\n{} and", ["g"], ">>>", "f"),
    ("functionary_v32", "look\n[1]", [], "object", "look"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "text", "runs", "word", "name"),
    MALFORMED,
    ids=[f"{form}-{number}" for number, (form, *_) in enumerate(MALFORMED)],
)
def test_what_is_malformed_is_answered_and_its_neighbours_run(
    form: str, text: str, runs: list[str], word: str, name: str | None
) -> None:
    turn = read(form, text)
    assert [call for call, _ in good(turn)] == runs
    (answered,) = bad(turn)
    assert word in answered.error
    assert "write " in answered.error
    assert answered.name == name
    assert answered.raw
    assert turn.content == ""


def test_a_number_that_is_too_long_has_a_plain_reason() -> None:
    for form, writer in JSON_WRITERS.items():
        text = writer([("f", {"x": 4242424242})]).replace("4242424242", "1" * 5000)
        (call,) = read(form, text).calls
        assert isinstance(call, MalformedToolCall), form
        assert "digits" in call.error
        assert "sys." not in call.error


def test_half_a_surrogate_pair_is_malformed_in_every_format() -> None:
    for form, writer in JSON_WRITERS.items():
        text = writer([("f", {"x": "MARK"})]).replace("MARK", "\\ud83d")
        (call,) = read(form, text).calls
        assert isinstance(call, MalformedToolCall), form
        assert "surrogate" in call.error


# ---------------------------------------------------------------------- what is only text

TEXT = [
    *((form, "Just text.") for form in JSON_WRITERS),
    *((form, "") for form in JSON_WRITERS),
    ("llama3_json", 'Call it like this: {"name": "look", "parameters": {}}'),
    ("llama3_json", '```json\n{"name": "look", "parameters": {}}\n```'),
    ("llama3_json", '{"answer": 4}'),
    ("llama3_json", '{"name": "Bob", "age": 3}'),
    ("llama3_json", "{x | x > 0}"),
    ("llama3_json", '[{"name": "look", "parameters": {}}]'),
    ("json_list", "[1, 2]"),
    ("json_list", "[]\n"),
    ("json_list", '[{"name": "Bob", "age": 3}]'),
    ("json_list", 'See [{"name": "look", "arguments": {}}]'),
    ("llama4_pythonic", "[1, 2]"),
    ("llama4_pythonic", "[cos(x) + 1]"),
    ("llama4_pythonic", "[link](https://example.org)"),
    ("llama4_pythonic", "I call [look(x=1)]"),
    ("phi4_mini", "functools.partial, functools"),
    ("lfm2", "[look(x=1)]"),
    ("mistral", "[ARGS]{}"),
    ("functionary_v31", "</function> <functional>"),
    ("functionary_v32", "Yes\nand no."),
    ("functionary_v32", "In Python:\n>>> f\n{}\n>>>f(1)\n{1}"),
]


@pytest.mark.parametrize(
    ("form", "text"), TEXT, ids=[f"{form}-{number}" for number, (form, _) in enumerate(TEXT)]
)
def test_what_opens_no_call_is_text(form: str, text: str) -> None:
    assert read(form, text) == ParsedTurn(text)


@pytest.mark.parametrize("form", sorted(set(JSON_WRITERS) - {"gpt_oss", "functionary_v32"}))
def test_a_call_in_a_thought_is_a_thought(form: str) -> None:
    call = JSON_WRITERS[form]([("look", {"x": 1})])
    thought = format_named(form).thought
    open_, close = thought.open, thought.close
    assert read(form, f"{open_}{call}{close} So.") == ParsedTurn(f"{open_}{call}{close} So.")
    assert read(form, f"{open_}{call}") == ParsedTurn(f"{open_}{call}")
    assert read(form, f"{call}{close} So.", in_think=True).calls == ()
    after = read(form, f"{call}{close}\n\n{call}", in_think=True)
    assert good(after) == [("look", {"x": 1})]
    assert after.content == f"{call}{close}\n\n"


# ---------------------------------------------------------------------- gpt-oss: channels


def test_channels_of_gpt_oss_are_reasoning_content_and_calls() -> None:
    turn = read(
        "gpt_oss",
        "<|channel|>analysis<|message|>Hm.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
        + OSS_CALL.format("look", '{"x": "<|end|>"}'),
    )
    assert (turn.reasoning, turn.content) == ("Hm.", "I look.")
    assert good(turn) == [("look", {"x": "<|end|>"})]
    assert turn.calls[0].raw.startswith("<|start|>assistant<|channel|>commentary to=")


def test_a_final_answer_of_gpt_oss_is_content() -> None:
    final = "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>analysis<|message|>"
    turn = read("gpt_oss", final + "B<|end|><|start|>assistant<|channel|>final<|message|> 42 \n")
    assert (turn.reasoning, turn.content, turn.calls) == ("A\nB", " 42 \n", ())


def test_what_a_parser_of_gpt_oss_would_lose_is_seen() -> None:
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    final = "<|start|>assistant<|channel|>final<|message|>So."
    text = thought + OSS_CALL.format("f", "{}") + final
    turn = read("gpt_oss", text)
    assert covers_messages(text, turn, FRAMES["gpt_oss"])
    losses: list[dict[str, Any]]
    losses = [{"content": ""}, {"reasoning": None}, {"calls": ()}, {"content": "So. So."}]
    for lost in losses:
        assert not covers_messages(text, dataclasses.replace(turn, **lost), FRAMES["gpt_oss"])


def test_a_recipient_without_functions_keeps_its_whole_name() -> None:
    turn = read("gpt_oss", "<|channel|>commentary to=browser.search<|message|>{}<|call|>")
    assert good(turn) == [("browser.search", {})]


# ---------------------------------------------------------------------- cut off, and in order


@pytest.mark.parametrize("form", sorted(JSON_WRITERS))
def test_a_call_that_was_cut_off_never_runs(form: str) -> None:
    calls: list[tuple[str, dict[str, object]]] = [("look", {"x": [1, {"y": "a"}]})]
    text = JSON_WRITERS[form](calls)
    end_token = {"gpt_oss": "<|call|>", "apertus": "<|tools_suffix|>"}.get(form, "")
    needed = len(text.removesuffix(end_token))  # an end token is no part of a turn
    for end in range(needed):
        assert good(read(form, text[:end])) == [], text[:end]
    assert good(read(form, text[:needed])) == calls


@pytest.mark.parametrize("form", sorted(JSON_WRITERS))
def test_calls_come_in_order_and_their_blocks_cover_the_text(form: str) -> None:
    calls: list[tuple[str, dict[str, object]]]
    calls = [("f", {"x": 1}), ("g", {}), ("look", {"y": "]}"})]
    text = JSON_WRITERS[form](calls)
    turn = read(form, text)
    assert good(turn) == calls
    assert "".join(call.raw for call in turn.calls) == text


def test_names_of_tools_need_not_be_known() -> None:
    for form, writer in JSON_WRITERS.items():
        turn = format_named(form).parse(writer([("f", {"x": 1})]), NO_TYPES)
        assert good(turn) == [("f", {"x": 1})], form


# ---------------------------------------------------------------------- linear time


def _hostile(form: str) -> list[str]:
    """Units that open something, cut at every place of a call."""
    call = JSON_WRITERS[form]([("look", {"a": '"'})])
    cuts = [call[:end] for end in range(1, len(call) + 1, 3)]
    return [*cuts, call + "x", "<think>", "{", "[", '"', "\\", " ", '[{"name": "f"}, ']


@pytest.mark.parametrize("form", sorted(JSON_WRITERS))
def test_work_grows_with_the_text_not_with_its_square(form: str) -> None:
    def work(text: str) -> int:
        counted = Counted(text)
        read(form, counted)
        return counted.work

    units = _hostile(form)
    for unit in units[::3]:
        for opener in ("", units[9], units[-8]):
            small, large = work(opener + unit * 50), work(opener + unit * 400)
            assert large <= 8 * small * 1.5 + 8192, (opener, unit)  # a square would be 64 times


@pytest.mark.parametrize("form", sorted(JSON_WRITERS))
def test_a_million_characters_are_read(form: str) -> None:
    for unit in _hostile(form)[3::17]:
        read(form, unit * (1_000_000 // len(unit)))  # would take hours if time were not linear
