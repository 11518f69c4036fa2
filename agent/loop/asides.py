"""What a conversation's tools ask its own model: sub-conversations, each a branch of the record.

A tool that says `asks_model` is given `model` in `execute`: see `tools.base.AskModel`. Invariants:
a sub-conversation is an append-only sequence of its own, which begins anew; what was sampled stands
in it alone, mask 1. Turns and tokens count against the conversation's budgets; what is not appended
counts for nothing. The end of the call, the tool's timeout and the conversation's deadline cut a
turn off, and what was sampled of it is dropped.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from agent.engines.engine import Generation, Interrupted
from agent.errors import EndConversation, EngineError
from agent.loop.budget import TokenBudget
from agent.loop.compaction import sequence_of
from agent.loop.runtime import Runtime
from agent.loop.turns import check_generation, turn_of
from conversations.errors import ConversationsError
from conversations.messages import Message, assistant_message, given_messages
from conversations.tokens import TEMPLATE, USER, Piece, TokenSequence
from conversations.trajectory import Branch, Turn
from tools.base import BackendError, ToolError


@dataclass(slots=True)
class Allowance:
    """What the calls of one turn may ask the model in all; `turns` None means no limit."""

    budget: TokenBudget
    turns: int | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One turn, which is given back if the block raises. Raises ToolError if none is left."""
        if self.turns is None:
            yield
            return
        if self.turns <= 0:
            raise ToolError("the model cannot be asked: all turns of the conversation are used")
        self.turns -= 1
        try:
            yield
        except BaseException:
            self.turns += 1
            raise


@dataclass(slots=True)
class Asides:
    """The sub-conversations of one conversation's tools.

    `earlier` are those of the record that it replays.
    """

    runtime: Runtime
    earlier: list[Branch]
    branch: int = 0
    allowance: Allowance = field(init=False)
    chats: list[Aside] = field(default_factory=list)

    def __post_init__(self) -> None:
        # for calls that are run again to bring a tool into its state
        self.allowance = Allowance(TokenBudget(self.runtime.settings.response_length))

    def open(self, *, branch: int, used: int, turns: int) -> None:
        """Calls are about to run, in sequence `branch`, after `used` tokens and `turns` turns."""
        settings = self.runtime.settings
        self.branch = branch
        limit = settings.max_turns
        left = None if limit is None else limit - turns
        self.allowance = Allowance(TokenBudget(settings.response_length, used), left)

    def sequences(self) -> list[Branch]:
        """The sub-conversations with a turn, in the order of their beginning."""
        return [*self.earlier, *(chat.sequence() for chat in self.chats if chat.turns)]

    @property
    def num_turns(self) -> int:
        """Turns that were sampled for tools."""
        if not (self.earlier or self.chats):
            return 0
        earlier = sum(len(one.turns) for one in self.earlier)
        return earlier + sum(len(chat.turns) for chat in self.chats)

    @property
    def response_length(self) -> int:
        """Tokens after the prompts of all sub-conversations."""
        if not (self.earlier or self.chats):
            return 0
        earlier = sum(len(one.response_ids) for one in self.earlier)
        return earlier + sum(chat.tokens.response_length for chat in self.chats)


@dataclass(slots=True)
class CallModel:
    """The model as one tool call is given it. It answers until the call has ended.

    `answering` are the turns that are being sampled.
    """

    asides: Asides
    tool: str
    call_id: str
    is_open: bool = True
    answering: set[asyncio.Task[str]] = field(default_factory=set)

    def close(self) -> None:
        """The call has ended: turns that a task of the tool still waits for are cut off."""
        self.is_open = False
        for turn in self.answering:
            turn.cancel()

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Aside:
        """A new sub-conversation; nothing is sampled yet. Raises ToolError."""
        try:
            given = given_messages([dict(message) for message in messages])
        except ConversationsError as error:
            raise ToolError(f"the model cannot be asked this: {error}") from error
        started = Aside(self, given)
        self.asides.chats.append(started)
        return started

    async def ask(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int | None = None
    ) -> str:
        """The model's answer to messages, in a sub-conversation of their own."""
        return await self.chat(messages).answer(max_tokens=max_tokens)


class Aside:
    """One sub-conversation of a tool call."""

    def __init__(self, model: CallModel, given: list[Message]) -> None:
        self.tokens = TokenSequence()
        self.turns: list[Turn] = []
        self.messages: list[Message] = []
        self._model = model
        self._branch = model.asides.branch
        self._allowance = model.asides.allowance
        self._given = given
        self._is_asking = False

    async def answer(self, said: str | None = None, *, max_tokens: int | None = None) -> str:
        """Samples the next turn, behind a user message if one is `said`; returns its text.

        Raises ToolError if the budgets leave no room or the template refuses the messages,
        BackendError if the engine fails.
        """
        if not self._model.is_open or self._is_asking:
            raise ToolError("the model can be asked for one turn at a time, while the call runs")
        self._is_asking = True
        answering = asyncio.create_task(self._answer(said, max_tokens))
        self._model.answering.add(answering)
        try:
            return await answering
        except asyncio.CancelledError as error:
            if self._was_cut_off():
                raise ToolError("the call has ended: the model's answer was dropped") from error
            raise
        finally:
            self._model.answering.discard(answering)
            self._is_asking = False

    def sequence(self) -> Branch:
        """The sub-conversation as the record has it."""
        model = self._model
        client = {"tool": model.tool, "call": model.call_id, "branch": self._branch}
        own = sequence_of(self.tokens, self.turns, self.messages, [], [], [])
        return replace(own, client=client)

    # ------------------------------------------------------------------ a turn

    def _was_cut_off(self) -> bool:
        """Whether the call's end cancelled a turn; False if who waits for it was cancelled."""
        waiting = asyncio.current_task()
        return not self._model.is_open and not (waiting and waiting.cancelling())

    async def _answer(self, said: str | None, max_tokens: int | None) -> str:
        runtime, allowance = self._model.asides.runtime, self._allowance
        messages = [
            *self._given,
            *([] if said is None else [{"role": "user", "content": said}]),
        ]
        pieces = self._pieces(runtime, messages)
        added, most = self._room(runtime, pieces, max_tokens)
        with allowance.turn():
            async with allowance.budget.reserve(added, most) as room:
                if room <= 0:
                    raise ToolError("the model cannot be asked: the budget of tokens is used up")
                generation = await self._generate(runtime, pieces, room)
                return self._append(runtime, messages, pieces, generation)

    def _pieces(self, runtime: Runtime, messages: list[Message]) -> list[Piece]:
        """The tokens before the turn. Raises ToolError."""
        template = runtime.template
        try:
            if not self.turns:
                return template.prompt(messages, [])
            if not messages:
                raise ToolError("the model has answered; say something to ask it again")
            missing = template.missing_end(self.tokens.ids[-1], USER)
            delta = template.follow(messages, self.messages[-1])
            return [(TEMPLATE, missing), *delta.pieces] if missing else list(delta.pieces)
        except ConversationsError as error:
            raise ToolError(f"the model cannot be asked this: {error}") from error

    def _room(
        self, runtime: Runtime, pieces: Sequence[Piece], max_tokens: int | None
    ) -> tuple[int, int]:
        """Tokens that are added to the response, and the most that the turn may sample."""
        settings, added = runtime.settings, sum(len(ids) for _, ids in pieces)
        free = settings.max_model_len - len(self.tokens) - added
        if not self.turns and added > settings.prompt_length:
            free = 0
        if free <= 0:
            raise ToolError("the model cannot be asked this: it is too long")
        limits = [free, settings.max_tokens, max_tokens]
        most = min(limit for limit in limits if limit is not None)
        return (added if self.turns else 0), most

    async def _generate(self, runtime: Runtime, pieces: Sequence[Piece], room: int) -> Generation:
        ids = [*self.tokens.ids, *(token for _, part in pieces for token in part)]
        sampling = {
            **runtime.settings.sampling,
            "max_new_tokens": room,
            "stop_token_ids": runtime.template.stop_token_ids,
        }
        try:
            generation = await runtime.engine.generate(ids, sampling, request_id=uuid.uuid4().hex)
            check_generation(generation, len(ids), room, ("stop", "length"))
        except Interrupted as interrupt:
            raise asyncio.CancelledError from interrupt
        except (EngineError, EndConversation) as error:
            raise BackendError(f"the model gave no answer: {error}") from error
        images = runtime.template.images
        if images and not set(images.reserved_ids).isdisjoint(generation.token_ids):
            raise BackendError("the model sampled a token that only an image may stand for")
        return generation

    def _append(
        self,
        runtime: Runtime,
        messages: Sequence[Message],
        pieces: Sequence[Piece],
        generation: Generation,
    ) -> str:
        if not self._model.is_open:  # the engine ended a turn that was cut off
            raise asyncio.CancelledError
        template = runtime.template
        try:
            raw = template.raw(generation.token_ids)
            parsed = template.read(raw, [], after=messages[-1])
        except (ConversationsError, OverflowError) as error:
            raise BackendError(f"the model's answer has no text: {error}") from error
        before = len(self.tokens) if self.turns else None
        for kind, ids in pieces:
            self.tokens.append(kind, ids)
        added = 0 if before is None else len(self.tokens) - before
        self.turns.append(turn_of(len(self.tokens), generation))
        self.tokens.append_sampled(generation.token_ids, generation.logprobs)
        self._allowance.budget.used += added + len(generation.token_ids)
        self.messages += [*messages, assistant_message(raw, parsed, [])]
        self._given = []
        return parsed.content
