"""Writers of the formats whose arguments are JSON or Python, as their chat templates write them.

They share no code with the parsers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Calls = Sequence[tuple[str, dict[str, Any]]]
Writer = Callable[[Calls], str]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _object(name: str, arguments: dict[str, Any], key: str = "arguments", **others: object) -> str:
    return _json({"name": name, key: arguments, **others})


def _listed(open_: str, close: str) -> Writer:
    return lambda calls: f"{open_}[{', '.join(_object(*call) for call in calls)}]{close}"


def kimi_k2(calls: Calls) -> str:
    written = "".join(
        f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>"
        f"{_json(arguments)}<|tool_call_end|>"
        for number, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{written}<|tool_calls_section_end|>"


def deepseek_v3(calls: Calls) -> str:
    written = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{_json(arguments)}\n```"
        "<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def deepseek_v31(calls: Calls) -> str:
    written = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{_json(arguments)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def gpt_oss(calls: Calls) -> str:
    """As the model samples it for odd numbers of calls, else as the chat template writes it."""
    sampled = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"
    rendered = " to=functions.{}<|channel|>commentary json<|message|>{}<|call|>"
    form = sampled if len(calls) % 2 else rendered
    return "<|start|>assistant".join(form.format(name, _json(a)) for name, a in calls)


def mistral(calls: Calls) -> str:
    """The three forms in turn, by the number of calls."""
    if len(calls) == 1:
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{_json(a)}" for name, a in calls)
    if len(calls) == 2:
        ids = "[CALL_ID]a1b2c3d4e[ARGS]"
        return "".join(f"[TOOL_CALLS]{name}{ids}{_json(a)}" for name, a in calls)
    written = ", ".join(_object(*call, id="a1b2c3d4e") for call in calls)
    return f"[TOOL_CALLS][{written}]"


def _keywords(write: Callable[[object], str]) -> Writer:
    def one(name: str, arguments: dict[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={write(a)}' for key, a in arguments.items())})"

    return lambda calls: f"[{', '.join(one(*call) for call in calls)}]"


def _lfm2_value(value: object) -> str:
    if isinstance(value, (dict, list)):
        return _json(value)
    if not isinstance(value, str):
        return str(value)
    for plain, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
        value = value.replace(plain, escaped)
    return f"'{value}'"


def lfm2(calls: Calls) -> str:
    return f"<|tool_call_start|>{_keywords(_lfm2_value)(calls)}<|tool_call_end|>"


def llama3_json(calls: Calls) -> str:
    tag = "<|python_tag|>" if len(calls) == 2 else ""
    return tag + "; ".join(_object(*call, "parameters") for call in calls)


def internlm2(calls: Calls) -> str:
    tokens = "<|action_start|><|plugin|>\n{}<|action_end|>"
    return "".join(tokens.format(_object(*call)) for call in calls)


def apertus(calls: Calls) -> str:
    written = ", ".join(_json({name: arguments}) for name, arguments in calls)
    return f"<|tools_prefix|>[{written}]<|tools_suffix|>"


def cohere(calls: Calls) -> str:
    objects = [
        {"tool_call_id": str(number), "tool_name": name, "parameters": arguments}
        for number, (name, arguments) in enumerate(calls)
    ]
    written = ",\n    ".join(map(_json, objects))
    return f"<|START_ACTION|>[\n    {written}\n]<|END_ACTION|>"


def command_r_plus(calls: Calls) -> str:
    objects = [{"tool_name": name, "parameters": arguments} for name, arguments in calls]
    return f"Action:\n```json\n{json.dumps(objects, ensure_ascii=False, indent=4)}\n```"


def minimax_m1(calls: Calls) -> str:
    return f"<tool_calls>\n{''.join(_object(*call) + chr(10) for call in calls)}</tool_calls>"


def granite(calls: Calls) -> str:
    objects = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return f"<|tool_call|>{json.dumps(objects, ensure_ascii=False, indent=4)}"


def hermes(calls: Calls) -> str:
    return "".join(f"<tool_call>\n{_object(*call)}\n</tool_call>" for call in calls)


JSON_WRITERS: dict[str, Writer] = {
    "hermes": hermes,
    "kimi_k2": kimi_k2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v31": deepseek_v31,
    "gpt_oss": gpt_oss,
    "mistral": mistral,
    "lfm2": lfm2,
    "llama4_pythonic": _keywords(repr),
    "llama3_json": llama3_json,
    "json_list": _listed("", ""),
    "granite": granite,
    "granite_20b_fc": lambda calls: "".join(f"<function_call> {_object(*c)}" for c in calls),
    "phi4_mini": _listed("functools", ""),
    "nemotron_nano": _listed("<TOOLCALL>", "</TOOLCALL>"),
    "apriel": _listed("<tool_calls>", "</tool_calls>"),
    "apertus": apertus,
    "cohere": cohere,
    "command_r_plus": command_r_plus,
    "gigachat3": lambda calls: "".join(f"<|function_call|>{_object(*c)}" for c in calls),
    "minimax_m1": minimax_m1,
    "internlm2": internlm2,
    "functionary_v31": lambda calls: "".join(
        f"<function={name}>{_json(arguments)}</function>" for name, arguments in calls
    ),
    "functionary_v32": lambda calls: ">>>".join(
        f"{name}\n{_json(arguments)}" for name, arguments in calls
    ),
}

JSON_TAGS = (
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
    *("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<｜tool▁calls▁begin｜>"),
    *("<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "<|tool_call_start|>", "<|python_tag|>"),
    *("<|tool_call|>", "<function_call>", "functools[", "<TOOLCALL>", "</TOOLCALL>"),
    *("<tool_calls>", "</tool_calls>", "<|tools_prefix|>", "<|tools_suffix|>"),
    *("<|START_ACTION|>", "<|END_ACTION|>", "<|action_start|><|plugin|>", "<|action_end|>"),
    *("```json\n", "\n```", ")]", ", g(x=1)]", '"}}]', "; {", '{"name": "g", "arguments": {}}'),
)
