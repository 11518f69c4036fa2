"""One session of an agent program: from a request to a turn.

The only file that knows both messages and engines. Invariants: the engine's input is the path that
the tree gives, token for token; a turn is in the journal before its answer leaves; a turn that the
client never got is given again, one that it got never is.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from agent.engines.engine import EndedGeneration, Generation, Interrupted
from agent.engines.sticky import asks_for
from agent.errors import EngineError
from agent.gateway.answer import Answer, AnsweredCall, Finish
from agent.gateway.dialect import ApiDialect
from agent.gateway.growing import BodyReader
from agent.gateway.request import Refusal, TurnRequest, too_long
from agent.loop.budget import TokenBudget
from agent.loop.conversation import Clock, Ending
from agent.loop.observer import observed
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from agent.loop.turns import check_generation
from conversations.errors import (
    ConversationsError,
    ImageError,
    MessageError,
    RunFolderError,
    TemplateError,
)
from conversations.messages import GivenImages, ToolCall, given_messages, image_parts, with_images
from conversations.session import Place, SessionTree, SessionTurn
from conversations.session.tree import Found

MAX_BRANCHES = 1024
"""A client with more of them does not replay its history: each request would be a branch."""
GONE_S = 30.0
"""How long a turn is sampled on after its client went away."""
RETRY_AFTER_S = 5
LARGE_TEXT = 400_000
"""Characters of new text from which a request is encoded in a thread: 20 ms and more."""
UNDELIVERED = "undelivered"
BUDGET_REASONS = frozenset({"max_turns", "length", "deadline"})

Write = Callable[["GatewaySession", SessionTurn], None]
"""Writes a turn into the journal. Raises RunFolderError."""
Keep = Callable[[Sequence[bytes]], None]
"""Keeps images, PNG files. Raises RunFolderError. Any thread may call it."""


@dataclass(slots=True, eq=False)
class Answering:
    """A turn that is being sampled for `clients` requests at a time.

    `task` ends with the turn, or raises Refusal.
    """

    place: Place
    task: asyncio.Task[SessionTurn]
    clients: int = 0
    giving_up: asyncio.TimerHandle | None = None

    def join(self) -> None:
        """A client waits for the turn."""
        self.clients += 1
        if self.giving_up:
            self.giving_up.cancel()
            self.giving_up = None

    def leave(self) -> None:
        """A client went away. After the last one the turn has `GONE_S` to be asked for again."""
        self.clients -= 1
        if not self.clients and not self.task.done():
            loop = asyncio.get_running_loop()
            self.giving_up = loop.call_later(GONE_S, self.task.cancel)


@dataclass(slots=True)
class Delivery:
    """Turns whose answers did not reach their client for certain.

    `lost`: the client went away before the last byte. `unknown`: a gateway that was killed had
    written them, and nothing followed.
    """

    lost: dict[int, SessionTurn] = field(default_factory=dict)
    unknown: dict[int, SessionTurn] = field(default_factory=dict)

    def waiting(self, place: Place) -> SessionTurn | None:
        """The turn that a request for this prompt gets instead of a new one."""
        found = [
            turn
            for turn in place.earlier
            if turn.number in self.lost or turn.number in self.unknown
        ]
        return found[-1] if found else None

    def arrived(self, turn: SessionTurn | None) -> None:
        """The client has the turn."""
        if turn:
            self.lost.pop(turn.number, None)
            self.unknown.pop(turn.number, None)


class GatewaySession:
    """The turns of one (task, sample), its budgets and its end.

    `name` stands in the ids that clients see. `write` writes a turn into the journal, `keep` images
    into the run folder.
    """

    def __init__(
        self, name: str, task: Task, sample: int, runtime: Runtime, write: Write, keep: Keep
    ) -> None:
        self.name = name
        self.task = task
        self.sample = sample
        self.runtime = runtime
        self.tree = SessionTree(runtime.template)
        self.ending = Ending()
        self.clock = Clock()
        self.engine_trouble: str | None = None
        self.reward_parts: dict[str, float] = {}
        self.said_at_end: Any = None
        self.closed: Refusal | None = None
        self.max_branches = MAX_BRANCHES
        self.refused = 0
        self.answering: list[Answering] = []
        self.bodies = BodyReader()
        self.delivery = Delivery()
        self._write, self._keep = write, keep
        self._unwritten: list[SessionTurn] = []
        self._budget = TokenBudget(runtime.settings.response_length)
        self._matching = asyncio.Lock()
        self._branches = 0

    @property
    def turns(self) -> list[SessionTurn]:
        """The turns so far, in the order in which they were sampled."""
        return self.tree.turns

    # ------------------------------------------------------------------ a request

    async def begin(
        self,
        request: TurnRequest,
        dialect: ApiDialect,
        client: Mapping[str, Any],
        *,
        is_retry: bool = False,
    ) -> Answering:
        """Starts the turn that a request asks for, or finds the one that it asks for again.

        Raises Refusal. `is_retry`: the client says that it did not get the last answer.
        """
        self._check_open()
        place = await self.match(request)
        self._check_open()  # encoding may have taken a while
        self.delivery.arrived(place.parent)
        for answering in self.answering:
            is_free = not answering.clients or is_retry
            if is_free and answering.place.is_same_prompt(place):
                return answering
        earlier = place.earlier[-1] if is_retry and place.earlier else None
        if turn := self.delivery.waiting(place) or earlier:
            return Answering(place, asyncio.create_task(self._again(turn)))
        self._check_place(place)
        sampling = self._sample(place, request, dialect, client)
        answering = Answering(place, asyncio.create_task(sampling))
        self.answering.append(answering)
        answering.task.add_done_callback(partial(self._end_answering, answering))
        return answering

    def _end_answering(self, answering: Answering, task: asyncio.Task[SessionTurn]) -> None:
        self.answering.remove(answering)
        if not task.cancelled() and task.exception() is None and not answering.clients:
            self.not_delivered(task.result())

    async def with_images(self, request: TurnRequest) -> TurnRequest:
        """The request with each image by its hash, read and kept in the run folder.

        Raises Refusal, by name, for what is no image, too large, or not seen by this model.
        """
        images = GivenImages()
        if not any(image_parts(request.messages)):
            return request
        try:
            reader = self.runtime.image_reader()
            messages = given_messages(request.messages, images)
            pictures = await reader.read(images.sources)
        except (ImageError, MessageError) as error:
            self.refused += 1
            raise Refusal(str(error), code="image_refused", field="messages") from error
        await asyncio.to_thread(self._keep, [picture.png for picture in pictures])
        sizes = {picture.sha256: (picture.width, picture.height) for picture in pictures}
        self.tree.image_sizes |= sizes
        shown = with_images(messages, [picture.reference for picture in pictures])
        return replace(request, messages=shown)

    async def match(self, request: TurnRequest) -> Place:
        """Where the request stands. Raises Refusal if the template refuses its messages.

        Much new text is encoded in a thread. Requests are placed in the order in which they came.
        """
        if not self._matching.locked():
            found = self._find(request)
            if found.new_characters <= LARGE_TEXT:
                return self._place(found)
        async with self._matching:
            found = self._find(request)  # turns may have been added
            if found.new_characters <= LARGE_TEXT:
                return self._place(found)
            place = await asyncio.to_thread(self._place, found)
            return self.tree.as_it_stands(place)

    def _find(self, request: TurnRequest) -> Found:
        after = None
        if request.previous_id is not None:
            after = self.tree.turn_of_response(request.previous_id)
            if after is None:
                raise Refusal(
                    f"previous_response_id: this session has no response {request.previous_id!r}",
                    status=404,
                    code="not_found",
                    field="previous_response_id",
                )
        try:
            return self.tree.find(request.messages, request.tools, after=after)
        except MessageError as error:
            self.refused += 1
            raise Refusal(str(error), code="template_refused") from error

    def _place(self, found: Found) -> Place:
        try:
            return self.tree.place(found)
        except (ImageError, MessageError, TemplateError) as error:
            self.refused += 1
            raise Refusal(str(error), code="template_refused") from error
        except ConversationsError as error:  # the model's call format is not proven
            raise Refusal(str(error), code="no_tools") from error

    async def _again(self, turn: SessionTurn) -> SessionTurn:
        if self.closed:
            raise self.closed
        self._write_missing()
        return turn

    # ------------------------------------------------------------------ budgets

    def _check_open(self) -> None:
        if self.closed:
            raise self.closed
        settings, clock = self.runtime.settings, self.clock
        if settings.deadline_s is not None and clock.so_far_s >= settings.deadline_s:
            self.ending.stop("deadline")
        if settings.max_turns is not None and len(self.turns) >= settings.max_turns:
            self.ending.stop("max_turns")
        if self.ending.stop_reason in BUDGET_REASONS:
            raise self._over_budget()

    def _over_budget(self) -> Refusal:
        reason = self.ending.stop_reason
        return Refusal(
            f"this session has ended: its budget is used up ({reason})", code="budget_exceeded"
        )

    def _check_place(self, place: Place) -> None:
        """Raises Refusal if no turn may be sampled at a place."""
        settings = self.runtime.settings
        if place.reason and self._branches >= self.max_branches:
            raise Refusal(
                f"this session has {self.max_branches} branches: "
                "the client does not replay history",
                code="too_many_branches",
            )
        sampled = sum(not answering.task.done() for answering in self.answering)
        if settings.max_turns is not None and len(self.turns) + sampled >= settings.max_turns:
            raise Refusal(
                f"the session's last turns of {settings.max_turns} are being sampled",
                status=503,
                code="busy",
                retry_after_s=RETRY_AFTER_S,
            )
        free = settings.max_model_len - place.prompt_length
        if free <= 0:
            self.refused += 1
            raise too_long(place.prompt_length, settings.max_model_len)
        self._check_images(place)
        if self._budget.is_used_up(_added(place)):
            self.ending.stop("length")
            raise self._over_budget()

    def _check_images(self, place: Place) -> None:
        """`with_images` saw the request's own; `previous_response_id` brings earlier ones."""
        if not place.prompt_images or self.runtime.images is None:
            return
        try:
            self.runtime.images.check_count(len(place.prompt_images))
        except ImageError as error:
            self.refused += 1
            raise Refusal(str(error), code="image_refused", field="messages") from error

    def _most(self, place: Place, request: TurnRequest) -> int:
        """How many tokens a turn may sample there, the session's budget aside."""
        settings = self.runtime.settings
        free = settings.max_model_len - place.prompt_length
        limits = [free, settings.max_tokens, request.max_tokens]
        return min(limit for limit in limits if limit is not None)

    # ------------------------------------------------------------------ a turn

    async def _sample(
        self,
        place: Place,
        request: TurnRequest,
        dialect: ApiDialect,
        client: Mapping[str, Any],
    ) -> SessionTurn:
        asks_for(self)  # one server for all turns of a session, where its prefix is cached
        most = self._most(place, request)
        try:
            async with (
                asyncio.timeout(self._time_left_s()),
                self._budget.reserve(_added(place), most) as room,
            ):
                if not room:
                    self.ending.stop("length")
                    raise self._over_budget()
                generation = await self._generation(place, room)
                return self._add(place, generation, request, dialect, client)
        except TimeoutError:
            self.ending.stop("deadline")
            raise self._over_budget() from None

    def _add(
        self,
        place: Place,
        generation: Generation,
        request: TurnRequest,
        dialect: ApiDialect,
        client: Mapping[str, Any],
    ) -> SessionTurn:
        response_id = dialect.response_id(f"{self.name}-{len(self.turns)}")
        try:
            turn = self.tree.add(
                place, generation, response_id=response_id, asked=request.asked, client=client
            )
        except (ConversationsError, OverflowError) as error:  # ids that have no text
            raise self._engine_failed(str(error)) from error
        self.engine_trouble = None
        self.count(turn)
        self._unwritten.append(turn)
        self.not_delivered(turn)  # if it cannot be written now, the next request gets it
        self._write_missing()
        self.delivery.arrived(turn)
        return turn

    def count(self, turn: SessionTurn) -> None:
        """Counts a turn against the budgets."""
        added = sum(len(ids) for _, ids in turn.pieces) if turn.parent else 0
        self._budget.used += added + len(turn.sampled)
        self._branches += turn.reason is not None

    def restore(self, entry: Mapping[str, Any]) -> None:
        """Adds a turn of the journal. Nobody knows whether its answer arrived."""
        turn = self.tree.restore(entry)
        self.count(turn)
        self.delivery.arrived(turn.parent)
        self.delivery.unknown[turn.number] = turn

    def _write_missing(self) -> None:
        """Writes what is not in the journal yet, in order; a full disk may have kept it out."""
        try:
            while self._unwritten:
                self._write(self, self._unwritten[0])
                self._unwritten.pop(0)
        except RunFolderError as error:
            raise not_written(error) from error

    async def _generation(self, place: Place, room: int) -> Generation:
        """What the engine samples. Raises Refusal.

        What was sampled of a turn that is aborted is dropped: nobody got it, and a cut sample is
        not one of the model's turns.
        """
        try:
            generation = await self._ask_engine(place, room)
            check_generation(generation, place.prompt_length, room, ("stop", "length"))
            self._check_placeholder(generation)
        except EndedGeneration as end:
            raise self._engine_failed(end.error or end.reason) from end
        except (EngineError, ImageError) as error:
            raise self._engine_failed(str(error)) from error
        return generation

    def _check_placeholder(self, generation: Generation) -> None:
        """Raises EngineError if the model sampled what only an image may stand for."""
        processor = self.runtime.template.images
        if processor and not set(processor.reserved_ids).isdisjoint(generation.token_ids):
            raise EngineError("the model sampled a token that only an image may stand for")

    def _time_left_s(self) -> float | None:
        limit_s = self.runtime.settings.deadline_s
        return None if limit_s is None else max(0.0, limit_s - self.clock.so_far_s)

    async def _ask_engine(self, place: Place, room: int) -> Generation:
        runtime, ids, request_id = self.runtime, place.prompt_ids, uuid.uuid4().hex
        sampling = {
            **runtime.settings.sampling,
            "max_new_tokens": room,
            "stop_token_ids": runtime.template.stop_token_ids,
        }
        engine, observer = runtime.engine, runtime.observer
        more: dict[str, Any] = {}
        if images := place.prompt_images:
            more["images"] = await runtime.image_reader().placed(images)
        try:
            if observer is None:
                return await engine.generate(ids, sampling, request_id=request_id, **more)
            begin = partial(observer.generation, engine.describe(), request_id, len(ids), sampling)
            with observed(begin) as tell:
                generation = await engine.generate(ids, sampling, request_id=request_id, **more)
                tell(generation)
                return generation
        except Interrupted as interrupt:  # `asyncio.timeout` knows no other than the plain one
            raise asyncio.CancelledError from interrupt

    def _engine_failed(self, error: str) -> Refusal:
        self.engine_trouble = error
        return Refusal(
            f"the engine gave no answer: {error}",
            status=503,
            code="engine_unavailable",
            retry_after_s=RETRY_AFTER_S,
        )

    # ------------------------------------------------------------------ its answer

    def answer(self, turn: SessionTurn) -> Answer:
        """The turn as its client gets it."""
        served = turn.served
        named = [call for call in turn.calls if call.name]
        calls = tuple(
            AnsweredCall(
                entry["id"],
                entry["function"]["name"],
                entry["function"]["arguments"],
                malformed=not isinstance(call, ToolCall),
            )
            for entry, call in zip(served.get("tool_calls", ()), named, strict=True)
        )
        finish: Finish = "length" if not turn.is_complete else "calls" if calls else "stop"
        return Answer(
            f"{self.name}-{turn.number}",
            served["content"],
            served.get("reasoning_content"),
            calls,
            finish,
            prompt_tokens=turn.start,
            sampled_tokens=len(turn.sampled),
            cached_tokens=turn.cached_tokens or 0,
        )

    def not_delivered(self, turn: SessionTurn) -> None:
        """The client went away before the last byte of the turn's answer."""
        if not turn.children:
            self.delivery.lost[turn.number] = turn

    # ------------------------------------------------------------------ its end

    async def close(self, why: Refusal) -> None:
        """Aborts the turns that are being sampled; every later request is refused with `why`."""
        self.closed = why
        tasks = [answering.task for answering in self.answering]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for turn in self.delivery.lost.values():
            if UNDELIVERED not in turn.notes:
                turn.notes.append(UNDELIVERED)
        self.clock.stop()


def _added(place: Place) -> int:
    """Tokens between turns that a place adds; a first prompt is free."""
    return place.added_length if place.parent else 0


def not_written(error: RunFolderError) -> Refusal:
    """The refusal of what could not be written: a full disk, which may have room again."""
    return Refusal(str(error), status=503, code="not_written", retry_after_s=RETRY_AFTER_S)


def checked_reward(name: str, value: object) -> float:
    """A reward that a program sent. Raises Refusal if it is no finite number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer of 309 digits and more
            if math.isfinite(number := float(value)):
                return number
    raise Refusal(f"{name}: must be a finite number, got {value!r:.100}", field=name)
