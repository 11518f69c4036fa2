"""Run folders of a trainer's worker: a record stands with the weights that sampled it, however late
it comes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.errors import ConfigError
from agent.trainers.step_folders import MAX_OPEN, NewFolders, StepFolders
from conversations.errors import RecordError
from conversations.run.open_run import open_run
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from tests.helpers import run_one, runtime, says


@pytest.fixture
async def record(smollm2: ChatTemplate) -> Trajectory:
    return await run_one(runtime(smollm2, says(smollm2, "Fine.")))


def at(record: Trajectory, step: str | None) -> Trajectory:
    return dataclasses.replace(
        record, turns=[dataclasses.replace(turn, weight_version=step) for turn in record.turns]
    )


def samples(root: Path) -> dict[str, list[int]]:
    """Those of each folder, by its name without host and pid."""
    found = {}
    for folder in root.iterdir():
        step, _, rest = folder.name.removeprefix("step-").partition("-")
        found[step + rest.rpartition(f"-{os.getpid()}")[2]] = [
            one.sample for one in open_run(folder)
        ]
    return found


def test_samples_of_a_task_are_counted_in_each_folder(
    tmp_path: Path, record: Trajectory, smollm2: ChatTemplate
) -> None:
    folders = StepFolders(tmp_path, lambda step: {"step": step}, smollm2.tokenizer)
    for step in ("1", "1", "2", None, "1"):
        folders.append(at(record, step))
    folders.append(
        dataclasses.replace(at(record, "2"), turns=[])
    )  # without a turn: where the last one went
    folders.append_unfinished(at(record, "2"))
    folders.close()
    assert samples(tmp_path) == {"1": [0, 1, 2, 3], "2": [0], "none": [0]}


def test_a_straggler_opens_another_folder_once_its_own_is_closed(
    tmp_path: Path, record: Trajectory, smollm2: ChatTemplate
) -> None:
    folders = StepFolders(tmp_path, lambda step: {"step": step}, smollm2.tokenizer)
    for step in [*range(MAX_OPEN + 1), 0, 1]:
        folders.append(at(record, str(step)))
    folders.close()
    folders.close()
    assert samples(tmp_path) == {
        **{str(step): [0] for step in range(MAX_OPEN + 1)},
        "0-1": [0],
        "1-1": [0],
    }
    assert all((folder / "tokenizer" / "tokenizer.json").is_file() for folder in tmp_path.iterdir())


def test_a_turn_gone_on_with_under_new_weights_stands_with_the_last(
    tmp_path: Path, record: Trajectory, smollm2: ChatTemplate
) -> None:
    folders = StepFolders(tmp_path, lambda step: {"step": step}, smollm2.tokenizer)
    for step in ("7", "7-8", "8"):
        folders.append(at(record, step))
    folders.close()
    assert samples(tmp_path) == {"7": [0], "8": [0, 1]}


def test_writers_of_one_name_have_a_folder_each(tmp_path: Path, smollm2: ChatTemplate) -> None:
    """Two trainers that keep their batches in one place, say; what was taken away meanwhile is no
    harm.
    """
    makers = [NewFolders(tmp_path / "kept", smollm2.tokenizer) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda maker: maker.create("train-1", {}), makers))
    assert sorted(folder.path.name for folder in made) == [
        "train-1",
        "train-1-1",
        "train-1-2",
        "train-1-3",
    ]
    for folder in made:
        folder.close()
        shutil.rmtree(folder.path)
    with makers[0].create("train-1", {}) as again:
        assert (again.path / "tokenizer" / "tokenizer.json").is_file()


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path, smollm2: ChatTemplate) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "kept"):
        with pytest.raises(ConfigError, match=rf"^save_to: .*{root}: "):
            NewFolders(root, smollm2.tokenizer).create("train-1", {})


def test_what_has_no_json_takes_no_number(
    tmp_path: Path, record: Trajectory, smollm2: ChatTemplate
) -> None:
    folders = StepFolders(tmp_path, lambda step: {"step": step}, smollm2.tokenizer)
    with pytest.raises(RecordError):
        folders.append(dataclasses.replace(record, extra={"a": object()}))
    folders.append(record)
    folders.close()
    assert samples(tmp_path) == {"none": [0]}
