"""Records as ATIF v1.8 documents (Agent Trajectory Interchange Format), and the way back.

ATIF's own fields hold what they can: messages, calls, observations and, for each generation, the
prompt ids, the sampled ids and the log-probs. `extra.turntrace` holds the rest: of the document
(segments, mask, rewards, ...), of a step (the message's own keys), of a call (its ledger line, the
text of a malformed call).

Invariant: `upgraded(record_of(document(record))) == record`, with the hash and the order of keys in
messages and tools. A message's own keys stand in `extra` in order, null where ATIF has the value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from conversations.errors import RecordError
from conversations.rounds import is_sampled, sampled_places
from conversations.upgrade import SCHEMA, as_written

VERSION = "ATIF-v1.8"
OWN = "turntrace"

AtifDocument = dict[str, Any]
Record = dict[str, Any]

_CARRIED = frozenset(
    {
        "id",
        "prompt_ids",
        "response_ids",
        "response_logprobs",
        "messages",
        "tool_calls",
        "tools",
        "turns",
    }
)
"""Fields of the record that ATIF's own fields hold, or parts of steps."""
_ATIF_KEYS = frozenset({"content", "tool_calls", "reasoning_content"})
"""Keys of a message that ATIF's own fields hold."""


def document(record: Mapping[str, Any]) -> AtifDocument:
    """The record as an ATIF document.

    Raises RecordError if its tokens do not line up or a log-prob is not a finite number.
    """
    check_tokens(record)
    record = as_written(record)
    steps = _Steps(record)
    for message in record["messages"]:
        steps.add(message)
    own = {key: value for key, value in record.items() if key not in _CARRIED}
    ids = record["prompt_ids"] + record["response_ids"]
    end = record["turns"][-1]["end"] if record["turns"] else 0
    own |= {
        "tail_ids": ids[end:],
        "prompt_length": len(record["prompt_ids"]),
        "ledger": steps.rest(),
    }
    agent: dict[str, Any] = {"name": OWN, "version": SCHEMA}
    if model := record["engine"].get("model"):
        agent["model_name"] = str(model)
    if record["tools"]:
        agent["tool_definitions"] = record["tools"]
    totals = {"total_prompt_tokens": sum(turn["prompt_tokens"] for turn in record["turns"])}
    totals |= {
        "total_completion_tokens": sum(record["response_mask"]),
        "total_steps": len(steps.done),
    }
    head = {
        "schema_version": VERSION,
        "session_id": record["task_id"],
        "trajectory_id": record["id"],
        "agent": agent,
    }
    return {**head, "steps": steps.done, "final_metrics": totals, "extra": {OWN: own}}


def check_tokens(record: Mapping[str, Any]) -> None:
    """Raises RecordError if ids, mask, log-probs and turns do not line up. ATIF's own models accept
    that.
    """
    count = len(record["response_ids"])
    if not len(record["response_mask"]) == len(record["response_logprobs"]) == count:
        raise RecordError(
            f"trajectory {record['id']}: {count} response ids, "
            "but not as many mask bits or log-probs"
        )
    values = [value for value in record["response_logprobs"] if value is not None]
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise RecordError(f"trajectory {record['id']}: a log-prob is not a finite number")
    sampled = len(sampled_places(record["messages"]))
    if sampled != len(record["turns"]):
        raise RecordError(
            f"trajectory {record['id']}: {len(record['turns'])} turns, "
            f"but {sampled} sampled messages"
        )


class _Steps:
    """Builds the steps of a record, message by message."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.done: list[dict[str, Any]] = []
        self._record = record
        self._ids = record["prompt_ids"] + record["response_ids"]
        self._ledger = {entry["call_id"]: entry for entry in record["tool_calls"]}
        self._turns = iter(record["turns"])

    def add(self, message: Mapping[str, Any]) -> None:
        role = message["role"]
        if role == "tool":
            self._observe(message)
        elif role == "assistant":
            self._append("agent", message, self._agent(message))
        else:
            self._append("user" if role == "user" else "system", message, {})

    def rest(self) -> list[dict[str, Any]]:
        """The ledger lines that belong to no message."""
        return list(self._ledger.values())

    def _append(self, source: str, message: Mapping[str, Any], more: dict[str, Any]) -> None:
        own = {key: None if key in _ATIF_KEYS else value for key, value in message.items()}
        step = {
            "step_id": len(self.done) + 1,
            "source": source,
            "message": message.get("content", ""),
            **more,
        }
        self.done.append({**step, "extra": {OWN: {"message": own}}})

    def _agent(self, message: Mapping[str, Any]) -> dict[str, Any]:
        calls = message.get("tool_calls")
        found: dict[str, Any] = (
            {}
            if calls is None
            else {"tool_calls": [self._call(call, place) for place, call in enumerate(calls)]}
        )
        if "reasoning_content" in message:
            found["reasoning_content"] = message["reasoning_content"]
        if not is_sampled(message):
            return {**found, "is_copied_context": True}
        return {**found, "metrics": self._metrics(next(self._turns)), "llm_call_count": 1}

    def _metrics(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        start, end = turn["start"], turn["end"]
        shift = len(self._record["prompt_ids"])
        metrics: dict[str, Any] = {
            "prompt_tokens": turn["prompt_tokens"],
            "completion_tokens": end - start,
        }
        if turn["cached_tokens"] is not None:
            metrics["cached_tokens"] = turn["cached_tokens"]
        metrics |= {
            "prompt_token_ids": self._ids[:start],
            "completion_token_ids": self._ids[start:end],
        }
        logprobs = self._record["response_logprobs"][start - shift : end - shift]
        if None not in logprobs:
            metrics["logprobs"] = logprobs
        return {**metrics, "extra": {OWN: dict(turn)}}

    def _call(self, call: Mapping[str, Any], place: int) -> dict[str, Any]:
        function = call["function"]
        arguments = _object(function["arguments"])
        own: dict[str, Any] = {
            "call": {
                **call,
                "function": {key: value for key, value in function.items() if key != "name"},
            }
        }
        if (
            arguments is not None
            and json.dumps(arguments, ensure_ascii=False) == function["arguments"]
        ):
            own["call"]["function"].pop("arguments")
        if (entry := self._ledger.pop(call.get("id"), None)) is not None:
            own["ledger"] = entry
        name = str(call.get("id") or f"given_{len(self.done) + 1}_{place}")
        return {
            "tool_call_id": name,
            "function_name": function["name"],
            "arguments": arguments or {},
            "extra": {OWN: own},
        }

    def _observe(self, message: Mapping[str, Any]) -> None:
        """Adds a tool message as an observation of the step whose call it answers.

        What a tool said at its creation becomes a step of its own.
        """
        last = self.done[-1] if self.done else {}
        known = {call["tool_call_id"] for call in last.get("tool_calls", [])}
        call_id = message.get("tool_call_id")
        if call_id not in known:
            last = {"step_id": len(self.done) + 1, "source": "system", "message": ""}
            self.done.append(last)
        result = {"source_call_id": call_id} if call_id in known else {}
        own = {**message, "content": None}
        results = last.setdefault("observation", {"results": []})["results"]
        results.append({**result, "content": message["content"], "extra": {OWN: {"message": own}}})


def _object(text: Any) -> dict[str, Any] | None:
    """A call's arguments as the object that ATIF wants, or None if they are not an object."""
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ---------------------------------------------------------------------- and back


def record_of(found: Mapping[str, Any]) -> Record:
    """The record that `document` wrote.

    Raises RecordError, or KeyError, TypeError and the like, if the document was changed since.
    """
    own = dict(found["extra"][OWN])
    tail, prompt_length, ledger = (
        own.pop("tail_ids"),
        own.pop("prompt_length"),
        list(own.pop("ledger")),
    )
    messages: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    ids: list[int] = []
    logprobs: dict[int, float] = {}
    calls: list[dict[str, Any]] = []
    for step in found["steps"]:
        messages += _messages(step)
        calls += [
            call["extra"][OWN]["ledger"]
            for call in step.get("tool_calls") or []
            if "ledger" in call["extra"][OWN]
        ]
        if (metrics := step.get("metrics")) is not None:
            ids = grown(ids, metrics, len(turns))
            turns.append(metrics["extra"][OWN])
            start = len(metrics["prompt_token_ids"])
            logprobs |= {
                start + place: value for place, value in enumerate(metrics.get("logprobs") or [])
            }
    ids += tail
    places = range(prompt_length, len(ids))
    tokens = {"prompt_ids": ids[:prompt_length], "response_ids": ids[prompt_length:]}
    tokens["response_logprobs"] = [logprobs.get(place) for place in places]  # type: ignore[misc]
    tools = found["agent"].get("tool_definitions") or []
    return {
        **own,
        "id": found["trajectory_id"],
        **tokens,
        "messages": messages,
        "tool_calls": calls + ledger,
        "tools": tools,
        "turns": turns,
    }


def grown(ids: Sequence[int], metrics: Mapping[str, Any], turn: int) -> list[int]:
    """The sequence with a generation added.

    Raises RecordError if the prompt does not start with all tokens before it.
    """
    prompt = metrics["prompt_token_ids"]
    if list(prompt[: len(ids)]) != list(ids):
        raise RecordError(
            f"the prompt of generation {turn + 1} does not start with "
            f"the tokens of generation {turn}"
        )
    return [*prompt, *metrics["completion_token_ids"]]


def _messages(step: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A step's message, and its observations as tool messages."""
    messages: list[dict[str, Any]] = []
    if step.get("extra") is not None:
        message = {**step["extra"][OWN]["message"], "content": step["message"]}
        if step.get("tool_calls") is not None:
            message["tool_calls"] = [_given_back(call) for call in step["tool_calls"]]
        if "reasoning_content" in message:
            message["reasoning_content"] = step.get("reasoning_content")
        messages.append(message)
    results = (step.get("observation") or {}).get("results", [])
    return messages + [
        {**result["extra"][OWN]["message"], "content": result["content"]} for result in results
    ]


def _given_back(call: Mapping[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = call["extra"][OWN]["call"]
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return {
        **own,
        "function": {"name": call["function_name"], "arguments": arguments, **own["function"]},
    }
