"""One turn's tool calls, all at once, and the tools of one conversation.

Invariant: every call of a turn ends with one result, with a status and a text for the model, in
call order, whatever its tool does. A tool's exception, hang or nonsense never reaches another call
or the conversation. Only cancellation passes through, after the tools were cancelled; the calls
that had not ended are `cancelled` then.
"""

from __future__ import annotations

import asyncio
import copy
import math
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from agent.loop.attempts import CANCELLED, AttemptOutcome, no_images, serve
from agent.loop.boundary import CallTimeoutError, awaitable, bounded, describe, finite, text_of
from agent.loop.images import ImageReader, given_image, tool_images
from agent.loop.ledger import Call, CallResult, call_id, ledger_line, not_run, unanswered
from agent.loop.limits import Gate
from agent.loop.observer import Observer, observed
from conversations.encoding import without_lone_surrogates
from conversations.errors import ImageError
from conversations.images.reading import Picture
from conversations.messages import MalformedToolCall, Message, ToolCall, tool_message
from conversations.trajectory import Attempt, Branch, ToolCallRecord
from conversations.truncate import Shortened
from conversations.warning import RecordWarning
from tools.base import AskModel
from tools.policy import Policy
from tools.toolset import LoadedTool, ToolSet

T = TypeVar("T")

Shorten = Callable[..., Shortened | None]
"""`shorten(text, limit=..., side=...)`: what the model may see of a text, None if all of it.

The keywords are a tool's own `max_response_tokens` and `response_side`; without them, the run's.
"""


class ClosableModel(AskModel, Protocol):
    """The model for one tool call."""

    def close(self) -> None:
        """The call has ended: nothing more is answered."""
        ...


ModelOf = Callable[[str, str], ClosableModel]
"""The model for a tool's call: `model_of(tool, call_id)`."""


class Dispatcher:
    """The tools of a run and their limits, shared by all of its conversations.

    `images` reads the images that tools answer with; None if the model sees none, or its template
    cannot show them in tool messages. `placeholder` is the token that stands in a text for an
    image, as far as it holds one: a response may not.
    """

    def __init__(
        self,
        tools: ToolSet,
        *,
        max_parallel_calls: int,
        shorten: Shorten,
        images: ImageReader | None = None,
        placeholder: Callable[[str], str] = lambda text: "",
    ) -> None:
        self.tools = tools
        self.images = images
        self.placeholder = placeholder
        self.max_parallel_calls = max_parallel_calls
        self._shorten = shorten
        self._own_shorten = {
            name: partial(shorten, **own)
            for name, tool in tools.items()
            if (own := _own_size(tool.policy))
        }
        self._gates = {name: gate for name, tool in tools.items() if (gate := Gate.of(tool.policy))}

    def gate(self, tool: LoadedTool) -> Gate | None:
        """What the tool's calls of all conversations pass through; None if nothing limits them."""
        return self._gates.get(tool.name)

    def shorten(self, name: str, text: str) -> Shortened | None:
        """What the model may see of a response of the named tool; None if that is all of it."""
        return self._own_shorten.get(name, self._shorten)(text)


def _own_size(policy: Policy) -> dict[str, Any]:
    sizes = {"limit": policy.max_response_tokens, "side": policy.response_side}
    return {key: value for key, value in sizes.items() if value is not None}


@dataclass(slots=True)
class PendingTurn:
    """A sampled turn that nobody has answered yet. `number` counts the conversation's turns from 0.

    `results` [calls] says how each of `calls` ended so far. `is_complete`: the model ended the turn
    itself, no budget cut it.
    """

    number: int
    calls: Sequence[Call]
    is_complete: bool = True
    results: list[CallResult] = field(init=False)

    def __post_init__(self) -> None:
        self.results = [not_run(call) for call in self.calls]

    def call_ids(self) -> list[str]:
        """The ids of the calls, in order."""
        return [call_id(self.number, index) for index in range(len(self.calls))]

    def reject(self, error: str) -> None:
        """Ends every call that could be read as `rejected`: it is not run."""
        self.results = [
            result if result.status == "malformed" else unanswered("rejected", error)
            for result in self.results
        ]

    def lines(self) -> list[ToolCallRecord]:
        """The lines of the calls in the ledger, as things stand."""
        return [
            ledger_line(self.number, index, call, self.results[index])
            for index, call in enumerate(self.calls)
        ]


class ConversationTools:
    """One conversation's tool instances: created before its first turn, released after its last.

    `tools_kwargs` is the row's: its keys choose the tools offered; without any, all are offered.
    `failure` says what went wrong outside of a call; `warnings` are for the record. `pictures` are
    the conversation's by hash: those of its task first, then what tools answered with. `model_of`
    makes what a tool asks the model with. `played_asides` are sub-conversations out of a record.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        tools_kwargs: Mapping[str, Any],
        ground_truth: Any,
        observer: Observer | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._kwargs = tools_kwargs
        self._ground_truth = ground_truth
        self._observer = observer
        # One id for all tools, as verl passes its request id: some of them share a backend's state.
        self._id = uuid.uuid4().hex
        self._instances: dict[str, str] = {}
        known = dispatcher.tools
        self.offered: dict[str, LoadedTool] = {
            name: known[name] for name in known if name in tools_kwargs or not tools_kwargs
        }
        self._schemas = [tool.schema for tool in self.offered.values()]
        self.warnings = [
            RecordWarning(
                "unknown_tool_kwargs",
                f"tools_kwargs names {name!r}, which is not a tool of this run",
            )
            for name in tools_kwargs
            if name not in known
        ]
        self.failure: str | None = None
        self.model_of: ModelOf | None = None
        self.played_asides: list[Branch] = []
        self.pictures: dict[str, Picture] = {}

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The OpenAI schemas offered, lossless, in order."""
        return self._schemas

    # ------------------------------------------------------------------ beginning and end

    async def create(self) -> list[Message]:
        """Creates one instance of each tool offered.

        Returns what the tools say to that, as messages that follow the prompt. The calls of a tool
        that fails here end with `backend_error`, and `failure` says why.
        """
        said = await _together([self._create(tool) for tool in self.offered.values()])
        return [
            tool_message(text, call_id=None, name=name, images=images)
            for name, (text, images) in zip(self.offered, said, strict=True)
            if text or images
        ]

    async def _create(self, tool: LoadedTool) -> tuple[str, list[str]]:
        try:
            given = self._given(tool, "create_kwargs")
            if tool.takes_image:
                given = await self._with_image(tool, given)
            kwargs = tool.create_kwargs(given, copy.deepcopy(self._ground_truth))
            begin = partial(self._created, tool, kwargs)
            response = await bounded(begin, tool.policy.timeout_s)
            text = "" if response is None else text_of(response)
            if token := self._dispatcher.placeholder(text):
                raise ImageError(f"it said {token}, which only an image may stand for")
            pictures, note = await self._read_images(response)
            text = "\n".join(filter(None, (text, note)))
            return text, [picture.reference for picture in pictures]
        except Exception as error:
            self._fail(tool, "create", error, tool.policy.timeout_s)
            return "", []

    async def _with_image(self, tool: LoadedTool, given: dict[str, Any]) -> dict[str, Any]:
        """The keywords with the image that the tool works on, a PIL image.

        It is the row's own, else the first of the conversation. Raises ImageError.
        """
        picture = next(iter(self.pictures.values()), None)
        if (source := given_image(given, tool.name)) is not None:
            if (reader := self._dispatcher.images) is None:
                raise ImageError("this model sees no images")
            [picture] = await reader.read([source])
        if picture is None:
            return given
        return {**given, "image": await asyncio.to_thread(picture.image)}

    async def _read_images(self, response: Any) -> tuple[Sequence[Picture], str]:
        """The pictures of a response, kept in `pictures`, and a note. Raises ImageError."""
        sources = tool_images(response)
        if not sources or (reader := self._dispatcher.images) is None:
            return await no_images(response)
        pictures = await reader.read(sources, before=len(self.pictures))
        self.pictures |= {picture.sha256: picture for picture in pictures}
        return pictures, ""

    async def _created(self, tool: LoadedTool, kwargs: dict[str, Any]) -> object:
        """Creates an instance and notes it, with no await in between: no cancellation loses it.

        An instance that comes although its creation was cancelled is released here: the
        conversation may have released the others already.
        """
        created = await awaitable(tool.tool.create(self._id, **kwargs))
        instance_id, response = created if isinstance(created, tuple) else (created, None)
        if (task := asyncio.current_task()) and task.cancelling():
            await tool.tool.release(instance_id, **self._given(tool, "release_kwargs"))
        else:
            self._instances[tool.name] = instance_id
        return response

    async def ended_early(self) -> None:
        """Called before the release if the conversation ended with `cancelled` by itself."""

    async def rewards(self, within_s: float = math.inf) -> dict[str, Any]:
        """The trajectory's reward by each tool that has one, asked for at once within `within_s`.

        A tool that fails here sets `failure`.
        """
        rewards = await _together([self._reward(name, within_s) for name in self._instances])
        pairs = zip(self._instances, rewards, strict=True)
        return {name: reward for name, reward in pairs if reward is not None}

    async def _reward(self, name: str, within_s: float) -> float | None:
        tool, instance_id = self.offered[name], self._instances[name]
        timeout_s = min(tool.policy.timeout_s, within_s)

        def begin() -> Coroutine[Any, Any, Any]:
            kwargs = self._given(tool, "calc_reward_kwargs")
            return tool.tool.calc_reward(instance_id, **kwargs)

        try:
            value = await bounded(begin, timeout_s)
            return None if value is None else finite(value)
        except Exception as error:
            self._fail(tool, "calc_reward", error, timeout_s)
            return None

    async def release(self, within_s: float = math.inf) -> None:
        """Releases every instance once, at once, within `within_s`.

        All are released even if one fails or the conversation is cancelled meanwhile.
        """
        if not self._instances:
            return
        instances, self._instances = self._instances, {}
        releasing = asyncio.ensure_future(
            _together([self._release(*pair, within_s) for pair in instances.items()])
        )
        try:
            await asyncio.shield(releasing)
        except asyncio.CancelledError:
            await asyncio.wait((releasing,))  # bounded by the tools' timeouts
            raise

    async def _release(self, name: str, instance_id: str, within_s: float) -> None:
        tool = self.offered[name]
        timeout_s = min(tool.policy.timeout_s, within_s)

        def begin() -> Coroutine[Any, Any, None]:
            return tool.tool.release(instance_id, **self._given(tool, "release_kwargs"))

        try:
            await bounded(begin, timeout_s)
        except Exception as error:
            text = f"tool {name}: release {_reason(error, timeout_s)}"
            self.warnings.append(RecordWarning("release_failed", text))

    def _given(self, tool: LoadedTool, key: str) -> dict[str, Any]:
        """A copy of the row's keywords for one coroutine of a tool: other samples use them, too."""
        kwargs = self._kwargs.get(tool.name)
        given = kwargs.get(key) if isinstance(kwargs, Mapping) else None
        return copy.deepcopy(dict(given)) if isinstance(given, Mapping) else {}

    def _fail(self, tool: LoadedTool, step: str, error: Exception, timeout_s: float) -> None:
        self.failure = f"tool {tool.name}: {step} {_reason(error, timeout_s)}"

    # ------------------------------------------------------------------ one turn

    async def run(self, turn: PendingTurn) -> None:
        """Runs a turn's calls concurrently; `turn.results` says how each ended."""
        answer, observer = self._answer, self._observer
        if observer is not None:
            answer = partial(self._observed_answer, observer)
        await _together([answer(turn, index) for index in range(len(turn.calls))])

    async def _observed_answer(self, observer: Observer, turn: PendingTurn, index: int) -> None:
        named, name = call_id(turn.number, index), turn.calls[index].name or ""
        with observed(partial(observer.tool_call, named, name)) as tell:
            await self._answer(turn, index)
            tell(turn.results[index])

    async def _answer(self, turn: PendingTurn, index: int) -> None:
        """Sets the result of one call. Always returns, unless it is cancelled."""
        call = turn.calls[index]
        if isinstance(call, MalformedToolCall):
            text = f"Error: malformed tool call: {call.error}"
            result = self._refused(call, "malformed", text, call.error)
        elif (tool := self.offered.get(call.name)) is None:
            names = ", ".join(self.offered) or "none"
            text = f"Error: there is no tool named {call.name!r}; the tools are: {names}"
            result = self._refused(call, "unknown_tool", text)
        elif problems := _problems(tool, call.arguments):
            text = f"Error: invalid arguments for {call.name}: {'; '.join(problems)}"
            result = self._refused(call, "invalid_arguments", text)
        elif index >= (allowed := self._dispatcher.max_parallel_calls):
            text = f"Error: not run: at most {allowed} tool calls are allowed in one turn"
            result = self._refused(call, "rejected", text)
        elif (instance_id := self._instances.get(tool.name)) is None:
            text = f"Error: {tool.name} is not available"
            result = self._refused(call, "backend_error", text, self.failure)
        else:
            await self._execute(tool, instance_id, turn, index, call)
            return
        turn.results[index] = result

    async def _execute(
        self, tool: LoadedTool, instance_id: str, turn: PendingTurn, index: int, call: ToolCall
    ) -> None:
        model = None
        if tool.asks_model and self.model_of:
            model = self.model_of(tool.name, call_id(turn.number, index))

        def execute() -> Coroutine[Any, Any, Any]:
            arguments = _copied(call.arguments)  # the record keeps what the model wrote
            given = self._given(tool, "execute_kwargs")
            if model is not None:
                given["model"] = model
            return tool.tool.execute(instance_id, arguments, **given)

        attempts: list[Attempt] = []
        outcome = CANCELLED
        try:
            gate = self._dispatcher.gate(tool)
            outcome = await serve(tool, execute, gate, attempts, self._read_images)
        finally:
            if model is not None:
                model.close()
            turn.results[index] = self._served(call.name, outcome, attempts)

    def _served(self, name: str, outcome: AttemptOutcome, attempts: list[Attempt]) -> CallResult:
        """The result of a call that was given to its tool."""
        if token := self._dispatcher.placeholder(outcome.text or ""):
            text = f"Error: {name} answered with {token}, which only an image may stand for"
            outcome = outcome._replace(status="tool_error", text=text, error=text, pictures=())
        response, full_response, tokens_cut = self._shown(name, outcome.text)
        if tokens_cut:
            attempts[-1] = replace(attempts[-1], tokens_cut=tokens_cut)
        queue_s = run_s = 0.0
        for attempt in attempts:
            queue_s += attempt.queue_s
            run_s += attempt.run_s
        return CallResult(
            outcome.status,
            response,
            full_response,
            outcome.reward,
            outcome.metrics or {},
            attempts,
            queue_s,
            run_s,
            outcome.error,
            [picture.sha256 for picture in outcome.pictures],
        )

    def _refused(self, call: Call, status: str, text: str, error: str | None = None) -> CallResult:
        """The result of a call that is not run. `text` may quote the model: lone surrogates too."""
        if token := self._dispatcher.placeholder(text):  # the model wrote it
            text = text.replace(token, "<image>")
        shown, full, _ = self._shown(call.name or "", without_lone_surrogates(text))
        return unanswered(status, error)._replace(response=shown, full_response=full)

    def _shown(self, name: str, text: str | None) -> tuple[str | None, str | None, int]:
        """What the model sees of a response; all of it and the number of tokens cut, if cut."""
        shown = None if text is None else self._dispatcher.shorten(name, text)
        return (text, None, 0) if shown is None else (shown.text, text, shown.tokens_cut)


async def _together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of coroutines that always return, run concurrently.

    One alone, the common case, is awaited without a task. If this is cancelled, all of them are,
    and have ended before CancelledError is raised.
    """
    if len(coroutines) == 1:
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        await asyncio.wait(tasks)  # gather does not wait for those that take longer to end
        raise


def _copied(value: Any) -> Any:
    """A copy of a JSON value, at a fifth of what `copy.deepcopy` costs."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if type(value) is list else value


def _problems(tool: LoadedTool, arguments: dict[str, Any]) -> list[str]:
    """What is wrong with a call's arguments. The validator itself fails on numbers beyond float."""
    try:
        return tool.validate(arguments)
    except Exception as error:
        return [f"they cannot be checked ({type(error).__name__})"]


def _reason(error: Exception, timeout_s: float) -> str:
    if isinstance(error, CallTimeoutError):
        return f"took more than {timeout_s:g} s"
    return f"failed: {describe(error)}"
