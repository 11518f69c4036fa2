"""One call given to its tool: attempts, as many as the tool's policy allows, until one is final.

Invariant: whatever a tool does, an attempt ends within its timeout (and a grace period to clean
up) as an AttemptOutcome, and is noted, a cancelled one too. Only cancellation passes through.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

from agent.loop.boundary import (
    CallTimeoutError,
    bounded,
    describe,
    finite,
    json_metrics,
    text_of,
    utf8_size,
)
from agent.loop.limits import CircuitOpenError, Gate
from conversations.encoding import without_lone_surrogates
from conversations.errors import ImageError
from conversations.images.reading import Picture
from conversations.trajectory import Attempt
from tools.base import BackendError, ToolError
from tools.toolset import LoadedTool

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 8.0

_random = random.Random()  # its own: a seed set elsewhere does not decide when calls are retried

Execution = Callable[[], Coroutine[Any, Any, Any]]
ReadImages = Callable[[Any], Awaitable[tuple[Sequence[Picture], str]]]
"""The pictures of a tool's response, and a note about those that the model cannot be shown.

Raises ImageError if one is no image or is over a limit.
"""


async def no_images(response: Any) -> tuple[Sequence[Picture], str]:
    """For models that see none."""
    images = getattr(response, "image", None)
    count = len(images) if isinstance(images, (list, tuple)) else int(images is not None)
    return (), f"[{count} image{'s' * (count > 1)}, not shown]" if count else ""


class AttemptOutcome(NamedTuple):
    """How an attempt ended. `text` is for the model, `error` for the record.

    `text` is None if the attempt was cancelled. `size` is the number of bytes that the tool
    answered. `is_retryable`: another attempt may end differently.
    """

    status: str
    text: str | None = None
    error: str | None = None
    error_class: str | None = None
    size: int | None = None
    reward: float | None = None
    metrics: dict[str, Any] | None = None
    is_retryable: bool = False
    pictures: Sequence[Picture] = ()


CANCELLED = AttemptOutcome("cancelled")


async def serve(
    tool: LoadedTool,
    execute: Execution,
    gate: Gate | None,
    attempts: list[Attempt],
    read_images: ReadImages = no_images,
) -> AttemptOutcome:
    """Runs a call until an attempt is final; returns how that one ended.

    Each attempt is appended to `attempts`, also if this is cancelled. Between attempts nothing is
    held: other calls use the slot during a pause.
    """
    attempt = partial(_attempt, tool, execute, gate, attempts, read_images)
    outcome = await attempt()
    for retry in range(tool.policy.retries):
        if not outcome.is_retryable:
            break
        outcome = await attempt(pause_s(retry))
    return outcome


def pause_s(retry: int) -> float:
    """Seconds before a retry, counted from 0: doubled each time, the later half of it random."""
    return min(FIRST_PAUSE_S * 2.0**retry, MAX_PAUSE_S) * _random.uniform(0.5, 1.0)


async def _attempt(
    tool: LoadedTool,
    execute: Execution,
    gate: Gate | None,
    attempts: list[Attempt],
    read_images: ReadImages,
    pause_s: float = 0.0,
) -> AttemptOutcome:
    outcome, probe, queued, begun = CANCELLED, False, perf_counter(), 0.0
    try:
        if pause_s:
            await asyncio.sleep(pause_s)
        if gate:
            probe = await gate.enter()
        begun = perf_counter()
        outcome = await _outcome(tool, execute, read_images)
    except CircuitOpenError as error:
        reason = "its backend keeps failing, so the call was not sent"
        text = f"Error: {tool.name} is not available: {reason}"
        outcome = AttemptOutcome("backend_error", text, describe(error), type(error).__name__)
    finally:
        ended = perf_counter()
        if gate and begun:
            gate.leave(outcome.status, probe=probe)
        began = begun or ended
        attempts.append(
            Attempt(
                outcome.status,
                began - queued,
                ended - began,
                outcome.error,
                outcome.error_class,
                outcome.size,
            )
        )
    return outcome


async def _outcome(tool: LoadedTool, execute: Execution, read_images: ReadImages) -> AttemptOutcome:
    """One run of the tool. `tools.base` says what each kind of exception means."""
    name = tool.name
    try:
        response, reward, metrics = _triple(await bounded(execute, tool.policy.timeout_s))
        pictures, note = await read_images(response)
        text = "\n".join(filter(None, (text_of(response), note)))
        return AttemptOutcome(
            "ok",
            text,
            size=utf8_size(text),
            reward=None if reward is None else finite(reward),
            metrics=json_metrics(metrics),
            pictures=pictures,
        )
    except ImageError as error:
        text = f"Error: {name} answered with an image that cannot be shown: {error}"
        return AttemptOutcome("tool_error", text, str(error), type(error).__name__)
    except CallTimeoutError as error:
        text = f"Error: {name} did not answer within {tool.policy.timeout_s:g} s"
        return AttemptOutcome("timeout", text, error_class=type(error).__name__, is_retryable=True)
    except BackendError as error:
        text = f"Error: {name} is not available"
        return AttemptOutcome(
            "backend_error", text, describe(error), type(error).__name__, is_retryable=True
        )
    except ToolError as error:
        return _refusal(name, error)
    except Exception as error:
        return _bug(name, error)


def _triple(answer: Any) -> Sequence[Any]:
    if isinstance(answer, (tuple, list)) and len(answer) == 3:
        return answer
    expected = "(ToolResponse, step reward or None, metrics)"
    raise TypeError(f"execute must return {expected}, got {type(answer).__name__}")


def _refusal(name: str, error: ToolError) -> AttemptOutcome:
    try:
        text = without_lone_surrogates(str(error))
        return AttemptOutcome(
            "tool_error",
            text,
            error_class=type(error).__name__,
            size=utf8_size(text),
            metrics=json_metrics(error.metrics),
        )
    except Exception as unreadable:  # a subclass of ToolError with a bug of its own
        return _bug(name, unreadable)


def _bug(name: str, error: Exception) -> AttemptOutcome:
    """The ledger keeps all of the error, the model is told one line."""
    text = f"Error: {name} failed"
    return AttemptOutcome("tool_error", text, describe(error), type(error).__name__)
