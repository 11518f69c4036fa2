"""Calls between tokens of their own, in one section of the turn.

| format | models | a call in its section |
|---|---|---|
| kimi_k2 | Kimi-K2, K2.5 | `functions.NAME:0<|tool_call_argument_begin|>{...}` |
| deepseek_v3 | DeepSeek-V3, R1 | `function<｜tool▁sep｜>NAME`, a fenced `json` block |
| deepseek_v31 | DeepSeek-V3.1 | `NAME<｜tool▁sep｜>{...}` |

What stands before and behind a section is content. The JSON decides where a call ends: a token that
is spelled inside a string belongs to the string.

| malformed | the model is told |
|---|---|
| another head than the format's | the form of a call |
| JSON that cannot be read, arguments that are no object | what is wrong, at which character |
| a call without its end token | that it is missing |
| other text between calls | that it is not a call |
| a section without its end token: its last call was not finished | that it is missing |
| a section without a call, a call without a section | that |
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from conversations.formats.blocks import THINK, Call, opening, read_turn
from conversations.formats.call_list import BlockRun, UnreadableError, json_call
from conversations.formats.format import CallFormat, ParameterTypes
from conversations.formats.json_values import JsonReader, checked_call
from conversations.messages import ParsedTurn


@dataclass(frozen=True, slots=True)
class SectionTokens:
    """The tokens around a section and around each call in it."""

    section: str
    section_end: str
    call: str
    call_end: str


class Sections:
    """Reads calls in sections. `head` names a call before its JSON, `tail` stands behind it."""

    def __init__(self, tokens: SectionTokens, head: str, tail: str, shape: str) -> None:
        self._tokens, self._shape = tokens, shape
        self._hint = f"write {tokens.section}{tokens.call}{shape}{tokens.call_end}"
        self._hint += tokens.section_end
        names = (tokens.section, tokens.section_end, tokens.call, tokens.call_end)
        self._token = re.compile("|".join(map(re.escape, names)))
        self._opens = opening(THINK, re.escape(tokens.section), re.escape(tokens.call))
        self._head = re.compile(head)
        self._tail = re.compile(tail + re.escape(tokens.call_end))

    def parse(self, raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
        """The calls and the remaining content of one assistant turn."""

        def block(start: int, calls: list[Call]) -> int:
            run = BlockRun(raw, start, calls, self._hint)
            if raw.startswith(self._tokens.section, start):
                return self._section(raw, run, start + len(self._tokens.section))
            end = self._after(raw, start + len(self._tokens.call))
            run.add_malformed(f"a call must stand behind {self._tokens.section}", end)
            return end

        return read_turn(raw, self._opens, THINK, in_think, block)

    def _section(self, text: str, run: BlockRun, position: int) -> int:
        """Reads up to the section's end; returns where the text goes on."""
        while (token := self._token.search(text, position)) is not None:
            if token.group() == self._tokens.section:
                break
            if text[position : token.start()].strip():
                run.add_malformed("text in the section is not a call", token.start())
            position = token.end()
            if token.group() == self._tokens.section_end:
                run.close(position, "the section holds no call")
                return run.end
            if token.group() == self._tokens.call:
                position = self._call(text, run, position)
        end = token.start() if token else len(text)
        run.leave_open(end, f"{self._tokens.section_end} is missing")
        return run.end

    def _call(self, text: str, run: BlockRun, position: int) -> int:
        """Reads the call whose head begins at a position."""
        head = self._head.match(text, position)
        try:
            if head is None:
                raise UnreadableError(f"a call must be written {self._shape}")
            groups = head.groupdict()

            def read(value: object, block: str) -> Call:
                return checked_call(groups["name"], value, block, self._hint, groups.get("id"))

            reader = JsonReader(text, head.end(), self._token)
            call, end = json_call(reader, text, read, head.end())
            tail = self._tail.match(text, end)
            if tail is None:
                raise UnreadableError(f"the JSON is not followed by {self._tokens.call_end}")
            run.add(call, tail.end())
        except UnreadableError as error:
            error.name = head["name"] if head else None
            run.add_unreadable(error, self._after(text, position))
        return run.end

    def _after(self, text: str, position: int) -> int:
        """Where a call ends that cannot be read: behind its end token, or before another token."""
        token = self._token.search(text, position)
        if token is None:
            return len(text)
        return token.end() if token.group() == self._tokens.call_end else token.start()


_WORD = r"[^\s<]{1,200}"
_KIMI = SectionTokens(
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
)
_KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"
_DEEPSEEK = SectionTokens(
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
)
_SEPARATOR = "<｜tool▁sep｜>"

KIMI_K2 = CallFormat(
    "kimi_k2",
    Sections(
        _KIMI,
        rf"\s*(?P<id>functions\.(?P<name>{_WORD}):\d{{1,9}})\s*{re.escape(_KIMI_ARGUMENTS)}\s*",
        r"\s*",
        f"functions.NAME:INDEX{_KIMI_ARGUMENTS}{{...}}",
    ).parse,
    is_typed=False,
)
DEEPSEEK_V3 = CallFormat(
    "deepseek_v3",
    Sections(
        _DEEPSEEK,
        rf"\s*function{_SEPARATOR}(?P<name>{_WORD})\s*```json\s*",
        r"\s*```\s*",
        f"function{_SEPARATOR}NAME\n```json\n{{...}}\n```",
    ).parse,
    aliases=("deepseekv3", "deepseek_r1"),
    is_typed=False,
)
DEEPSEEK_V31 = CallFormat(
    "deepseek_v31",
    Sections(
        _DEEPSEEK,
        rf"\s*(?P<name>{_WORD})\s*{_SEPARATOR}\s*",
        r"\s*",
        f"NAME{_SEPARATOR}{{...}}",
    ).parse,
    aliases=("deepseekv31",),
    is_typed=False,
)
