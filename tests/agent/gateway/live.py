"""A gateway on a scripted engine, for tests and for the commands that drive real clients.

The engine speaks the embedded model's format: a `Plan` reads the whole prompt as text and says what
the model answers. So a plan decides by what stands in the conversation, never by counting requests.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.config.config import Config, load_config
from agent.engines.engine import Engine, Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.errors import EngineError
from agent.gateway import Gateway
from conversations.checks.finding import Defect
from conversations.open_run import open_run
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from conversations.verify import verify_run
from tests.helpers import hermes_template, logprobs

Plan = Callable[[str], str]
"""From the text of a prompt to the text of the turn; may raise EngineError."""


def speaks(plan: Plan, template: ChatTemplate | None = None, *, delay_s: float = 0.0) -> Engine:
    """An engine that answers as the plan says, its end token added."""
    spoken = template or hermes_template()

    def respond(prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        text = plan(spoken.decode(list(prompt_ids)))
        ids = [*spoken.encode(text), spoken.end_id]
        return Generation(ids, logprobs(ids), "stop", prompt_tokens=len(prompt_ids))

    return ScriptedEngine(respond, delay_s=delay_s)


class Obedient(ScriptedEngine):
    """Does what the last user's message says: `say TEXT`, `wait TEXT`, `nan`, `down`, `cut TEXT`.

    `wait` answers once `gate` is set. `asked` counts the generations that were begun, `aborted`
    those that were cancelled.
    """

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.template = hermes_template()
        self.gate = threading.Event()
        self.asked = 0
        self.aborted = 0
        super().__init__(self._obey, delay_s=delay_s)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        self.asked += 1
        try:
            while "wait" in self._order(prompt_ids) and not self.gate.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        return await super().generate(prompt_ids, sampling, request_id=request_id)

    def _order(self, prompt_ids: Sequence[int]) -> str:
        text = self.template.decode(list(prompt_ids))
        return text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]

    def _obey(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        word, _, text = self._order(prompt_ids).partition(" ")
        if word == "down":
            raise EngineError("the scheduler is gone")
        ids = [*self.template.encode(text or word), self.template.end_id]
        values = logprobs(ids, self.asked)
        if word == "nan":
            values[0] = math.nan
        if word == "cut":
            return Generation(ids[:-1], values[:-1], "length")
        return Generation(ids, values, "stop", prompt_tokens=len(prompt_ids))


def then(*turns: str) -> Plan:
    """Says the k-th text after k assistant turns, the last one from then on."""

    def plan(prompt: str) -> str:
        done = prompt.count("<|im_start|>assistant") - 1
        return turns[min(done, len(turns) - 1)]

    return plan


def hermes_call(name: str, arguments: Any) -> str:
    """A call as the model writes it; `arguments` may be JSON text, odd spacing and all."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'


def gateway_config_of(**rollout: Any) -> Config:
    """A config for the embedded model's template; the engine is a test's own."""
    settings = {
        "name": "sglang_server",  # so only the tokenizer is read from the model
        "server.urls": ["http://127.0.0.1:9"],
        "prompt_length": 4096,
        "response_length": 28672,
        "multi_turn.max_assistant_turns": 4096,
        **rollout,
    }
    assignments = [f"rollout.{key}={json.dumps(value)}" for key, value in settings.items()]
    return load_config(None, assignments)


@contextmanager
def live(
    out: Path, plan: Plan | None = None, *, engine: Engine | None = None, **options: Any
) -> Iterator[Gateway]:
    """A running gateway that records into `out`."""
    config = options.pop("config", None) or gateway_config_of()
    made = engine or speaks(plan or then("Hello."))
    options.setdefault("template", hermes_template())
    with Gateway(config, out, engine=lambda: made, **options) as gateway:
        yield gateway


@dataclass(frozen=True)
class Record:
    """A finished run: its trajectories by id."""

    trajectories: dict[str, Trajectory]

    @property
    def only(self) -> Trajectory:
        """The one trajectory."""
        (trajectory,) = self.trajectories.values()
        return trajectory


def checked(out: Path) -> Record:
    """The records of a run that `verify` finds no defect in, all of their tokens in rows."""
    defects: list[Defect] = []
    verify_run(out, on_defect=defects.append)
    assert not defects, "\n".join(map(repr, defects))
    run = open_run(out)
    found = {name: run[name] for name in run.ids}
    for trajectory in found.values():
        turns = [*trajectory.turns, *(turn for one in trajectory.branches for turn in one.turns)]
        masks = [trajectory.response_mask, *(one.response_mask for one in trajectory.branches)]
        assert sum(map(sum, masks)) == sum(turn.end - turn.start for turn in turns)
    return Record(found)
