"""The work of `turntrace rescore`: new rewards by a user's function, without a model or a tool.

Invariant: of a record only `reward`, `reward_parts`, `parent` and the hash change. Records that
failed because of infrastructure keep their null. The new run is there whole or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from agent.errors import AgentError
from agent.loop.batch import Progress
from agent.loop.boundary import describe
from agent.loop.tasks import task_file_hash
from agent.runs.manifest import command_line, parent_entry, save_tokenizer, versions
from agent.runs.progress import counts
from conversations.errors import RunFolderError
from conversations.run.new_folder import new_folder
from conversations.run.open_run import TOKENIZER, Run, open_run
from conversations.run.saved_tokenizer import load_tokenizer
from conversations.run.store import RunFolder
from conversations.trajectory import Trajectory, total_reward

VERL_PARAMETERS = frozenset({"data_source", "solution_str", "ground_truth"})
"""Parameters of verl's `compute_score(data_source, solution_str, ground_truth, extra_info=None)`.

A function that has all of them is called as verl would call it.
"""

Score = Callable[[Trajectory], Any]
CHUNK = 16
"""Trajectories that a process gets at a time."""


@dataclass(frozen=True, slots=True)
class Rescored:
    """`changed` counts rewards that differ from the old ones, `unscored` those that are null."""

    progress: Progress
    changed: int
    unscored: int


def rescore_run(
    run: Path, reward: str, out: Path, *, jobs: int = 1, argv: Iterable[str] = ()
) -> Rescored:
    """Writes into `out` the trajectories of `run` with new rewards.

    `reward` is `module:function` or `file.py:function`. The function takes a Trajectory and returns
    a number, a dict of numbers (the parts), or None for no reward; or it is verl's `compute_score`,
    called with the decoded response. `jobs` processes call it. Raises AgentError that names the
    trajectory on which it failed.
    """
    if run.resolve() == out.resolve():
        raise AgentError(f"--out {out} is the run itself; the new rewards need another folder")
    parent = open_run(run)
    if len(parent) == 0:
        raise AgentError(f"{run} has no finished trajectories to score")
    function = load_function(reward)
    progress, changed, unscored = Progress(total=len(parent)), 0, 0
    manifest = _manifest(parent, reward, function, argv)
    with new_folder(out, RunFolderError) as path, RunFolder.create(path, manifest) as folder:
        if (run / TOKENIZER).is_dir():
            save_tokenizer(path, load_tokenizer(parent.path / TOKENIZER))
        for old, new in _scored(parent, reward, jobs):
            folder.append(new)
            progress.count(new)
            changed += old != new.reward
            unscored += new.reward is None
        folder.close(counts(progress))
    return Rescored(progress, changed, unscored)


def _manifest(
    parent: Run, reward: str, function: Callable[..., Any], argv: Iterable[str]
) -> dict[str, Any]:
    source = _source_file(function)
    return {
        **{
            key: value
            for key, value in parent.manifest.items()
            if key not in ("schema", "counts", "digest", "replay")
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(list(argv)),
        "versions": versions(),
        "parent": parent_entry(parent.path),
        "rescore": {"reward": reward, "sha256": task_file_hash(source) if source else None},
    }


def _source_file(function: Callable[..., Any]) -> str | None:
    try:
        return inspect.getsourcefile(function)
    except TypeError:  # a builtin, or an object that can be called
        return None


# ---------------------------------------------------------------------- scoring


def _scored(parent: Run, reward: str, jobs: int) -> Iterator[tuple[float | None, Trajectory]]:
    """(old reward, new trajectory) of each, in order. Only a few chunks are in memory at a time."""
    score = functools.partial(_score_ids, str(parent.path), reward, sys.path[:])
    if jobs == 1:
        for ids in _chunks(parent.ids):
            yield from score(ids)
        return
    pending: deque[Future[list[tuple[float | None, Trajectory]]]] = deque()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            for ids in _chunks(parent.ids):
                pending.append(pool.submit(score, ids))
                if len(pending) > 2 * jobs:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _chunks(ids: Iterable[str]) -> Iterator[list[str]]:
    names = list(ids)
    return (names[start : start + CHUNK] for start in range(0, len(names), CHUNK))


def _score_ids(
    path: str, reward: str, search: list[str], ids: list[str]
) -> list[tuple[float | None, Trajectory]]:
    run, score = _scorer(path, reward, tuple(search))
    return [
        (record.reward, scored(record, score, run.path)) for record in map(run.__getitem__, ids)
    ]


@functools.lru_cache(1)
def _scorer(path: str, reward: str, search: tuple[str, ...]) -> tuple[Run, Score]:
    sys.path += [folder for folder in search if folder not in sys.path]
    run = open_run(path)
    return run, as_score(load_function(reward), run.path)


def scored(record: Trajectory, score: Score, run: Path) -> Trajectory:
    """The record with its new reward.

    Raises AgentError that names it if the function fails or returns no reward.
    """
    parent = {"run": run.resolve().name, "id": record.id, "turn": (record.parent or {}).get("turn")}
    if record.infra_error:
        return dataclasses.replace(record, parent=parent)
    try:
        parts = _parts(score(record))
    except (Exception, SystemExit) as error:  # a script may exit
        raise AgentError(
            f"trajectory {record.id}: the reward function failed: {_one_line(error)}"
        ) from error
    reward = total_reward(parts)
    return dataclasses.replace(record, reward=reward, reward_parts=parts, parent=parent)


def load_score(reward: str, run: Path) -> Callable[[Trajectory], dict[str, float]]:
    """The function that `reward` names, as `parts_of` makes it.

    Raises AgentError if there is no such function.
    """
    return parts_of(load_function(reward), run)


def parts_of(function: Callable[..., Any], run: Path) -> Callable[[Trajectory], dict[str, float]]:
    """The user's function as one from a record of `run` to the reward's parts."""
    score = as_score(function, run)
    return lambda record: _parts(score(record))


def _one_line(error: BaseException) -> str:
    return " ".join(describe(error).split())


def _parts(value: Any) -> dict[str, float]:
    """What a reward function returned, as parts whose sum is finite."""
    if value is None:
        return {}
    named = value if isinstance(value, Mapping) else {"reward": value}
    parts = {str(name): _number(part) for name, part in named.items()}
    reward = total_reward(parts)
    if reward is not None and not math.isfinite(reward):
        raise ValueError(f"the sum of the parts is {reward}")
    return parts


def _number(value: Any) -> float:
    value = value.item() if hasattr(value, "item") else value  # numpy's and torch's scalars
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    raise TypeError(f"expected a finite number, a dict of them, or None; got {value!r:.100}")


def as_score(function: Callable[..., Any], run: Path) -> Score:
    """The user's function as one that takes a trajectory.

    Parameter names tell which signature it has.
    """
    if not _parameters(function).keys() >= VERL_PARAMETERS:
        return function
    tokenizer = load_tokenizer(run / TOKENIZER)

    def compute_score(record: Trajectory) -> Any:
        """Calls it as verl's reward managers do: with the response's text, no special tokens."""
        extra = record.extra if isinstance(record.extra, dict) else {}
        score = function(
            data_source=record.data_source,
            solution_str=tokenizer.decode(record.response_ids, skip_special_tokens=True),
            ground_truth=record.ground_truth,
            **_extra_info(
                function, {**(extra.get("extra_info") or {}), "num_turns": record.num_turns}
            ),
        )
        return (
            score["score"] if isinstance(score, Mapping) else score
        )  # its other keys are for verl's logs

    return compute_score


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # some builtins have no signature
        return {}


def _extra_info(function: Callable[..., Any], info: dict[str, Any]) -> dict[str, Any]:
    parameters = _parameters(function)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"extra_info": info} if "extra_info" in parameters or takes_any else {}


# ---------------------------------------------------------------------- finding the function


def load_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names. Raises AgentError."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise AgentError(f"--reward {name}: write it as module:function, or as file.py:function")
    try:
        module = _file_module(Path(place)) if place.endswith(".py") else _named_module(place)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise AgentError(
            f"--reward {name}: importing {place} failed: {_one_line(error)}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise AgentError(f"--reward {name}: {place} has no function {attribute!r}")
    if inspect.iscoroutinefunction(function):
        raise AgentError(f"--reward {name}: an async function cannot be used; give a plain one")
    plain: Callable[..., Any] = function
    return plain


def _file_module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"turntrace_reward_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _named_module(name: str) -> ModuleType:
    """An installed module, else one in the current folder, which cannot hide an installed one."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)
