"""Rounds of training without a trainer: sample, keep what is right, train, and again.

A round samples its own problems from the model of the round before, keeps the trajectories that
are right and well-formed, exports them as plain rows, and trains LoRA on the rows: ids and masks as
they were sampled, nothing rendered again. Then the new model answers the held-out problems at
temperature 0 and 1. Every stage is a run folder whose run.json names the same stage of the round
before as `follows`, so that `turntrace view` shows them side by side. The stages of one model share
its engine. A stage that is done is not touched again: the same command goes on after a kill.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from rich.console import Console

from agent.commands.run_work import RunRequest, run_request
from agent.config.config import load_config
from agent.errors import AgentError
from agent.model.base import WEIGHTS, resolve_model, write_merged
from agent.recipe.grpo.report import interval
from agent.recipe.grpo.reward import score_of
from agent.recipe.grpo.rows import split
from agent.recipe.metrics import complete
from agent.recipe.own_folder import check_same, check_unused
from agent.recipe.train import Settings, TokenFile, train_adapter
from agent.runs.ending import DONE, INTERRUPTED, TERMINATED, Terminated
from agent.runs.manifest import parent_entry
from agent.runs.session import KeptSession
from agent.terminal import say
from conversations.export import job
from conversations.export.filters import Filters
from conversations.run.open_run import open_run
from conversations.run.store import RUN, read_manifest
from conversations.run.whole_file import write_whole
from conversations.trajectory import INVALID_STATUSES, Trajectory

TEMPERATURES = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class RoundsPlan:
    """How much of everything. A round samples `tasks` x `samples` conversations.

    lr, epochs, batch_tokens: of a round's training on what it kept
    config: config keys of every stage
    """

    rounds: int
    tasks: int
    samples: int
    held_out: int
    lr: float
    epochs: float
    batch_tokens: int
    seed: int = 1
    config: tuple[str, ...] = ()


SMALL_ROUNDS = RoundsPlan(
    rounds=3,
    tasks=8,
    samples=4,
    held_out=12,
    lr=4e-4,
    epochs=2.0,
    batch_tokens=4_800,
    config=("rollout.response_length=512",),
)
"""For two CPU cores: within 30 minutes. Its intervals are wide."""
FULL_ROUNDS = RoundsPlan(
    rounds=3, tasks=1_024, samples=8, held_out=512, lr=1e-3, epochs=2.0, batch_tokens=16_384,
    config=("rollout.max_num_seqs=256",),
)  # fmt: skip
"""For a GPU: the embedded config alone is a CPU's, with 16 conversations at once."""


@dataclass(slots=True)
class Score:
    """What a model did on the held-out problems at one temperature.

    `right`: the tools' reward is 1 and the model ended the conversation, as in the GRPO recipe.
    `recovered` of `failed`: conversations with a call that failed, and those of them that still
    ended well.
    """

    temperature: float
    asked: int = 0
    right: int = 0
    whole: int = 0
    calls: int = 0
    invalid: int = 0
    failed: int = 0
    recovered: int = 0

    def add(self, one: Trajectory) -> None:
        """Counts a trajectory, unless infrastructure failed it."""
        if one.infra_error:
            return
        ends_well = complete(one)
        has_failed = any(call.status != "ok" for call in one.tool_calls)
        self.asked += 1
        self.right += score_of(one, from_tools=True) == 1.0
        self.whole += ends_well
        self.calls += len(one.tool_calls)
        self.invalid += sum(call.status in INVALID_STATUSES for call in one.tool_calls)
        self.failed += has_failed
        self.recovered += has_failed and ends_well


@dataclass(slots=True)
class RoundResult:
    """A round: what it sampled and kept, and how its model did. Round 0: the model at the start."""

    number: int
    sampled: int
    kept: int
    trained_tokens: int
    scores: list[Score]


@dataclass(frozen=True, slots=True)
class Stage:
    """Tasks that a round's model answers into a run folder, `samples` times each."""

    round: int
    out: Path
    model: Path
    tasks: Path
    temperature: float
    samples: int


class SelfTraining:
    """The rounds in a folder."""

    def __init__(
        self,
        plan: RoundsPlan,
        root: Path,
        gsm8k: Path,
        model: str,
        console: Console,
        overrides: Sequence[str] = (),
    ) -> None:
        self.plan = plan
        self._root = root
        self._model = model
        self._console = console
        self._overrides = tuple(overrides)
        rows = split(gsm8k, plan.held_out)
        Random(plan.seed).shuffle(rows.train)
        if len(rows.train) < plan.rounds * plan.tasks:
            raise AgentError(
                f"{gsm8k} has {len(rows.train)} rows to train on, {plan.rounds} rounds of "
                f"{plan.tasks} tasks need more"
            )
        self._rows = rows
        self._data_sha256 = hashlib.sha256(gsm8k.read_bytes()).hexdigest()

    def run(self, report: Callable[[list[RoundResult]], None]) -> list[RoundResult]:
        """Runs all rounds; `report` gets the results after each. Returns them.

        A user's mistake is raised before anything is written.
        """
        model = resolve_model(self._model)
        if not (model / WEIGHTS).is_file():
            raise AgentError(f"{model} has no {WEIGHTS}: rounds merge into weights of one file")
        load_config(None, self._words(model, 1.0, 1))
        self.check_plan()
        held_out = self._task_file(self._root / "held-out.jsonl", self._rows.held_out)
        results: list[RoundResult] = []
        sampled, kept, tokens = 0, 0, 0
        for number in range(self.plan.rounds + 1):
            with KeptSession() as session:
                scores = self._scores(number, model, held_out, session)
                results.append(RoundResult(number, sampled, kept, tokens, scores))
                report(results)
                if number == self.plan.rounds:
                    break
                folder = self._root / f"round-{number + 1}"
                run = self._sample(number + 1, folder, model, session)
            sampled, kept = len(open_run(run)), self._export(run, folder / "rows")
            model, tokens = self._train(model, folder)
        return results

    def check_plan(self) -> None:
        """Raises ConfigError if the folder holds rounds of another plan, or something else."""
        file = self._root / "plan.json"
        plan = {**asdict(self.plan), "config": list(self.plan.config)}
        wanted = {**plan, "model": self._model, "overrides": list(self._overrides)}
        wanted["data_sha256"] = self._data_sha256
        if file.is_file():
            check_same(self._root, json.loads(file.read_text(encoding="utf-8")), wanted)
            return
        check_unused(self._root, {f"{file.name}.new"})
        self._root.mkdir(parents=True, exist_ok=True)
        write_whole(file, [(json.dumps(wanted, indent=2) + "\n").encode()])

    # ------------------------------------------------------------------ stages

    def _sample(self, number: int, folder: Path, model: Path, session: KeptSession) -> Path:
        """The run folder of a round's conversations, at temperature 1."""
        first = (number - 1) * self.plan.tasks
        rows = self._rows.train[first : first + self.plan.tasks]
        tasks = self._task_file(folder / "tasks.jsonl", rows)
        stage = Stage(number, folder / "sampled", model, tasks, 1.0, self.plan.samples)
        return self._stage(stage, session)

    def _scores(self, number: int, model: Path, tasks: Path, session: KeptSession) -> list[Score]:
        """The held-out figures of a round's model."""
        found = []
        for temperature in TEMPERATURES:
            name = f"held-out-T{temperature:g}"
            folder = self._root / f"round-{number}" / name
            score = Score(temperature)
            stage = Stage(number, folder, model, tasks, temperature, 1)
            for one in open_run(self._stage(stage, session)):
                score.add(one)
            found.append(score)
        return found

    def _stage(self, stage: Stage, session: KeptSession) -> Path:
        """Runs tasks into a run folder, or what it lacks; the stages of a model share its engine.

        It follows the same stage of the round before: it is no replay of it, so its records have no
        parents. Raises KeyboardInterrupt after Ctrl-C.
        """
        out, tasks = stage.out, stage.tasks
        words = self._words(stage.model, stage.temperature, stage.samples)
        if is_whole(out, tasks, stage.samples):
            return out
        before = self._root / f"round-{stage.round - 1}" / out.name
        follows = parent_entry(before) if (before / RUN).is_file() else None
        request = RunRequest(
            tasks=tasks,
            out=out,
            config=load_config(None, words),
            limit=None,
            resume=(out / RUN).is_file(),
            force=False,
            validate=False,
            argv=("run", str(tasks), "--out", str(out), *(f"--set={word}" for word in words)),
            more={"follows": follows, "step": stage.round, "part": out.name},
            again="the same command",
            session=session,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        say(self._console, f"round {stage.round}: {out.relative_to(self._root)}")
        code = run_request(request, self._console)
        if code in (INTERRUPTED, TERMINATED):
            raise KeyboardInterrupt if code == INTERRUPTED else Terminated
        if code != DONE:
            raise AgentError(f"{out} ended with {code}; the same command goes on")
        return out

    def _words(self, model: Path, temperature: float, n: int) -> tuple[str, ...]:
        """A stage's config, as `--set` has it."""
        return (
            f"model_path={model}",
            "rollout.multi_turn.tool_config_path=gsm8k",
            f"rollout.temperature={temperature}",
            f"rollout.n={n}",
            *self.plan.config,
            *self._overrides,
        )

    def _export(self, sampled: Path, out: Path) -> int:
        """The trajectories to learn from, as plain rows, each once; returns how many."""
        if not out.is_dir():
            job.export_run(
                open_run(sampled),
                "rows",
                out,
                Filters(
                    min_reward=1.0,
                    stop_reasons=frozenset({"stop"}),
                    valid_calls_only=True,
                    dedupe=True,
                ),
            )
        return len(_read_rows(out))

    def _train(self, model: Path, folder: Path) -> tuple[Path, int]:
        """The model after a round, and how many tokens it was trained on."""
        after = folder / "model"
        tokens = tokens_of(_read_rows(folder / "rows"))
        if not after.is_dir():
            shutil.rmtree(folder / "adapter", ignore_errors=True)
            settings = Settings(
                lr=self.plan.lr,
                batch_tokens=self.plan.batch_tokens,
                epochs=self.plan.epochs,
                max_seconds=3600,
                seed=self.plan.seed,
            )
            say(self._console, f"training on {len(tokens.kinds)} conversations")
            done = train_adapter(model, tokens, settings, folder / "adapter", lambda progress: None)
            if done["interrupted"]:
                raise KeyboardInterrupt
            fresh = folder / "model.new"
            shutil.rmtree(fresh, ignore_errors=True)
            write_merged(model, folder / "adapter", fresh)
            fresh.rename(after)
        return after, int(tokens.loss.sum())

    def _task_file(self, file: Path, rows: Sequence[dict[str, Any]]) -> Path:
        """Tasks as JSONL; the same rows give the same file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file


def is_whole(run: Path, tasks: Path, n: int) -> bool:
    """Whether a stage is closed with every conversation in it, none failed by infrastructure.

    Resuming it would do nothing but write its run.json anew, whose hash the next stage names.
    """
    if not (run / RUN).is_file() or read_manifest(run).get("counts") is None:
        return False
    with tasks.open("rb") as lines:
        asked = n * sum(1 for _ in lines)
    return sum(not record["infra_error"] for record in open_run(run).records(check=False)) == asked


def tokens_of(rows: Sequence[dict[str, Any]]) -> TokenFile:
    """Exported rows as training data: the ids and the mask that the run recorded.

    Raises AgentError if there are none.
    """
    if not rows:
        raise AgentError("no trajectory was right and well-formed: there is nothing to train on")
    lengths = [len(row["input_ids"]) for row in rows]
    return TokenFile(
        ids=np.concatenate([np.array(row["input_ids"], np.uint32) for row in rows]),
        loss=np.concatenate([np.array(row["loss_mask"], np.uint8) for row in rows]),
        starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        kinds=["sampled"] * len(rows),
        answers=[""] * len(rows),
        held_out=np.zeros(len(rows), bool),
    )


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    columns = ["id", "input_ids", "loss_mask"]
    found: list[dict[str, Any]] = pq.read_table(
        folder / "rows.parquet", columns=columns
    ).to_pylist()
    return found


def rounds_table(results: Sequence[RoundResult]) -> str:
    """The rounds as a Markdown table, a line for each model and temperature."""
    head = (
        "round", "sampled", "kept", "T", "right [95%]", "whole protocol", "invalid calls",
        "recovered of failed",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cells) + " |" for one in results for cells in _cells(one)]
    return "\n".join(lines) + "\n"


def _cells(one: RoundResult) -> Iterator[tuple[str, ...]]:
    for score in one.scores:
        low, high = interval(score.right, score.asked)
        yield (
            str(one.number),
            str(one.sampled),
            str(one.kept),
            f"{score.temperature:g}",
            f"{score.right}/{score.asked} ({score.right / max(1, score.asked):.1%}) "
            f"[{low:.1%}, {high:.1%}]",
            f"{score.whole}/{score.asked}",
            f"{score.invalid}/{score.calls}",
            f"{score.recovered}/{score.failed}",
        )


def write_rounds(root: Path, results: Sequence[RoundResult]) -> None:
    """Writes rounds.json and report.md."""
    document = json.dumps([asdict(one) for one in results], indent=2)
    (root / "rounds.json").write_text(document + "\n", encoding="utf-8")
    (root / "report.md").write_text(rounds_table(results), encoding="utf-8")
