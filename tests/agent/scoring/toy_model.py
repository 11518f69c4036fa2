"""A model small enough to know exactly: its logits are a function of the last ids and a seed.

It samples as an engine and scores as a scorer, with SGLang's rules: a greedy token's log-prob is at
temperature 1, any other's at its own temperature.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response

from agent.engines.engine import Generation, SamplingParams
from agent.engines.scoring import Scores
from agent.engines.scripted import ScriptedEngine
from agent.loop.batch import run_tasks
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from conversations.messages import Message
from conversations.run.open_run import open_run
from conversations.run.store import RunFolder
from conversations.session import SessionTree
from conversations.trajectory import Trajectory
from tests.agent.native_api import Server
from tests.conversations.session.sessions import record_of_tree
from tests.helpers import hermes_template, save_tokenizer_of, settings

NAME = {"name": "sglang", "model": "toy"}
MAX_TOKENS = 24


def as_float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


class ToyModel(ScriptedEngine):
    """`seed` stands for its weights."""

    def __init__(self, seed: int = 1, version: str | None = None, **more: Any) -> None:
        super().__init__(self.sample)
        self.seed, self.version, self.described = seed, version, {**NAME, **more}
        template = hermes_template()
        letters = sorted({template.encode(letter)[0] for letter in "abcdefghijklmnopqrstuvwxyz ,."})
        self.vocabulary = [*letters, template.end_id]
        self.end_id = template.end_id
        self.asked: list[int] = []

    def describe(self) -> dict[str, Any]:
        return dict(self.described)

    def logprobs(self, before: Sequence[int], temperature: float = 1.0) -> dict[int, float]:
        """The log-prob of each id after `before`; ids outside the vocabulary have none."""
        rng = random.Random(f"{self.seed}:{list(before[-4:])}")
        logits = {token: rng.gauss(0, 2) / temperature for token in self.vocabulary}
        total = math.log(sum(map(math.exp, logits.values())))
        return {token: logit - total for token, logit in logits.items()}

    def sample(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        ids, logprobs = list(prompt_ids), []
        temperature = sampling["temperature"]
        rng = random.Random(f"sampling {len(prompt_ids)} {sum(prompt_ids)}")
        while len(logprobs) < MAX_TOKENS and (not logprobs or ids[-1] != self.end_id):
            at = self.logprobs(ids, temperature or 1.0)
            if temperature:
                chosen = rng.choices(list(at), [math.exp(value) for value in at.values()])[0]
            else:
                chosen = max(at, key=lambda token: at[token])
            ids.append(chosen)
            logprobs.append(as_float32(at[chosen]))
        reason = "stop" if ids[-1] == self.end_id else "length"
        return Generation(ids[len(prompt_ids) :], logprobs, reason, weight_version=self.version)

    async def score(self, ids: Sequence[int], first: int, *, likeliest: int) -> Scores:
        await asyncio.sleep(0)
        self.asked.append(first)
        logprobs, tops = [], []
        for place in range(first, len(ids)):
            at = self.logprobs(ids[:place])
            logprobs.append(at.get(ids[place], -50.0))
            tops.append(sorted(at.values(), reverse=True)[:likeliest])
        return Scores(logprobs, tops, self.version)

    async def serve(self, server: Server, body: dict[str, Any]) -> Response:
        """SGLang's answer to a request for scores."""
        ids, start = body["input_ids"], body["logprob_start_len"]
        scores = await self.score(ids, start + 1, likeliest=body["top_logprobs_num"])
        triples = zip(scores.logprobs, ids[start + 1 :], strict=True)
        tops = [[[value, 0, None] for value in place] for place in scores.likeliest]
        meta = {
            "finish_reason": {"type": "length"},
            "input_token_logprobs": [
                [None, ids[start], None],
                *([*pair, None] for pair in triples),
            ],
            "input_top_logprobs": [None, *tops],
        }
        return JSONResponse({"output_ids": [5], "meta_info": meta})


def sampled_run(path: Path, model: ToyModel, n: int = 12, temperature: float = 1.0) -> Path:
    """A run of `n` conversations that `model` sampled."""
    template = hermes_template()
    limits = settings(sampling={"temperature": temperature}, max_tokens=MAX_TOKENS)
    tasks = [Task(f"t{number}", [{"role": "user", "content": f"{number}?"}]) for number in range(n)]
    with RunFolder.create(path, {"n": 1}) as folder:
        save_tokenizer_of(template, path / "tokenizer")
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            loop.run_until_complete(
                run_tasks(tasks, Runtime(model, template, limits, None), store=folder)
            )
    return path


def sampled_session(path: Path, model: ToyModel) -> Path:
    """A run of one session that `model` sampled: two branches of a turn's, and a root of its own.

    The trunk has three turns, the branches two, one and one.
    """
    template = hermes_template()
    tree = SessionTree(template)

    def turn(history: list[Message], said: str) -> list[Message]:
        asked = [*history, {"role": "user", "content": said}]
        place = tree.match(asked, [])
        tree.add(place, model.sample(place.prompt_ids.to_list(), {"temperature": 1.0}))
        return [*asked, tree.turns[-1].served]

    first = turn([], "One?")
    turn(turn(first, "Two?"), "Three?")
    turn(turn(first, "Two otherwise?"), "And three?")
    turn(first, "Two once more?")
    turn([], "Something else?")
    record = replace(record_of_tree(tree), engine=dict(NAME), sampling={"temperature": 1.0})
    with RunFolder.create(path, {"gateway": True}) as folder:
        save_tokenizer_of(template, path / "tokenizer")
        folder.append(record)
    return path


def changed(path: Path, like: Path, change: Callable[[int, Trajectory], Trajectory]) -> Path:
    """The run again, each record passed through `change`, its hash made again."""
    with RunFolder.create(path, {"n": 1}) as folder:
        (path / "tokenizer").symlink_to(like.resolve() / "tokenizer")
        for number, record in enumerate(open_run(like)):
            folder.append(change(number, record))
    return path
