"""Calls of gpt-oss, in OpenAI's harmony format: a turn is a row of messages, each with a header.

    <|start|>assistant<|channel|>analysis<|message|>a thought<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>
    {...}<|call|>

The generation prompt is the first `<|start|>assistant`. The recipient makes a message a call, in
any channel, and may stand before the channel, as the chat template writes it: `assistant
to=functions.NAME<|channel|>commentary json`. Its block is the whole message. What is addressed to
nobody is `reasoning` in the channel `analysis`, else content. Messages of one kind are joined by a
newline; their headers and end tokens belong to neither.

A call ends with `<|call|>`, or where the turn ends: the end token of a turn is no part of its text.
Text without a header is content.

| malformed | the model is told |
|---|---|
| JSON that cannot be read, arguments that are no object | what is wrong, at which character |
| JSON that is not followed by `<|call|>` | that it is missing |
| a header with a recipient, without `<|message|>` | that it is missing |
| `<|call|>` behind a message without a recipient | that a call needs one |
"""

from __future__ import annotations

import re

from conversations.formats.blocks import Call, skip_space
from conversations.formats.format import CallFormat, ParameterTypes
from conversations.formats.json_values import InvalidJsonError, JsonReader, checked_call
from conversations.messages import MalformedToolCall, ParsedTurn

MESSAGE, CALL = "<|message|>", "<|call|>"

_RECIPIENT = r"\s*to=(?P<{}>[^\s<]{{1,200}})"
_HEADER = re.compile(
    rf"(?:<\|start\|>\w{{0,40}})?(?:{_RECIPIENT.format('first')})?"
    rf"(?:<\|channel\|>\s*(?P<channel>\w{{0,40}})(?:{_RECIPIENT.format('second')})?"
    r"\s*(?:<\|constrain\|>)?[\w ]{0,40})?<\|message\|>"
)
_CUT_HEADER = re.compile(
    rf"(?:<\|start\|>\w{{0,40}})?(?:{_RECIPIENT.format('first')}(?:<\|channel\|>|\Z)"
    r"|<\|channel\|>\s*\w{0,40}\s*to=)"
)
_BEGIN = re.compile(r"<\|(?:start|channel)\|>")
_TOKEN = re.compile(r"<\|(?:start|channel|message|constrain|end|call|return)\|>")
_STOP = re.compile(r"<\|(?:start|channel|(?P<end>end|call|return))\|>")
_HINT = "write <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>"


def _parse(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
    """The calls, the content and the reasoning of one assistant turn."""
    return _Scan(raw).run()


class _Scan:
    """One pass over the messages of a turn."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[Call] = []

    def run(self) -> ParsedTurn:
        position = 0
        while position < len(self.text):
            header = _HEADER.match(self.text, position)
            position = self._message(header) if header else self._headless(position)
        reasoning = "\n".join(self.reasoning) if self.reasoning else None
        return ParsedTurn("\n".join(self.content), tuple(self.calls), reasoning)

    def _headless(self, start: int) -> int:
        """Text without a header, or a header that is not finished."""
        cut = _CUT_HEADER.match(self.text, start)
        begin = _BEGIN.search(self.text, cut.end() if cut else start + 1)
        end = begin.start() if begin else len(self.text)
        if cut:
            return self._malformed(start, end, f"{MESSAGE} is missing", None)
        self.content.append(self.text[start:end])
        return end

    def _message(self, header: re.Match[str]) -> int:
        if (recipient := header["second"] or header["first"]) is not None:
            return self._call(header, recipient.removeprefix("functions."))
        stop = _STOP.search(self.text, header.end())
        end = stop.start() if stop else len(self.text)
        after = stop.end() if stop and stop["end"] else end
        if stop and stop.group() == CALL:
            self._malformed(header.start(), after, "a call needs to=functions.NAME", None)
        elif header["channel"] == "analysis":
            self.reasoning.append(self.text[header.end() : end])
        else:
            self.content.append(self.text[header.end() : end])
        return after

    def _call(self, header: re.Match[str], name: str) -> int:
        start, body = header.start(), skip_space(self.text, header.end())
        try:
            value, end = JsonReader(self.text, body, _TOKEN).value(body)
        except InvalidJsonError as error:
            return self._malformed(start, self._after(body), str(error), name)
        end = skip_space(self.text, end)
        if end < len(self.text) and not self.text.startswith(CALL, end):
            reason = f"the JSON is not followed by {CALL}"
            return self._malformed(start, self._after(end), reason, name)
        after = min(end + len(CALL), len(self.text))
        self.calls.append(checked_call(name, value, self.text[start:after], _HINT))
        return after

    def _after(self, position: int) -> int:
        """Where a call ends that cannot be read: behind an end token or before the next one."""
        stop = _STOP.search(self.text, position)
        if stop is None:
            return len(self.text)
        return stop.end() if stop["end"] else stop.start()

    def _malformed(self, start: int, end: int, reason: str, name: str | None) -> int:
        block = self.text[start:end]
        self.calls.append(MalformedToolCall(block, f"{reason}; {_HINT}", name))
        return end


FORMAT = CallFormat("gpt_oss", _parse, aliases=("gpt-oss", "openai", "harmony"), is_typed=False)
