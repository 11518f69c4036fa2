"""A task being run: its tokens, messages, turns and calls, and what may happen to them.

Invariants (DESIGN: the token contract). The engine's input is always the conversation's own token
sequence, unchanged and only ever longer. Work per turn depends on the turn, never on the length of
the conversation. `loop.py` decides the order of things.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from time import perf_counter
from typing import Any

from agent.engines.engine import EndedGeneration, Generation, Interrupted
from agent.errors import EngineError
from agent.loop.asides import Asides, CallModel
from agent.loop.boundary import finite
from agent.loop.calls import ConversationTools, PendingTurn
from agent.loop.compaction import NO_CALLS, after_summary, sequence_of, summary_request
from agent.loop.evidence import EvidenceLog
from agent.loop.observer import observed
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from agent.loop.turns import check_generation, joined, turn_of
from agent.loop.users import SimulatedUser
from conversations.errors import ImageError
from conversations.images.placing import PlacedImage
from conversations.images.reading import Picture
from conversations.images.sources import ImageSource, hash_of
from conversations.messages import (
    Message,
    assistant_message,
    image_parts,
    tool_message,
    with_images,
)
from conversations.tokens import TEMPLATE, TOOL, USER, Piece, TokenSequence
from conversations.trajectory import (
    INVALID_STATUSES,
    Branch,
    ToolCallRecord,
    Trajectory,
    Turn,
    total_reward,
)
from conversations.warning import RecordWarning

USER_REWARDS = "user_turn_rewards"
"""Where a record's `reward_parts` keep the rewards of the user's turns."""


@dataclass(slots=True)
class Ending:
    """Why a conversation ended. The first stop reason stays."""

    stop_reason: str | None = None
    error: str | None = None
    infra_error: bool = False

    @property
    def is_failure(self) -> bool:
        """Whether the conversation has no reward because something failed."""
        return self.infra_error or self.stop_reason == "engine_error"

    def stop(self, reason: str, error: str | None = None) -> None:
        """Sets the stop reason, once."""
        self.stop_reason = self.stop_reason or reason
        self.error = self.error or error

    def fail(self, error: str, reason: str | None = None) -> None:
        """Notes a failure of infrastructure: the reward is unknown, never 0."""
        if reason:
            self.stop(reason)
        self.infra_error, self.error = True, self.error or error


@dataclass(slots=True)
class Clock:
    """When a conversation started and how long it ran, `earlier_s` of it before it was resumed."""

    started_at: str = field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds")
    )
    earlier_s: float = 0.0
    wall_s: float = 0.0
    _begun: float = field(default_factory=perf_counter)

    @property
    def so_far_s(self) -> float:
        """Seconds until now."""
        return self.earlier_s + perf_counter() - self._begun

    def stop(self) -> None:
        """Sets `wall_s`."""
        self.wall_s = self.so_far_s


SentFiles = tuple[tuple[str, bytes], ...]
"""Relative paths and contents."""


@dataclass(frozen=True, slots=True)
class RanElsewhere:
    """What another process made of a conversation: its record, the content of its evidence, its
    images as PNG, and the files of an agent program.
    """

    record: Trajectory
    evidence: bytes | None = None
    images: tuple[bytes, ...] = ()
    files: SentFiles = ()


@dataclass(frozen=True, slots=True)
class Counterparts:
    """Who answers a conversation's turns: tools, not yet created, and a user, not yet started."""

    tools: ConversationTools | None
    user: SimulatedUser | None

    @classmethod
    def of(cls, task: Task, runtime: Runtime) -> Counterparts:
        """The run's tools and the user that the row chooses. Raises TaskError if it is unknown."""
        dispatcher, interactions = runtime.dispatcher, runtime.interactions
        tools, user = None, None
        if dispatcher:
            tools = ConversationTools(
                dispatcher, task.tools_kwargs, task.ground_truth, runtime.observer
            )
        if interactions is not None and task.interaction_kwargs:
            kwargs = task.interaction_kwargs
            user = SimulatedUser(interactions.chosen(kwargs), kwargs)
        return cls(tools, user)


class Conversation:
    """The state of one conversation, and its transitions.

    `pending` is the last turn while it waits for an answer; `partial_turn` is the last turn if it
    was interrupted and its rest is still to be sampled. `sequences` are those before the last
    compaction, the trunk first; if `summing_up`, the next turn is a summary.
    `before` is the record that a resumed conversation continues, until its tools and user are in
    the state that they were in. `elsewhere` is what another process made of it: then nothing else
    here is its record.
    Raises TaskError if the row chooses a user that the run does not have.
    `images` are those that lie in the tokens, in order; `pictures` are all by hash.
    `restored_images` are an earlier record's that lie in the tokens, until `open` has read their
    files, and `known_images` the hashes of all that it names. `asides` are what the tools ask the
    model; None without tools.
    """

    __slots__ = (
        "_id",
        "_requests",
        "asides",
        "before",
        "clock",
        "elsewhere",
        "ending",
        "evidence",
        "images",
        "invalid_in_a_row",
        "known_images",
        "messages",
        "parent",
        "partial_turn",
        "pending",
        "pictures",
        "restored_images",
        "rewards",
        "runtime",
        "sample",
        "sequences",
        "settled_calls",
        "summing_up",
        "task",
        "tokens",
        "tools",
        "turns",
        "user",
        "warnings",
    )

    def __init__(
        self, task: Task, sample: int, runtime: Runtime, counterparts: Counterparts | None = None
    ) -> None:
        self._id = uuid.uuid4().hex[:24]
        self._requests = 0
        self.task = task
        self.sample = sample
        self.runtime = runtime
        self.tokens = TokenSequence()
        self.messages: list[Message] = list(task.messages)
        self.turns: list[Turn] = []
        self.settled_calls: list[ToolCallRecord] = []
        self.pending: PendingTurn | None = None
        self.partial_turn: Turn | None = None
        self.invalid_in_a_row = 0
        self.images: list[PlacedImage] = []
        self.pictures: dict[str, Picture] = {}
        self.restored_images: list[dict[str, Any]] = []
        self.known_images: list[str] = []
        self.warnings: list[RecordWarning] = []
        self.rewards: dict[str, Any] = {}
        self.ending = Ending()
        self.clock = Clock()
        self.parent: dict[str, Any] | None = None
        self.before: Trajectory | None = None
        self.sequences: list[Branch] = []
        self.summing_up = False
        self.elsewhere: RanElsewhere | None = None
        asked = runtime.settings.evidence
        self.evidence = EvidenceLog(asked) if asked else None
        if counterparts is None:
            counterparts = Counterparts.of(task, runtime)
            self._warn_of_lost_user()
        self.tools = counterparts.tools
        self.asides: Asides | None = None
        if self.tools:
            self.tools.pictures = self.pictures
            self.asides = Asides(runtime, self.tools.played_asides)
            self.tools.model_of = partial(CallModel, self.asides)
        self.user = counterparts.user

    def _warn_of_lost_user(self) -> None:
        if self.task.interaction_kwargs and self.runtime.interactions is None:
            text = (
                "the row has interaction_kwargs, but this run has no interactions: nobody answers"
            )
            self.warnings.append(RecordWarning("no_interactions", text))

    # ------------------------------------------------------------------ beginning and end

    @property
    def deadline_s(self) -> float | None:
        """Seconds that the conversation may still run, from its (re)start on; None: no limit."""
        limit_s = self.runtime.settings.deadline_s
        return None if limit_s is None else max(0.0, limit_s - self.clock.earlier_s)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools offered, as OpenAI schemas."""
        return self.tools.schemas if self.tools else []

    @property
    def ledger(self) -> list[ToolCallRecord]:
        """The lines of all calls of the sequence so far."""
        return [*self.settled_calls, *(self.pending.lines() if self.pending else ())]

    @property
    def all_calls(self) -> list[ToolCallRecord]:
        """The lines of all calls so far, earlier sequences included."""
        return [*(line for one in self.sequences for line in one.tool_calls), *self.ledger]

    @property
    def num_turns(self) -> int:
        """Turns so far, those of earlier sequences and those that tools asked for included."""
        asked = self.asides.num_turns if self.asides else 0
        if not self.sequences:
            return len(self.turns) + asked
        return len(self.turns) + sum(len(one.turns) for one in self.sequences) + asked

    @property
    def response_length(self) -> int:
        """Tokens after the prompts so far, those of all sequences included."""
        asked = self.asides.response_length if self.asides else 0
        if not self.sequences:
            return self.tokens.response_length + asked
        earlier = sum(len(one.response_ids) for one in self.sequences)
        return self.tokens.response_length + earlier + asked

    async def open(self) -> bool:
        """Reads the images, creates the tools, renders the prompt and starts the user.

        Returns False if the prompt is longer than its budget. Raises TemplateError if the template
        refuses the task's messages, ImageError if one of its images cannot be shown.
        """
        await self._read_images()
        created = await self.tools.create() if self.tools else []
        if not self.tokens.ids:  # a restored conversation has its prompt
            given = self.messages
            pieces = self.runtime.template.prompt(given, self.schemas, created)
            pieces, images = self._placed(pieces, [*given, *created])
            for kind, ids in pieces:
                self.tokens.append(kind, ids)
            self.images += images
            self.messages = [*given, *created]
        if not self._prompt_fits():
            return False
        if self.user:
            await self.user.start()
        self.before = None
        return True

    async def _read_images(self) -> None:
        """Reads the images of the task; its messages name them by their hashes from here on.

        Raises ImageError.
        """
        known = [ImageSource(sha256=sha256) for sha256 in self.known_images]
        sources = [*self.task.images, *known]
        if not sources:
            return
        pictures = await self.runtime.image_reader().read(sources)
        self.pictures |= {picture.sha256: picture for picture in pictures}
        if not self.tokens.ids:
            given = pictures[: len(self.task.images)]
            self.messages = with_images(self.messages, [one.reference for one in given])
        self.images += [
            PlacedImage(self.pictures[one["sha256"]], tuple(one["grid"]), one["start"], one["end"])
            for one in self.restored_images
        ]
        self.restored_images = []

    def _placed(
        self, pieces: Sequence[Piece], messages: Sequence[Message]
    ) -> tuple[list[Piece], list[PlacedImage]]:
        """Rendered pieces of `messages` with their images, as they will follow what is there.

        Raises ImageError.
        """
        template, shift = self.runtime.template, len(self.tokens)
        pictures = [self.pictures[hash_of(part["image"])] for part in image_parts(messages)]
        processor = template.images
        grids = [processor.grid(one.width, one.height) for one in pictures] if processor else []
        placed, spans = template.place(pieces, grids)
        images = [
            PlacedImage(picture, grid, start + shift, end + shift)
            for picture, grid, (start, end) in zip(pictures, grids, spans, strict=True)
        ]
        return placed, images

    def _prompt_fits(self) -> bool:
        settings, tokens = self.runtime.settings, self.tokens
        length = len(tokens) if tokens.prompt_length is None else tokens.prompt_length
        return length <= min(settings.prompt_length, settings.max_model_len - 1)

    async def collect_rewards(self, within_s: float) -> None:
        """Asks tools and user for the trajectory's reward, within `within_s`.

        There is none if nothing was sampled, something failed, or the conversation was cut off.
        """
        ending = self.ending
        self._note_backend_failures()
        if self.tools and ending.stop_reason == "cancelled":
            await self.tools.ended_early()
        elif self.tools and self.num_turns and not ending.is_failure:
            self.rewards = await self.tools.rewards(within_s)
        if self.user and self.user.rewards:
            self.rewards[USER_REWARDS] = self.user.rewards
        for failure in self._failures():
            ending.fail(failure)
        self._check_sum()

    def _note_backend_failures(self) -> None:
        """A conversation without an answer because a backend failed has no reward."""
        ledger, ending = self.all_calls, self.ending
        if any(line.status == "backend_error" for line in ledger):
            ending.infra_error = True
        if ending.stop_reason == "deadline" and (failure := _failure_before_deadline(ledger)):
            ending.fail(failure)

    def _failures(self) -> list[str]:
        failures = [self.tools.failure] if self.tools and self.tools.failure else []
        return failures + (self.user.failures if self.user else [])

    def _check_sum(self) -> None:
        """Each reward fits a float32, their sum may not: trainers would see infinity."""
        try:
            if self.rewards:
                finite(total_reward(self.rewards))
        except TypeError as error:
            self.ending.fail(f"the sum of the rewards: {error}")

    async def close(self, within_s: float = math.inf) -> None:
        """Releases the tools, finalizes the user, each within `within_s`, and stops the clock."""
        try:
            if self.tools:
                await self.tools.release(within_s)
                self.warnings += self.tools.warnings
        finally:
            if self.user:
                await self.user.finalize(within_s)
                self.warnings += self.user.warnings
                self.warnings += [
                    RecordWarning("user_failed", failure)
                    for failure in self.user.failures
                    if failure != self.ending.error
                ]
        if not self.runtime.template.has_text(max(self.tokens.ids, default=0)):
            text = "the model sampled ids that the tokenizer does not have: is it model_path's?"
            self.warnings.append(RecordWarning("unknown_ids", text))
        self.clock.stop()

    # ------------------------------------------------------------------ sampling a turn

    def room(self) -> int:
        """How many tokens the next turn may sample."""
        settings = self.runtime.settings
        room = min(
            settings.response_length - self.response_length,
            settings.max_model_len - len(self.tokens),
        )
        if settings.max_tokens is None:
            return room
        begun = self.partial_turn.end - self.partial_turn.start if self.partial_turn else 0
        return min(room, settings.max_tokens - begun)

    async def generate(self, room: int) -> Generation:
        """Samples a turn of at most `room` tokens.

        Raises EngineError if the engine failed or its answer is not data. If the turn is
        interrupted, what was sampled of it is appended, and CancelledError raised.
        """
        try:
            generation = await self._sampled(room)
        except Interrupted as interrupt:
            self._append_interrupted(interrupt.generation, room)
            raise asyncio.CancelledError from interrupt
        except EndedGeneration as end:
            self._append_interrupted(end.generation, room)
            raise
        check_generation(generation, len(self.tokens), room, ("stop", "length"))
        return generation

    async def _sampled(self, room: int) -> Generation:
        runtime, ids, request_id = self.runtime, self.tokens.ids, self._request_id()
        sampling = {
            **runtime.settings.sampling,
            "max_new_tokens": room,
            "stop_token_ids": runtime.template.stop_token_ids,
        }
        engine, observer = runtime.engine, runtime.observer
        more: dict[str, Any] = {"evidence": self.evidence.request} if self.evidence else {}
        if self.images:
            more["images"] = self.images
        if observer is None:
            return await engine.generate(ids, sampling, request_id=request_id, **more)
        begin = partial(observer.generation, engine.describe(), request_id, len(ids), sampling)
        with observed(begin) as tell:
            generation = await engine.generate(ids, sampling, request_id=request_id, **more)
            tell(generation)
            return generation

    def _request_id(self) -> str:
        """32 hex digits: the conversation's, and a count. A uuid a turn costs ten times as much."""
        self._requests += 1
        return f"{self._id}{self._requests:08x}"

    def _append_interrupted(self, generation: Generation | None, room: int) -> None:
        """Keeps what was sampled of an interrupted turn; the calls in it stay `cancelled`."""
        with contextlib.suppress(EngineError):  # what is not data is left out
            if generation:
                check_generation(generation, len(self.tokens), room, ("abort",))
                self.append_turn(generation)

    def append_turn(self, generation: Generation) -> None:
        """Appends a turn's tokens and its message. The rest of an interrupted turn completes it."""
        template, turn = self.runtime.template, turn_of(len(self.tokens), generation)
        if self.partial_turn:
            turn = joined(self.partial_turn, turn)
        ids = self.tokens.ids[turn.start :] + generation.token_ids
        raw = template.raw(ids)  # first: an unknown id raises here, with nothing appended
        if self.partial_turn:
            self._take_back_partial_turn()
        self.turns.append(turn)
        self.tokens.append_sampled(generation.token_ids, generation.logprobs)
        if self.evidence:
            self.evidence.append(len(generation.token_ids), generation.evidence)
        parsed = template.read(raw, self.schemas, after=self.messages[-1])
        is_complete = ids[-1] in template.end_ids or generation.finish_reason == "stop"
        self.pending = PendingTurn(len(self.turns) - 1, parsed.calls, is_complete)
        self.messages.append(assistant_message(raw, parsed, self.pending.call_ids()))
        if template.images and ids[-1] in template.images.reserved_ids:
            raise ImageError(
                f"the model sampled {template.decode(ids[-1:])}, which only an image may stand for"
            )

    def _take_back_partial_turn(self) -> None:
        """Drops what was made of the first part of a turn; its tokens stay."""
        self.turns.pop()
        self.messages.pop()
        self.settled_calls = [line for line in self.settled_calls if line.turn < len(self.turns)]
        self.partial_turn = None

    # ------------------------------------------------------------------ answering a turn

    async def run_calls(self, turn: PendingTurn) -> list[ToolCallRecord]:
        """Runs the calls of the last turn; returns their ledger lines."""
        if self.asides:
            used, branch = self.response_length, len(self.sequences)
            self.asides.open(branch=branch, used=used, turns=self.num_turns)
        if self.tools:
            await self.tools.run(turn)
        return self._settle(turn)

    def reject_calls(self, turn: PendingTurn) -> None:
        """Ends a conversation whose last turn was cut by its budget: its calls are never run."""
        turn.reject("the turn was cut by its token budget, so its calls were not run")
        self._settle(turn)
        self.ending.stop("length")

    def _settle(self, turn: PendingTurn) -> list[ToolCallRecord]:
        lines = turn.lines()
        self.settled_calls += lines
        self.pending = None
        return lines

    def reason_to_stop(self, lines: Sequence[ToolCallRecord]) -> str | None:
        """What ends the conversation after a turn's calls, before their responses are appended."""
        settings = self.runtime.settings
        offered = self.tools.offered if self.tools else {}
        for line in lines:
            if line.status == "ok" and offered[line.name].ends_conversation:
                return "tool_stop"
        for line in lines:
            self.count_invalid(line)
            if _reached(self.invalid_in_a_row, settings.max_consecutive_invalid_calls):
                return "invalid_tool_calls"
        return "max_turns" if _reached(self.num_turns, settings.max_turns) else None

    def count_invalid(self, line: ToolCallRecord) -> None:
        """Counts the invalid calls in a row."""
        is_invalid = line.status in INVALID_STATUSES
        self.invalid_in_a_row = self.invalid_in_a_row + 1 if is_invalid else 0

    def append_responses(self, lines: Sequence[ToolCallRecord]) -> bool:
        """Appends the tools' responses to the last turn; False if they do not fit."""
        messages = [
            tool_message(
                line.response or "",
                call_id=line.call_id,
                name=line.name,
                images=[f"sha256:{sha256}" for sha256 in line.images],
            )
            for line in lines
        ]
        turn = self.messages[-1]
        if not self._append_messages(messages, TOOL):
            return False
        self.warn(turn, lines)
        return True

    def compact(self, turn: PendingTurn) -> bool:
        """Begins the next sequence with the summary that the last turn wrote.

        Returns False, and stops with `length`, if the new prompt leaves no room before the next
        compaction.
        """
        turn.reject(NO_CALLS)
        self._settle(turn)
        context, template = self.runtime.settings.context, self.runtime.template
        assert context is not None
        self.summing_up = False
        messages = after_summary(self.task.messages, self.messages, context.keep)
        prompt = template.prompt(messages, self.schemas)
        length = sum(len(ids) for _, ids in prompt)
        if length >= min(context.compact_at, self.runtime.settings.max_model_len - 1):
            self.ending.stop("length")
            return False
        self.sequences.append(self.sequence())
        self.tokens, self.turns, self.settled_calls = TokenSequence(), [], []
        self.messages = messages
        for kind, ids in prompt:
            self.tokens.append(kind, ids)
        return True

    def sequence(self) -> Branch:
        """The sequence as it stands."""
        images = [image.as_json() for image in self.images] or self.restored_images
        return sequence_of(
            self.tokens, self.turns, self.messages, self.ledger, self.schemas, images
        )

    async def take_user_turn(self) -> str | None:
        """Lets the user answer the last turn; returns the stop reason if there is no answer."""
        self.pending = None
        user, settings = self.user, self.runtime.settings
        if (
            user is None
            or _reached(user.turns, settings.max_user_turns)
            or _reached(self.num_turns, settings.max_turns)
        ):
            return "stop"
        text = await user.reply(self.messages)
        if text is None:
            return "stop"
        turn = self.messages[-1]
        if not self._append_messages([{"role": "user", "content": text}], USER):
            return "length"
        self.warn(turn, [])
        return None

    def _is_to_be_compacted(self, pieces: Sequence[Piece], images: Sequence[PlacedImage]) -> bool:
        """Whether the next prompt would reach the limit. Images cannot be summed up: they stay."""
        context = self.runtime.settings.context
        if context is None or images or self.images:
            return False
        added = sum(len(ids) for _, ids in pieces)
        return len(self.tokens) + added >= context.compact_at

    def _append_messages(self, messages: list[Message], kind: str) -> bool:
        """Appends what the template puts after a turn, a missing end token included.

        Returns False, with nothing appended, if that does not fit.
        """
        template, settings = self.runtime.template, self.runtime.settings
        turn = self.messages[-1]
        delta = template.delta(messages, kind, turn=turn)
        missing_end = template.missing_end(self.tokens.ids[-1], kind)
        ahead: list[Piece] = [(TEMPLATE, missing_end)] if missing_end else []
        pieces, images = self._placed([*ahead, *delta.pieces], messages)
        if self._is_to_be_compacted(pieces, images):
            messages = [*messages, summary_request()]
            delta = template.follow(messages, turn, with_tools=bool(self.schemas))
            pieces, self.summing_up = [*ahead, *delta.pieces], True
        added = sum(len(ids) for _, ids in pieces)
        if (
            self.response_length + added > settings.response_length
            or len(self.tokens) + added > settings.max_model_len
        ):
            return False
        for piece, ids in pieces:
            self.tokens.append(piece, ids)
        self.images += images
        self.messages += messages
        return True

    def warn(self, turn: Message, lines: Sequence[ToolCallRecord]) -> None:
        """Notes what is odd about an answered turn, its message given, and its calls' responses."""
        template = self.runtime.template
        for line in lines:
            if tokens := template.control_tokens(line.response or ""):
                text = f"the response of {line.call_id} holds control tokens: {', '.join(tokens)}"
                self.warnings.append(RecordWarning("control_tokens", text))
        if "reasoning_content" in turn and template.rewrites_history:
            text = "the chat template drops earlier thoughts; the sampled tokens were kept"
            warning = RecordWarning("history_rewritten", text)
            if warning not in self.warnings:
                self.warnings.append(warning)


def _failure_before_deadline(ledger: Sequence[ToolCallRecord]) -> str | None:
    """How the backend failed of a call that the deadline ended between two attempts."""
    for line in ledger:
        failed = [attempt for attempt in line.attempts if attempt.status == "backend_error"]
        if line.status == "cancelled" and failed:
            return f"{line.call_id} was cut off while it was tried again: {failed[-1].error}"
    return None


def _reached(count: int, limit: int | None) -> bool:
    """Whether a limit is reached. A resumed conversation may be beyond one at once."""
    return limit is not None and count >= limit
