"""Run folders of any size, made fast: what the commands on a run are tested and measured with.

    python -m tests.conversations.synthetic PATH N

The first `distinct` trajectories come out of the real loop with a scripted model: several turns,
calls that work, fail, are malformed or unknown, long responses that are cut, thoughts, odd
unicode, infrastructure failures, rewards. The others are those again under new ids with right
hashes; groups of 4 throughout. What is asked for twice is the same twice, but for clocks.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agent.config.config import Config, load_config
from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.errors import EngineError
from agent.loop.batch import Progress, run_tasks
from agent.loop.runtime import Runtime
from agent.loop.tasks import read_tasks
from agent.model.base import base_model_dir
from agent.runs.manifest import run_manifest
from agent.runs.parts import loop_settings, make_dispatcher
from agent.runs.progress import counts
from conversations.run.store import RUN, TRAJECTORIES, RunFolder
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory, canonical_json
from tests.helpers import call, float32, save_tokenizer_of, tokenizer_at
from tools.base import BackendError, BaseTool, ToolError, ToolResponse
from tools.registry import load_tools

GROUP = 4
TOOLS = Path(__file__).parent / "synthetic_tools.yaml"
CONFIG = (
    "model_path=smollm2-base", "rollout.name=scripted", f"rollout.n={GROUP}",
    "rollout.multi_turn.max_assistant_turns=6",
    "rollout.multi_turn.max_tool_response_length=64",
    f"rollout.multi_turn.tool_config_path={TOOLS}",
)  # fmt: skip


def make_run(
    path: str | Path,
    n: int,
    *,
    tokenizer: Any = None,
    distinct: int = 200,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> Path:
    """Writes a run of `n` trajectories into a new folder; returns it. `overrides` are config
    keys as --set takes them."""
    path = Path(path)
    with tempfile.TemporaryDirectory() as scratch:
        tasks = _write_tasks(Path(scratch) / "tasks.jsonl", -(-n // GROUP))
        # The config of a scripted engine needs a recorded run; it is not read.
        recorded = f"rollout.turntrace.recorded={scratch}"
        config = load_config(None, [*CONFIG, recorded, *overrides])
        template = ChatTemplate(
            tokenizer or tokenizer_at(base_model_dir()),
            kwargs=config.rollout.turntrace.apply_chat_template_kwargs,
        )
        tools = load_tools(TOOLS)
        manifest = run_manifest(
            config,
            tasks,
            tools,
            limit=None,
            validate=False,
            argv=["run", tasks.name],
        )
        progress = Progress(total=n)
        with RunFolder.create(path, manifest) as folder:
            save_tokenizer_of(template, path / "tokenizer")
            runtime = _runtime(config, template, seed)
            asyncio.run(
                run_tasks(
                    read_tasks(tasks, -(-min(n, distinct) // GROUP)),
                    runtime,
                    n=GROUP,
                    store=folder,
                    progress=progress,
                )
            )
            _issue_again(path / TRAJECTORIES, n, progress)
            folder.close(counts(progress))
        _note_digest(path)
    return path


def _note_digest(path: Path) -> None:
    """Into run.json, of the records that were issued again, too."""
    manifest, digest = json.loads((path / RUN).read_text()), hashlib.sha256()
    with (path / TRAJECTORIES).open(encoding="ascii") as lines:
        for line in lines:
            digest.update(line.rstrip()[-66:-2].encode())
    (path / RUN).write_text(json.dumps({**manifest, "digest": digest.hexdigest()}, indent=2))


def _runtime(config: Config, template: ChatTemplate, seed: int) -> Runtime:
    tools = load_tools(TOOLS)
    engine = ScriptedEngine(Model(template, seed).respond)
    return Runtime(
        engine,
        template,
        loop_settings(config, config.sampling(False)),
        make_dispatcher(config, tools, template),
    )


def _write_tasks(file: Path, count: int) -> Path:
    """Word problems; some have a system message, some a tool that speaks first, one is too long
    for its budget."""
    with file.open("w", encoding="utf-8") as out:
        for index in range(count):
            out.write(json.dumps(_task(index)) + "\n")
    return file


def _task(index: int) -> dict[str, Any]:
    rng = random.Random(index)
    a, b = rng.randrange(2, 99), rng.randrange(2, 99)
    text = f"A shop sells {a} boxes a day, {b} apples in each. How many apples is that? " * (
        60 if index == 13 else 1
    )
    row: dict[str, Any] = {
        "id": f"apples-{index:06d}",
        "prompt": [{"role": "user", "content": text.strip()}],
        "data_source": "synthetic",
    }
    row |= {"ground_truth": str(a * b), "extra_info": {"index": index, "split": "test"}}
    if index % 3 == 0:
        row["prompt"].insert(
            0, {"role": "system", "content": "Use the tools. 漢字, é and 🙂 are fine."}
        )
    if index % 5 == 0:
        row["extra_info"]["tools_kwargs"] = {
            "calculator": {},
            "lookup": {"create_kwargs": {"greeting": "42 articles."}},
            "submit": {},
        }
    return row


def _issue_again(file: Path, n: int, progress: Progress) -> None:
    """Appends the trajectories that are there under the ids of tasks to come, until there are
    `n`; cuts the last group short."""
    lines = sorted(file.read_text(encoding="ascii").splitlines(), key=_order)
    if len(lines) > n:
        file.write_text("".join(f"{line}\n" for line in lines[:n]), encoding="ascii")
    trajectories = [Trajectory.from_line(line) for line in lines]
    canonical = [
        canonical_json({key: value for key, value in json.loads(line).items() if key != "sha256"})
        for line in lines
    ]
    with file.open("a", encoding="ascii") as out:
        for index in range(len(lines), n):
            source = index % len(lines)
            out.write(
                _renamed(
                    lines[source],
                    canonical[source],
                    trajectories[source],
                    f"apples-{index // GROUP:06d}",
                )
                + "\n"
            )
            progress.count(trajectories[source])


def _order(line: str) -> tuple[str, int]:
    record = json.loads(line)
    return record["task_id"], record["sample"]


def _renamed(line: str, canonical: str, trajectory: Trajectory, task_id: str) -> str:
    """The line under another task's id, with its hash: text for text, as parsing 100,000 of them
    takes minutes."""
    old = f'"id":"{trajectory.id}","infra_error"', f'"task_id":"{trajectory.task_id}","tool_calls"'
    new = (
        f'"id":"{task_id}-{trajectory.sample}","infra_error"',
        f'"task_id":"{task_id}","tool_calls"',
    )
    for before, after in zip(old, new, strict=True):
        line, canonical = line.replace(before, after), canonical.replace(before, after)
    body = line[: line.rindex(',"sha256":')]
    return f'{body},"sha256":"{hashlib.sha256(canonical.encode("ascii")).hexdigest()}"}}'


# ---------------------------------------------------------------------- the model


class Model:
    """Says what its dice say; never looks at what it is asked."""

    def __init__(self, template: ChatTemplate, seed: int) -> None:
        self._template = template
        self._rng = random.Random(seed)

    def respond(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """One turn, one in a hundred an engine's failure; the end token is missing now and then."""
        rng = self._rng
        if rng.random() < 0.01:
            raise EngineError("the engine went away")
        ids = self._template.encode(self._turn(rng))
        if rng.random() < 0.95:
            ids.append(self._template.end_id)
        return Generation(
            ids,
            [float32(rng) for _ in ids],
            "stop",
            prompt_tokens=len(prompt_ids),
            cached_tokens=0,
            engine_s=0.1,
        )

    def _turn(self, rng: random.Random) -> str:
        thought = (
            "<think>\nFirst the boxes, then the apples.\n</think>\n\n" if rng.random() < 0.2 else ""
        )
        kinds: Iterator[str] = iter(
            rng.choices(
                list(_SAYS),
                weights=[weight for weight, _ in _SAYS.values()],
                k=rng.choice((1, 1, 1, 2)),
            )
        )
        return thought + "\n".join(_SAYS[kind][1](rng) for kind in kinds)


def _number(rng: random.Random) -> int:
    return rng.randrange(2, 99)


_SAYS: dict[str, tuple[int, Any]] = {
    "multiply": (
        30,
        lambda rng: (
            "Let me work that out. "
            + call("calculator", op="multiply", a=_number(rng), b=_number(rng))
        ),
    ),
    "add": (10, lambda rng: call("calculator", op="add", a=_number(rng), b=_number(rng))),
    "look up": (
        14,
        lambda rng: (
            "I look it up.\n"
            + call("lookup", topic=rng.choice(("apples", "box é", "漢字", "<|im_end|>")))
        ),
    ),
    "submit": (12, lambda rng: call("submit", answer=str(_number(rng) * _number(rng)))),
    "answer": (16, lambda rng: f"That makes {_number(rng) * _number(rng)} apples. 🍎"),
    "divide by zero": (3, lambda rng: call("calculator", op="divide", a=1, b=0)),
    "no such tool": (3, lambda rng: call("calculatr", a=1)),
    "wrong arguments": (3, lambda rng: call("calculator", op="multiply", a="six")),
    "malformed": (
        4,
        lambda rng: '<tool_call>\n{"name": "calculator", "arguments": {"op": \n</tool_call>',
    ),
    "unclosed": (2, lambda rng: '<tool_call>\n{"name": "submit", "arguments": {"answer": "7"}}'),
    "backend": (1, lambda rng: call("lookup", topic="the backend is down")),
    "ramble": (2, lambda rng: "and then some more, " * rng.randrange(50, 400)),
}
"""What a turn may say: its weight, and its text."""


# ---------------------------------------------------------------------- the tools


class Calculator(BaseTool):
    """Adds, multiplies and divides."""

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        a, b, op = parameters["a"], parameters["b"], parameters["op"]
        if op == "divide" and b == 0:
            raise ToolError("division by zero")
        return (
            ToolResponse(str({"add": a + b, "multiply": a * b, "divide": a / (b or 1)}[op])),
            0.0,
            {"op": op},
        )


class Lookup(BaseTool):
    """Answers at length; greets where the row asks it to."""

    async def create(
        self, instance_id: str | None = None, **create_kwargs: Any
    ) -> tuple[str, ToolResponse]:
        return instance_id or "", ToolResponse(create_kwargs.get("greeting"))

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, None, dict[str, Any]]:
        topic = parameters["topic"]
        if "backend" in topic:
            raise BackendError("connection refused")
        return (
            ToolResponse(
                f"{topic}: "
                + " ".join(f"fact {index} about {topic};" for index in range(len(topic) * 4))
            ),
            None,
            {},
        )


class Submit(BaseTool):
    """Takes the answer; the reward depends on the number alone."""

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        super().__init__(config, tool_schema)
        self._reward: dict[str, float] = {}

    async def create(
        self, instance_id: str | None = None, **create_kwargs: Any
    ) -> tuple[str, ToolResponse]:
        assert instance_id is not None
        self._reward[instance_id] = 0.0
        return instance_id, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        self._reward[instance_id] = 1.0 if int(parameters["answer"]) % 3 == 0 else 0.5
        return ToolResponse(f"submitted: {parameters['answer']}"), self._reward[instance_id], {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return self._reward[instance_id]

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self._reward.pop(instance_id, None)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conversations.synthetic", description=__doc__.splitlines()[0]
    )
    parser.add_argument("path", type=Path, help="the run folder to write")
    parser.add_argument("n", type=int, help="how many trajectories")
    parser.add_argument(
        "--distinct", type=int, default=200, help="how many of them come out of the loop"
    )
    asked = parser.parse_args()
    path = make_run(asked.path, asked.n, distinct=asked.distinct)
    size = (path / TRAJECTORIES).stat().st_size
    print(f"{asked.n} trajectories, {size / 1e6:.0f} MB, in {path}")


if __name__ == "__main__":
    main()
