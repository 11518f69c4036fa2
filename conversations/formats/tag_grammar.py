"""The tags of a format that writes calls in tags, and the patterns that find them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from conversations.formats.blocks import THINK, Thought, one_of, opening

_NAME = r"""[^\s<>"'{}]+"""
_KEY = r"""[^<>"\n]*"""
_NEXT_LINE = r"[ \t\r]*\n\s*\S"


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of one format, as literal text but for the two that hold a name.

    `call` and `parameter` are the text before the name, and a regular expression for what stands
    behind it. A group in the latter is `string_mark` if the value is a string and another word if
    not, if the format says so itself. `call_close` is empty if the block's end ends the call.
    `newlines`: the template writes a newline at each end of a value. `cdata`: a value with tags in
    it stands in `<![CDATA[...]]>`. `strict`: other strings hold no `parameter_close`.
    `frame` is a regular expression for tokens around content that belong to no
    message, `header` one for what announces a block.
    """

    block: tuple[str, str]
    call: tuple[str, str]
    call_close: str
    parameter: tuple[str, str]
    parameter_close: str
    example: str
    several: bool = False
    newlines: bool = False
    cdata: bool = False
    strict: bool = False
    string_mark: str = "true"
    frame: str = ""
    header: str = ""
    thought: Thought = THINK


class Grammar:
    """The patterns of a format.

    opens        a thought, a block, or a call outside a block
    call         the tag with a call's name
    parameter    the tag with a parameter's name
    parameters   the tags around a parameter, with any name or attributes
    goes_on      what stands behind a parameter's end if the next one lost its opening tag
    in_value     where a value may end: its own end, a call that begins, a call that ends
    balance      where a call begins and ends; with its block, if each call has a block of its own
    resume       where to go on behind a malformed call
    stray_end    where a call outside a block ends
    """

    def __init__(self, tags: Tags) -> None:
        literal = (*tags.block, tags.call_close, tags.parameter_close)
        block_open, block_close, call_close, parameter_close = map(re.escape, literal)
        start, behind = re.escape(tags.call[0]), tags.call[1]
        key_start = re.escape(tags.parameter[0])
        name = f"{start}{_NAME}{behind}"
        call_end = f"{call_close}\\s*" if call_close else ""
        call, end = f"{block_open}\\s*{name}", f"{call_end}{block_close}"
        after_value = f"{call_end}(?:{block_close}|{block_open}|\\Z)"
        if tags.several:
            call, end, after_value = name, call_close, call_close
        value_end = f"{parameter_close}(?=\\s*(?:{key_start}|{after_value}))"
        stray = name if start else key_start

        any_open = key_start
        if "</" in parameter_close:
            any_open = parameter_close.replace("</", "<", 1).replace(">", "\\b[^<>]*>")
        stray_close = f"{call_close}(?:\\s*{block_close})?" if call_close else block_close
        others = (block_open, stray) if start else (block_open,)
        headers = (f"{tags.header}(?!\\s*{block_open})",) if tags.header else ()

        behind_key = tags.parameter[1]
        lost_start = (f"\\s*+{_KEY}+{behind_key}",) if behind_key.startswith("</") else ()

        self.tags = tags
        self.opens = opening(tags.thought, block_open, stray, *headers)
        self.frame = re.compile(tags.frame or r"(?!)")
        self.call = re.compile(f"{start}({_NAME}){behind}")
        self.parameter = re.compile(f"{key_start}({_KEY}){behind_key}")
        self.parameters = re.compile(one_of(close=parameter_close, open=any_open))
        self.goes_on = re.compile("" if tags.strict else "|".join((_NEXT_LINE, *lost_start)))
        self.in_value = re.compile(one_of(value_end=value_end, call=call, end=end))
        self.balance = re.compile(one_of(call=call, end=end))
        self.resume = re.compile(one_of(done=block_close, call=call, block=block_open))
        self.stray_end = re.compile(one_of(*others, done=stray_close))

    def flaw(self, value: str) -> str | None:
        """What the parameter tags inside a value say is wrong with it, None if it can be one."""
        if self.tags.strict and value.startswith(("[", "{")):
            return None  # a literal tells by itself where it ends
        if self.tags.parameter_close in value and self._lost_tag(value):
            return f"{self.tags.parameter[0]} is missing before {self.tags.parameter_close}"
        if self.tags.parameter[0] in value:
            opened = sum(1 for _ in self.parameter.finditer(value))
            if opened > value.count(self.tags.parameter_close):
                return self.not_closed
        return None

    def _lost_tag(self, value: str) -> bool:
        """Whether a tag closes a parameter that the value did not open, and more follows."""
        opened = 0
        for tag in self.parameters.finditer(value):
            if tag.lastgroup == "open":
                opened += 1
            elif opened:
                opened -= 1
            elif self.goes_on.match(value, tag.end()):
                return True
        return False

    @property
    def not_closed(self) -> str:
        return f"it is not closed: {self.tags.parameter_close} is missing, or text follows it"
