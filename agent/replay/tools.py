"""The tools of a replayed conversation: recorded answers, or today's tools with an eye on what was recorded.

Invariant: a recorded answer is given only to the call that got it (same turn and place, name and arguments) while every
call before it was the same too, so that a tool with state would be in the state it was in. Which calls reach a tool at
all is not taken from the record: today's code parses, checks and limits them as it would in a run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from agent.errors import EndConversation
from agent.loop.calls import Call, ConversationTools, Dispatcher
from agent.loop.tasks import Task, given_length
from agent.replay.compare import answer_difference, same_call
from conversations.messages import Message, ToolCall
from conversations.trajectory import ToolCallRecord, Trajectory
from tools.base import BaseTool, ToolResponse
from tools.toolset import LoadedTool, ToolSet, loaded_tool

LOOP_WARNINGS = frozenset({"control_tokens", "history_rewritten", "unknown_ids"})
"""The kinds that the loop finds again in a replay; the others of a record are copied."""

_ANSWER_FIELDS = (
    "status",
    "response",
    "full_response",
    "reward",
    "metrics",
    "attempts",
    "queue_s",
    "run_s",
    "error",
)


def reached_a_tool(line: ToolCallRecord) -> bool:
    """Whether a recorded call was given to its tool, or was about to be: it may have changed the tool's state."""
    return bool(line.attempts) or line.status in (
        "ok",
        "tool_error",
        "backend_error",
        "timeout",
        "cancelled",
    )


class RecordedTools(ConversationTools):
    """Answers with what the ledger of `record` has. Nothing is imported and nothing runs; `dispatcher` holds `stand_ins(record)`.

    A call that the record has no answer for ends the conversation as `cancelled`. `kept` turns are in the conversation
    already. With a live model the recorded reward is given only where all recorded calls were made again.
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
        self.warnings = [
            warning for warning in record.warnings if warning.kind not in LOOP_WARNINGS
        ]

    async def create(self) -> list[Message]:
        """What the tools said when they were created."""
        await super().create()
        record = self._record
        if record.infra_error and record.stop_reason != "engine_error":
            self.failure = record.error
        if not record.prompt_ids and record.stop_reason in ("cancelled", "deadline"):
            raise EndConversation(record.stop_reason, record.error)
        first = next(
            (i for i, message in enumerate(record.messages) if message.get("raw") is not None), None
        )
        return record.messages[given_length(record) : first]

    async def run(self, calls: Sequence[Call], lines: Sequence[ToolCallRecord]) -> None:
        """Fills in the ledger lines of a turn: by our own code where no tool is asked, else from the record."""
        await super().run(calls, lines)
        recorded = {
            line.call_id: line for line in self._record.tool_calls if line.turn == lines[0].turn
        }
        missing = [line for line in lines if not self._fill(line, recorded.get(line.call_id))]
        if missing:
            raise EndConversation(
                "cancelled",
                f"replay: {missing[0].call_id} ({missing[0].name}) is a call without a recorded answer",
            )
        if unmade := [call_id for call_id, turn in self._open.items() if turn <= lines[0].turn]:
            raise EndConversation("cancelled", f"replay: {unmade[0]} of the record was not made")
        if any(map(self._is_cut_off, recorded.values())):
            raise EndConversation(self._record.stop_reason, self._record.error)

    def _fill(self, line: ToolCallRecord, recorded: ToolCallRecord | None) -> bool:
        """Puts the recorded answer in the place of a stand-in's, and cuts our own answers as the record's are; False without one."""
        if recorded is None or not same_call(line, recorded):
            if not line.attempts:
                return True
            _copy_answer(line, ToolCallRecord("", 0, "", {}, error="replay: no recorded answer"))
            return False
        if not line.attempts and not self._is_cut_off(recorded):  # no tool was asked
            if _whole(line) == _whole(recorded) and line.status == recorded.status:
                line.response, line.full_response = recorded.response, recorded.full_response
            return True
        _copy_answer(line, recorded)
        self._open.pop(line.call_id, None)
        return recorded.response is not None or self._is_cut_off(recorded)

    def _is_cut_off(self, recorded: ToolCallRecord) -> bool:
        """A call that was not answered when the recorded conversation was cut off."""
        is_last = recorded.turn == len(self._record.turns) - 1
        return (
            is_last
            and recorded.response is None
            and self._record.stop_reason in ("cancelled", "deadline")
        )

    async def rewards(self) -> dict[str, Any]:
        """The recorded reward, as far as it belongs to these calls."""
        if not self._live_model:
            return self._record.reward_parts
        if self._open:
            return {}
        return {
            name: value for name, value in self._record.reward_parts.items() if name in self.offered
        }


def _copy_answer(line: ToolCallRecord, recorded: ToolCallRecord) -> None:
    for name in _ANSWER_FIELDS:
        setattr(line, name, getattr(recorded, name))


def _whole(line: ToolCallRecord) -> str | None:
    return line.response if line.full_response is None else line.full_response


class LiveTools(ConversationTools):
    """Today's tools. `differences` holds, as JSON, what they answered otherwise outside of the conversation's own turns.

    With `recorded_prompt` the model was shown the record's schemas, and these stand in the new record.
    """

    def __init__(
        self, dispatcher: Dispatcher, task: Task, record: Trajectory, *, recorded_prompt: bool
    ) -> None:
        super().__init__(dispatcher, task.tools_kwargs, task.ground_truth)
        self._record = record
        self._recorded_prompt = recorded_prompt
        self._turns_run: set[int] = set()
        self.differences: list[dict[str, Any]] = []
        self.asked_again: list[tuple[ToolCallRecord, ToolCallRecord]] = []

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The schemas that stand in the prompt."""
        return self._record.tools if self._recorded_prompt else super().schemas

    async def run(self, calls: Sequence[Call], lines: Sequence[ToolCallRecord]) -> None:
        """Runs a turn's calls."""
        self._turns_run.add(lines[0].turn)
        await super().run(calls, lines)

    async def rebuild(self, turns: int, created: Sequence[Message]) -> None:
        """Brings the tools into the state after the first `turns` recorded turns: their calls are made again, in silence."""
        recorded = self._record.messages[given_length(self._record) :]
        before = [
            message["content"]
            for message in recorded
            if message["role"] == "tool" and "tool_call_id" not in message
        ]
        now = [message["content"] for message in created]
        if before != now:
            self.differences.append(
                {
                    "call_id": None,
                    "name": None,
                    "recorded": {"created": before},
                    "replayed": {"created": now},
                }
            )
        await self._again(range(turns))

    async def run_rest(self) -> None:
        """Makes the recorded calls that the conversation did not come to, to compare their answers too; the record is not touched."""
        await self._again(sorted({line.turn for line in self._record.tool_calls} - self._turns_run))

    async def _again(self, turns: Iterable[int]) -> None:
        written = _written_arguments(self._record)
        for turn in turns:
            lines = [
                line
                for line in self._record.tool_calls
                if line.turn == turn and reached_a_tool(line)
            ]
            if known := [
                (line, written[line.call_id]) for line in lines if line.call_id in written
            ]:
                await self._ask_again(turn, known)

    async def _ask_again(
        self, turn: int, recorded: Sequence[tuple[ToolCallRecord, dict[str, Any]]]
    ) -> None:
        self._turns_run.add(turn)
        fresh = [
            ToolCallRecord(line.call_id, turn, line.name, arguments) for line, arguments in recorded
        ]
        await super().run(
            [ToolCall(line.name, arguments, "") for line, arguments in recorded], fresh
        )
        for (old, _), new in zip(recorded, fresh, strict=True):
            if old.status == "cancelled":
                continue
            self.asked_again.append((old, new))
            if difference := answer_difference(old, new):
                sides = [{name: pair[side] for name, pair in difference.items()} for side in (0, 1)]
                self.differences.append(
                    {
                        "call_id": old.call_id,
                        "name": old.name,
                        "recorded": sides[0],
                        "replayed": sides[1],
                    }
                )


def _written_arguments(record: Trajectory) -> dict[str, dict[str, Any]]:
    """The arguments of each call as the model wrote them: the ledger's have lost the order of their keys."""
    calls = [
        call
        for message in record.messages
        if message.get("raw") is not None
        for call in message.get("tool_calls", ())
    ]
    return {
        call["id"]: json.loads(call["function"]["arguments"])
        for call in calls
        if not call.get("malformed")
    }


# ---------------------------------------------------------------------- tools that are only their schema


class _StandIn(BaseTool):
    """Takes every call; `RecordedTools` puts the recorded answer in the place of its own."""

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        return ToolResponse(), None, {}


def stand_ins(record: Trajectory) -> ToolSet:
    """The tools offered in a record, as what answers calls instead of them. Those whose success ended the conversation do so again."""
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
    """The tools that may have ended the conversation: they answered in its last turn, and in no turn before."""
    if record.stop_reason != "tool_stop":
        return set()
    last = len(record.turns) - 1
    answered = [(line.name, line.turn) for line in record.tool_calls if line.status == "ok"]
    return {name for name, turn in answered if turn == last} - {
        name for name, turn in answered if turn < last
    }
