"""The proof of a call format: what is taken, what is refused, and what the refusal shows."""

from __future__ import annotations

import json

import pytest

from conversations.formats.format import CallFormat, ParameterTypes
from conversations.formats.proof import (
    BY_CALLS,
    BY_TEXT,
    NOT_PROVEN,
    PROBES,
    Written,
    WrittenTurn,
    choose_format,
    failure,
    prove_named,
)
from conversations.formats.registry import FORMATS, format_named
from conversations.messages import ParsedTurn, ToolCall

HERMES = format_named("hermes")


def as_hermes(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def written(call: object = as_hermes, prompt: str = "") -> Written:
    """What a template would write that prints calls as `call` does."""
    turns = [
        WrittenTurn(
            probe,
            (f"<think>{probe.thought}</think>" if probe.thought else "")
            + probe.content
            + "\n".join(call(*one) for one in probe.calls),  # type: ignore[operator]
        )
        for probe in PROBES
    ]
    return Written(turns, prompt)


def renamed(form: CallFormat, name: str, **fields: object) -> CallFormat:
    return CallFormat(name, form.parse, **fields)  # type: ignore[arg-type]


def test_the_format_that_gives_the_calls_back_is_taken() -> None:
    report = choose_format(FORMATS, written())
    assert (report.name, report.how, report.problem) == ("hermes", BY_CALLS, "")
    assert prove_named(HERMES, FORMATS, written()).is_proven


def test_a_format_that_the_template_does_not_write_fails_and_the_right_one_is_named() -> None:
    report = prove_named(format_named("glm45"), FORMATS, written())
    assert not report.is_proven
    assert "hermes" in report.problem


@pytest.mark.parametrize("lost", ["arguments", "order", "value", "type"])
def test_what_comes_back_otherwise_is_no_proof(lost: str) -> None:
    def parse(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
        parsed = HERMES.parse(raw, types, in_think=in_think)
        calls = [call for call in parsed.calls if isinstance(call, ToolCall)]
        changed = {
            "arguments": [ToolCall(call.name, {}, call.raw) for call in calls],
            "order": calls[::-1],
            "value": [ToolCall(c.name, {**c.arguments, "query": "x"}, c.raw) for c in calls],
            "type": [
                ToolCall(c.name, {k: float(v) if v == 7 else v for k, v in c.arguments.items()}, "")
                for c in calls
            ],
        }[lost]
        return ParsedTurn(parsed.content, tuple(changed))

    assert failure(CallFormat("lossy", parse), written())
    assert choose_format([CallFormat("lossy", parse)], written()).how == NOT_PROVEN


def test_an_id_that_the_template_prints_must_come_back() -> None:
    def parse(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
        parsed = HERMES.parse(raw, types)
        calls = [
            ToolCall(call.name, call.arguments, call.raw, id="mine")
            for call in parsed.calls
            if isinstance(call, ToolCall)
        ]
        return ParsedTurn(parsed.content, tuple(calls))

    turn = WrittenTurn(PROBES[1], as_hermes(*PROBES[1].calls[0]), ids=("theirs",))
    assert "ids" in failure(CallFormat("ids", parse), Written([turn]))


def test_two_formats_that_agree_about_all_are_one_to_the_model() -> None:
    report = choose_format([HERMES, renamed(HERMES, "again")], written())
    assert report.name == "hermes"


def test_two_formats_that_disagree_are_both_named() -> None:
    def parse(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
        parsed = HERMES.parse(raw, types, in_think=in_think)
        return ParsedTurn(raw, tuple(c for c in parsed.calls if isinstance(c, ToolCall)))

    report = choose_format([HERMES, CallFormat("lenient", parse)], written())
    assert report.name is None
    assert "hermes" in report.problem
    assert "lenient" in report.problem


def test_what_no_format_reads_is_shown() -> None:
    report = choose_format(
        FORMATS, written(lambda name, arguments: f"<act>{name} {arguments}</act>")
    )
    assert report.name is None
    assert "<act>list_all" in report.problem


@pytest.mark.parametrize(
    ("prompt", "name", "how"),
    [
        ("Write <a> and </a>.", "one", BY_TEXT),
        ("Write nothing.", None, NOT_PROVEN),
        ("Write <a>, </a> or <b>.", None, NOT_PROVEN),
    ],
)
def test_a_template_that_prints_no_calls_is_taken_at_its_word_if_it_is_one_word(
    prompt: str, name: str | None, how: str
) -> None:
    forms = [
        renamed(HERMES, "one", taught_by=("<a>", "</a>")),
        renamed(HERMES, "two", taught_by=("<b>",)),
        renamed(HERMES, "silent"),
    ]
    report = choose_format(forms, Written([], prompt))
    assert (report.name, report.how) == (name, how)
    assert ("format_unproven" in report.problem) == (name is None)


def test_a_thought_that_ends_with_an_end_token_is_refused() -> None:
    whole = written()
    cut = WrittenTurn(PROBES[-1], "<think>I look it up.", is_cut=True)
    report = choose_format(FORMATS, Written([*whole.turns[:-1], cut]))
    assert (report.name, report.is_proven) == (None, False)
    assert "stops there" in report.problem


def test_calls_that_lose_values_are_refused_by_name() -> None:
    turn = ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="{}">]<]minimax[>[</invoke>'
    report = choose_format(FORMATS, written(lambda name, arguments: turn.format(name)))
    assert (report.name, report.is_proven) == (None, False)
    assert "MiniMax-M3" in report.problem


def test_texts_that_are_not_escaped_are_refused() -> None:
    """As LFM2.5's older templates write them: a quote or a backslash in a text changes the call."""

    def unescaped(name: str, arguments: dict[str, object]) -> str:
        values = [
            f"{key}='{value}'" if isinstance(value, str) else f"{key}={json.dumps(value)}"
            for key, value in arguments.items()
        ]
        return f"<|tool_call_start|>[{name}({', '.join(values)})]<|tool_call_end|>"

    report = choose_format(FORMATS, written(unescaped))
    assert (report.name, report.is_proven) == (None, False)
    assert "lfm2" in report.problem
