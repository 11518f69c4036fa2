"""Serving one tool call: attempt after attempt, as its tool's policy allows, until one of them is final.

Invariant: whatever a tool does, an attempt ends within its time-out (and a grace to clean up) as an Outcome; each has
its line in the ledger, cancelled ones too. Cancellation alone passes through, after the tool has been told.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

from agent.loop.boundary import describe, finite, json_metrics, text_of, utf8_size
from agent.loop.limits import CircuitOpenError, Gate
from conversations.encoding import without_lone_surrogates
from conversations.trajectory import Attempt, ToolCallRecord
from tools.base import BackendError, ToolError
from tools.toolset import LoadedTool

GRACE_S = 1.0
"""How long a cancelled tool may take to clean up before it is left behind."""

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 8.0

_random = (
    random.Random()
)  # its own: nobody's seed decides when calls are retried, nor is moved on by it

Execution = Callable[[], Coroutine[Any, Any, Any]]

T = TypeVar("T")


@dataclass(slots=True)
class Outcome:
    """How an attempt ended. `text` is for the model, `error` for the record; `size` the bytes of what the tool answered.

    `may_pass`: the next attempt may end otherwise.
    """

    status: str
    text: str = ""
    error: str | None = None
    error_class: str | None = None
    size: int | None = None
    reward: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    may_pass: bool = False


_CANCELLED = Outcome("cancelled")


class CallTimeoutError(Exception):
    """The tool took too long; its own TimeoutErrors are something else."""


async def serve(
    tool: LoadedTool, execute: Execution, gate: Gate | None, line: ToolCallRecord
) -> Outcome:
    """Runs a call until an attempt is final; returns how that ended. Each attempt is added to `line`, with its seconds.

    Between attempts nothing is held: others use the slot during a pause.
    """
    outcome = await _attempt(tool, execute, gate, line)
    for retry in range(tool.policy.retries):
        if not outcome.may_pass:
            break
        outcome = await _attempt(tool, execute, gate, line, pause_s(retry))
    return outcome


def pause_s(retry: int) -> float:
    """Seconds before a retry, the first being 0: twice as long each time, the later half of it at random."""
    return min(FIRST_PAUSE_S * 2.0**retry, MAX_PAUSE_S) * _random.uniform(0.5, 1.0)


async def _attempt(
    tool: LoadedTool,
    execute: Execution,
    gate: Gate | None,
    line: ToolCallRecord,
    pause_s: float = 0.0,
) -> Outcome:
    outcome, probe, queued, begun = _CANCELLED, False, perf_counter(), 0.0
    try:
        if pause_s:
            await asyncio.sleep(pause_s)
        if gate:
            probe = await gate.enter()
        begun = perf_counter()
        outcome = await _outcome(tool, execute)
    except CircuitOpenError as error:
        text = f"Error: {tool.name} is not available: its backend keeps failing, so the call was not sent"
        outcome = Outcome("backend_error", text, describe(error), type(error).__name__)
    finally:
        ended = perf_counter()
        if gate and begun:
            gate.leave(outcome.status, probe=probe)
        _note(line, outcome, (begun or ended) - queued, ended - (begun or ended))
    return outcome


def _note(line: ToolCallRecord, outcome: Outcome, queue_s: float, run_s: float) -> None:
    line.attempts.append(
        Attempt(outcome.status, queue_s, run_s, outcome.error, outcome.error_class, outcome.size)
    )
    line.queue_s += queue_s
    line.run_s += run_s


async def _outcome(tool: LoadedTool, execute: Execution) -> Outcome:
    """One run of the tool. What it may raise is told apart here: `tools.base` says what each means."""
    name = tool.name
    try:
        response, reward, metrics = _triple(await bounded(execute(), tool.policy.timeout_s))
        text = text_of(response)
        reward = None if reward is None else finite(reward)
        return Outcome(
            "ok", text, size=utf8_size(text), reward=reward, metrics=json_metrics(metrics)
        )
    except CallTimeoutError as error:
        text = f"Error: {name} did not answer within {tool.policy.timeout_s:g} s"
        return Outcome("timeout", text, error_class=type(error).__name__, may_pass=True)
    except BackendError as error:
        return Outcome(
            "backend_error",
            f"Error: {name} is not available",
            describe(error),
            type(error).__name__,
            may_pass=True,
        )
    except ToolError as error:
        return _refusal(name, error)
    except Exception as error:
        return _bug(name, error)


def _triple(answer: Any) -> Sequence[Any]:
    if isinstance(answer, (tuple, list)) and len(answer) == 3:
        return answer
    raise TypeError(
        f"execute must return (ToolResponse, step reward or None, metrics), got {type(answer).__name__}"
    )


def _refusal(name: str, error: ToolError) -> Outcome:
    try:
        text = without_lone_surrogates(str(error))
        return Outcome(
            "tool_error",
            text,
            None,
            type(error).__name__,
            utf8_size(text),
            metrics=json_metrics(error.metrics),
        )
    except Exception as unreadable:  # a ToolError of the tool's own making
        return _bug(name, unreadable)


def _bug(name: str, error: Exception) -> Outcome:
    """The ledger has it all, the model one line."""
    return Outcome("tool_error", f"Error: {name} failed", describe(error), type(error).__name__)


async def bounded(coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
    """The coroutine's result. On time-out or cancellation it is cancelled and, should it ignore that, left behind.

    Raises CallTimeoutError, and what the coroutine raises: always an Exception, but for our own cancellation.
    """
    loop = asyncio.get_running_loop()
    task, ended = loop.create_task(_contained(coroutine)), loop.create_future()
    task.add_done_callback(lambda _: _wake(ended))
    timer = loop.call_later(timeout_s, _wake, ended)
    try:
        await ended  # as asyncio.wait does it, at three quarters of the cost
    except asyncio.CancelledError:
        await _stop(task)
        raise
    finally:
        timer.cancel()
    if not task.done():
        await _stop(task)
        raise CallTimeoutError
    if task.cancelled():
        raise RuntimeError("the tool cancelled itself")
    return task.result()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def _contained(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a tool raises stays in its task: a SystemExit would end the event loop, a Rust panic is no Exception."""
    try:
        return await awaitable(coroutine)
    except (Exception, asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"the tool raised {type(error).__name__}") from error


def awaitable(made: T) -> T:
    """What a tool's method gave. Raises TypeError where nobody can await it."""
    if not inspect.isawaitable(made):
        raise TypeError(
            f"a tool's methods must be `async def`; this one returned {type(made).__name__} at once"
        )
    return made


async def _stop(task: asyncio.Future[Any]) -> None:
    task.cancel()
    task.add_done_callback(
        lambda done: done.cancelled() or done.exception()
    )  # left behind or not, it is not our error
    await asyncio.wait((task,), timeout=GRACE_S)
