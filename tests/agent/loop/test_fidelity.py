"""The token contract, on thousands of random conversations whose ids survive no decode and encode.

Each conversation is a `World`, drawn from a seed: a task, tools, limits, and an engine that
improvises: random ids of the whole vocabulary, halves of characters, calls spelled with other
tokens than the tokenizer's, cut turns, errors, hangs. `Oracle` is an independent small model of the
right result: it builds the tokens, their authors and the end by itself.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from agent.engines.engine import Generation, SamplingParams
from agent.errors import EngineError
from agent.loop.calls import Dispatcher
from agent.loop.conversation import Conversation
from agent.loop.loop import converse
from agent.loop.record import trajectory_of
from agent.loop.runtime import LoopSettings, Runtime
from agent.loop.tasks import Task
from conversations.messages import given_messages
from conversations.template import ChatTemplate
from conversations.trajectory import CALL_STATUSES, STOP_REASONS, Trajectory
from conversations.truncate import cut_to_tokens
from tests.conversations.test_template import history
from tests.helpers import OK, TOOL_ERRORS, Toy, float32, odd_text, respelled
from tools.toolset import ToolSet

WORLDS = int(os.environ.get("TURNTRACE_WORLDS", "300"))
"""Of each tokenizer, in hundreds."""
CALM = [do for do in OK if do != "nap"]
INVALID = {"unknown_tool", "invalid_arguments", "malformed"}

# ---------------------------------------------------------------------- what a model may write


@dataclass(frozen=True)
class Planned:
    """A call as it will be written, and what it would come to if nothing else stood in its way."""

    text: str
    name: str
    arguments: dict[str, Any] | None
    status: str
    runs: bool = False


def planned_call(rng: random.Random) -> Planned:
    kind = rng.choices(
        ("ok", "tool_error", "backend", "timeout", "done", "unknown", "invalid", "malformed"),
        (40, 12, 2, 1, 4, 8, 8, 10),
    )[0]
    if kind == "malformed":
        return Planned(rng.choice(MALFORMED), "", None, "malformed")
    name, arguments, status = {
        "ok": lambda: (
            rng.choice(["toy", "other"]),
            {"do": rng.choice(CALM), "text": "0.5" if rng.random() < 0.5 else ""},
            "ok",
        ),
        "tool_error": lambda: (
            rng.choice(["toy", "other"]),
            {"do": rng.choice(list(TOOL_ERRORS))},
            "tool_error",
        ),
        "backend": lambda: ("toy", {"do": "backend"}, "backend_error"),
        "timeout": lambda: ("quick", {"do": "hang"}, "timeout"),
        "done": lambda: ("done", {"do": rng.choice(["say", "tool_error"])}, ""),
        "unknown": lambda: (
            rng.choice(["nobody", "Toy", "toy "]),
            {"do": odd_text(rng)},
            "unknown_tool",
        ),
        "invalid": lambda: (
            "toy",
            rng.choice([{}, {"do": 7}, {"do": "say", "more": odd_text(rng)}]),
            "invalid_arguments",
        ),
    }[kind]()
    if name == "other" and status == "ok" and rng.random() < 0.4:
        arguments = {"do": "say", "text": odd_text(rng)}
    status = status or ("ok" if arguments["do"] == "say" else "tool_error")
    body = unicodedata.normalize(
        "NFC", json.dumps({"name": name, "arguments": arguments}, ensure_ascii=rng.random() < 0.3)
    )  # as Qwen's does
    text = (
        f"<tool_call>{body}</tool_call>"
        if rng.random() < 0.5
        else f"<tool_call>\n{body}\n</tool_call>"
    )
    return Planned(
        text, name, json.loads(body)["arguments"], status, kind not in ("unknown", "invalid")
    )


MALFORMED = (
    "<tool_call>{oops</tool_call>",
    "<tool_call></tool_call>",
    "<tool_call>[]</tool_call>",
    '<tool_call>{"name": "toy"</tool_call>',
    '<tool_call>{"name": "toy", "argument": {}}</tool_call>',
    '<tool_call>\n{"name": "toy", "arguments": {"do": "say", "text": "é\n🙂"}}\n</tool_call>',
)

_TAG = re.compile(r"tool_call|think")


class Writer:
    """Turns as ids: text in odd spellings, noise of the whole vocabulary, halves of characters."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        size = len(template.tokenizer)
        self._beyond = [
            size,
            size + 100,
        ]  # models pad their vocabulary: such ids can be sampled too
        self._vocabulary = [
            token
            for token in range(size)
            if not _TAG.search(template.decode([token])) and token not in template.end_ids
        ]

    def noise(self, rng: random.Random) -> list[int]:
        ids = [rng.choice(self._vocabulary) for _ in range(rng.choice((0, 0, 1, 3, 12)))]
        if rng.random() < 0.2:
            ids += self.template.encode("🙂漢")[: rng.randrange(1, 3)]
        if rng.random() < 0.05:
            ids.append(rng.choice(self._beyond))
        return ids if not _TAG.search(self.template.decode(ids)) else []

    def spelled(self, text: str, rng: random.Random) -> list[int]:
        """Spells an end token inside a text in ordinary tokens: engines would stop at it."""
        half = [*self.template.encode("<|im_"), *self.template.encode("end|>")]
        first, *rest = (respelled(self.template, part, rng) for part in text.split("<|im_end|>"))
        return [*first, *(token for part in rest for token in half + part)]

    def turn(self, rng: random.Random, calls: Sequence[Planned]) -> list[int]:
        ids = self.noise(rng)
        if rng.random() < 0.15:
            thought = (
                "<think>\nmaybe <tool_call>{}</tool_call>\n</think>\n\n"
                if rng.random() < 0.5
                else "<think>\nhm\n</think>\n\n"
            )
            ids += self.spelled(thought, rng)
        if rng.random() < 0.5:
            ids += self.spelled(
                rng.choice(["Let me see. ", "So it is  42.\n\n", "漢字🙂é ", "\n \n"]), rng
            )
        for call in calls:
            ids += self.spelled(call.text, rng) + (self.noise(rng) if rng.random() < 0.3 else [])
        return ids or self.template.encode("x")


writer_for = functools.cache(Writer)

# ---------------------------------------------------------------------- an engine that improvises


@dataclass
class Asked:
    """One generation: what the engine was given and what it did."""

    prompt: list[int]
    room: int
    did: str
    answer: Generation | None = None
    calls: list[Planned] = field(default_factory=list)


class Improvising:
    """An engine of one conversation. It notes breaches of the contract: raised, they would only be
    recorded.
    """

    def __init__(
        self, writer: Writer, rng: random.Random, *, most_turns: int, may_hang: bool
    ) -> None:
        self.writer, self.rng, self.most_turns, self.may_hang = writer, rng, most_turns, may_hang
        self.asked: list[Asked] = []
        self.broken: list[str] = []
        self._known: list[int] = []
        self._request_ids: set[str] = set()

    def describe(self) -> dict[str, Any]:
        return {"name": "improvising"}

    async def abort(self, request_id: str) -> None: ...

    async def close(self) -> None: ...

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        self._check(list(prompt_ids), sampling, request_id)
        weights = {
            "write": 60,
            "answer": 12,
            "other_stop": 4,
            "overlong_cut": 3,
            "raise": 2,
            "bug": 1,
            "abort": 1,
            "nan": 1,
            "short": 1,
            "cancel": 1,
        }
        if len(self.asked) >= self.most_turns:
            weights = {"answer": 1}
        if self.may_hang:
            weights["hang"] = 30
        did = self.rng.choices(list(weights), list(weights.values()))[0]
        asked = Asked(list(prompt_ids), sampling["max_new_tokens"], did)
        self.asked.append(asked)
        await asyncio.sleep(0)
        asked.answer = await self._do(asked)
        self._known = asked.prompt + asked.answer.token_ids
        return asked.answer

    def _check(self, prompt: list[int], sampling: SamplingParams, request_id: str) -> None:
        if self._known and not (
            prompt[: len(self._known)] == self._known and len(prompt) > len(self._known)
        ):
            self.broken.append(
                f"call {len(self.asked)}: the input does not go on from what was seen and sampled"
            )
        if (
            sampling["max_new_tokens"] < 1
            or "stop" in sampling
            or not set(self.writer.template.end_ids) <= set(sampling["stop_token_ids"])
        ):
            self.broken.append(f"sampling params {sampling}")
        if not re.fullmatch("[0-9a-f]{32}", request_id) or request_id in self._request_ids:
            self.broken.append(f"request id {request_id}")
        self._request_ids.add(request_id)

    async def _do(self, asked: Asked) -> Generation:
        rng, template = self.rng, self.writer.template
        if asked.did == "raise":
            raise EngineError("out of memory")
        if asked.did == "bug":
            raise RuntimeError("a bug")
        if asked.did == "hang":
            await asyncio.Event().wait()
        if asked.did == "cancel":
            current = asyncio.current_task()
            assert current is not None
            current.cancel()
            await asyncio.sleep(0)
        if asked.did in ("write", "other_stop", "overlong_cut"):
            asked.calls = [planned_call(rng) for _ in range(rng.choice((1, 1, 1, 2, 3, 5)))]
        ids = self.writer.turn(rng, asked.calls)
        if asked.did == "overlong_cut" and asked.room < 500:
            ids = (ids * (asked.room // len(ids) + 1))[: asked.room + 1]
        elif asked.did == "other_stop":
            ids += rng.choice([[], template.encode("<|endoftext|>")])
        else:
            ids.append(template.end_id)
        reason = "stop"
        if (
            len(ids) >= asked.room
        ):  # a real engine stops at its budget, and calls an exact fit a cut
            ids, reason = ids[: asked.room], "length"
        logprobs = [
            float32(rng) if rng.random() < 0.98 else rng.choice([0.0, -0.0, -1e-45, -3.4e38])
            for _ in ids
        ]
        if asked.did == "nan":
            logprobs[rng.randrange(len(ids))] = float("nan")
        if asked.did == "short":
            logprobs.pop()
        return Generation(
            ids,
            logprobs,
            "abort" if asked.did == "abort" else reason,
            cached_tokens=len(asked.prompt) - 1,
        )


# ---------------------------------------------------------------------- a world


@functools.cache
def toolset(moody: bool) -> ToolSet:
    toys = [
        Toy(calc_reward="reward"),
        Toy("other"),
        Toy("done", ends_conversation=True),
        Toy("quick", timeout_s=0.02),
    ]
    return ToolSet.from_tools([*toys, Toy("moody", calc_reward="nan_reward")] if moody else toys)


class World:
    def __init__(self, writer: Writer, seed: str) -> None:
        rng = self.rng = random.Random(seed)
        self.template = writer.template
        self.tools = toolset(rng.random() < 0.05)
        self.task = Task(
            f"w{seed}",
            given_messages(self._messages()),
            self._tools_kwargs(),
            "42",
            "worlds",
            extra={"seed": seed},
        )
        hangs = rng.random() < 0.03

        def seldom(low: int, high: int) -> int | None:
            return rng.randrange(low, high) if rng.random() < 0.12 else None

        self.settings = LoopSettings(
            prompt_length=seldom(300, 2000) or 8192,
            response_length=seldom(1, 100) or seldom(100, 1000) or 8192,
            max_model_len=seldom(300, 3000) or 16384,
            max_tokens=seldom(1, 40) or seldom(40, 400),
            max_turns=seldom(1, 5),
            max_consecutive_invalid_calls=rng.choice((None, 8, 3, 2, 1)),
            deadline_s=0.05 if hangs else None,
            sampling={"temperature": 1.0},
        )
        self.max_parallel_calls = rng.choice((16, 16, 16, 2, 1))
        limit, side = rng.choice((None, None, 64, 8, 1)), rng.choice(("left", "middle", "right"))
        self.cut_limit = limit
        self.cut = lambda text: cut_to_tokens(text, limit, side, self.template) if limit else None
        self.engine = Improvising(writer, rng, most_turns=rng.choice((2, 4, 6, 10)), may_hang=hangs)

    def _messages(self) -> list[dict[str, Any]]:
        rng = self.rng
        if rng.random() < 0.15:
            messages = history(rng, "user", system=True, tool_rounds=True)
            for message in messages:
                for call in message.get("tool_calls", ()):
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            return [*messages, {"role": "user", "content": odd_text(rng)}]
        system = [{"role": "system", "content": odd_text(rng)}] if rng.random() < 0.3 else []
        return [*system, {"role": "user", "content": odd_text(rng)}]

    def _tools_kwargs(self) -> dict[str, Any]:
        rng = self.rng
        if rng.random() < 0.6:
            return {}
        chosen = [name for name in self.tools if rng.random() < 0.8] or ["toy"]
        created = [
            {},
            {},
            {"create_kwargs": {"text": odd_text(rng)}},
            {"create_kwargs": {"do": "surrogate"}},
        ]
        broken = (
            [{"create_kwargs": {"do": do}} for do in ("bug", "backend")]
            if rng.random() < 0.1
            else []
        )
        return {name: rng.choice(broken or created) for name in chosen}

    async def run(self) -> Trajectory:
        dispatcher = Dispatcher(
            self.tools, max_parallel_calls=self.max_parallel_calls, shorten=self.cut
        )
        self.conversation = Conversation(
            self.task, 0, Runtime(self.engine, self.template, self.settings, dispatcher)
        )
        try:
            await converse(self.conversation)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            assert current is not None
            assert self.engine.asked[-1].did == "cancel"
            current.uncancel()
        return trajectory_of(self.conversation)


# ---------------------------------------------------------------------- what must come of it


class Oracle:
    """The tokens, authors, ledger and end that a world must have. Follows DESIGN, section 3."""

    def __init__(self, world: World, record: dict[str, Any]) -> None:
        self.world, self.record, self.template = world, record, world.template
        self.offered = [
            name
            for name in world.tools
            if name in world.task.tools_kwargs or not world.task.tools_kwargs
        ]
        self.uncreated = {
            name
            for name, given in world.task.tools_kwargs.items()
            if given.get("create_kwargs", {}).get("do") in ("bug", "backend")
        }
        self.ids: list[int] = []
        self.authors: list[str] = []
        self.logprobs: list[float | None] = []
        self.statuses: list[str] = []
        self.executed = 0
        self.turns = 0
        self.stop = self._run()

    def _append(
        self, author: str, ids: Sequence[int], logprobs: Sequence[float | None] | None = None
    ) -> None:
        self.ids += ids
        self.authors += [author] * len(ids)
        self.logprobs += logprobs or [None] * len(ids)

    def _run(self) -> str:
        limits, asked = self.world.settings, self.world.engine.asked
        for author, ids in self._prompt():
            self._append(author, ids)
        self.first = len(self.ids)
        if self.first > limits.prompt_length or self.first >= limits.max_model_len:
            return "prompt_too_long"
        invalid = 0
        for each in asked:
            if self._room() < 1:
                return "the engine was asked though there was no room"
            if each.did in ("raise", "bug", "abort", "nan", "short"):
                return "engine_error"
            if each.did in ("hang", "cancel"):
                return {"hang": "deadline", "cancel": "cancelled"}[each.did]
            if each.answer is None:
                return "deadline"  # before the hang was reached
            ids = each.answer.token_ids
            self._append("sampled", ids, each.answer.logprobs)
            self.turns += 1
            if ids[-1] != self.template.end_id and each.answer.finish_reason == "length":
                self.statuses += [
                    status if status == "malformed" else "rejected"
                    for status in self._recorded(self.turns - 1)
                ]
                return "length"
            statuses = self._statuses(each.calls)
            self.statuses += statuses
            if not statuses:
                return "stop"
            if any(
                status == "ok" and call.name == "done"
                for status, call in zip(statuses, each.calls, strict=True)
            ):
                return "tool_stop"
            for status in statuses:
                invalid = invalid + 1 if status in INVALID else 0
                if invalid == limits.max_consecutive_invalid_calls:
                    return "invalid_tool_calls"
            if self.turns == limits.max_turns:
                return "max_turns"
            if any(message["content"] is None for message in self._responses(self.turns - 1)):
                return "deadline"  # before the hang was reached
            block = (
                [("template", [self.template.end_id])] if ids[-1] != self.template.end_id else []
            )
            block += self.template.delta(self._responses(self.turns - 1)).pieces
            if (
                len(self.ids) - self.first + sum(len(part) for _, part in block)
                > limits.response_length
            ):
                return "length"
            if len(self.ids) + sum(len(part) for _, part in block) > limits.max_model_len:
                return "length"
            for author, part in block:
                self._append(author, part)
        return "length" if self._room() < 1 else "the engine was not asked though there was room"

    def _prompt(self) -> list[tuple[str, list[int]]]:
        """Rendered and cut by characters here, encoded once, by the tokenizer itself."""
        world, template = self.world, self.template
        schemas = [world.tools[name].schema for name in self.offered]
        says = {
            name: world.task.tools_kwargs.get(name, {}).get("create_kwargs", {})
            for name in self.offered
        }
        texts = {
            name: "half \ufffd of a pair \ufffd"
            if given.get("do") == "surrogate"
            else given.get("text", "")
            for name, given in says.items()
        }
        created = [
            {"role": "tool", "content": text, "name": name} for name, text in texts.items() if text
        ]
        given = [
            {key: value for key, value in message.items() if key != "raw"}
            for message in world.task.messages
        ]
        for message in given:
            message.update(
                {"tool_calls": [_as_object(call) for call in message["tool_calls"]]}
                if "tool_calls" in message
                else {}
            )
        render = functools.partial(
            template.tokenizer.apply_chat_template, tools=schemas, tokenize=False
        )
        whole, before = (
            render([*given, *created], add_generation_prompt=True),
            render(given, add_generation_prompt=False),
        )
        after = whole.rindex("<|im_start|>assistant")
        ids, offsets = template.encoding(whole).ids, template.encoding(whole).offsets
        authors = [
            "tool" if created and len(before) <= start < after else "prompt" for start, _ in offsets
        ]
        self.created = created
        return [(author, [token]) for author, token in zip(authors, ids, strict=True)]

    def _room(self) -> int:
        limits = self.world.settings
        room = min(
            limits.response_length - (len(self.ids) - self.first),
            limits.max_model_len - len(self.ids),
        )
        return min(room, limits.max_tokens or room)

    def _statuses(self, calls: Sequence[Planned]) -> list[str]:
        statuses = []
        for index, call in enumerate(calls):
            status = call.status
            if status not in ("malformed", "unknown_tool") and call.name not in self.offered:
                status = "unknown_tool"
            elif call.runs and index >= self.world.max_parallel_calls:
                status = "rejected"
            elif call.runs and call.name in self.uncreated:
                status = "backend_error"
            elif call.runs:
                self.executed += 1
            statuses.append(status)
        return statuses

    def _recorded(self, turn: int) -> list[str]:
        return [line["status"] for line in self.record["tool_calls"] if line["turn"] == turn]

    def _responses(self, turn: int) -> list[dict[str, Any]]:
        lines = [line for line in self.record["tool_calls"] if line["turn"] == turn]
        return [
            {
                "role": "tool",
                "content": line["response"],
                "tool_call_id": line["call_id"],
                "name": line["name"],
            }
            for line in lines
        ]

    def reward(self) -> float | None:
        infra = (
            self.stop == "engine_error"
            or "backend_error" in self.statuses
            or self.uncreated & set(self.offered)
        )
        if (
            infra
            or self.stop in ("cancelled", "prompt_too_long")
            or not self.turns
            or "moody" in self.offered
        ):
            return None
        return 1.0 if "toy" in self.offered else None


def _as_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}


# ---------------------------------------------------------------------- the checks


def check_form(record: dict[str, Any], world: World) -> None:
    """What holds for every record, whatever happened."""
    ids, first = record["prompt_ids"] + record["response_ids"], len(record["prompt_ids"])
    rest = {key: value for key, value in record.items() if key != "sha256"}
    text = json.dumps(
        rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    assert record["sha256"] == hashlib.sha256(text.encode()).hexdigest()

    position = 0
    for kind, start, end in record["segments"]:
        assert start == position < end
        assert kind in ("prompt", "sampled", "tool", "user", "template")
        position = end
    assert position == len(ids)

    sampled = [False] * len(ids)
    for turn in record["turns"]:
        assert turn["prompt_tokens"] == turn["start"] < turn["end"]
        sampled[turn["start"] : turn["end"]] = [True] * (turn["end"] - turn["start"])
    by_segments = [
        kind == "sampled" for kind, start, end in record["segments"] for _ in range(start, end)
    ]
    assert sampled == by_segments
    assert record["response_mask"] == [int(flag) for flag in sampled[first:]]
    assert [value is not None for value in record["response_logprobs"]] == sampled[first:]
    assert not any(sampled[:first])

    limits = world.settings
    assert len(record["response_ids"]) <= limits.response_length
    assert all(
        turn["end"] - turn["start"] <= (limits.max_tokens or 10**9) for turn in record["turns"]
    )
    if record["stop_reason"] != "prompt_too_long":
        assert first <= limits.prompt_length
        assert len(ids) <= limits.max_model_len
    assert record["num_turns"] == len(record["turns"]) <= (limits.max_turns or 10**9)
    assert record["stop_reason"] in STOP_REASONS
    assert not record["infra_error"] or (record["reward"] is None and record["reward_parts"] == {})


def check_messages(record: dict[str, Any], world: World) -> None:
    """Messages equal tokens; the ledger has one line a call, answered by the message shown."""
    ids, tokenizer = record["prompt_ids"] + record["response_ids"], world.template.tokenizer
    spoken = [
        message
        for message in record["messages"]
        if message["role"] == "assistant" and message["raw"] is not None
    ]
    assert len(spoken) == len(record["turns"])
    lines = record["tool_calls"]
    assert [call["id"] for message in spoken for call in message.get("tool_calls", ())] == [
        line["call_id"] for line in lines
    ]
    for number, (turn, message) in enumerate(zip(record["turns"], spoken, strict=True)):
        span = ids[turn["start"] : turn["end"]]
        span = span[:-1] if span[-1] == world.template.end_id else span
        raw = message["raw"]
        assert raw == tokenizer.decode(
            span, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        mine = [line for line in lines if line["turn"] == number]
        assert [line["call_id"] for line in mine] == [
            f"call_{number}_{index}" for index in range(len(mine))
        ]
        assert not mine or len(message["content"]) < len(raw)
        for line, call in zip(mine, message.get("tool_calls", ()), strict=True):
            check_call(line, call, raw)
    shown = [
        message
        for message in record["messages"][len(world.task.messages) :]
        if message["role"] == "tool"
    ]
    answered = {line["call_id"]: line for line in lines}
    for message in shown:
        if "tool_call_id" in message:
            assert message["content"] == answered[message["tool_call_id"]]["response"]
    assert [message["tool_call_id"] for message in shown if "tool_call_id" in message] == list(
        answered
    )[: sum("tool_call_id" in m for m in shown)]


def check_call(line: dict[str, Any], call: dict[str, Any], raw: str) -> None:
    assert line["status"] in CALL_STATUSES
    assert call["function"]["name"] == line["name"]
    if line["status"] == "malformed":
        assert call["malformed"] is True
        assert call["function"]["arguments"] == line["arguments"]
        assert line["arguments"] in raw
        assert line["error"]
    else:
        assert json.loads(call["function"]["arguments"]) == line["arguments"]
    assert len(line["attempts"]) <= 1
    assert not line["attempts"] or (line["queue_s"], line["run_s"]) == (
        line["attempts"][0]["queue_s"],
        line["attempts"][0]["run_s"],
    )


def check_against_oracle(record: dict[str, Any], world: World) -> Oracle | None:
    oracle = Oracle(world, record)
    if record["stop_reason"] == "deadline":  # on a slow machine it may come before the hang does
        assert world.settings.deadline_s
        end = len(record["prompt_ids"] + record["response_ids"])
        assert (record["prompt_ids"] + record["response_ids"]) == oracle.ids[:end]
        return None
    assert record["stop_reason"] == oracle.stop
    assert record["prompt_ids"] + record["response_ids"] == oracle.ids
    assert [
        kind for kind, start, end in record["segments"] for _ in range(start, end)
    ] == oracle.authors
    assert record["num_turns"] == oracle.turns
    found = record["response_logprobs"]
    expected = oracle.logprobs[oracle.first :]
    assert [value if value is None else value.hex() for value in found] == [
        value if value is None else float(value).hex() for value in expected
    ]
    assert [line["status"] for line in record["tool_calls"]] == oracle.statuses
    if oracle.stop != "length":  # a cut turn holds what was whole of its calls
        planned = [call for asked in world.engine.asked[: oracle.turns] for call in asked.calls]
        assert [line["name"] for line in record["tool_calls"] if line["status"] != "malformed"] == [
            call.name for call in planned if call.name
        ]
        assert [line["arguments"] for line in record["tool_calls"]] == [
            call.text if call.arguments is None else call.arguments for call in planned
        ]
    assert record["reward"] == oracle.reward()
    assert [
        message
        for message in record["messages"]
        if message["role"] == "tool" and message in oracle.created
    ] == oracle.created
    assert [turn["cached_tokens"] for turn in record["turns"]] == [
        turn["start"] - 1 for turn in record["turns"]
    ]
    return oracle


def check_cuts(record: dict[str, Any], world: World) -> None:
    for line in record["tool_calls"]:
        if line["full_response"] is not None:
            assert line["response"] == world.cut(line["full_response"]).text
            assert "characters cut" in line["response"]
        elif line["response"] is not None:
            assert world.cut(line["response"]) is None


# ---------------------------------------------------------------------- the test


async def test_hundreds_of_conversations_keep_the_contract(template: ChatTemplate) -> None:
    writer = writer_for(template)
    name = "qwen" if "qwen" in template.name else "smollm2"
    sets = [toolset(False), toolset(True)]
    before = {id(loaded): len(toy_log(loaded)) for tools in sets for loaded in tools.values()}
    stops: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    executed = 0
    for start in range(0, WORLDS, 100):
        worlds = [World(writer, f"{name}{seed}") for seed in range(start, start + 100)]
        trajectories = await asyncio.gather(*(asyncio.create_task(world.run()) for world in worlds))
        for world, trajectory in zip(worlds, trajectories, strict=True):
            line = trajectory.to_line()
            assert Trajectory.from_line(line).to_line() == line
            record = json.loads(line)
            assert world.engine.broken == []
            check_form(record, world)
            check_messages(record, world)
            oracle = check_against_oracle(record, world)
            check_cuts(record, world)
            stops[record["stop_reason"]] += 1
            statuses.update(line["status"] for line in record["tool_calls"])
            if oracle:
                executed += oracle.executed
            else:
                executed += sum(len(line["attempts"]) for line in record["tool_calls"])
    assert set(stops) == set(STOP_REASONS), stops
    assert set(statuses) >= set(CALL_STATUSES) - {"cancelled", "external"}, statuses

    logs = [
        (id(loaded), *entry)
        for tools in sets
        for loaded in tools.values()
        for entry in toy_log(loaded)[before[id(loaded)] :]
    ]
    assert (
        sum(step == "execute" for _, step, _ in logs) == executed
    )  # a call of a cut turn is never run, no call twice
    created = Counter((tool, instance) for tool, step, instance in logs if step == "create")
    released = Counter((tool, instance) for tool, step, instance in logs if step == "released")
    assert created == released
    assert set(created.values()) == {1}


def toy_log(loaded: Any) -> list[tuple[str, str]]:
    log: list[tuple[str, str]] = loaded.tool.log
    return log


@pytest.mark.parametrize(
    ("model", "ids", "text", "again"),
    [
        ("qwen2_5", [27, 14172, 13429, 29], "<tool_call>", [151657]),
        ("qwen2_5", [198, 198, 90], "\n\n{", [271, 90]),
        ("qwen2_5", [5416, 20022], "calculator", [88821]),
        ("qwen2_5", [220, 1350], " print", [1173]),
        ("qwen3", [27, 14172, 13429, 29], "<tool_call>", [151657]),
    ],
)
async def test_ids_that_are_known_to_drift_stay_as_they_were_sampled(
    request: pytest.FixtureRequest, model: str, ids: list[int], text: str, again: list[int]
) -> None:
    template: ChatTemplate = request.getfixturevalue(model)
    assert template.decode(ids) == text
    assert template.encode(text) == again != ids
    call = template.encode('{"name": "toy", "arguments": {"do": "say"}}</tool_call>')
    opening = ids if text == "<tool_call>" else [*ids, *template.encode("<tool_call>")]
    answer = template.encode("42 ") if text == "<tool_call>" else ids
    turns = iter([[*opening, *call, template.end_id], [*answer, template.end_id]])
    inputs: list[list[int]] = []

    class Drifting(Improvising):
        async def generate(
            self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
        ) -> Generation:
            inputs.append(list(prompt_ids))
            turn = next(turns)
            return Generation(turn, [-0.5] * len(turn), "stop")

    world = World(writer_for(template), "drift")
    world.settings = LoopSettings(4096, 4096, 8192)
    world.task = Task("drift", [{"role": "user", "content": "u"}])
    world.engine = Drifting(writer_for(template), world.rng, most_turns=2, may_hang=False)
    record = await world.run()
    assert record.stop_reason == "stop"
    assert [line.status for line in record.tool_calls] == ["ok"]
    assert inputs[1][: len(inputs[0]) + len(opening)] == inputs[0] + opening
    assert record.response_ids[-1 - len(answer) : -1] == answer
