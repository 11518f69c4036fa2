"""The boundary around foreign code: tools, simulated users, and what they return.

Invariant: whatever a foreign coroutine does, `bounded` returns within its time limit and a grace
period, and raises an Exception or our own cancellation, nothing else. What it returned becomes
what a record may hold: text, a finite number, plain JSON; exceptions become text.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from conversations.encoding import without_lone_surrogates
from conversations.trajectory import canonical_json

T = TypeVar("T")

FLOAT32_MAX = 3.4028234663852886e38
GRACE_S = 1.0
"""How long a cancelled coroutine may take to clean up before it is abandoned."""
END_S = 5.0
"""What rewards have, and then releases, if less than that is left of the deadline."""


# ---------------------------------------------------------------------- foreign coroutines


class CallTimeoutError(Exception):
    """The coroutine exceeded its time limit. A TimeoutError of its own is something else."""


async def bounded(begin: Callable[[], Awaitable[T]], timeout_s: float) -> T:
    """The result of the coroutine that `begin` makes.

    On timeout or cancellation the coroutine is cancelled; if it ignores that for `GRACE_S`, it is
    abandoned. Raises CallTimeoutError, and whatever `begin` or its coroutine raises, always as an
    Exception: a SystemExit becomes a RuntimeError. Only our own cancellation passes through.
    """
    loop = asyncio.get_running_loop()
    task, ended = loop.create_task(_contained(begin)), loop.create_future()
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
        raise RuntimeError("the coroutine cancelled itself")
    try:
        return task.result()
    except Exception:
        raise
    except BaseException as error:
        raise _as_exception(error) from error


def time_left(deadline: asyncio.Timeout) -> float:
    """Seconds for a step after the conversation's end: until the deadline, at least `END_S`."""
    ends_at = deadline.when()
    if ends_at is None:
        return math.inf
    return max(ends_at - asyncio.get_running_loop().time(), END_S)


async def _contained(begin: Callable[[], Awaitable[T]]) -> T:
    """Awaits what `begin` returns. Keeps what would end the event loop inside this task."""
    try:
        return await awaitable(begin())
    except SystemExit as error:
        raise _as_exception(error) from error
    except KeyboardInterrupt as error:
        if threading.current_thread() is threading.main_thread():
            raise  # Ctrl-C reaches the main thread alone: it may be the user's
        raise _as_exception(error) from error


def _as_exception(error: BaseException) -> Exception:
    return RuntimeError(f"the coroutine raised {type(error).__name__}")


def awaitable(returned: T) -> T:
    """What a foreign method returned. Raises TypeError if it cannot be awaited."""
    if not inspect.isawaitable(returned):
        kind = type(returned).__name__
        raise TypeError(f"the method must be `async def`; it returned {kind} at once")
    return returned


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def _stop(task: asyncio.Future[Any]) -> None:
    task.cancel()
    # An abandoned task may still raise: asyncio would print that as our error.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait((task,), timeout=GRACE_S)


# ---------------------------------------------------------------------- foreign values


def text_of(response: object) -> str:
    """The text of a tool's response, a `ToolResponse` (ours or verl's) or a str.

    Lone surrogates become U+FFFD. Raises TypeError if the response has no text.
    """
    text = response if isinstance(response, str) else getattr(response, "text", text_of)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise TypeError(f"expected a ToolResponse with text, got {type(response).__name__}")
    return without_lone_surrogates(text)


def utf8_size(text: str) -> int:
    """The number of UTF-8 bytes of a text without lone surrogates."""
    return len(text) if text.isascii() else len(text.encode())


def finite(value: object) -> float:
    """A reward as a number that fits a float32, which is what trainers keep.

    numpy and torch scalars are read by their `item`. Raises TypeError for anything else.
    """
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, (int, float)) and abs(value) <= FLOAT32_MAX:
        return float(value)
    raise TypeError(f"expected a finite number as reward, got {value!r:.100}")


def json_metrics(metrics: object) -> dict[str, Any]:
    """The metrics as plain JSON; a value without a JSON form becomes its text."""
    if not metrics:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(f"expected a dict of metrics, got {type(metrics).__name__}")
    return {str(key): _json_value(value) for key, value in metrics.items()}


def _json_value(value: object) -> Any:
    try:
        return json.loads(canonical_json(value))
    except (TypeError, ValueError, RecursionError):
        return _text(value)[:1000]


def describe(error: BaseException) -> str:
    """An exception for the record: its class, its message and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    cause = error.__cause__
    because = f" from {type(cause).__name__}: {_text(cause)}" if cause else ""
    return f"{type(error).__name__}: {_text(error)}{where}{because}"[:2000]


def _text(value: object) -> str:
    """`str`, for values whose own `__str__` may fail."""
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__} without a text>"
