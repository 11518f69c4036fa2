"""Several calls in one construct: a list in brackets, or a section between tokens.

The blocks of such calls touch: the first begins where the construct opens, each further one where
the block before it ends, and the last one reaches to where the construct closes. So brackets,
commas and section tokens belong to a block and never to the content.

A construct that is not closed was not finished: its last call is malformed. What cannot be read in
a list takes the rest of the list with it. Nothing in a list tells where the next call begins: after
an unescaped quote, a call that seems to follow may be a piece of a string, and must not run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from conversations.formats.blocks import Call, skip_space
from conversations.formats.json_values import InvalidJsonError, JsonReader, written_name
from conversations.messages import MalformedToolCall


class UnreadableError(Exception):
    """A call that cannot be read to its end. The message is the reason for the model.

    Its name is `name`, or stands in the JSON that begins at `json_at`.
    """

    def __init__(self, reason: str, *, name: str | None = None, json_at: int | None = None) -> None:
        super().__init__(reason)
        self.name, self.json_at = name, json_at


class BlockRun:
    """Appends calls whose blocks touch to `calls`. `hint` ends every reason."""

    def __init__(self, text: str, start: int, calls: list[Call], hint: str) -> None:
        self._text, self._calls, self._hint = text, calls, hint
        self._first = len(calls)
        self.end = start

    @property
    def is_empty(self) -> bool:
        """Whether no call was appended yet."""
        return len(self._calls) == self._first

    def add(self, call: Call, end: int) -> None:
        """Appends a call whose block ends at `end`."""
        self._calls.append(dataclasses.replace(call, raw=self._text[self.end : end]))
        self.end = end

    def add_malformed(self, reason: str, end: int, name: str | None = None) -> None:
        """Appends what is not a call and ends at `end`."""
        block = self._text[self.end : end]
        self._calls.append(MalformedToolCall(block, f"{reason}; {self._hint}", name))
        self.end = end

    def add_unreadable(self, error: UnreadableError, end: int) -> None:
        """Appends a call that could not be read; its block ends at `end`.

        If nothing stands there, the construct ends behind its last call and was not closed.
        """
        if end == self.end and not self.is_empty:
            self.leave_open(end, str(error))
            return
        name = error.name
        if name is None and error.json_at is not None:
            name = written_name(self._text[error.json_at : end])
        self.add_malformed(str(error), end, name)

    def close(self, end: int, empty: str) -> None:
        """Ends the construct at `end`. `empty` is the reason if it holds no call."""
        if self.is_empty:
            self.add_malformed(empty, end)
        else:
            self._extend(end)

    def leave_open(self, end: int, reason: str) -> None:
        """Ends a construct that is not closed: its last call was not finished."""
        if self.is_empty:
            self.add_malformed(reason, end)
            return
        self._extend(end)
        last = self._calls[-1]
        if not isinstance(last, MalformedToolCall):
            reason = f"{reason}; {self._hint}"
            self._calls[-1] = MalformedToolCall(last.raw, reason, last.name)

    def _extend(self, end: int) -> None:
        last = self._calls[-1]
        self._calls[-1] = dataclasses.replace(last, raw=last.raw + self._text[self.end : end])
        self.end = end


ReadElement = Callable[[int], tuple[Call, int]]
"""Reads the call at a position, returns it and where it ends. Raises UnreadableError."""


@dataclasses.dataclass(frozen=True, slots=True)
class CallList:
    """Calls between `[` and `]`, and behind that `close` if it is not empty.

    `tags` finds the tokens that close a list or open another block: what cannot be read ends there.
    `ends_turn`: `close` is the end token of the turn, so the text of a turn may lack it.
    """

    hint: str
    tags: re.Pattern[str]
    close: str = ""
    ends_turn: bool = False

    def read(
        self, text: str, start: int, bracket: int, calls: list[Call], element: ReadElement
    ) -> int:
        """Reads the list whose block opens at `start`; returns where the text goes on."""
        run = BlockRun(text, start, calls, self.hint)
        try:
            self._read(text, skip_space(text, bracket), run, element)
        except UnreadableError as error:
            run.add_unreadable(error, self.after(text, max(run.end, bracket)))
        return run.end

    def after(self, text: str, position: int) -> int:
        """Where a block ends that cannot be read beyond `position`."""
        tag = self.tags.search(text, position)
        if tag is None:
            return len(text)
        return tag.end() if tag.group() == self.close else tag.start()

    def _read(self, text: str, position: int, run: BlockRun, element: ReadElement) -> None:
        if not text.startswith("[", position):
            raise UnreadableError("calls must stand in a list")
        position = skip_space(text, position + 1)
        while not text.startswith("]", position):
            call, position = element(position)
            run.add(call, position)
            position = skip_space(text, position)
            if text.startswith(",", position):
                position = skip_space(text, position + 1)
            elif position == len(text):
                run.leave_open(position, "the list is not closed by ]")
                return
            elif not text.startswith("]", position):
                raise UnreadableError("a call in a list must be followed by , or ]")
        self._close(text, position + 1, run)

    def _close(self, text: str, position: int, run: BlockRun) -> None:
        closing = skip_space(text, position) if self.close else position
        if text.startswith(self.close, closing):
            run.close(closing + len(self.close), "the list holds no call")
        elif self.ends_turn and closing == len(text):
            run.close(closing, "the list holds no call")
        else:
            end = self.after(text, position)
            run.leave_open(end, f"the list is not followed by {self.close}")


ReadObject = Callable[[object, str], Call]
"""The call that a JSON value is, given its text."""


def json_call(reader: JsonReader, text: str, read: ReadObject, position: int) -> tuple[Call, int]:
    """The call whose JSON stands at a position, and where it ends. Raises UnreadableError."""
    try:
        value, end = reader.value(position)
    except InvalidJsonError as error:
        raise UnreadableError(str(error), json_at=position) from error
    return read(value, text[position:end]), end
