"""One conversation: generate, parse, dispatch, append, until one stop reason is set.

Invariants (DESIGN: the token contract). The engine's input is always the conversation's own token sequence, unchanged
and only ever longer. Work per turn depends on the turn, never on the length of the conversation. Whatever goes wrong
ends in the record with one stop reason, the first that happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from agent.engines.engine import Engine, Generation, Interrupted
from agent.errors import EndConversation, EngineError
from agent.loop.boundary import describe
from agent.loop.calls import ConversationTools, Dispatcher, ledger_lines
from agent.loop.tasks import Task
from agent.loop.tracing import Tracing
from agent.loop.users import Interactions, SimulatedUser
from conversations.messages import Message, ParsedTurn, assistant_message, tool_message
from conversations.template import ChatTemplate
from conversations.tokens import TEMPLATE, TOOL, USER, TokenSequence
from conversations.trajectory import (
    INVALID_STATUSES,
    ToolCallRecord,
    Trajectory,
    Turn,
    total_reward,
)
from conversations.warning import RecordWarning


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """Budgets and limits of one conversation; token counts unless the name says otherwise.

    `sampling` are the engine's sampling params without `max_new_tokens` and `stop_token_ids`, which the loop sets.
    None means no limit.
    """

    prompt_length: int
    response_length: int
    max_model_len: int
    max_tokens: int | None = None
    max_turns: int | None = None
    max_user_turns: int | None = None
    max_consecutive_invalid_calls: int | None = 8
    deadline_s: float | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Runtime:
    """What all conversations of a run share."""

    engine: Engine
    template: ChatTemplate
    settings: LoopSettings
    dispatcher: Dispatcher | None = None
    tracing: Tracing | None = None
    interactions: Interactions | None = None


async def converse(conversation: Conversation) -> None:
    """Runs a conversation to its end; afterwards `conversation.trajectory()` is its record.

    Raises CancelledError alone: the record is complete up to the last finished turn, with `cancelled`.
    """
    deadline = asyncio.timeout(conversation.runtime.settings.deadline_s)
    try:
        try:
            async with deadline:
                await _turns(conversation)
        except asyncio.CancelledError:
            conversation.stop("cancelled")
            raise
        except EndConversation as end:
            conversation.end(end)
        except Exception as error:
            if deadline.expired():
                conversation.stop("deadline")
            else:  # ours: kept in the record, like every other failure, and never a reward
                conversation.fail("engine_error", describe(error))
        await conversation.collect_rewards()
    finally:
        await conversation.close()


async def _turns(conversation: Conversation) -> None:
    if not await conversation.open():
        conversation.stop("prompt_too_long")
        return
    turn = conversation.unanswered or await _sample(conversation)
    while turn and await _answer(conversation, turn):
        turn = await _sample(conversation)


async def _sample(conversation: Conversation) -> ParsedTurn | None:
    """The next turn, sampled and appended; None where the conversation has stopped."""
    # 1. Budget: what this turn may sample.
    room = conversation.room()
    if room <= 0:
        conversation.stop("length")
        return None
    # 2. Generate, and append what was sampled.
    try:
        generation = await conversation.generate(room)
    except EngineError as error:
        conversation.fail("engine_error", str(error))
        return None
    return conversation.append_turn(generation)


async def _answer(conversation: Conversation, turn: ParsedTurn) -> bool:
    """Answers a turn and appends the answer; False where the conversation has stopped."""
    # 3. A turn that was cut has its calls never run; one without calls is the last, unless a user answers.
    if not conversation.turn_is_complete:
        conversation.reject_calls(turn)
        return False
    if not turn.calls:
        reason = await conversation.take_user_turn()
    else:
        # 4. Run the calls.
        lines = await conversation.run_calls(turn)
        reason = conversation.reason_to_stop(lines)
        # 5. Append their responses, if they fit.
        if not reason and not conversation.append_responses(lines):
            reason = "length"
    if reason:
        conversation.stop(reason)
    return not reason


class Conversation:
    """A task being run: its tokens, messages, turns and ledger, and what may be done to them.

    One that goes on from a record has the turn that nobody answered as `unanswered`, or the one that was `cut` off.
    Engine calls and tools are awaited here, the order of things is `converse`'s.
    """

    __slots__ = (
        "_invalid_in_a_row", "_opened", "_started_at", "cut", "error", "infra_error", "ledger", "messages", "parent", "rewards", "runtime",
        "sample", "stop_reason", "task", "tokens", "tools", "turn_is_complete", "turns", "unanswered", "user", "wall_s", "warnings",
    )  # fmt: skip

    def __init__(self, task: Task, sample: int, runtime: Runtime) -> None:
        self.task = task
        self.sample = sample
        self.runtime = runtime
        self.tokens = TokenSequence()
        self.messages: list[Message] = list(task.messages)
        self.turns: list[Turn] = []
        self.ledger: list[ToolCallRecord] = []
        self.warnings: list[RecordWarning] = []
        self.rewards: dict[str, Any] = {}
        self.tools: ConversationTools | None = None
        self.user: SimulatedUser | None = None
        self.stop_reason: str | None = None
        self.error: str | None = None
        self.parent: dict[str, Any] | None = None
        self.infra_error = False
        self.turn_is_complete = False
        self.unanswered: ParsedTurn | None = None
        self.cut: Turn | None = None
        self.wall_s = 0.0
        self._invalid_in_a_row = 0
        self._opened = perf_counter()
        self._started_at = datetime.now(UTC).isoformat(timespec="milliseconds")

    # ------------------------------------------------------------------ beginning and end

    async def open(self) -> bool:
        """Creates the tools and renders the prompt; False where it is longer than the prompt budget."""
        self.tools = self.make_tools()
        created = await self.tools.create() if self.tools else []
        for kind, ids in self.runtime.template.prompt(self.task.messages, self.schemas, created):
            self.tokens.append(kind, ids)
        self.messages += created
        settings = self.runtime.settings
        if len(self.tokens) > min(settings.prompt_length, settings.max_model_len - 1):
            return False
        self.user = self.make_user()
        if self.user:
            await self.user.start()
        return True

    def make_user(self) -> SimulatedUser | None:
        """The user of this conversation, not yet started; None where nobody answers."""
        interactions, kwargs = self.runtime.interactions, self.task.interaction_kwargs
        return (
            SimulatedUser(interactions.chosen(kwargs), kwargs) if interactions and kwargs else None
        )

    def make_tools(self) -> ConversationTools | None:
        """The tools of this conversation, not yet created; None without any."""
        dispatcher = self.runtime.dispatcher
        return (
            ConversationTools(dispatcher, self.task.tools_kwargs, self.task.ground_truth)
            if dispatcher
            else None
        )

    def stop(self, reason: str) -> None:
        """Sets the stop reason, once: the first that happens stays."""
        self.stop_reason = self.stop_reason or reason

    def fail(self, reason: str, error: str) -> None:
        """Ends the conversation by an infrastructure failure: its reward is unknown, never 0."""
        self.stop(reason)
        self.infra_error, self.error = True, error

    def end(self, end: EndConversation) -> None:
        """Ends the conversation as its engine or its tools said."""
        self.stop(end.reason)
        self.error = end.error

    async def collect_rewards(self) -> None:
        """Asks tools and user for the trajectory's reward, unless nothing was sampled, infrastructure failed, or it was cut off."""
        self.infra_error = self.infra_error or any(
            line.status == "backend_error" for line in self.ledger
        )
        if self.stop_reason == "deadline" and (failed := _failed_meanwhile(self.ledger)):
            self.infra_error, self.error = True, failed
        if self.tools and self.turns and not self.infra_error and self.stop_reason != "cancelled":
            self.rewards = await self.tools.rewards()
        if self.user and self.user.rewards:
            self.rewards["user_turn_rewards"] = self.user.rewards
        for failure in (
            self.tools and self.tools.failure,
            *(self.user.failures if self.user else ()),
        ):
            if failure:
                self.infra_error, self.error = True, self.error or failure

    async def close(self) -> None:
        """Releases the tools, lets the user go and stops the clock."""
        try:
            if self.tools:
                await self.tools.release()
                self.warnings += self.tools.warnings
        finally:
            if self.user:
                await self.user.finalize()
                self.warnings += [
                    RecordWarning("user_failed", failure)
                    for failure in self.user.failures
                    if failure != self.error
                ]
        if max(self.tokens.ids, default=0) >= self.runtime.template.vocabulary_size:
            text = "the model sampled ids that the tokenizer does not have: does the engine run the model of model_path?"
            self.warnings.append(RecordWarning("unknown_ids", text))
        self.wall_s = perf_counter() - self._opened

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools offered, as OpenAI schemas."""
        return self.tools.schemas if self.tools else []

    # ------------------------------------------------------------------ one turn

    def room(self) -> int:
        """How many tokens the next turn may sample."""
        settings = self.runtime.settings
        room = min(
            settings.response_length - self.tokens.response_length,
            settings.max_model_len - len(self.tokens),
        )
        if settings.max_tokens is None:
            return room
        begun = self.cut.end - self.cut.start if self.cut else 0
        return min(room, settings.max_tokens - begun)

    async def generate(self, room: int) -> Generation:
        """Samples one turn. Raises EngineError where the engine failed or its answer is not data."""
        runtime = self.runtime
        sampling = {
            **runtime.settings.sampling,
            "max_new_tokens": room,
            "stop_token_ids": runtime.template.stop_token_ids,
        }
        try:
            generation = await runtime.engine.generate(
                self.tokens.ids, sampling, request_id=uuid.uuid4().hex
            )
        except Interrupted as cut:
            self._append_cut(cut.generation, room)
            raise asyncio.CancelledError from cut
        except EndConversation as end:
            self._append_cut(end.generation, room)
            raise
        _check(generation, len(self.tokens), room, ("stop", "length"))
        return generation

    def _append_cut(self, generation: Generation | None, room: int) -> None:
        """Keeps what was sampled of a turn that was cut off in the midst; the calls in it stay `cancelled`."""
        with contextlib.suppress(EngineError):  # what is not data is left out
            if generation:
                _check(generation, len(self.tokens), room, ("abort",))
                self.append_turn(generation)

    def append_turn(self, generation: Generation) -> ParsedTurn:
        """Appends a turn's tokens and its message; returns what it says. A turn that had been cut off is made whole."""
        template, turn = self.runtime.template, _turn(len(self.tokens), generation)
        if self.cut:
            turn = _joined(self.cut, turn)
        ids = self.tokens.ids[turn.start :] + generation.token_ids
        raw = template.raw(ids)  # first: an id that is none raises here, with nothing appended
        if self.cut:
            self._take_back()
        self.turns.append(turn)
        self.tokens.append_sampled(generation.token_ids, generation.logprobs)
        self.turn_is_complete = ids[-1] in template.end_ids or generation.finish_reason == "stop"
        parsed = template.read(raw, self.schemas, after=self.messages[-1])
        lines = ledger_lines(parsed.calls, len(self.turns) - 1)
        self.ledger += lines
        self.messages.append(assistant_message(raw, parsed, [line.call_id for line in lines]))
        return parsed

    def _take_back(self) -> None:
        """Drops what was made of the beginning of a turn; its tokens stay."""
        self.turns.pop()
        self.messages.pop()
        self.ledger = [line for line in self.ledger if line.turn < len(self.turns)]
        self.cut = None

    async def run_calls(self, parsed: ParsedTurn) -> list[ToolCallRecord]:
        """Runs the calls of the last turn; returns their ledger lines."""
        lines = self.ledger[len(self.ledger) - len(parsed.calls) :]
        if self.tools:
            await self.tools.run(parsed.calls, lines)
        return lines

    def reject_calls(self, parsed: ParsedTurn) -> None:
        """Ends a conversation whose turn was cut by its budget: the calls in it were never run."""
        for line in self.ledger[len(self.ledger) - len(parsed.calls) :]:
            if line.status != "malformed":
                line.status, line.error = (
                    "rejected",
                    "the turn was cut by its token budget, so its calls were not run",
                )
        self.stop("length")

    def reason_to_stop(self, lines: list[ToolCallRecord]) -> str | None:
        """What ends the conversation after a turn's calls, before their responses are appended."""
        settings = self.runtime.settings
        offered = self.tools.offered if self.tools else {}
        if any(line.status == "ok" and offered[line.name].ends_conversation for line in lines):
            return "tool_stop"
        for line in lines:
            self._invalid_in_a_row = (
                self._invalid_in_a_row + 1 if line.status in INVALID_STATUSES else 0
            )
            if self._invalid_in_a_row == settings.max_consecutive_invalid_calls:
                return "invalid_tool_calls"
        return "max_turns" if _reached(len(self.turns), settings.max_turns) else None

    def append_responses(self, lines: list[ToolCallRecord]) -> bool:
        """Appends the tools' answers to the last turn; False where they do not fit."""
        messages = [
            tool_message(line.response or "", call_id=line.call_id, name=line.name)
            for line in lines
        ]
        turn = self.messages[-1]
        if not self._append_messages(messages, TOOL):
            return False
        self.warn(turn, lines)
        return True

    async def take_user_turn(self) -> str | None:
        """Lets the user answer the last turn; returns what ends the conversation where nobody answers, or it does not fit."""
        user, settings = self.user, self.runtime.settings
        if (
            user is None
            or _reached(user.turns, settings.max_user_turns)
            or _reached(len(self.turns), settings.max_turns)
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

    def _append_messages(self, messages: list[Message], kind: str) -> bool:
        """Appends what the template puts after a turn, the end token it may lack included; False where it does not fit."""
        template, settings = self.runtime.template, self.runtime.settings
        delta = template.delta(messages, kind)
        missing_end = [] if self.tokens.ids[-1] in template.end_ids else [template.end_id]
        added = len(missing_end) + len(delta)
        if (
            self.tokens.response_length + added > settings.response_length
            or len(self.tokens) + added > settings.max_model_len
        ):
            return False
        self.tokens.append(TEMPLATE, missing_end)
        for piece, ids in delta.pieces:
            self.tokens.append(piece, ids)
        self.messages += messages
        return True

    def warn(self, turn: Message, lines: list[ToolCallRecord]) -> None:
        """Notes what is odd about a turn that was answered, its message given, and about the answers to its calls."""
        template = self.runtime.template
        for line in lines:
            if found := template.control_tokens(line.response or ""):
                text = f"the response of {line.call_id} holds control tokens as text: {', '.join(found)}"
                self.warnings.append(RecordWarning("control_tokens", text))
        if template.rewrites_history and "</think>" in turn["raw"]:
            text = "the chat template drops earlier <think> blocks; the sampled tokens were kept"
            warning = RecordWarning("history_rewritten", text)
            if warning not in self.warnings:
                self.warnings.append(warning)

    # ------------------------------------------------------------------ the record

    def trajectory(self) -> Trajectory:
        """The record of the conversation as it stands."""
        task, tokens, template = self.task, self.tokens, self.runtime.template
        parts = {} if self.infra_error else self.rewards
        return Trajectory(
            id=f"{task.id}-{self.sample}",
            task_id=task.id,
            sample=self.sample,
            prompt_ids=tokens.prompt_ids(),
            response_ids=tokens.response_ids(),
            response_mask=tokens.response_mask(),
            response_logprobs=tokens.response_logprobs(),
            segments=tokens.segments(),
            turns=self.turns,
            messages=self.messages,
            tool_calls=self.ledger,
            tools=self.schemas,
            stop_reason=self.stop_reason or "cancelled",
            num_turns=len(self.turns),
            infra_error=self.infra_error,
            error=self.error,
            warnings=self.warnings,
            reward=total_reward(parts),
            reward_parts=parts,
            ground_truth=task.ground_truth,
            data_source=task.data_source,
            extra=task.extra,
            engine=self.runtime.engine.describe(),
            sampling={**self.runtime.settings.sampling, "stop_token_ids": template.stop_token_ids},
            parent=self.parent,
            started_at=self._started_at,
            wall_s=self.wall_s,
        )


def _failed_meanwhile(ledger: list[ToolCallRecord]) -> str | None:
    """How the backend failed of a call that was cut off while it was tried again; None where there is no such call."""
    for line in ledger:
        if line.status == "cancelled" and (
            failed := [attempt for attempt in line.attempts if attempt.status == "backend_error"]
        ):
            return f"{line.call_id} was cut off while it was tried again: {failed[-1].error}"
    return None


def _reached(count: int, limit: int | None) -> bool:
    """A conversation that goes on under another config may be over its limit at once."""
    return limit is not None and count >= limit


def _turn(start: int, generation: Generation) -> Turn:
    return Turn(
        start=start,
        end=start + len(generation.token_ids),
        finish_reason=generation.finish_reason,
        prompt_tokens=start,
        cached_tokens=generation.cached_tokens,
        queue_s=generation.queue_s,
        engine_s=generation.engine_s,
        weight_version=generation.weight_version,
        resumed=generation.resumed,
    )


def _joined(begun: Turn, rest: Turn) -> Turn:
    """The two parts of a turn that was cut off as one."""
    return Turn(
        start=begun.start,
        end=rest.end,
        finish_reason=rest.finish_reason,
        prompt_tokens=begun.prompt_tokens,
        cached_tokens=begun.cached_tokens,
        queue_s=_sum(begun.queue_s, rest.queue_s),
        engine_s=_sum(begun.engine_s, rest.engine_s),
        weight_version=begun.weight_version,
        resumed=[*(begun.resumed or []), [begun.end, rest.weight_version]],
    )


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def _check(generation: Generation, start: int, room: int, reasons: tuple[str, ...]) -> None:
    """What an engine answers is data only when it saw our tokens, and ids and log-probs belong together and are numbers."""
    ids, logprobs = generation.token_ids, generation.logprobs
    if generation.prompt_tokens not in (None, start):
        raise EngineError(
            f"the engine saw {generation.prompt_tokens} prompt tokens where {start} were sent"
        )
    if generation.finish_reason not in reasons:
        raise EngineError(f"the engine ended the generation with {generation.finish_reason!r}")
    if not ids or len(ids) > room:
        raise EngineError(f"the engine returned {len(ids)} tokens where 1 to {room} were asked for")
    if len(ids) != len(logprobs):
        raise EngineError(f"the engine returned {len(ids)} tokens with {len(logprobs)} log-probs")
    if not all(map(math.isfinite, logprobs)):
        raise EngineError("the engine returned a log-prob that is not a finite number")
