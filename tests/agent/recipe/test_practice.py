"""Problems to practise on: none of them was trained on, each is asked once."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

from agent.model.base import ADAPTER_DIR, TOOLS_NAME, WEIGHTS, resolve_model
from agent.recipe import symbolic
from agent.recipe.grpo.rows import split
from agent.recipe.practice import practice_rows
from tests.helpers import ROOT

RECIPE = (sys.executable, "-m", "agent.recipe")


def test_practice_problems_stand_in_no_training_data_and_are_held_out_whole(
    tmp_path: Path,
) -> None:
    rows = practice_rows(300, 1_000)
    asked = [row["question"] for row in rows]
    assert len(set(asked)) == len(asked) > 200
    trained = {problem.question.strip() for problem in symbolic.problems(1_000)}
    assert trained.isdisjoint(asked)
    file = tmp_path / "generated.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    parts = split(file, 40)
    assert len(parts.held_out) == 40
    assert len(parts.train) + len(parts.held_out) == len(rows)
    answers = [row["reward_model"]["ground_truth"] for row in parts.train]
    assert all(math.isfinite(float(answer)) for answer in answers)


def test_merge_writes_the_model_that_the_adapter_makes(tmp_path: Path) -> None:
    words = (*RECIPE, "merge", str(ADAPTER_DIR), "--out", str(tmp_path / "model"))
    (tmp_path / "model.new").mkdir()  # what a merge that was killed leaves
    (tmp_path / "model.new" / "piece").write_text("")
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    made, shipped = tmp_path / "model", resolve_model(TOOLS_NAME)
    assert (made / WEIGHTS).read_bytes() == (shipped / WEIGHTS).read_bytes()
    assert sorted(file.name for file in made.iterdir()) == sorted(
        file.name for file in shipped.iterdir()
    )
    again = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr == f"error: {made} exists; choose another --out\n"


def test_a_missing_package_is_named_in_one_line(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['reasoning_gym'] = None\n"
        "from agent.recipe.__main__ import app; from agent.recipe.app import run_app\n"
        "sys.exit(run_app(app, 'recipe'))"
    )
    words = (sys.executable, "-c", code, "problems", "--out", str(tmp_path / "problems.jsonl"))
    done = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: the Python package 'reasoning_gym' is not installed; "
        "pip install 'turntrace[tasks]'\n"
    )


def test_problems_that_cannot_be_written_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = (*RECIPE, "problems", "--count", "1", "--out", str(tmp_path / "file" / "x.jsonl"))
    done = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be written" in done.stderr
