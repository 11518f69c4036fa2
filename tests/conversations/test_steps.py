"""A folder of steps: figures against an oracle over the records, the page, and hostile names."""

from __future__ import annotations

import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest

from conversations.errors import RunFolderError
from conversations.page import build
from conversations.page.steps import TaskOverSteps, steps_page, write_steps
from conversations.run.open_run import open_run
from conversations.run.store import RUN
from conversations.steps import FIGURES, is_steps, run_folders, step_folders, steps
from conversations.trajectory import INVALID_STATUSES
from tests.conversations.exports import small_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of one worker, the second also of another; all with the small run's records."""
    made = tmp_path_factory.mktemp("steps") / "training"
    for name, step in (("step-0-a", "0"), ("step-1-a", "1"), ("step-1-b", 1)):
        shutil.copytree(small_run().path, made / name)
        file = made / name / RUN
        file.write_text(json.dumps({**json.loads(file.read_text()), "step": step}))
    (made / "notes").mkdir()
    return made


def test_steps_are_found_by_their_manifest(root: Path) -> None:
    found = step_folders(root)
    assert {number: len(folders) for number, folders in found.items()} == {0: 1, 1: 2}
    assert is_steps(root)
    assert not is_steps(root / "step-0-a")
    assert not is_steps(root / "notes")
    with pytest.raises(RunFolderError, match="steps"):
        step_folders(root / "notes")


def test_rounds_have_their_parts_one_level_down_and_each_part_is_shown_by_itself(
    tmp_path: Path,
) -> None:
    for number, part in ((0, "held-out"), (1, "held-out"), (1, "sampled")):
        folder = tmp_path / f"round-{number}" / part
        shutil.copytree(small_run().path, folder)
        file = folder / RUN
        named = {"step": number, "part": part}
        file.write_text(json.dumps({**json.loads(file.read_text()), **named}))
    shutil.copytree(small_run().path, tmp_path / "elsewhere" / "of no part")
    (tmp_path / "round-1" / "broken").mkdir()
    (tmp_path / "round-1" / "broken" / RUN).write_text("{")
    assert list(run_folders(tmp_path)) == [
        "round-0:held-out", "round-1:held-out", "round-1:sampled"
    ]  # fmt: skip
    assert is_steps(tmp_path)
    found = steps(tmp_path)
    numbers = {name: [step.number for step in of_part] for name, of_part in found.items()}
    assert numbers == {"held-out": [0, 1], "sampled": [1]}
    assert all(step.trajectories == len(small_run()) for step in found["held-out"])
    text, count = steps_page(tmp_path)
    assert count == 2
    assert "<bdi>sampled</bdi>" in text
    task = next(iter(small_run().records()))["task_id"]
    shown = [record["id"] for record in TaskOverSteps(tmp_path, task).records()]
    assert len(set(shown)) == len(shown)
    assert {one.rpartition("/")[0] for one in shown} == {
        "step-0/held-out", "step-1/held-out", "step-1/sampled"
    }  # fmt: skip


def test_figures_are_those_of_the_records(root: Path) -> None:
    records = list(small_run().records())
    healthy = [record for record in records if not record["infra_error"]]
    [(first, second)] = steps(root).values()
    calls = [call["status"] for record in records for call in record["tool_calls"]]
    logprobs = [
        value
        for record in healthy
        for value in record["response_logprobs"]
        if value is not None and math.isfinite(value)
    ]
    expected = {
        "reward": fmean(one["reward"] for one in healthy if one["reward"] is not None),
        "response tokens": fmean(len(one["response_ids"]) for one in healthy),
        "turns": fmean(one["num_turns"] for one in healthy),
        "calls": len(calls) / len(records),
        "invalid calls": sum(status in INVALID_STATUSES for status in calls) / len(calls),
        "infra failures": 1 - len(healthy) / len(records),
        "entropy, nats": -fmean(logprobs),
    }
    assert list(expected) == list(FIGURES)
    for name, value in expected.items():
        for step in (first, second):  # twice the same records have the same means
            assert FIGURES[name](step) == pytest.approx(value), name
    assert (first.trajectories, second.trajectories) == (len(records), 2 * len(records))


def test_training_and_validation_of_a_step_do_not_share_means(root: Path, tmp_path: Path) -> None:
    """In verl 0.9's steps their data sources tell them apart; verl 0.6.1's run.json says it."""
    both = tmp_path / "both"
    shutil.copytree(root, both)
    file = both / "step-1-b" / "trajectories.jsonl"
    file.write_text(file.read_text().replace('"data_source":"synthetic"', '"data_source":"<b>"'))
    shutil.copytree(root / "step-0-a", both / "val-0")
    manifest = both / "val-0" / RUN
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "validate": True}))
    found = steps(both)
    count = len(small_run())
    numbers = {
        name: [(step.number, step.trajectories) for step in of] for name, of in found.items()
    }
    assert numbers == {
        "synthetic": [(0, count), (1, count)],
        "<b>": [(1, count)],
        "synthetic, validation": [(0, count)],
    }
    assert next(iter(found)) == "synthetic"
    write_steps(both, tmp_path / "page.html")
    page = _Texts()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.tags.count("polyline") == 3 * len(FIGURES)
    assert set(found) <= set(page.texts)
    assert "b" not in page.tags


class _Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_the_page_shows_every_figure_and_every_step(root: Path, tmp_path: Path) -> None:
    count, size = write_steps(root, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = _Texts()
    page.feed(text)
    assert (count, size) == (2, len(text.encode()))
    assert page.tags.count("polyline") == len(FIGURES)
    assert "script" not in page.tags
    assert all(name in page.texts for name in FIGURES)
    [(first, _)] = steps(root).values()
    assert set(first.tasks) <= set(page.texts)
    mean = FIGURES["reward"](first)
    assert f"{mean:.4g}" in page.texts


def test_a_hostile_name_is_text(root: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(root, hostile)
    write_steps(hostile, tmp_path / "page.html")
    page = _Texts()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "img" not in page.tags
    assert hostile.name in page.texts


def test_one_tasks_trajectories_stand_in_the_page_of_a_run(root: Path) -> None:
    task = next(small_run().records())["task_id"]
    members = [one.id for one in small_run() if one.task_id == task]
    over = TaskOverSteps(root, task)
    names = [record["id"] for record in over.records()]
    assert names[: len(members)] == [f"step-0/{name}" for name in members]
    assert len(over) == 3 * len(members)
    with build(over) as page:
        assert page.shown == page.total == len(over)
    with pytest.raises(RunFolderError, match="nobody"):
        TaskOverSteps(root, "nobody")


def test_a_step_that_is_no_number_is_no_step(tmp_path: Path) -> None:
    shutil.copytree(small_run().path, tmp_path / "run")
    file = tmp_path / "run" / RUN
    file.write_text(json.dumps({**json.loads(file.read_text()), "step": "none"}))
    assert not is_steps(tmp_path)
    assert len(open_run(tmp_path / "run")) > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reward", "x"), ("reward", 10**400), ("num_turns", "x"), ("response_logprobs", ["x"]),
        ("tool_calls", [1]), ("stop_reason", [1]), ("task_id", [1]), ("wall_s", None),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_counted_is_named(
    root: Path, tmp_path: Path, name: str, value: object
) -> None:
    shutil.copytree(root / "step-0-a", tmp_path / "steps" / "step-0-a")
    file = tmp_path / "steps" / "step-0-a" / "trajectories.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    record = next(one for one in map(json.loads, lines) if one["reward"] is not None)
    changed = {**record, name: value, "id": "odd-0"}
    file.write_text(json.dumps(changed) + "\n" + "".join(lines))
    with pytest.raises(RunFolderError, match=f"step-0-a: trajectory odd-0: .*{name}"):
        steps(tmp_path / "steps")


@pytest.mark.parametrize("step", ["²", "9" * 5000, -1, True, None])
def test_an_odd_step_is_no_step(tmp_path: Path, step: object) -> None:
    shutil.copytree(small_run().path, tmp_path / "run")
    file = tmp_path / "run" / RUN
    file.write_text(json.dumps({**json.loads(file.read_text()), "step": step}))
    assert not is_steps(tmp_path)
