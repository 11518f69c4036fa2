"""Mistral's calls, behind `[TOOL_CALLS]`.

| models | a call |
|---|---|
| 7B v0.3, Nemo, Large | `[TOOL_CALLS][{"name": ..., "arguments": {...}, "id": ID}, ...]` |
| Small 3.2 | `[TOOL_CALLS]NAME[CALL_ID]ID[ARGS]{...}` |
| Devstral, Ministral 3, Magistral | `[TOOL_CALLS]NAME[ARGS]{...}` |

One parser reads all three: what stands behind `[TOOL_CALLS]` tells them apart. An id has nine
characters. The token opens a call at any place; thoughts are `[THINK]...[/THINK]`. No token closes
a call: it ends with its JSON.

| malformed | the model is told |
|---|---|
| JSON that cannot be read, up to the next `[TOOL_CALLS]` | what is wrong, at which character |
| neither a list nor a name and `[ARGS]` | the form of a call |
| no name, arguments that are no object, another key for them | which |
| a list without `]`, or without a call | that |
"""

from __future__ import annotations

import re
from functools import partial

from conversations.formats.blocks import Call, Thought, opening, read_turn, skip_space
from conversations.formats.call_list import BlockRun, CallList, UnreadableError, json_call
from conversations.formats.format import CallFormat, ParameterTypes
from conversations.formats.json_values import CallObject, JsonReader, checked_call
from conversations.messages import ParsedTurn

OPEN = "[TOOL_CALLS]"
THINK = Thought("[THINK]", "[/THINK]")

_OPEN = re.compile(re.escape(OPEN))
_OPENS = opening(THINK, re.escape(OPEN))
_OBJECT = CallObject(f'write {OPEN}[{{"name": ..., "arguments": {{...}}}}]', id="id")
_LIST = CallList(_OBJECT.hint, _OPEN)
_WORD = r"[^\s\[\]{}\"]{1,200}"
_HEAD = re.compile(
    rf"(?P<name>{_WORD})\s*(?:\[CALL_ID\]\s*(?P<id>{_WORD})\s*)?\[ARGS\]\s*", re.ASCII
)
_NAMED_HINT = f"write {OPEN}NAME[ARGS]{{...}}"


def _parse(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
    """The calls and the remaining content of one assistant turn."""
    if not in_think and OPEN not in raw:
        return ParsedTurn(raw)

    def block(start: int, calls: list[Call]) -> int:
        body = skip_space(raw, start + len(OPEN))
        reader = JsonReader(raw, body, _OPEN)
        if raw.startswith("[", body):
            return _LIST.read(
                raw, start, body, calls, partial(json_call, reader, raw, _OBJECT.read)
            )
        return _named(raw, body, reader, BlockRun(raw, start, calls, _NAMED_HINT))

    return read_turn(raw, _OPENS, THINK, in_think, block)


def _named(text: str, position: int, reader: JsonReader, run: BlockRun) -> int:
    """Reads `NAME[ARGS]{...}`, with or without an id."""
    head = _HEAD.match(text, position)
    try:
        if head is None:
            raise UnreadableError(f"{OPEN} must be followed by NAME[ARGS] or by a list")

        def read(value: object, block: str) -> Call:
            return checked_call(head["name"], value, block, _NAMED_HINT, head["id"])

        run.add(*json_call(reader, text, read, head.end()))
    except UnreadableError as error:
        error.name = head["name"] if head else None
        run.add_unreadable(error, _LIST.after(text, position))
    return run.end


FORMAT = CallFormat(
    "mistral", _parse, aliases=("devstral", "ministral"), is_typed=False, thought=THINK
)
