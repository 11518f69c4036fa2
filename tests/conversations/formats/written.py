"""Random calls, and what each format makes of them: an oracle that shares no code with the parsers.

`WRITERS` has a function for each format that writes calls as the format's chat template does.
`render` goes through a real template. Strings hold what parsers trip over: blanks at both ends,
code, JSON, unicode, other formats' tags and the format's own closing tags, and whole examples of
calls.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.conversations.formats.written_json import JSON_TAGS, JSON_WRITERS

Arguments = dict[str, Any]
Calls = Sequence[tuple[str, Arguments]]


@dataclass(frozen=True, slots=True)
class Sample:
    """Calls, and the OpenAI schemas of the tools that they name."""

    tools: list[dict[str, Any]]
    calls: list[tuple[str, Arguments]]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _text(value: object) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else _json(value)


def _printed(value: object) -> str:
    """A string as it is, lists and objects as JSON, the rest as Python prints it."""
    return _json(value) if isinstance(value, (list, dict)) else str(value)


def qwen3_coder(calls: Calls) -> str:
    def one(name: str, arguments: Arguments) -> str:
        parameters = "".join(
            f"<parameter={key}>\n{_printed(value)}\n</parameter>\n"
            for key, value in arguments.items()
        )
        return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"

    return "\n".join(one(*call) for call in calls)


def seed_oss(calls: Calls) -> str:
    def one(name: str, arguments: Arguments) -> str:
        parameters = "".join(
            f"<parameter={key}>{value}</parameter>\n" for key, value in arguments.items()
        )
        return f"\n<seed:tool_call>\n<function={name}>\n{parameters}</function>\n</seed:tool_call>"

    return "".join(one(*call) for call in calls)


def minimax_m2(calls: Calls) -> str:
    def one(name: str, arguments: Arguments) -> str:
        parameters = "".join(
            f'<parameter name="{key}">{_text(value)}</parameter>\n'
            for key, value in arguments.items()
        )
        return f'<invoke name="{name}">\n{parameters}</invoke>\n'

    written = "".join(one(*call) for call in calls)
    return f"\n<minimax:tool_call>\n{written}</minimax:tool_call>"


def glm45(calls: Calls) -> str:
    return _glm(calls, "\n")


def glm47(calls: Calls) -> str:
    return _glm(calls, "")


def _glm(calls: Calls, line_end: str) -> str:
    def one(name: str, arguments: Arguments) -> str:
        pairs = "".join(
            f"<arg_key>{key}</arg_key>{line_end}<arg_value>{_text(value)}</arg_value>{line_end}"
            for key, value in arguments.items()
        )
        return f"{line_end}<tool_call>{name}{line_end}{pairs}</tool_call>"

    return "".join(one(*call) for call in calls)


def hy3(calls: Calls) -> str:
    def one(name: str, arguments: Arguments) -> str:
        pairs = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{{{number}}}</arg_value>\n"
            for number, key in enumerate(arguments)
        )
        call = f"<tool_call>{name}<tool_sep>\n{pairs}</tool_call>\n".replace(">", ":opensource>")
        return call.format(*map(_text, arguments.values()))

    written = "".join(one(*call) for call in calls)
    return f"<tool_calls:opensource>\n{written}</tool_calls:opensource>"


def minicpm5(calls: Calls) -> str:
    def value(value: object) -> str:
        if isinstance(value, str) and any(mark in value for mark in "<&\n"):
            return f"<![CDATA[{value}]]>"
        return str(value)

    def one(name: str, arguments: Arguments) -> str:
        parameters = "".join(
            f'<param name="{key}">{value(each)}</param>' for key, each in arguments.items()
        )
        return f'<function name="{name}">{parameters}</function>'

    return "\n".join(one(*call) for call in calls)


def kimi_k3(calls: Calls) -> str:
    names = {str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object"}

    def one(index: int, name: str, arguments: Arguments) -> str:
        parameters = "".join(
            f'<|open|>argument key="{key}" type="{names.get(type(value), "number")}"<|sep|>'
            f"{_text(value)}<|close|>argument<|sep|>"
            for key, value in arguments.items()
        )
        opened = f'<|open|>call tool="{name}" index="{index}"<|sep|>'
        return f"{opened}{parameters}<|close|>call<|sep|>"

    written = "".join(one(index, *call) for index, call in enumerate(calls, 1))
    return f"<|open|>tools<|sep|>{written}<|close|>tools<|sep|>"


def muse_glimmer(calls: Calls) -> str:
    def value(value: object) -> str:
        is_written = isinstance(value, (list, dict, bool, type(None)))
        return _json(value) if is_written else str(value)

    def one(name: str, arguments: Arguments) -> str:
        parameters = "".join(
            f'<atem:parameter name="{key}">{value(each)}</atem:parameter>\n'
            for key, each in arguments.items()
        )
        call = f'<atem:invoke name="{name}">\n{parameters}</atem:invoke>\n'
        return f" to={name}<|message|><atem:function_calls>\n{call}</atem:function_calls>"

    return "<|eom|><|start|>assistant".join(one(*call) for call in calls)


def _dsml(block: str) -> Callable[[Calls], str]:
    def parameter(key: str, value: object) -> str:
        is_string = "true" if isinstance(value, str) else "false"
        open_ = f'<｜DSML｜parameter name="{key}" string="{is_string}">'
        return f"{open_}{_text(value)}</｜DSML｜parameter>\n"

    def one(name: str, arguments: Arguments) -> str:
        parameters = "".join(parameter(*item) for item in arguments.items()) or "\n"
        return f'<｜DSML｜invoke name="{name}">\n{parameters}</｜DSML｜invoke>\n'

    def write(calls: Calls) -> str:
        written = "".join(one(*call) for call in calls)
        return f"\n\n<｜DSML｜{block}>\n{written}</｜DSML｜{block}>"

    return write


def _braces(open_: str, close: str, quote: str) -> Callable[[Calls], str]:
    def value_text(value: object) -> str:
        if isinstance(value, str):
            return f"{quote}{value}{quote}"
        if isinstance(value, dict):
            return "{" + ",".join(f"{k}:{value_text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(value_text, value)) + "]"
        if isinstance(value, bool):
            return "true" if value else "false"
        return str(value)

    def write(calls: Calls) -> str:
        return "".join(f"{open_}call:{name}{value_text(a)}{close}" for name, a in calls)

    return write


TAGGED: dict[str, Callable[[Calls], str]] = {
    "qwen3_coder": qwen3_coder,
    "seed_oss": seed_oss,
    "minimax_m2": minimax_m2,
    "glm45": glm45,
    "hy3": hy3,
    "minicpm5": minicpm5,
    "kimi_k3": kimi_k3,
    "muse_glimmer": muse_glimmer,
    "deepseek_v4": _dsml("tool_calls"),
    "deepseek_v32": _dsml("function_calls"),
    "gemma4": _braces("<|tool_call>", "<tool_call|>", '<|"|>'),
    "functiongemma": _braces("<start_function_call>", "<end_function_call>", "<escape>"),
}
WRITERS = {**TAGGED, **JSON_WRITERS}
ONE_CALL = ("gigachat3", "gpt_oss", "llama3_json")
"""Formats whose templates write only one call a turn."""

CLOSING_TAGS = (
    *("</tool_call>", "</function>", "</parameter>", "</arg_value>", "</invoke>", "</think>"),
    *("</minimax:tool_call>", "</seed:tool_call>", "</｜DSML｜parameter>", "</｜DSML｜invoke>"),
    *("<tool_call|>", '<|"|>', "<escape>", "<end_function_call>", "<|tool_call_end|>"),
    *("</arg_value:opensource>", "</tool_call:opensource>", "</param>", "</atem:parameter>"),
    *("</atem:invoke>"),
)
_PIECES = (
    *("", " ", "\n", "\n\n", "\t", "\r\n", "word", "42", "-0.5e3", "true", "None", "null"),
    *('"', "'", '"quoted"', "\\", "\\n", "{", "}", "[1, 2]", '{"a": 1}', "{'a': None}", ", "),
    *("def f(x):\n    return x\n\n", "```json\n{}\n```", "<b>&amp;</b>", "<think>", "<!-- -->"),
    *("a <tool_call> b", "<|im_end|>", "\u2028", "\x00", "x < y > z", "1e5", "e\u0301", "{{ x }}"),
    *("é漢字🙂", ": ", "%}"),
)
_KINDS = ("string", "string", "integer", "number", "boolean", "null", "array", "object")
_KEYS = ("city", "days", "x", "max_results", "file-path", "query2", "Über", "a.b", "code", "note")


def random_text(rng: random.Random, tags: Sequence[str]) -> str:
    """A string, in some cases with some of these tags between letters."""
    pieces = [rng.choice(_PIECES) for _ in range(rng.choice((1, 1, 2, 3, 6)))]
    if rng.random() < 0.4:
        pieces += [f"a{rng.choice(tags)}b" for _ in range(rng.randrange(1, 4))]
    rng.shuffle(pieces)
    return "".join(pieces)


def random_value(rng: random.Random, kind: str, tags: Sequence[str], depth: int = 0) -> Any:
    """A value of a JSON type."""
    if kind == "integer":
        return rng.choice((0, 1, -1, 42, 2**70, rng.randrange(-(10**9), 10**9)))
    if kind == "number":
        return rng.choice((0.5, -2.0, 1e21, 1e-9, 3, rng.uniform(-1e6, 1e6)))
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "null":
        return None
    if kind == "string":
        return random_text(rng, tags)
    inner = [rng.choice(_KINDS[: 6 if depth > 2 else 8]) for _ in range(rng.randrange(4))]
    values = [random_value(rng, each, tags, depth + 1) for each in inner]
    return (
        values
        if kind == "array"
        else dict(zip(rng.sample(_KEYS, len(values)), values, strict=True))
    )


def random_sample(rng: random.Random, form: str, *, most: int = 3) -> Sample:
    """One to `most` calls of tools with typed parameters.

    A parameter holds closing tags or whole calls, not both: `</tool_call> <tool_call>...` reads as
    a parameter that was not closed, before the next call.
    """
    arguments: Arguments = {} if form in ("gemma4", "functiongemma", "kimi_k3") else {"k": "v"}
    example = WRITERS[form]([("g", arguments)]).strip()
    tags = JSON_TAGS if form in JSON_WRITERS else CLOSING_TAGS
    tools, calls = [], []
    for number in range(rng.randrange(1, most + 1)):
        tool = rng.choice(("look", "get_weather", "web.search", "run-code", "F")) + str(number)
        types = {key: rng.choice(_KINDS) for key in rng.sample(_KEYS, rng.randrange(5))}
        values = {
            key: random_value(rng, kind, rng.choice((tags, tags, (example,))))
            for key, kind in types.items()
        }
        tools.append(tool_schema(tool, {key: {"type": kind} for key, kind in types.items()}))
        calls.append((tool, values))
    return Sample(tools, calls)


def tool_schema(name: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": dict(properties), "required": []}
    function = {"name": name, "description": "d", "parameters": parameters}
    return {"type": "function", "function": function}


_ASKED = "What stands behind this mark is the model's: 7f3a"


def render(template: str, sample: Sample, content: str = "") -> str:
    """What a chat template writes behind the generation prompt, for an assistant with these calls.

    If the prompt is no prefix of the conversation, what stands behind the user's message.
    """
    try:
        text = _conversation(template, sample, _messages(sample, content))
    except TypeError:  # a template that joins strings: it wants the arguments as JSON text
        as_text = [(name, json.dumps(a, ensure_ascii=False)) for name, a in sample.calls]
        messages = _messages(Sample(sample.tools, as_text), content)  # type: ignore[arg-type]
        text = _conversation(template, sample, messages)
    prompt = _conversation(template, sample, _messages(sample, content)[:1], prompt=True)
    return text[len(prompt) :] if text.startswith(prompt) else text.split(_ASKED, 1)[1]


def _messages(sample: Sample, content: str) -> list[dict[str, Any]]:
    calls = [
        {
            "type": "function",
            "id": f"call{number:05d}",  # Mistral's templates want nine letters or digits
            "function": {"name": name, "arguments": arguments},
        }
        for number, (name, arguments) in enumerate(sample.calls)
    ]
    return [
        {"role": "user", "content": _ASKED},
        {"role": "assistant", "content": content, "tool_calls": calls},
    ]


def _conversation(
    template: str, sample: Sample, messages: list[dict[str, Any]], *, prompt: bool = False
) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[messages],
        tools=sample.tools,
        chat_template=template,
        add_generation_prompt=prompt,
        bos_token="",
        eos_token="",
    )
    text: str = rendered[0]
    return text
