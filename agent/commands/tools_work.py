"""The work of `turntrace tools`: shows the tools of a config and calls one, as a run does.

Invariant: whatever was started is stopped, also after Ctrl-C.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from agent.config.config import Config
from agent.errors import AgentError
from agent.loop.calls import ConversationTools, Dispatcher, PendingTurn
from agent.runs.parts import load_template, make_dispatcher, prepare
from agent.terminal import one_line, visible
from conversations.errors import TemplateError
from conversations.messages import ToolCall, content_text
from conversations.template import ChatTemplate
from conversations.trajectory import ToolCallRecord
from tools.base import BaseTool, ToolsError
from tools.function import FunctionTool
from tools.reading import nearest
from tools.registry import load_tools
from tools.toolset import LoadedTool, ToolSet

QUESTION = "..."
"""The task in the prompt that `check` shows."""


# ---------------------------------------------------------------------- turntrace tools check


def check_file(file: str, config: Config | None, *, start: bool) -> int:
    """Prints each tool of a config and what the model sees of them.

    Returns 1 if a tool does not start, else 0.
    """
    tools = load_tools(file)
    plural = "s" * (len(tools) != 1)
    print(f"{file} offers {len(tools)} tool{plural}: {', '.join(map(one_line, tools))}")
    failures = asyncio.run(_shown_and_started(tools, start=start))
    template = prepare(config, tools).template if config else None
    if template:
        report = template.require_tools()
        print(f"\nThe model writes calls in the format {report.name}, {report.how}.")
    print("\nWhat the model sees:")
    for line in _offered(tools, template):
        print(line)
    return int(failures > 0)


async def _shown_and_started(tools: ToolSet, *, start: bool) -> int:
    failures = 0
    try:
        for tool in tools.values():
            print(f"\n{one_line(tool.name)}\n  {_origin(tool)}\n  policy   {_policy(tool)}")
            for warning in tool.warnings:
                print(f"  warning  {one_line(warning)}")
            started = await _started(tool) if start else "not started"
            failures += started.startswith("failed")
            print(f"  backend  {one_line(started)}", flush=True)
    finally:
        await tools.close()
    return failures


def _origin(tool: LoadedTool) -> str:
    is_function = isinstance(tool.tool, FunctionTool)
    named: Any = (
        tool.tool if is_function else type(tool.tool)
    )  # a FunctionTool is named as its function is
    return f"{'function' if is_function else 'class   '} {named.__module__}.{named.__qualname__}"


async def _started(tool: LoadedTool) -> str:
    if getattr(type(tool.tool), "start", BaseTool.start) is BaseTool.start:
        return "none to start"
    began = perf_counter()
    try:
        await ToolSet([tool]).start()
    except ToolsError as error:
        return f"failed: {error}"
    return f"ready after {perf_counter() - began:.2f} s"


def _policy(tool: LoadedTool) -> str:
    """The limits that apply to the tool: its config's, its class's and the defaults.

    Unset ones are left out.
    """
    limits = {
        name: value
        for name, value in dataclasses.asdict(tool.policy).items()
        if value not in (None, 0)
    }
    limits |= {"ends_conversation": True} if tool.ends_conversation else {}
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in limits.items())


def _offered(tools: ToolSet, template: ChatTemplate | None) -> Iterator[str]:
    if template is None:
        yield from (visible(json.dumps(schema, ensure_ascii=False)) for schema in tools.schemas)
        yield (
            "\n(the schemas as JSON; --model or --config shows the prompt that a chat template "
            "makes of them)"
        )
        return
    ids = _prompt_ids(template, tools.schemas)
    yield visible(template.decode(ids))
    try:
        of_tools = len(ids) - len(_prompt_ids(template, []))
    except TemplateError:  # a template that needs tools
        yield f"\n({len(ids)} tokens)"
    else:
        yield f"\n({len(ids)} tokens; {of_tools} of them are the tools')"


def _prompt_ids(template: ChatTemplate, schemas: list[dict[str, Any]]) -> list[int]:
    return [
        token
        for _, ids in template.prompt([{"role": "user", "content": QUESTION}], schemas)
        for token in ids
    ]


# ---------------------------------------------------------------------- turntrace tools call


def call_tool(
    file: str, name: str, arguments: str, ground_truth: str | None, config: Config | None
) -> int:
    """Prints the result of one call. Returns 0 if its status is ok, else 1."""
    parsed = ToolCall(name, _arguments(arguments), raw="")
    tools = load_tools(file)
    if name not in tools:
        raise AgentError(f"{file} has no tool {name!r}{nearest(name, tools)}")
    if tools[name].asks_model:
        raise AgentError(
            f"{name} asks its conversation's model, and a call by hand has none; use turntrace run"
        )
    return asyncio.run(_called(ToolSet([tools[name]]), parsed, ground_truth, config))


def _arguments(text: str) -> dict[str, Any]:
    example = """'{"answer": "42"}'"""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AgentError(
            f"the arguments are not JSON: {error}; write them as a shell takes them: {example}"
        ) from error
    if not isinstance(parsed, dict):
        raise AgentError(
            f"the arguments must be a JSON object, got {text[:80]}; write them as a shell takes "
            f"them: {example}"
        )
    return parsed


async def _called(
    tools: ToolSet, call: ToolCall, ground_truth: str | None, config: Config | None
) -> int:
    conversation = ConversationTools(_dispatcher(tools, config), {}, ground_truth)
    turn = PendingTurn(0, [call])
    clock = _Clock()
    try:
        await tools.start()
        clock.note("start")
        said = await conversation.create()
        clock.note("create")
        await conversation.run(turn)
        clock.note("call")
        rewards = await conversation.rewards()
        clock.note("calc_reward")
    finally:
        try:
            await conversation.release()
        finally:
            await tools.close()
    clock.note("release")
    (line,) = turn.lines()
    for text in (
        *_about(line, rewards, clock.noted),
        *(warning.text for warning in conversation.warnings),
        *filter(None, (conversation.failure,)),
    ):
        print(one_line(text))
    for title, content in (
        *(("created", content_text(message["content"])) for message in said),
        ("response", line.response or ""),
    ):
        print(f"\n--- {title}\n{visible(content)}")
    return int(line.status != "ok")


def _dispatcher(tools: ToolSet, config: Config | None) -> Dispatcher:
    """As in a run.

    Without a config there is no model, so responses cannot be measured in tokens and are not cut.
    """
    if config is None:
        return Dispatcher(tools, max_parallel_calls=1, shorten=lambda text, **limits: None)
    return make_dispatcher(config, tools, load_template(config))


def _about(
    line: ToolCallRecord, rewards: dict[str, float], clock: dict[str, float]
) -> Iterator[str]:
    yield f"status       {line.status}"
    if line.error:
        yield f"error        {line.error}"
    yield f"step reward  {line.reward}"
    yield f"reward       {rewards.get(line.name)}"
    yield f"metrics      {json.dumps(line.metrics, ensure_ascii=False)}"
    yield f"seconds      {', '.join(f'{step} {seconds:.3f}' for step, seconds in clock.items())}"
    for number, attempt in enumerate(line.attempts, 1):
        times = f"queued {attempt.queue_s:.3f} s, ran {attempt.run_s:.3f} s"
        yield f"attempt {number}    {attempt.status}, {times}"


class _Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.noted: dict[str, float] = {}
        self._last = perf_counter()

    def note(self, step: str) -> None:
        now = perf_counter()
        self.noted[step], self._last = now - self._last, now
