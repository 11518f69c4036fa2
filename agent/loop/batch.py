"""Many conversations at once: admission, groups, progress, and what is kept when a run is cut off.

Invariant: each (task, sample) that was begun ends on exactly one line: in `trajectories.jsonl` if
it finished, in `unfinished.jsonl` if it was cut off. At most `max_concurrent` conversations are
alive; tasks are read as they are admitted, so memory does not grow with the task file.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from agent.loop.conversation import Conversation
from agent.loop.loop import converse
from agent.loop.observer import observed
from agent.loop.record import evidence_file, has_evidence, image_files, trajectory_of
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from conversations.branches import Totals
from conversations.errors import RecordError
from conversations.run.hash_store import HashStore
from conversations.trajectory import Trajectory, Turn
from conversations.warning import RecordWarning

FAILURES = frozenset({"engine_error", "prompt_too_long"})
"""Stop reasons of conversations that nothing can be learned from."""

_OPEN_PARTS: dict[str, Any] = {
    "messages": [],
    "tool_calls": [],
    "tools": [],
    "ground_truth": None,
    "data_source": None,
    "extra": None,
    "engine": {},
    "sampling": {},
}
"""The parts of a record that hold what rows, tools and engines gave, and their empty forms."""


class Store(Protocol):
    """Where conversations are kept: a `RunFolder`, or something in front of one.

    `image_store` is asked for conversations with images alone, before they are appended.
    """

    done: set[tuple[str, int]]

    def keep_evidence(self, data: bytes) -> None: ...

    def append(self, trajectory: Trajectory) -> object: ...

    def append_unfinished(self, trajectory: Trajectory) -> None: ...

    def image_store(self, trajectory: Trajectory) -> HashStore: ...


@dataclass(slots=True)
class Progress:
    """Counters of the finished conversations of a run; `live` are those that are being run.

    `total` is None if the number of tasks is not known. `live` changes on the loop's thread and is
    read on others: copy it before iterating. `turns_elsewhere` and `tokens_elsewhere` are those of
    live conversations that other processes run. `failed` counts what has no reward because
    something failed. `lost` says why a conversation could not be written, one line each.
    """

    total: int | None = None
    done: int = 0
    live: set[Conversation] = field(default_factory=set)
    turns_elsewhere: int = 0
    tokens_elsewhere: int = 0
    skipped: int = 0
    turns: int = 0
    sampled_tokens: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    invalid_calls: int = 0
    infra_errors: int = 0
    failed: int = 0
    rewards: int = 0
    reward_sum: float = 0.0
    stop_reasons: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    @property
    def running(self) -> int:
        """Conversations that are being run."""
        return len(self.live)

    @property
    def turns_so_far(self) -> int:
        """`turns` and those of the live conversations."""
        here = sum(len(conversation.turns) for conversation in tuple(self.live))
        return self.turns + here + self.turns_elsewhere

    @property
    def sampled_tokens_so_far(self) -> int:
        """`sampled_tokens` and those of the live conversations."""
        here = sum(sampled_tokens(conversation.turns) for conversation in tuple(self.live))
        return self.sampled_tokens + here + self.tokens_elsewhere

    @property
    def mean_reward(self) -> float | None:
        """Over the conversations that have a reward."""
        return self.reward_sum / self.rewards if self.rewards else None

    def count(self, trajectory: Trajectory) -> None:
        """Counts a finished conversation."""
        totals = Totals.of(trajectory)
        self.done += 1
        self.stop_reasons[trajectory.stop_reason] += 1
        self.turns += totals.turns
        self.sampled_tokens += totals.sampled_tokens
        self.tool_calls += totals.tool_calls
        self.tool_errors += totals.tool_errors
        self.invalid_calls += totals.invalid_calls
        self.infra_errors += trajectory.infra_error
        self.failed += trajectory.infra_error or trajectory.stop_reason in FAILURES
        if trajectory.reward is not None:
            self.rewards += 1
            self.reward_sum += trajectory.reward


def sampled_tokens(turns: Iterable[Turn]) -> int:
    """How many tokens these turns sampled."""
    return sum(turn.end - turn.start for turn in turns)


Make = Callable[[Task, int], Conversation]
"""Makes the conversation of a (task, sample)."""

Converse = Callable[[Conversation], Awaitable[None]]
"""Runs a conversation to its end; `trajectory_of` is its record then, also if it is cancelled.

Raises RecordError if there is no record of it.
"""


async def converse_observed(conversation: Conversation) -> None:
    """Runs a conversation in this process, watched by the run's observer if there is one."""
    observer = conversation.runtime.observer
    if observer is None:
        await converse(conversation)
        return
    begin = partial(observer.conversation, conversation.task.id, conversation.sample)
    with observed(begin) as tell:
        try:
            await converse(conversation)
        finally:
            tell(trajectory_of(conversation))


async def run_tasks(
    tasks: Iterable[Task],
    runtime: Runtime,
    *,
    n: int = 1,
    max_concurrent: int = 64,
    target: int | None = None,
    make: Make | None = None,
    converse: Converse = converse_observed,
    store: Store | None = None,
    progress: Progress | None = None,
    on_done: Callable[[Trajectory], None] | None = None,
) -> Progress:
    """Runs `n` samples of every task. What `store` already holds is skipped.

    `make` makes each conversation, by default a new one, and `converse` runs it. Once `target`
    conversations are done that did not fail, the others are cut off: aborted in the engine, and
    kept as unfinished.
    `on_done` sees each trajectory once, as it ends. If this is cancelled, so are the running
    conversations: their records are written as unfinished, and CancelledError is raised. An error
    of the store ends the run, as does a TaskError of `make`.
    """
    make = make or partial(Conversation, runtime=runtime)
    return await run_conversations(
        (make(task, sample) for task in tasks for sample in range(n)),
        max_concurrent=max_concurrent,
        target=target,
        converse=converse,
        store=store,
        progress=progress,
        on_done=on_done,
    )


async def run_conversations(
    conversations: Iterable[Conversation],
    *,
    max_concurrent: int = 64,
    target: int | None = None,
    converse: Converse = converse_observed,
    store: Store | None = None,
    progress: Progress | None = None,
    on_done: Callable[[Trajectory], None] | None = None,
) -> Progress:
    """`run_tasks` for conversations of any kind; each is made when there is room to run it."""
    batch = _Batch(store, progress or Progress(), on_done, target, converse)
    missing = filter(batch.is_missing, conversations)
    slots = asyncio.Semaphore(max_concurrent)
    try:
        async with asyncio.TaskGroup() as group:
            while (
                await slots.acquire()
                and not batch.has_enough
                and (conversation := next(missing, None))
            ):
                running = group.create_task(batch.run(conversation))
                batch.running.add(running)
                running.add_done_callback(batch.running.discard)
                running.add_done_callback(lambda _: slots.release())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return batch.progress


@dataclass(frozen=True, slots=True)
class _Batch:
    store: Store | None
    progress: Progress
    on_done: Callable[[Trajectory], None] | None
    target: int | None
    converse: Converse
    running: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def has_enough(self) -> bool:
        """Whether the rest can be cut off. Failures, which come fast, do not count."""
        return self.target is not None and self.progress.done - self.progress.failed >= self.target

    def is_missing(self, conversation: Conversation) -> bool:
        """False, and counted as skipped, if the store has it already."""
        is_there = (
            self.store is not None
            and (conversation.task.id, conversation.sample) in self.store.done
        )
        self.progress.skipped += is_there
        return not is_there

    async def run(self, conversation: Conversation) -> None:
        self.progress.live.add(conversation)
        try:
            await self.converse(conversation)
            if self.store and has_evidence(conversation):  # first: the record names it
                await asyncio.to_thread(self._keep_evidence, self.store, conversation)
            await self._keep_images(conversation)
        except asyncio.CancelledError:
            cut_off = trajectory_of(conversation)
            if self.has_enough:
                text = f"cut off when {self.target} conversations were done (over_sample_rate)"
                cut_off.warnings.append(RecordWarning("over_sampled", text))
            if self.store:
                self._keep_evidence(self.store, conversation)
                if image_files(conversation):
                    _put_images(conversation, self._images(conversation))
                self._keep(self.store.append_unfinished, cut_off)
            raise
        except RecordError as error:
            self.progress.lost.append(str(error))
            return
        finally:
            self.progress.live.discard(conversation)
        trajectory = trajectory_of(conversation)
        # What the engine's owner aborted was cut off, as what we cancel; a replay may end so.
        is_cut_off = trajectory.stop_reason == "cancelled" and trajectory.parent is None
        kept: Trajectory | None = trajectory
        if self.store:
            append = self.store.append_unfinished if is_cut_off else self.store.append
            kept = self._keep(append, trajectory)
        if kept is None:
            return
        if not is_cut_off:
            self.progress.count(kept)
        if self.on_done:
            self.on_done(kept)
        if self.has_enough:
            for other in self.running - {asyncio.current_task()}:
                other.cancel()

    def _keep_evidence(self, store: Store, conversation: Conversation) -> None:
        if (file := evidence_file(conversation)) is not None:
            store.keep_evidence(file)

    async def _keep_images(self, conversation: Conversation) -> None:
        """Writes the images to where the record will go; a trainer's next step changes that."""
        folder: Path | None = None
        while self.store and image_files(conversation):
            images = self._images(conversation)
            if images.folder == folder:
                return
            folder = images.folder
            await asyncio.to_thread(_put_images, conversation, images)

    def _images(self, conversation: Conversation) -> HashStore:
        if self.store is None:
            raise ValueError("there is no store")
        return self.store.image_store(trajectory_of(conversation))

    def _keep(
        self, append: Callable[[Trajectory], object], trajectory: Trajectory
    ) -> Trajectory | None:
        """Writes the trajectory, or a copy without the parts that have no JSON form.

        Returns what was written, None if neither could be.
        """
        try:
            append(trajectory)
            return trajectory
        except RecordError as error:
            bare = bare_record(trajectory, str(error))
        try:
            append(bare)
            return bare
        except RecordError as error:
            self.progress.lost.append(str(error))
            return None


def _put_images(conversation: Conversation, store: HashStore) -> None:
    for png in image_files(conversation):
        store.put(png)


def bare_record(trajectory: Trajectory, error: str) -> Trajectory:
    """A record of a failure, with those open parts of the trajectory that have a JSON form."""
    failed: dict[str, Any] = {
        "stop_reason": "engine_error",
        "infra_error": True,
        "error": error,
        "reward": None,
        "reward_parts": {},
        "warnings": [
            *trajectory.warnings,
            RecordWarning("partial", "parts that have no JSON form were left out"),
        ],
    }
    bare = dataclasses.replace(trajectory, **failed, **_OPEN_PARTS)
    for name in _OPEN_PARTS:
        fuller = dataclasses.replace(bare, **{name: getattr(trajectory, name)})
        with contextlib.suppress(RecordError):
            fuller.to_line()
            bare = fuller
    return bare
