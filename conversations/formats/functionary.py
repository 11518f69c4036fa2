"""Functionary: a name, then the arguments as JSON.

| format | models | a call |
|---|---|---|
| functionary_v31 | Functionary 3.1, Llama 3.1's own tools | `<function=NAME>{...}</function>` |
| functionary_v32 | Functionary 3.2 | `>>>NAME`, a newline, `{...}` |

In v3.2 a turn is a row of messages, each with a recipient; the prompt writes the first `>>>`. What
is addressed to `all` is content, its header is not. A header is a recipient alone in its line that
is `all` or an offered tool, or that `{` follows; other lines are text.

| malformed | the model is told |
|---|---|
| JSON that cannot be read, arguments that are no object | what is wrong, at which character |
| `<function=` without a name and `>` | that they must follow |
| JSON that `</function>` does not follow, or `>>>` or the end of the turn | that |
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from conversations.formats.blocks import THINK, Call, opening, read_turn, skip_space
from conversations.formats.call_list import BlockRun, UnreadableError, json_call
from conversations.formats.format import CallFormat, ParameterTypes
from conversations.formats.json_values import JsonReader, checked_call
from conversations.messages import ParsedTurn

_WORD = r"[^\s<>(){}\"]{1,200}"
_OPENS = opening(THINK, "<function=")
_HEAD = re.compile(rf"<function=(?P<name>{_WORD})>")
_RECIPIENT = re.compile(rf"<think>|(?:\A|>>>)(?P<name>{_WORD})\n(?P<sure>\s*{{)?")


@dataclass(frozen=True, slots=True)
class _Named:
    """Reads the JSON behind a name. `tags` finds what ends a call that cannot be read."""

    tags: re.Pattern[str]
    close: re.Pattern[str]
    expected: str
    hint: str

    def read(self, run: BlockRun, text: str, name: str, position: int) -> int:
        """Appends the call whose JSON stands at a position, returns where it ends."""

        def called(value: object, block: str) -> Call:
            return checked_call(name, value, block, self.hint)

        body = skip_space(text, position)
        try:
            call, end = json_call(JsonReader(text, body, self.tags), text, called, body)
            if (close := self.close.match(text, end)) is None:
                raise UnreadableError(f"the JSON is not followed by {self.expected}")
            run.add(call, close.end())
        except UnreadableError as error:
            error.name = name
            run.add_unreadable(error, self.after(text, position))
        return run.end

    def after(self, text: str, position: int) -> int:
        """Where a call ends that cannot be read beyond `position`."""
        tag = self.tags.search(text, position)
        if tag is None:
            return len(text)
        return tag.end() if tag.group() == self.expected else tag.start()


_V31 = _Named(
    re.compile("<function=|</function>"),
    re.compile(r"\s*</function>"),
    "</function>",
    "write <function=NAME>{...}</function>",
)
_V32 = _Named(
    re.compile(">>>"),
    re.compile(r"\s*(?:(?=>>>)|\Z)"),
    ">>> or the end of the turn",
    "write >>>NAME, a newline and {...}",
)


def parse_v31(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
    """The calls and the remaining content of one assistant turn."""

    def block(start: int, calls: list[Call]) -> int:
        run = BlockRun(raw, start, calls, _V31.hint)
        if (head := _HEAD.match(raw, start)) is None:
            end = _V31.after(raw, start + len("<function="))
            run.add_malformed("<function= must be followed by a name and >", end)
            return end
        return _V31.read(run, raw, head["name"], head.end())

    return read_turn(raw, _OPENS, THINK, in_think, block)


def parse_v32(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
    """The calls and the remaining content of one assistant turn."""
    content: list[str] = []
    calls: list[Call] = []
    copied, position = 0, THINK.after(raw, 0) if in_think else 0
    while (header := _RECIPIENT.search(raw, position)) is not None:
        if (name := header["name"]) is None:
            position = THINK.after(raw, header.end())
            continue
        position = header.end("name") + 1
        if name != "all" and header["sure"] is None and name not in types.by_tool:
            continue
        content.append(raw[copied : header.start()])
        if name != "all":
            run = BlockRun(raw, header.start(), calls, _V32.hint)
            position = _V32.read(run, raw, name, position)
        copied = position
    content.append(raw[copied:])
    return ParsedTurn("".join(content), tuple(calls))


FUNCTIONARY_V31 = CallFormat("functionary_v31", parse_v31, is_typed=False)
FUNCTIONARY_V32 = CallFormat("functionary_v32", parse_v32, aliases=("functionary",))
