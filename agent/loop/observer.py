"""What may watch a run: told of each conversation, generation and tool call.

Invariant: an observer never decides anything. What it raises is logged, and the conversation and
its record are as they would be without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

from agent.engines.engine import Generation
from agent.loop.ledger import CallResult
from conversations.trajectory import Trajectory

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Each method is entered when something begins and left when it ends, by an exception or not.

    What the context gives is called with the result, once, if there is one.
    """

    def conversation(
        self, task_id: str, sample: int
    ) -> AbstractContextManager[Callable[[Trajectory], None]]:
        """One conversation; a cancelled one has a result too."""
        ...

    def generation(
        self,
        engine: Mapping[str, Any],
        request_id: str,
        prompt_tokens: int,
        sampling: Mapping[str, Any],
    ) -> AbstractContextManager[Callable[[Generation], None]]:
        """One turn being sampled. `engine` is what `Engine.describe` returns."""
        ...

    def tool_call(
        self, call_id: str, name: str
    ) -> AbstractContextManager[Callable[[CallResult], None]]:
        """One call being answered, by its tool or without it."""
        ...


@contextmanager
def observed(
    begin: Callable[[], AbstractContextManager[Callable[[T], None]]],
) -> Iterator[Callable[[T], None]]:
    """Enters the context that `begin` returns; an exception of the observer is logged only."""
    try:
        context = begin()
        tell = context.__enter__()
    except Exception:
        logger.exception("an observer failed")
        yield lambda result: None
        return

    def tell_safely(result: T) -> None:
        try:
            tell(result)
        except Exception:
            logger.exception("an observer failed")

    try:
        yield tell_safely
    except BaseException as error:
        _leave(context, error)
        raise
    _leave(context, None)


def _leave(context: AbstractContextManager[Any], error: BaseException | None) -> None:
    trace = error.__traceback__ if error else None
    try:
        context.__exit__(type(error) if error else None, error, trace)
    except Exception as raised:
        if raised is not error:
            logger.exception("an observer failed")
    except BaseException as raised:  # a cancellation that the context passes on
        if raised is not error:
            raise
