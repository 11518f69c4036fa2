"""Reads sampled turns: chooses the call format that the template proves, and applies it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conversations.errors import CallFormatError, TemplateError
from conversations.formats import proof
from conversations.formats.blocks import THINK, Thought
from conversations.formats.format import NO_TYPES, CallFormat, ParameterTypes
from conversations.formats.proof import PROBE_PARAMETERS, FormatReport, Probe, Written, WrittenTurn
from conversations.formats.registry import FORMATS, format_named
from conversations.formats.thinking import with_calls_of_thought, without_thought
from conversations.messages import Message, ParsedTurn
from conversations.template.probing import probe_call, tool_schema, user
from conversations.template.renderer import Renderer

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Reading:
    """How a run reads sampled turns.

    `format` is a call format's name, or "auto" for the one that the template proves. `unproven`
    takes the named format without proof. `calls_in_thoughts`: calls inside a thought are run.
    """

    format: str = AUTO
    unproven: bool = False
    calls_in_thoughts: bool = False


class Reader:
    """Reads turns of one template. `ends` are the texts of its end tokens.

    The format is proven when it is first asked for. Raises CallFormatError then.
    """

    def __init__(self, renderer: Renderer, ends: Collection[str], reading: Reading) -> None:
        self._renderer = renderer
        self._ends = ends
        self.reading = reading

    def read(
        self,
        raw: str,
        tools: Sequence[Mapping[str, Any]],
        *,
        in_think: bool,
        split_thought: bool = True,
    ) -> ParsedTurn:
        """What a turn says. `in_think`: its generation prompt opened a thought. Without
        `split_thought` its thought stays in the content.
        """
        if not tools:
            parsed = ParsedTurn(raw)
        else:
            form = self.form
            types = ParameterTypes.of(tools) if form.is_typed else NO_TYPES
            if self.reading.calls_in_thoughts:
                parsed = with_calls_of_thought(form, raw, types, in_think=in_think)
            else:
                parsed = form.parse(raw, types, in_think=in_think)
        if not split_thought:
            return parsed
        return without_thought(parsed, self.thought, in_think=in_think)

    # ------------------------------------------------------------------ the format

    @functools.cached_property
    def thought(self) -> Thought:
        """The tags of the model's thoughts: those of its call format, if it has one."""
        try:
            return self.form.thought
        except CallFormatError:
            return THINK

    @functools.cached_property
    def form(self) -> CallFormat:
        """The run's call format. Raises CallFormatError if it is unknown or not proven."""
        chosen = self.reading.format
        if chosen != AUTO and self.reading.unproven:
            return format_named(chosen)
        report = self.report
        if report.name is None or not report.is_proven:
            name = self._renderer.name
            which = f"no call format is proven for {name}"
            if chosen != AUTO:
                which = f"rollout.multi_turn.format: {chosen} is not proven for {name}"
            raise CallFormatError(f"{which}: {report.problem}{self._advice(report)}")
        return format_named(report.name)

    def _advice(self, report: FormatReport) -> str:
        if "rollout." in report.problem:
            return ""
        return (
            "; use another chat_template, or name the format in rollout.multi_turn.format and set "
            "rollout.turntrace.format_unproven: true"
        )

    @functools.cached_property
    def report(self) -> FormatReport:
        """The proof, whatever comes of it. Raises CallFormatError for an unknown name."""
        if self.reading.format == AUTO:
            return proof.choose_format(FORMATS, self.written)
        return proof.prove_named(format_named(self.reading.format), FORMATS, self.written)

    @functools.cached_property
    def written(self) -> Written:
        """What the template writes for the probes."""
        tools = [tool_schema(name, schema) for name, schema in PROBE_PARAMETERS.items()]
        asked = [user("u")]
        try:
            prompt = self._renderer.whole(asked, tools, generation=True)
        except TemplateError:
            return Written()
        turns = [self.written_turn(probe, asked, prompt, tools) for probe in proof.PROBES]
        return Written([turn for turn in turns if turn is not None], prompt)

    def _turn_start(self, prompt: str, whole: str) -> int:
        """Where the assistant's turn begins: behind the generation prompt, or what history has of
        it.
        """
        if whole.startswith(prompt):
            return len(prompt)
        shared = whole[: self._renderer.common_length(prompt, whole)]
        ends = [token.end() for token in self._renderer.specials(shared)]
        return max([shared.rfind("\n") + 1, *ends])

    def written_turn(
        self, probe: Probe, asked: list[Message], prompt: str, tools: list[dict[str, Any]]
    ) -> WrittenTurn | None:
        """What the template writes for a turn behind `prompt`; None if it refuses it, or leaves out
        a call.
        """
        calls = [
            probe_call(name, f"functions.{name}:{index}", arguments)
            for index, (name, arguments) in enumerate(probe.calls)
        ]
        turn: Message = {"role": "assistant", "content": probe.content, "tool_calls": calls}
        if probe.thought is not None:
            turn["reasoning_content"] = probe.thought
        try:
            whole = self._renderer.whole([*asked, turn], tools, generation=False)
        except TemplateError:
            return None
        start = self._turn_start(prompt, whole)
        opened, text = whole[:start], whole[start:]
        ends = [place for end in self._ends if (place := text.find(end)) >= 0]
        if not all(name in text for name, _ in probe.calls):  # it drops calls beside text, say
            return None
        text = text[: min(ends)] if ends else text
        if not all(name in text for name, _ in probe.calls):
            return WrittenTurn(probe, text, prompt=opened, is_cut=True)
        ids = tuple(
            str(call["id"]) for call in self._renderer.dialect.view([turn])[0]["tool_calls"]
        )
        return WrittenTurn(
            probe,
            text,
            ids if all(call_id in text for call_id in ids) else (),
            opened,
        )
