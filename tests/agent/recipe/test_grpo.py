"""The GRPO recipe as far as no trainer is needed: rows, reward, settings, report.

verl's whole trainer runs with `python -m tests.agent.verl09.whole_trainer DATA OUT`.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.errors import ConfigError, TaskError
from agent.recipe.data import held_out
from agent.recipe.grpo import report, trainer
from agent.recipe.grpo.flaky import FlakySandboxTool
from agent.recipe.grpo.reward import compute_score
from agent.recipe.grpo.rows import HELD_OUT_SOURCE, TRAIN_SOURCE, split, write_verl_rows
from agent.recipe.grpo.settings import (
    GrpoSettings,
    Layout,
    Loop,
    agent_loop_yaml,
    overrides,
    tools_yaml,
)
from agent.recipe.gsm8k import from_gsm8k
from tests.helpers import call
from tools.base import BackendError, ToolConfigError
from tools.registry import load_tools


def gsm8k(path: Path, count: int) -> Path:
    """Rows of GSM8K's form; every third is one whose worked answer makes no program."""
    rows = []
    for index in range(count):
        program = f"It is {index}+1=<<{index}+1={index + 1}>>{index + 1}."
        worked = program if index % 3 else "That is easy."
        rows.append(
            {"question": f"What is {index} plus 1?", "answer": f"{worked}\n#### {index + 1}"}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_held_out_rows_are_those_that_the_adapter_never_saw(tmp_path: Path) -> None:
    data = gsm8k(tmp_path / "train.jsonl", 90)
    parts = split(data, 12)
    asked = [row["prompt"][0]["content"] for row in parts.held_out]
    rows = {row["question"]: row for row in map(json.loads, data.read_text().splitlines())}
    assert len(asked) == 12
    assert all(held_out(one) or not from_gsm8k(one, rows[one]["answer"]) for one in asked)
    assert not {row["id"] for row in parts.train} & {row["id"] for row in parts.held_out}
    assert len(parts.train) + len(parts.held_out) == 90
    assert {row["data_source"] for row in parts.train} == {TRAIN_SOURCE}
    assert {row["data_source"] for row in parts.held_out} == {HELD_OUT_SOURCE}
    assert parts.train[0]["reward_model"]["ground_truth"].isdigit()


def test_more_held_out_rows_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="held out"):
        split(gsm8k(tmp_path / "train.jsonl", 9), 9)


def test_verl_reads_the_rows_as_tasks(tmp_path: Path) -> None:
    from agent.loop.tasks import read_tasks

    parts = split(gsm8k(tmp_path / "train.jsonl", 30), 4)
    write_verl_rows(parts.train, tmp_path / "train.parquet")
    tasks = list(read_tasks(tmp_path / "train.parquet", None))
    assert [task.id for task in tasks] == [row["id"] for row in parts.train]
    assert tasks[0].tools_kwargs["calculate_answer"] == {
        "create_kwargs": {"ground_truth": tasks[0].ground_truth}
    }


ENDED = "\nuser\n<tool_response>\nCurrent parsed answer\n</tool_response>\nassistant\nDone."


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (call("calculate_answer", answer="42") + ENDED, 1.0),
        (
            call("calculate_answer", answer="41") + call("calculate_answer", answer="42") + ENDED,
            1.0,
        ),
        (
            call("calculate_answer", answer="42") + call("calculate_answer", answer="41") + ENDED,
            0.0,
        ),
        ("The answer is 42.", 0.0),
        ("<tool_call>\n{broken\n</tool_call>" + ENDED, 0.0),
        (call("code_interpreter", code="print(42)") + ENDED, 0.0),
        ('<tool_call>\n{"name": "calculate_answer", "arguments": {}}\n</tool_call>' + ENDED, 0.0),
        (call("calculate_answer", answer="42"), 0.0),
        (
            call("calculate_answer", answer="42") + ENDED + call("calculate_answer", answer="42"),
            0.0,
        ),
        (
            call("calculate_answer", answer="42")
            + "\nuser\n<tool_response>\n1.0\n</tool_response>\n",
            0.0,
        ),
        (call("calculate_answer", answer="42") + ENDED.replace("Done.", "<tool_call>\n{"), 0.0),
    ],
)
def test_the_reward_function_scores_the_last_answer_of_a_conversation_that_ended(
    text: str, score: float
) -> None:
    assert compute_score("gsm8k", text, "42", {}) == score


def test_the_tools_of_a_flaky_run_load(tmp_path: Path) -> None:
    settings = replace(GrpoSettings(), failure_share=0.25)
    file = tmp_path / "tools.yaml"
    file.write_text(yaml.safe_dump(tools_yaml(settings), sort_keys=False), encoding="utf-8")
    loaded = load_tools(file)
    assert list(loaded) == ["code_interpreter", "calculate_answer"]
    verl = tools_yaml(replace(settings, loop=Loop.verl))
    assert [tool["config"]["type"] for tool in verl["tools"]] == ["native", "native"]


SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "code_interpreter",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}},
    },
}


def test_a_flaky_sandbox_fails_the_same_programs_each_time() -> None:
    tool = FlakySandboxTool({"failure_share": 0.3}, SCHEMA)
    failing = [tool._fails("one", f"print({number})") for number in range(2000)]
    assert failing == [tool._fails("one", f"print({number})") for number in range(2000)]
    assert 0.25 < sum(failing) / len(failing) < 0.35
    assert failing != [tool._fails("other", f"print({number})") for number in range(2000)]


def test_a_flaky_sandbox_raises_what_a_failing_backend_raises() -> None:
    tool = FlakySandboxTool({"failure_share": 1.0}, SCHEMA)
    with pytest.raises(BackendError):
        asyncio.run(tool.execute("one", {"code": "print(1)"}))


@pytest.mark.parametrize("share", [-0.1, 1.5, "x", True])
def test_a_failure_share_is_a_number_from_0_to_1(share: object) -> None:
    with pytest.raises(ToolConfigError, match="failure_share"):
        FlakySandboxTool({"failure_share": share}, SCHEMA)


def test_each_override_names_its_key_once(tmp_path: Path) -> None:
    for loop in Loop:
        words = overrides(replace(GrpoSettings(), loop=loop), Layout(tmp_path), tmp_path / "model")
        keys = [word.partition("=")[0] for word in words]
        assert len(set(keys)) == len(keys)
        chosen = "turntrace" if loop is Loop.turntrace else "tool_agent"
        assert f"actor_rollout_ref.rollout.agent.default_agent_loop='{chosen}'" in words


def test_the_agent_loop_file_is_read_by_the_agent_loops_options(tmp_path: Path) -> None:
    (entry,) = agent_loop_yaml(GrpoSettings(), Layout(tmp_path))
    assert entry["_target_"] == "agent.verl_agent_loop.TurntraceAgentLoop"
    assert entry["tool_config_path"] == str(tmp_path / "tools.yaml")


def test_a_run_goes_on_only_with_its_own_settings(tmp_path: Path) -> None:
    layout, data = Layout(tmp_path / "run"), gsm8k(tmp_path / "train.jsonl", 60)
    layout.root.mkdir()
    settings = replace(GrpoSettings(), held_out=5)
    trainer.lay_out(settings, layout, data)
    trainer.lay_out(settings, layout, data)
    with pytest.raises(ConfigError, match="lr"):
        trainer.lay_out(replace(settings, lr=1.0), layout, data)


def test_steps_that_are_done_again_are_set_aside(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for step in (0, 3, 4):
        (layout.steps / f"step-{step}-host-1").mkdir(parents=True)
    layout.checkpoints.mkdir()
    (layout.checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
    trainer.set_aside(layout)
    (layout.steps / "step-4-host-1").mkdir()  # another start, with the same host and process id
    trainer.set_aside(layout)
    assert [folder.name for folder in layout.steps.iterdir()] == ["step-0-host-1"]
    assert len(list((tmp_path / "superseded").iterdir())) == 3


def test_two_trainers_in_one_folder_are_refused(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    (layout.steps / "step-0-host-1").mkdir(parents=True)
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="still running"):
            trainer.run_trainer(GrpoSettings(), layout, tmp_path)
    assert (layout.steps / "step-0-host-1").is_dir()


def test_the_report_reads_verls_metrics_of_every_start(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    first = {"step": 1, "data": {"timing_s/step": 10.0, "critic/score/mean": 0.25}}
    again = {
        "step": 2,
        "data": {"timing_s/step": 5.0, "timing_s/gen": 2.5, "critic/score/mean": 0.5},
    }
    (tmp_path / "metrics-9.jsonl").write_text(
        json.dumps(first) + "\n" + json.dumps({**again, "data": {}}) + '\n{"step": 3, "da'
    )
    (tmp_path / "metrics-10.jsonl").write_text(json.dumps(again) + "\n")
    read = report.read_report(layout)
    assert sorted(read.metrics) == [1, 2]
    text = report.steps_table(read)
    assert "| 2 | 0.500 |" in text
    assert "gen 17%" in text
    drawn = report.curve({"<one>": read})
    assert drawn.count("<polyline") == 1
    assert "<one>" not in drawn


def test_verls_own_loop_is_reported_from_its_dumps(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.dumps.mkdir()
    failed = "Error executing tool 'code_interpreter': the sandbox is not reachable"
    rows = [{"output": failed, "score": 1.0}, {"output": "fine", "score": 0.0}]
    (layout.dumps / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"step": 1, "data": {"timing_s/step": 1.0, "critic/score/mean": 0.5}}
    (tmp_path / "metrics-0.jsonl").write_text(json.dumps(entry) + "\n")
    assert "1 of 2, told the model" in report.steps_table(report.read_report(layout))


def test_wilsons_interval_holds_the_share_and_stays_within_0_and_1() -> None:
    low, high = report.interval(12, 64)
    assert (round(low, 3), round(high, 3)) == (0.111, 0.300)  # Wilson 1927, worked by hand
    assert report.interval(0, 10)[0] == 0.0
    assert report.interval(10, 10)[1] == pytest.approx(1.0)
