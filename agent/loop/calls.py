"""One turn's tool calls, at once: `asyncio.gather` over wrappers that always return.

Invariant: every call of a turn has one line in the ledger, with one status and a text for the model, in call order,
whatever its tool does. A tool's exception, hang or nonsense never reaches a sibling or the conversation. Only
cancellation passes through, after the tools have been told; the lines then say `cancelled`.
"""

from __future__ import annotations

import asyncio
import copy
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from agent.loop.attempts import awaitable, bounded, serve
from agent.loop.boundary import describe, finite, text_of
from agent.loop.limits import Gate
from conversations.encoding import without_lone_surrogates
from conversations.messages import MalformedToolCall, Message, ToolCall, tool_message
from conversations.trajectory import ToolCallRecord
from conversations.truncate import Shortened
from conversations.warning import RecordWarning
from tools.policy import Policy
from tools.toolset import LoadedTool, ToolSet

Cut = Callable[..., Shortened | None]
"""`cut(text, limit=..., side=...)`: what the model may see of a text, None where that is all of it. Without the keywords,
which are a tool's own `max_response_tokens` and `response_side`, as the run says."""

Call = ToolCall | MalformedToolCall

Around = Callable[
    [Callable[[], Coroutine[Any, Any, None]], ToolCallRecord], Coroutine[Any, Any, None]
]
"""Wraps the answering of one call; its ledger line is filled in when that has ended."""

T = TypeVar("T")


class Dispatcher:
    """The tools of a run and their limits, shared by all of its conversations."""

    def __init__(self, tools: ToolSet, *, max_parallel_calls: int, cut: Cut) -> None:
        self.tools = tools
        self.max_parallel_calls = max_parallel_calls
        self.around: Around | None = None
        self._cut = cut
        self._cuts = {
            name: partial(cut, **own)
            for name, tool in tools.items()
            if (own := _own_size(tool.policy))
        }
        self._gates = {name: gate for name, tool in tools.items() if (gate := Gate.of(tool.policy))}

    def gate(self, tool: LoadedTool) -> Gate | None:
        """What the tool's calls of all conversations pass through; None where nothing limits them."""
        return self._gates.get(tool.name)

    def cut(self, name: str, text: str) -> Shortened | None:
        """What the model may see of an answer to a call of that name; None where that is all of it."""
        return self._cuts.get(name, self._cut)(text)


def _own_size(policy: Policy) -> dict[str, Any]:
    sizes = {"limit": policy.max_response_tokens, "side": policy.response_side}
    return {key: value for key, value in sizes.items() if value is not None}


def ledger_lines(calls: Sequence[Call], turn: int) -> list[ToolCallRecord]:
    """The ledger lines of a turn's calls before they run; one that never gets to run stays `cancelled`."""
    return [_line(call, f"call_{turn}_{index}", turn) for index, call in enumerate(calls)]


def _line(call: Call, call_id: str, turn: int) -> ToolCallRecord:
    if isinstance(call, ToolCall):
        return ToolCallRecord(call_id, turn, call.name, call.arguments)
    return ToolCallRecord(
        call_id, turn, call.name or "", call.raw, status="malformed", error=call.error
    )


class ConversationTools:
    """One conversation's tool instances: created before its first turn, released after its last.

    `tools_kwargs` is the row's: its keys choose the tools offered, all of them where it has none.
    """

    def __init__(
        self, dispatcher: Dispatcher, tools_kwargs: Mapping[str, Any], ground_truth: Any
    ) -> None:
        self._dispatcher = dispatcher
        self._kwargs = tools_kwargs
        self._ground_truth = ground_truth
        self._id = (
            uuid.uuid4().hex
        )  # one for all tools, as verl gives them its request id: some share a backend's state
        self._instances: dict[str, str] = {}
        known = dispatcher.tools
        self.offered: dict[str, LoadedTool] = {
            name: known[name] for name in known if name in tools_kwargs or not tools_kwargs
        }
        self.warnings = [
            RecordWarning(
                "unknown_tool_kwargs",
                f"tools_kwargs names {name!r}, which is not a tool of this run",
            )
            for name in tools_kwargs
            if name not in known
        ]
        self.failure: str | None = None

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The OpenAI schemas offered, lossless, in order."""
        return [tool.schema for tool in self.offered.values()]

    # ------------------------------------------------------------------ a conversation's beginning and end

    async def create(self) -> list[Message]:
        """Creates one instance of each tool offered; returns what they say, as messages that follow the prompt.

        A tool that fails here answers none of its calls, and `failure` says why: infrastructure, not the model.
        """
        texts = await _together([self._create(tool) for tool in self.offered.values()])
        return [
            tool_message(text, call_id=None, name=name)
            for name, text in zip(self.offered, texts, strict=True)
            if text
        ]

    async def _create(self, tool: LoadedTool) -> str:
        try:
            kwargs = tool.create_kwargs(
                self._given(tool, "create_kwargs"), copy.deepcopy(self._ground_truth)
            )
            response = await bounded(self._created(tool, kwargs), tool.policy.timeout_s)
            return "" if response is None else text_of(response)
        except Exception as error:
            self._fail(tool, "create", error)
            return ""

    async def _created(self, tool: LoadedTool, kwargs: dict[str, Any]) -> object:
        """Nothing is awaited between creation and the note of it: no cancellation leaves an instance unreleased.

        One that was made although its creation was cancelled is nobody's any more, and may come after the last release.
        """
        created = await awaitable(tool.tool.create(self._id, **kwargs))
        instance_id, response = created if isinstance(created, tuple) else (created, None)
        if (task := asyncio.current_task()) and task.cancelling():
            await tool.tool.release(instance_id, **self._given(tool, "release_kwargs"))
        else:
            self._instances[tool.name] = instance_id
        return response

    async def rewards(self) -> dict[str, float]:
        """The trajectory's reward by each tool that has one. A tool that fails here sets `failure`."""
        parts: dict[str, float] = {}
        for name, instance_id in self._instances.items():
            tool = self.offered[name]
            try:
                value = await bounded(
                    tool.tool.calc_reward(instance_id, **self._given(tool, "calc_reward_kwargs")),
                    tool.policy.timeout_s,
                )
                if value is not None:
                    parts[name] = finite(value)
            except Exception as error:
                self._fail(tool, "calc_reward", error)
        return parts

    async def release(self) -> None:
        """Releases every instance once, all of them even if one fails or the conversation is cancelled meanwhile."""
        if not self._instances:
            return
        releasing = asyncio.ensure_future(self._release())
        try:
            await asyncio.shield(releasing)
        except asyncio.CancelledError:
            await asyncio.wait((releasing,))  # bounded by the tools' time-outs
            raise

    async def _release(self) -> None:
        while self._instances:
            name, instance_id = self._instances.popitem()
            tool = self.offered[name]
            try:
                await bounded(
                    tool.tool.release(instance_id, **self._given(tool, "release_kwargs")),
                    tool.policy.timeout_s,
                )
            except Exception as error:
                text = f"tool {name}: release failed: {describe(error)}"
                self.warnings.append(RecordWarning("release_failed", text))

    def _given(self, tool: LoadedTool, key: str) -> dict[str, Any]:
        """The row's keywords for one coroutine of one tool, as a copy: the task's other samples need them too."""
        kwargs = self._kwargs.get(tool.name)
        given = kwargs.get(key) if isinstance(kwargs, Mapping) else None
        return copy.deepcopy(dict(given)) if isinstance(given, Mapping) else {}

    def _fail(self, tool: LoadedTool, step: str, error: Exception) -> None:
        self.failure = f"tool {tool.name}: {step} failed: {describe(error)}"

    # ------------------------------------------------------------------ one turn

    async def run(self, calls: Sequence[Call], lines: Sequence[ToolCallRecord]) -> None:
        """Runs a turn's calls concurrently and fills in their ledger lines."""
        limit, around = self._dispatcher.max_parallel_calls, self._dispatcher.around
        answers = []
        for index, (call, line) in enumerate(zip(calls, lines, strict=True)):
            answer = partial(self._answer, call, line, index < limit)
            answers.append(around(answer, line) if around else answer())
        await _together(answers)

    async def _answer(self, call: Call, line: ToolCallRecord, within_limit: bool) -> None:
        """Fills in one ledger line. Always returns, but for cancellation."""
        if isinstance(call, MalformedToolCall):
            self._refuse(line, "malformed", f"Error: malformed tool call: {call.error}", line.error)
        elif (tool := self.offered.get(call.name)) is None:
            names = ", ".join(self.offered) or "none"
            self._refuse(
                line,
                "unknown_tool",
                f"Error: there is no tool named {call.name!r}; the tools are: {names}",
            )
        elif problems := _problems(tool, call.arguments):
            self._refuse(
                line,
                "invalid_arguments",
                f"Error: invalid arguments for {call.name}: {'; '.join(problems)}",
            )
        elif not within_limit:
            allowed = self._dispatcher.max_parallel_calls
            self._refuse(
                line,
                "rejected",
                f"Error: not run: at most {allowed} tool calls are allowed in one turn",
            )
        elif (instance_id := self._instances.get(tool.name)) is None:
            self._refuse(
                line, "backend_error", f"Error: {tool.name} is not available", self.failure
            )
        else:
            await self._execute(tool, instance_id, call, line)

    async def _execute(
        self, tool: LoadedTool, instance_id: str, call: ToolCall, line: ToolCallRecord
    ) -> None:
        def execute() -> Coroutine[Any, Any, Any]:
            arguments = copy.deepcopy(
                call.arguments
            )  # what the tool does to them is not what the model wrote
            return tool.tool.execute(instance_id, arguments, **self._given(tool, "execute_kwargs"))

        outcome = await serve(tool, execute, self._dispatcher.gate(tool), line)
        line.reward, line.metrics = outcome.reward, outcome.metrics
        self._close(line, outcome.status, outcome.text, outcome.error)

    def _refuse(
        self, line: ToolCallRecord, status: str, text: str, error: str | None = None
    ) -> None:
        """Answers a call that is not run. What the model wrote may stand in the text: half surrogates, too."""
        self._close(line, status, without_lone_surrogates(text), error)

    def _close(self, line: ToolCallRecord, status: str, text: str, error: str | None) -> None:
        line.status, line.error, line.response = status, error, text
        if shown := self._dispatcher.cut(line.name, text):
            line.response, line.full_response = shown.text, text
            if line.attempts:
                line.attempts[-1].tokens_cut = shown.tokens_cut


async def _together(answers: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What coroutines that always return give, run concurrently; a single one, the common case, needs no task of its own."""
    return [await answers[0]] if len(answers) == 1 else await asyncio.gather(*answers)


def _problems(tool: LoadedTool, arguments: dict[str, Any]) -> list[str]:
    """What is wrong with a call's arguments. A validator may choke on them too: on numbers beyond float, for one."""
    try:
        return tool.validate(arguments)
    except Exception as error:
        return [f"they cannot be checked ({type(error).__name__})"]
