"""Gemma's calls: where a string ends, what is malformed and why, and that no text takes long."""

from __future__ import annotations

import re
from typing import Any

import pytest

from conversations.formats import functiongemma, gemma4
from conversations.formats.call_braces import BraceTokens
from conversations.formats.format import NO_TYPES
from conversations.formats.registry import format_named
from conversations.messages import MalformedToolCall, ParsedTurn, ToolCall
from tests.conversations.formats.written import WRITERS

TOKENS = {"gemma4": gemma4.TOKENS, "functiongemma": functiongemma.TOKENS}
NAMES = sorted(TOKENS)
STRINGS = (
    *("Rome", "", " ", "\n", "42", "true", "}", "]", ",", "a:", "{a:1}", '"', "'", "é漢🙂"),
    *("a, b", "x}y", "<tool_call|>", "<end_function_call>", "<think>", "def f():\n    return 1\n"),
)


def read(name: str, text: str) -> ParsedTurn:
    return format_named(name).parse(text, NO_TYPES)


def good(turn: ParsedTurn) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in turn.calls if isinstance(call, ToolCall)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", STRINGS)
def test_a_string_comes_back_to_the_letter(name: str, text: str) -> None:
    for arguments in ({"x": text}, {"x": [text, {"y": text}], "z": 1}):
        assert good(read(name, WRITERS[name]([("f", arguments)]))) == [("f", arguments)]


@pytest.mark.parametrize("name", NAMES)
def test_quote_tokens_inside_a_string_belong_to_it(name: str) -> None:
    tokens = TOKENS[name]
    inside = f"a{tokens.quote}b {tokens.open}call:g{{}}{tokens.close}"
    calls = [("f", {"x": inside, "y": "z"})]
    assert good(read(name, WRITERS[name](calls))) == calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("written", "value"),
    [
        *(("1", 1), ("-2.5e3", -2500.0), ("true", True), ("False", False), ("null", None)),
        *(("None", None), ("[]", []), ("[1,[2]]", [1, [2]]), ("{}", {}), ("{k:1}", {"k": 1})),
        *(("{k:{l:[1]}}", {"k": {"l": [1]}}), (" 1 ", 1), ("[ 1 , 2 ]", [1, 2])),
    ],
)
def test_values_without_quotes(name: str, written: str, value: object) -> None:
    tokens = TOKENS[name]
    turn = read(name, f"{tokens.open}call:f{{x:{written}}}{tokens.close}")
    assert good(turn) == [("f", {"x": value})]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_malformed_and_what_the_model_is_told(name: str) -> None:
    tokens = TOKENS[name]
    whole = f"{tokens.open}call:look{{x:{tokens.quote}a{tokens.quote}}}{tokens.close}"
    cases = {
        "": "expected call:NAME",
        '{"name": "look"}': "expected call:NAME",
        "look{x:1}": "expected call:NAME",
        "call:look": "expected call:NAME",
        f"call:look{{x:{tokens.quote}a}}": "not closed",
        "call:look{x:a}": "expected a value",
        "call:look{x:NaN}": "expected a value",
        "call:look{x:1e999}": "out of range",
        f"call:look{{x:{'9' * 5000}}}": "digits",
        "call:look{x:1,x:2}": "twice",
        "call:look{x 1}": "expected ':'",
        "call:look{x:1 y:2}": "expected ','",
        "call:look{x:[1}": "expected ','",
        "call:look{x:1": "expected ','",
        f"call:look{{x:{'[' * 100}": "nested",
        "call:look{x:1} and": f"expected {tokens.close}",
    }
    for body, reason in cases.items():
        text = f"{tokens.open}{body}{tokens.close}"
        turn = read(name, f"One.{text}Two.{whole}")
        bad, fine = turn.calls
        assert isinstance(bad, MalformedToolCall), body
        assert (bad.raw, turn.content) == (text, "One.Two."), body
        assert reason in bad.error
        assert tokens.example in bad.error
        assert bad.name == ("look" if body.startswith("call:look{") else None)
        assert good(turn) == [("look", {"x": "a"})]
        assert isinstance(fine, ToolCall)


@pytest.mark.parametrize("name", NAMES)
def test_a_string_that_was_not_closed_does_not_take_the_next_call(name: str) -> None:
    tokens = TOKENS[name]
    unclosed = f"{tokens.open}call:f{{x:{tokens.quote}a}}{tokens.close}"
    after = WRITERS[name]([("g", {"y": "b", "z": [1]})])
    assert good(read(name, unclosed + after)) == [("g", {"y": "b", "z": [1]})]
    assert len(read(name, unclosed * 3 + after).calls) == 4


def hostile_units(tokens: BraceTokens) -> list[str]:
    open_, close, quote, _ = (tokens.open, tokens.close, tokens.quote, tokens.thought)
    return [
        *(open_, close, quote, f"{open_}call:f{{", f"{open_}call:f{{a:{quote}", f"{quote} ", ": "),
        *(
            f"{open_}call:f{{a: {quote}x",
            f"{open_}call:f{{a:[",
            "[",
            "a:",
            f"{quote},",
            f":{quote}",
        ),
        *(f"{open_}call:f{{a:{quote}x{quote}}}{close}", f"{open_}call:f{{a:1,}}", " ", "{a:"),
        *(f"{open_}call:f{{a:{quote}x{quote},b:{quote}", tokens.thought.open, "call:f{"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_long_hostile_text_parses(name: str) -> None:
    tokens = TOKENS[name]
    for unit in hostile_units(tokens):
        for before in ("", f"{tokens.open}call:f{{a:{tokens.quote}"):
            text = before + unit * (200_000 // len(unit))  # a square would take many minutes
            assert len(read(name, text).content) <= len(text)


@pytest.mark.parametrize("name", NAMES)
def test_quote_tokens_are_looked_for_once_a_turn(name: str) -> None:
    tokens = TOKENS[name]
    whole = WRITERS[name]([("f", {"x": "a", "y": ["b", "c"]})])
    assert len(re.findall(re.escape(tokens.quote), whole)) == 6
    assert len(read(name, whole * 2000).calls) == 2000
