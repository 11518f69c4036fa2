"""The tools of a replayed conversation: recorded answers, or today's tools beside the record.

Invariant: a recorded answer is given only to the call that got it (same turn and place, name and
arguments), and only if every call before it was the same too, so that a tool with state would be in
the state that it was in. Which calls reach a tool at all is not taken from the record: today's code
parses, checks and limits them as in a run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from agent.errors import EndConversation, EngineError
from agent.loop.calls import ConversationTools, Dispatcher, PendingTurn
from agent.loop.ledger import CallResult, result_of, unanswered
from agent.loop.observer import Observer
from agent.loop.tasks import Task, task_message_count
from agent.replay.compare import answer_difference, calls_match
from agent.replay.restored import sampled_messages
from conversations.branches import is_aside
from conversations.messages import Message, ToolCall
from conversations.rounds import is_sampled
from conversations.trajectory import ToolCallRecord, Trajectory
from conversations.warning import RecordWarning
from tools.base import BaseTool, ToolResponse
from tools.toolset import LoadedTool, ToolSet, loaded_tool

LOOP_WARNINGS = frozenset({"control_tokens", "history_rewritten", "unknown_ids"})
"""The kinds that the loop finds again in a replay; the others of a record are copied."""

REACHED = frozenset({"ok", "tool_error", "backend_error", "timeout", "cancelled"})


def reached_a_tool(line: ToolCallRecord) -> bool:
    """Whether a recorded call was given to its tool, and may have changed its state."""
    return bool(line.attempts) or line.status in REACHED


class RecordedTools(ConversationTools):
    """Answers with what the ledger of `record` has. Nothing is imported and nothing runs.

    `dispatcher` holds `stand_ins(record)`. A call without a recorded answer ends the conversation
    with `cancelled`. The first `kept` turns were answered already. With a live model the recorded
    reward is given only if all recorded calls were made again.
    """

    def __init__(
        self, record: Trajectory, dispatcher: Dispatcher, *, live_model: bool, kept: int = 0
    ) -> None:
        super().__init__(dispatcher, {}, None)
        self._record = record
        self._live_model = live_model
        self._open = {
            line.call_id: line.turn
            for line in record.tool_calls
            if line.turn >= kept and reached_a_tool(line)
        }
        self.warnings = [one for one in record.warnings if one.kind not in LOOP_WARNINGS]
        for line in record.tool_calls:
            if line.turn < kept:
                self._play_asides(line)

    def _play_asides(self, line: ToolCallRecord) -> None:
        """Puts what an answered call asked the model into the new record."""
        self.played_asides += [
            branch
            for branch in self._record.branches
            if is_aside(branch) and branch.client["call"] == line.call_id
        ]

    async def create(self) -> list[Message]:
        """What the tools said when they were created."""
        await super().create()
        record = self._record
        if record.infra_error and record.stop_reason != "engine_error":
            self.failure = record.error
        if not record.prompt_ids and record.stop_reason in ("cancelled", "deadline"):
            raise EndConversation(record.stop_reason, record.error)
        sampled = sampled_messages(record)
        return record.messages[task_message_count(record) : sampled[0] if sampled else None]

    async def run(self, turn: PendingTurn) -> None:
        """Answers a turn's calls: by our own code if no tool is asked, else from the record."""
        await super().run(turn)
        recorded = {
            line.call_id: line for line in self._record.tool_calls if line.turn == turn.number
        }
        missing = [line for line in turn.lines() if not self._answer_again(turn, line, recorded)]
        if missing:
            line = missing[0]
            text = f"replay: {line.call_id} ({line.name}) is a call without a recorded answer"
            raise EndConversation("cancelled", text)
        if not_made := [named for named, number in self._open.items() if number <= turn.number]:
            text = f"replay: {not_made[0]} of the record was not made"
            raise EndConversation("cancelled", text)
        if any(map(self._is_cut_off, recorded.values())):
            raise EndConversation(self._record.stop_reason, self._record.error)

    def _answer_again(
        self, turn: PendingTurn, line: ToolCallRecord, recorded: dict[str, ToolCallRecord]
    ) -> bool:
        """Puts the recorded result in the place of a stand-in's; False if there is none.

        What our own code answered is shortened as the record's answer is.
        """
        index = turn.call_ids().index(line.call_id)
        result, old = turn.results[index], recorded.get(line.call_id)
        if old is None or not calls_match(line, old):
            if not result.attempts:
                return True
            turn.results[index] = unanswered("cancelled", "replay: no recorded answer")
            return False
        if not result.attempts and not self._is_cut_off(old):  # no tool was asked
            if _whole(result) == _whole(old) and result.status == old.status:
                turn.results[index] = result._replace(
                    response=old.response, full_response=old.full_response
                )
            return True
        turn.results[index] = result_of(old)
        self._open.pop(line.call_id, None)
        if not self._live_model:  # a live model was not asked
            self._play_asides(old)
        return old.response is not None or self._is_cut_off(old)

    def _is_cut_off(self, recorded: ToolCallRecord) -> bool:
        """Whether a call was not answered because the recorded conversation was cut off."""
        is_last = recorded.turn == len(self._record.turns) - 1
        return (
            is_last
            and recorded.response is None
            and self._record.stop_reason in ("cancelled", "deadline")
        )

    async def rewards(self, within_s: float = math.inf) -> dict[str, Any]:
        """The recorded reward, as far as it belongs to these calls."""
        if not self._live_model:
            return self._record.reward_parts
        if self._open:
            return {}
        return {
            name: value for name, value in self._record.reward_parts.items() if name in self.offered
        }


def _whole(answer: CallResult | ToolCallRecord) -> str | None:
    return answer.response if answer.full_response is None else answer.full_response


class LiveTools(ConversationTools):
    """Today's tools, brought into the state that they were in after the first `turns` turns.

    `differences` holds, as JSON, what they answered differently outside of the conversation's own
    turns. `turns` is None if the conversation starts anew. With `recorded_prompt` the model was
    shown the record's schemas, and these stand in the new record. With `resumes` the differences
    are warnings, too.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        task: Task,
        record: Trajectory,
        *,
        turns: int | None,
        recorded_prompt: bool = False,
        resumes: bool = False,
        observer: Observer | None = None,
    ) -> None:
        super().__init__(dispatcher, task.tools_kwargs, task.ground_truth, observer)
        self._record = record
        self._turns = turns
        self._recorded_prompt = recorded_prompt
        self._resumes = resumes
        self._turns_run: set[int] = set()
        self.differences: list[dict[str, Any]] = []
        self.asked_again: list[tuple[ToolCallRecord, ToolCallRecord]] = []

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The schemas that stand in the prompt."""
        return self._record.tools if self._recorded_prompt else super().schemas

    async def create(self) -> list[Message]:
        """Creates the tools, and makes the recorded calls of the first `turns` turns again.

        Raises EngineError if a backend fails meanwhile: nothing can go on from there.
        """
        created = await super().create()
        if self._turns is None:
            return created
        self._compare_created(created)
        await self._make_again(range(self._turns))
        if self._resumes:
            self._warn_of_differences()
        for _, line in self.asked_again:
            if line.status == "backend_error":
                raise EngineError(f"{line.call_id} could not be made again: {line.error}")
        return created

    async def run(self, turn: PendingTurn) -> None:
        """Runs a turn's calls."""
        self._turns_run.add(turn.number)
        await super().run(turn)

    async def ended_early(self) -> None:
        """Makes the recorded calls that the conversation did not come to, to compare the answers.

        The record is not touched.
        """
        await self._make_again(
            sorted({line.turn for line in self._record.tool_calls} - self._turns_run)
        )

    def _compare_created(self, created: Sequence[Message]) -> None:
        recorded = self._record.messages[task_message_count(self._record) :]
        before = [
            message["content"]
            for message in recorded
            if message["role"] == "tool" and "tool_call_id" not in message
        ]
        now = [message["content"] for message in created]
        if before != now:
            self._note(None, None, {"created": before}, {"created": now})

    async def _make_again(self, turns: Iterable[int]) -> None:
        written = _written_arguments(self._record)
        for turn in turns:
            lines = [
                line
                for line in self._record.tool_calls
                if line.turn == turn and line.call_id in written and reached_a_tool(line)
            ]
            if lines:
                await self._ask_again(turn, lines, written)

    async def _ask_again(
        self, turn: int, lines: Sequence[ToolCallRecord], written: dict[str, dict[str, Any]]
    ) -> None:
        self._turns_run.add(turn)
        calls = [ToolCall(line.name, written[line.call_id], "") for line in lines]
        fresh = PendingTurn(turn, calls)
        await super().run(fresh)
        for old, answer in zip(lines, fresh.lines(), strict=True):
            if old.status == "cancelled":
                continue
            new = dataclasses.replace(answer, call_id=old.call_id)
            self.asked_again.append((old, new))
            if difference := answer_difference(old, new):
                before, now = (
                    {name: pair[side] for name, pair in difference.items()} for side in (0, 1)
                )
                self._note(old.call_id, old.name, before, now)

    def _note(
        self, named: str | None, name: str | None, recorded: dict[str, Any], now: dict[str, Any]
    ) -> None:
        self.differences.append(
            {"call_id": named, "name": name, "recorded": recorded, "replayed": now}
        )

    def _warn_of_differences(self) -> None:
        names = {one["name"] or "what tools say when created" for one in self.differences}
        self.warnings += [
            RecordWarning("tools_differ", f"{name}: not what was recorded, when asked again")
            for name in sorted(names)
        ]


def _written_arguments(record: Trajectory) -> dict[str, dict[str, Any]]:
    """The arguments of each call as the model wrote them; the ledger lost the order of the keys."""
    calls = [
        call
        for message in record.messages
        if is_sampled(message)
        for call in message.get("tool_calls", ())
    ]
    return {
        call["id"]: json.loads(call["function"]["arguments"])
        for call in calls
        if not call.get("malformed")
    }


# ---------------------------------------------------------------------- stand-ins


class _StandIn(BaseTool):
    """Accepts every call; `RecordedTools` puts the recorded answer in the place of its own."""

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        return ToolResponse(), None, {}


def stand_ins(record: Trajectory) -> ToolSet:
    """Stand-ins for the tools offered in a record.

    Those whose success ended the conversation end it again.
    """
    ending = _ending(record)
    tools = [_stand_in(json.dumps(schema)) for schema in record.tools]
    return ToolSet(
        dataclasses.replace(tool, ends_conversation=True) if tool.name in ending else tool
        for tool in tools
    )


@functools.lru_cache(256)
def _stand_in(schema: str) -> LoadedTool:
    loaded = json.loads(schema)
    return loaded_tool(_StandIn({}, loaded), loaded)


def _ending(record: Trajectory) -> set[str]:
    """The tools that may have ended the conversation: they succeeded in its last turn alone."""
    if record.stop_reason != "tool_stop":
        return set()
    last = len(record.turns) - 1
    answered = [(line.name, line.turn) for line in record.tool_calls if line.status == "ok"]
    return {name for name, turn in answered if turn == last} - {
        name for name, turn in answered if turn < last
    }
