"""One turn's tool calls, at once: `asyncio.gather` over wrappers that always return.

Invariant: every call of a turn has one line in the ledger, with one status and a text for the model, in call order,
whatever its tool does. A tool's exception, hang or nonsense never reaches a sibling or the conversation. Only
cancellation passes through, after the tools have been told; the lines then say `cancelled`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import json
import traceback
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from time import perf_counter
from typing import Any, TypeVar

from conversations.encoding import without_lone_surrogates
from conversations.messages import MalformedToolCall, Message, ToolCall, tool_message
from conversations.trajectory import Attempt, ToolCallRecord, canonical_json
from tools.base import BackendError, ToolError
from tools.toolset import LoadedTool, ToolSet

GRACE_S = 1.0
"""How long a cancelled tool may take to clean up before it is left behind."""

FLOAT32_MAX = 3.4028234663852886e38

Cut = Callable[[str], str | None]
"""A response shortened to what the model may see, None where it fits as it is."""

Call = ToolCall | MalformedToolCall

Around = Callable[[Callable[[], Coroutine[Any, Any, None]], ToolCallRecord], Coroutine[Any, Any, None]]
"""Wraps the answering of one call; its ledger line is filled in when that has ended."""

T = TypeVar("T")


class Dispatcher:
    """The tools of a run and their limits, shared by all of its conversations."""

    def __init__(self, tools: ToolSet, *, max_parallel_calls: int, cut: Cut) -> None:
        self.tools = tools
        self.max_parallel_calls = max_parallel_calls
        self.cut = cut
        self.around: Around | None = None
        self._slots = {name: asyncio.Semaphore(tool.max_concurrency) for name, tool in tools.items() if tool.max_concurrency}

    def slot(self, tool: LoadedTool) -> contextlib.AbstractAsyncContextManager[None]:
        """What bounds the tool's concurrent calls over all conversations."""
        return self._slots.get(tool.name) or contextlib.nullcontext()


def ledger_lines(calls: Sequence[Call], turn: int) -> list[ToolCallRecord]:
    """The ledger lines of a turn's calls before they run; one that never gets to run stays `cancelled`."""
    return [_line(call, f"call_{turn}_{index}", turn) for index, call in enumerate(calls)]


def _line(call: Call, call_id: str, turn: int) -> ToolCallRecord:
    if isinstance(call, ToolCall):
        return ToolCallRecord(call_id, turn, call.name, call.arguments)
    return ToolCallRecord(call_id, turn, call.name or "", call.raw, status="malformed", error=call.error)


class ConversationTools:
    """One conversation's tool instances: created before its first turn, released after its last.

    `tools_kwargs` is the row's: its keys choose the tools offered, all of them where it has none.
    """

    def __init__(self, dispatcher: Dispatcher, tools_kwargs: Mapping[str, Any], ground_truth: Any) -> None:
        self._dispatcher = dispatcher
        self._kwargs = tools_kwargs
        self._ground_truth = ground_truth
        self._instances: dict[str, str] = {}
        known = dispatcher.tools
        self.offered: dict[str, LoadedTool] = {name: known[name] for name in known if name in tools_kwargs or not tools_kwargs}
        self.warnings = [f"tools_kwargs names {name!r}, which is not a tool of this run" for name in tools_kwargs if name not in known]
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
        return [tool_message(text, call_id=None, name=name) for name, text in zip(self.offered, texts, strict=True) if text]

    async def _create(self, tool: LoadedTool) -> str:
        try:
            kwargs = tool.create_kwargs(self._given(tool, "create_kwargs"), copy.deepcopy(self._ground_truth))
            response = await _bounded(self._created(tool, kwargs), tool.timeout_s)
            return "" if response is None else without_lone_surrogates(_text(response))
        except Exception as error:
            self._fail(tool, "create", error)
            return ""

    async def _created(self, tool: LoadedTool, kwargs: dict[str, Any]) -> object:
        """Nothing is awaited between creation and the note of it: no cancellation leaves an instance unreleased."""
        created = await tool.tool.create(uuid.uuid4().hex, **kwargs)
        instance_id, response = created if isinstance(created, tuple) else (created, None)
        self._instances[tool.name] = instance_id
        return response

    async def rewards(self) -> dict[str, float]:
        """The trajectory's reward by each tool that has one. A tool that fails here sets `failure`."""
        parts: dict[str, float] = {}
        for name, instance_id in self._instances.items():
            tool = self.offered[name]
            try:
                value = await _bounded(tool.tool.calc_reward(instance_id, **self._given(tool, "calc_reward_kwargs")), tool.timeout_s)
                if value is not None:
                    parts[name] = _number(value)
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
                await _bounded(tool.tool.release(instance_id, **self._given(tool, "release_kwargs")), tool.timeout_s)
            except Exception as error:
                self.warnings.append(f"tool {name}: release failed: {describe(error)}")

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
            answer = functools.partial(self._answer, call, line, index < limit)
            answers.append(around(answer, line) if around else answer())
        await _together(answers)

    async def _answer(self, call: Call, line: ToolCallRecord, within_limit: bool) -> None:
        """Fills in one ledger line. Always returns, but for cancellation."""
        if isinstance(call, MalformedToolCall):
            self._close(line, "malformed", f"Error: malformed tool call: {call.error}", line.error)
        elif (tool := self.offered.get(call.name)) is None:
            names = ", ".join(self.offered) or "none"
            self._close(line, "unknown_tool", f"Error: there is no tool named {call.name!r}; the tools are: {names}")
        elif problems := _problems(tool, call.arguments):
            self._close(line, "invalid_arguments", f"Error: invalid arguments for {call.name}: {'; '.join(problems)}")
        elif not within_limit:
            allowed = self._dispatcher.max_parallel_calls
            self._close(line, "rejected", f"Error: not run: at most {allowed} tool calls are allowed in one turn")
        elif (instance_id := self._instances.get(tool.name)) is None:
            self._close(line, "backend_error", f"Error: {tool.name} is not available", self.failure)
        else:
            await self._attempt(tool, instance_id, call, line)

    async def _attempt(self, tool: LoadedTool, instance_id: str, call: ToolCall, line: ToolCallRecord) -> None:
        waiting = perf_counter()
        async with self._dispatcher.slot(tool):
            started = perf_counter()
            try:
                await self._execute(tool, instance_id, call, line)
            except Exception as error:  # a bug of the tool: the ledger has it all, the model one line
                self._close(line, "tool_error", f"Error: {tool.name} failed", describe(error))
            finally:
                ended = perf_counter()
                line.queue_s, line.run_s = started - waiting, ended - started
                line.attempts.append(Attempt(line.status, line.queue_s, line.run_s, line.error))

    async def _execute(self, tool: LoadedTool, instance_id: str, call: ToolCall, line: ToolCallRecord) -> None:
        """One run of the tool. What it may raise is told apart here: `tools.base` says what each means."""
        name = tool.name
        try:
            arguments = copy.deepcopy(call.arguments)  # what the tool does to them is not what the model wrote
            kwargs = self._given(tool, "execute_kwargs")
            response, reward, metrics = await _bounded(tool.tool.execute(instance_id, arguments, **kwargs), tool.timeout_s)
            text, reward, metrics = _text(response), None if reward is None else _number(reward), _json_metrics(metrics)
        except _TimeoutExpiredError:
            self._close(line, "timeout", f"Error: {name} did not answer within {tool.timeout_s:g} s")
        except ToolError as error:
            line.metrics = _json_metrics(error.metrics)
            self._close(line, "tool_error", str(error))
        except BackendError as error:
            self._close(line, "backend_error", f"Error: {name} is not available", describe(error))
        else:
            line.reward, line.metrics = reward, metrics
            self._close(line, "ok", text)

    def _close(self, line: ToolCallRecord, status: str, text: str, error: str | None = None) -> None:
        line.status, line.error = status, error
        text = without_lone_surrogates(text)
        shown = self._dispatcher.cut(text)
        line.response, line.full_response = (text, None) if shown is None else (shown, text)


async def _together(answers: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What coroutines that always return give, run concurrently; a single one, the common case, needs no task of its own."""
    return [await answers[0]] if len(answers) == 1 else await asyncio.gather(*answers)


class _TimeoutExpiredError(Exception):
    """The tool took too long; its own TimeoutErrors are something else."""


async def _bounded(coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
    """The coroutine's result. On time-out or cancellation it is cancelled and, should it ignore that, left behind."""
    task = asyncio.ensure_future(_contained(coroutine))
    try:
        done, _ = await asyncio.wait((task,), timeout=timeout_s)
    except asyncio.CancelledError:
        await _stop(task)
        raise
    if not done:
        await _stop(task)
        raise _TimeoutExpiredError
    if task.cancelled():
        raise RuntimeError("the tool cancelled itself")
    return task.result()


async def _contained(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a tool raises stays in its task: a SystemExit would end the event loop, a Rust panic is no Exception."""
    try:
        return await coroutine
    except (Exception, asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"the tool raised {type(error).__name__}") from error


async def _stop(task: asyncio.Future[Any]) -> None:
    task.cancel()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # left behind or not, it is not our error
    await asyncio.wait((task,), timeout=GRACE_S)


def _problems(tool: LoadedTool, arguments: dict[str, Any]) -> list[str]:
    """What is wrong with a call's arguments. A validator may choke on them too: on numbers beyond float, for one."""
    try:
        return tool.validate(arguments)
    except Exception as error:
        return [f"they cannot be checked ({type(error).__name__})"]


def _text(response: object) -> str:
    """The text of a tool's answer: a `ToolResponse` (ours or verl's) or a plain string."""
    text = response if isinstance(response, str) else getattr(response, "text", _text)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise TypeError(f"expected a ToolResponse with text, got {type(response).__name__}")
    return text


def _number(value: object) -> float:
    """A reward as a number that has a float32, as trainers keep it; so sums are finite too. numpy's scalars have `item`."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, (int, float)) and abs(value) <= FLOAT32_MAX:
        return float(value)
    raise TypeError(f"expected a finite number as reward, got {value!r:.100}")


def _json_metrics(metrics: object) -> dict[str, Any]:
    """The metrics as plain JSON; what has no JSON form becomes its text."""
    if not metrics:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(f"expected a dict of metrics, got {type(metrics).__name__}")
    return {str(key): _json_value(value) for key, value in metrics.items()}


def _json_value(value: object) -> Any:
    try:
        return json.loads(canonical_json(value))
    except (TypeError, ValueError, RecursionError):
        return _say(value)[:1000]


def describe(error: BaseException) -> str:
    """An exception for the record: its class, message and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    cause = f" from {type(error.__cause__).__name__}: {_say(error.__cause__)}" if error.__cause__ else ""
    return f"{type(error).__name__}: {_say(error)}{where}{cause}"[:2000]


def _say(value: object) -> str:
    """`str`, of things whose own text may fail."""
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__} without a text>"
