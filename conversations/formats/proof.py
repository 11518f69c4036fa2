"""Which call format a model writes: proven by its own chat template, not believed.

The template renders probe calls: nested values, newlines, quotes, numbers, unicode, no arguments,
two at once, text before them, a thought before them. A format is proven if it gives exactly these
calls back, in order, and their ids if it reads ids. Probes that the template refuses (two calls at
once, say) prove nothing and are left out.

A template that never prints a call can only teach a format in words: it is proven by its text if
exactly one format's own words all stand in the prompt with tools (`CallFormat.taught_by`).

Two formats that are both proven are the same to this model if they also agree about every piece of
the probes that is cut off in its midst; then the earlier one in the registry is taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conversations.formats.format import CallFormat, ParameterTypes
from conversations.messages import ToolCall

_STRING = 'a "quoted" back\\slash, it\'s C:\\new,\n  an indented line, <b>&amp; é漢🙂'

PROBE_PARAMETERS: dict[str, dict[str, Any]] = {
    "look_up": {
        "query": {"type": "string"},
        "limit": {"type": "integer"},
        "share": {"type": "number"},
        "exact": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object"},
    },
    "list_all": {},
}
"""The probe tools and the schemas of their parameters."""

Call = tuple[str, dict[str, Any]]
"""(name, arguments)."""

_FULL: Call = (
    "look_up",
    {
        "query": _STRING,
        "limit": 7,
        "share": -0.5,
        "exact": True,
        "tags": ["a", "b c"],
        "where": {"x": {"y": [1, None, "z\n"]}, "on": False},
    },
)
_PLAIN: Call = ("look_up", {"query": "42", "limit": 1})
_EMPTY: Call = ("list_all", {})


@dataclass(frozen=True, slots=True)
class Probe:
    """An assistant turn that the template is asked to write."""

    calls: tuple[Call, ...]
    content: str = ""
    thought: str | None = None


PROBES = (
    Probe((_FULL,)),
    Probe((_PLAIN,)),
    Probe((_EMPTY,)),
    Probe((_EMPTY, _FULL)),
    Probe((_PLAIN,), content="Let me see."),
    Probe((_PLAIN,), thought="I look it up."),
)


@dataclass(frozen=True, slots=True)
class WrittenTurn:
    """What the template wrote for a probe: its text without the end token, its calls' ids, and the
    prompt before it. `is_cut`: an end token stands before its calls.
    """

    probe: Probe
    text: str
    ids: tuple[str, ...] = ()
    prompt: str = ""
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class FormatReport:
    """The call format of a model. `name` is None if none could be chosen, and `problem` says why.

    `how` is "by its calls", "by its text" or "not proven".
    """

    name: str | None
    how: str
    problem: str = ""

    @property
    def is_proven(self) -> bool:
        return self.how != NOT_PROVEN


BY_CALLS, BY_TEXT, NOT_PROVEN = "by its calls", "by its text", "not proven"


_TYPES = ParameterTypes(PROBE_PARAMETERS)

_LOSSY = {
    "]<]minimax[>[<invoke": "MiniMax-M3 writes nested values without their types, and no null",
}
"""What calls that lose values look like, and what they lose."""


@dataclass(frozen=True, slots=True)
class Written:
    """All that a template wrote: turns with calls, and the prompt that teaches the tools."""

    turns: Sequence[WrittenTurn] = ()
    prompt: str = ""
    types: ParameterTypes = _TYPES

    @property
    def prints_calls(self) -> bool:
        return any("look_up" in turn.text for turn in self.turns)


def choose_format(formats: Sequence[CallFormat], written: Written) -> FormatReport:
    """The one format of `formats` that the template writes."""
    if not written.prints_calls:
        return _taught(formats, written)
    if (cut := next((turn for turn in written.turns if turn.is_cut), None)) is not None:
        problem = f"the chat template ends {_shown(cut.text)} with an end token before the call"
        return FormatReport(None, NOT_PROVEN, f"{problem}: an engine stops there")
    proven = [form for form in formats if not failure(form, written)]
    if not proven:
        return FormatReport(None, NOT_PROVEN, _unread(formats, written))
    for other in proven[1:]:
        if (text := _disagreement(proven[0], other, written)) is not None:
            problem = (
                f"both {proven[0].name} and {other.name} read its calls back, but they differ "
                f"about {_shown(text)}; name one of them in rollout.multi_turn.format"
            )
            return FormatReport(None, NOT_PROVEN, problem)
    return FormatReport(proven[0].name, BY_CALLS)


def prove_named(form: CallFormat, formats: Sequence[CallFormat], written: Written) -> FormatReport:
    """The proof of a format that was named by the user."""
    if not written.prints_calls:
        taught = _taught(formats, written)
        if taught.name == form.name:
            return taught
        return FormatReport(form.name, NOT_PROVEN, taught.problem or _teaches(taught.name))
    problem = failure(form, written)
    if not problem:
        return FormatReport(form.name, BY_CALLS)
    others = choose_format(formats, written).name
    hint = f"; its format is {others}" if others else ""
    return FormatReport(form.name, NOT_PROVEN, problem + hint)


def _teaches(name: str | None) -> str:
    return f"the chat template teaches {name}"


def failure(form: CallFormat, written: Written) -> str:
    """Empty if the format reads all that the template wrote; else what it makes of one turn."""
    for turn in written.turns:
        if (difference := _difference(form, turn, written.types)) is not None:
            return f"the chat template writes {_shown(turn.text)}, which {form.name} {difference}"
    return ""


def _difference(form: CallFormat, turn: WrittenTurn, types: ParameterTypes) -> str | None:
    parsed = form.parse(turn.text, types, in_think=form.thought.is_open(turn.prompt))
    calls = [call for call in parsed.calls if isinstance(call, ToolCall)]
    malformed = next((call.error for call in parsed.calls if not isinstance(call, ToolCall)), None)
    if malformed is not None:
        return f"finds malformed: {' '.join(malformed.split())[:120]}"
    if not calls:
        return "reads as text"
    found = [(call.name, _canonical(call.arguments)) for call in calls]
    if found != [(name, _canonical(arguments)) for name, arguments in turn.probe.calls]:
        return f"reads as {_shown(str(found))}"
    ids = [call.id for call in calls if call.id is not None]
    if ids and turn.ids and ids != list(turn.ids):
        return f"gives the ids {ids}"
    said = parsed.content + (parsed.reasoning or "")
    if any(text in turn.text and text not in said for text in (turn.probe.content,)):
        return "reads without the text before it"
    return None


def _canonical(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, sort_keys=True)  # 1, 1.0 and True differ


def _disagreement(one: CallFormat, other: CallFormat, written: Written) -> str | None:
    """A text, cut out of what the template wrote, in which the two do not find the same calls."""
    for text in _pieces(written):
        if _summary(one, text, written.types) != _summary(other, text, written.types):
            return text
    return None


def _pieces(written: Written) -> Iterator[str]:
    """Beginnings of the turns, some 30 of each."""
    for turn in written.turns[:4]:
        step = max(1, len(turn.text) // 30)
        for end in range(0, len(turn.text) + 1, step):
            yield turn.text[:end]


def _summary(form: CallFormat, text: str, types: ParameterTypes) -> list[object]:
    return [
        (call.name, _canonical(call.arguments)) if isinstance(call, ToolCall) else None
        for call in form.parse(text, types).calls
    ]


def _taught(formats: Sequence[CallFormat], written: Written) -> FormatReport:
    taught = [
        form.name
        for form in formats
        if form.taught_by and all(piece in written.prompt for piece in form.taught_by)
    ]
    if len(taught) == 1:
        return FormatReport(taught[0], BY_TEXT)
    which = f"teaches {' and '.join(taught)}" if taught else "teaches no call format"
    problem = (
        f"the chat template prints no tool calls and {which}; name the format in "
        "rollout.multi_turn.format and set rollout.turntrace.format_unproven: true"
    )
    return FormatReport(None, NOT_PROVEN, problem)


def _unread(formats: Sequence[CallFormat], written: Written) -> str:
    """What the template wrote that the format which reads most of it does not read."""
    for mark, why in _LOSSY.items():
        if any(mark in turn.text for turn in written.turns):
            return f"the chat template's calls cannot be read back: {why}"
    nearest = max(formats, key=lambda form: _count_read(form, written))
    if _count_read(nearest, written):
        return failure(nearest, written)
    plain = min(written.turns, key=lambda turn: len(turn.text))
    return f"the chat template writes {_shown(plain.text)}, which no known format reads"


def _count_read(form: CallFormat, written: Written) -> int:
    return sum(_difference(form, turn, written.types) is None for turn in written.turns)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 160 else f"{text[:80]}...{text[-70:]}")
