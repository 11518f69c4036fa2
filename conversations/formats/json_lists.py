r"""Formats whose calls are JSON objects behind a token, most of them in a list.

| format | models | calls |
|---|---|---|
| granite | Granite 3 | `<|tool_call|>[OBJECT, ...]` |
| phi4_mini | Phi-4-mini, Firefunction | `functools[OBJECT, ...]` |
| nemotron_nano | Nemotron-Nano v2 | `<TOOLCALL>[OBJECT, ...]</TOOLCALL>` |
| apriel | Apriel, Hunyuan-A13B, Jamba | `<tool_calls>[OBJECT, ...]</tool_calls>` |
| cohere | Command-R7B, Cohere2 | `<|START_ACTION|>[OBJECT, ...]<|END_ACTION|>` |
| apertus | Apertus | `<|tools_prefix|>[{NAME: ARGUMENTS}, ...]<|tools_suffix|>` |
| minimax_m1 | MiniMax-M1 | `<tool_calls>OBJECT OBJECT ...</tool_calls>` |
| internlm2 | InternLM 2.5 | `<|action_start|><|plugin|>OBJECT<|action_end|>` |
| command_r_plus | Command-R+ | `Action:`, a fenced `json` block of `[OBJECT, ...]` |
| granite_20b_fc | Granite-20b-functioncalling | `<function_call> OBJECT` |
| gigachat3 | GigaChat 3.1 | `<|function_call|>OBJECT` |

OBJECT is `{"name": NAME, "arguments": ARGUMENTS}`, in some formats with an id; Cohere has the keys
`tool_call_id`, `tool_name` and `parameters`. Written after the models' own chat templates.

A construct without a closing token ends at its bracket or brace; the text behind it is content.
`<|tools_suffix|>` ends Apertus' turn: like any end token, it may be missing at the turn's end.
Cohere's thoughts are `<|START_THINKING|>...<|END_THINKING|>`.

| malformed | the model is told |
|---|---|
| JSON that cannot be read, with the rest of its list | what is wrong, at which character |
| no name, arguments that are no object, another key for them | which |
| a token without a list, or without an object | that |
| a list without a call | that |
| no `]`, no closing token: the last call was not finished | what is missing |
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

from conversations.formats.blocks import THINK, Call, Thought, opening, read_turn, skip_space
from conversations.formats.call_list import (
    BlockRun,
    CallList,
    ReadObject,
    UnreadableError,
    json_call,
)
from conversations.formats.format import CallFormat, ParameterTypes, Parse
from conversations.formats.json_values import CallObject, JsonReader, checked_call
from conversations.messages import MalformedToolCall, ParsedTurn


class JsonLists:
    """Reads calls between `open` and `close` (empty if nothing closes them).

    `opens` is a regular expression for `open` if more than the token decides that a call opens.
    """

    def __init__(
        self,
        form: tuple[str, str, str],
        read: ReadObject,
        *,
        opens: str = "",
        listed: bool = True,
        thought: Thought = THINK,
        ends_turn: bool = False,
    ) -> None:
        start, self._close, hint = form
        tags = [opens or re.escape(start), *([re.escape(self._close)] if self._close else [])]
        self._token = start
        self._thought, self._opens = thought, opening(thought, tags[0])
        self._list = CallList(hint, re.compile("|".join(tags)), self._close, ends_turn)
        self._read, self._is_list = read, listed

    def parse(self, raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
        """The calls and the remaining content of one assistant turn."""
        if not in_think and self._token not in raw:
            return ParsedTurn(raw)

        def block(start: int, calls: list[Call]) -> int:
            body = start + len(self._token)
            reader = JsonReader(raw, body, self._list.tags)
            if self._is_list:
                element = partial(json_call, reader, raw, self._read)
                return self._list.read(raw, start, body, calls, element)
            return self._objects(raw, body, reader, BlockRun(raw, start, calls, self._list.hint))

        return read_turn(raw, self._opens, self._thought, in_think, block)

    def _objects(self, text: str, body: int, reader: JsonReader, run: BlockRun) -> int:
        """Reads one object, or up to the closing token as many as there are."""
        position = skip_space(text, body)
        try:
            while run.is_empty or (self._close and text.startswith("{", position)):
                call, end = json_call(reader, text, self._read, position)
                run.add(call, end)
                position = skip_space(text, end)
        except UnreadableError as error:
            run.add_unreadable(error, self._list.after(text, position))
            return run.end
        if self._close and text.startswith(self._close, position):
            run.close(position + len(self._close), "")
        elif self._close:
            run.leave_open(self._list.after(text, position), f"{self._close} is missing")
        return run.end


def _single_key(hint: str) -> ReadObject:
    """Reads `{NAME: ARGUMENTS}`."""

    def read(value: object, block: str) -> Call:
        if not isinstance(value, dict) or len(value) != 1:
            reason = "a call must be a JSON object with one key, the name of the tool"
            return MalformedToolCall(block, f"{reason}; {hint}")
        ((name, arguments),) = value.items()
        return checked_call(name, arguments, block, hint)

    return read


_OBJECT = CallObject("", id="id")
_COHERE = CallObject("", "tool_name", ("parameters",), "tool_call_id")
_COHERE_THOUGHT = Thought("<|START_THINKING|>", "<|END_THINKING|>")
_INTERNLM = CallObject("", arguments=("arguments", "parameters"), id="id")
_APERTUS = ("<|tools_prefix|>", "<|tools_suffix|>")
_APERTUS_HINT = "write <|tools_prefix|>[{NAME: {...}}]<|tools_suffix|>"


def _parser(
    start: str,
    close: str = "",
    *,
    opens: str = "",
    call: CallObject = _OBJECT,
    listed: bool = True,
    thought: Thought = THINK,
) -> Parse:
    """Reads calls that are objects with the keys of `call`."""
    shape = f'{{"{call.name}": ..., "{call.arguments[0]}": {{...}}}}'
    hint = f"write {start}{f'[{shape}]' if listed else shape}{close}"
    read = replace(call, hint=hint).read
    return JsonLists((start, close, hint), read, opens=opens, listed=listed, thought=thought).parse


def _format(name: str, parse: Parse, *aliases: str, taught_by: tuple[str, ...] = ()) -> CallFormat:
    return CallFormat(name, parse, aliases, taught_by, is_typed=False)


GRANITE_20B = _parser("<function_call>", listed=False)
GRANITE = _parser("<|tool_call|>")
PHI4_MINI = _parser("functools", opens=r"functools(?=\[)")
NEMOTRON_NANO = _parser("<TOOLCALL>", "</TOOLCALL>")
APRIEL = _parser("<tool_calls>", "</tool_calls>")
APERTUS = JsonLists((*_APERTUS, _APERTUS_HINT), _single_key(_APERTUS_HINT), ends_turn=True).parse
COMMAND_R_PLUS = _parser("Action:\n```json", "```", call=_COHERE)
GIGACHAT3 = _parser("<|function_call|>", listed=False)
COHERE = _parser("<|START_ACTION|>", "<|END_ACTION|>", call=_COHERE, thought=_COHERE_THOUGHT)
MINIMAX_M1 = _parser("<tool_calls>", "</tool_calls>", listed=False)
INTERNLM2 = _parser("<|action_start|><|plugin|>", "<|action_end|>", call=_INTERNLM, listed=False)

FORMATS = (
    _format("granite", GRANITE, "granite3", taught_by=("<|tool_call|>", "JSON list of tools")),
    _format("granite_20b_fc", GRANITE_20B, "granite-20b-fc"),
    _format("phi4_mini", PHI4_MINI, "phi4_mini_json", "firefunction", taught_by=("functools[",)),
    _format("nemotron_nano", NEMOTRON_NANO, "nemotron_nano_v2"),
    _format("apriel", APRIEL, "hunyuan_a13b", "jamba"),
    _format("apertus", APERTUS),
    replace(_format("cohere", COHERE, "cohere2", "command_r7b"), thought=_COHERE_THOUGHT),
    _format("command_r_plus", COMMAND_R_PLUS),
    _format("gigachat3", GIGACHAT3),
    _format("minimax_m1", MINIMAX_M1, "minimax"),
    _format("internlm2", INTERNLM2, "internlm"),
)
