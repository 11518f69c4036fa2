"""The GRPO recipe as far as no trainer is needed: rows, reward, settings, report.

verl's whole trainer runs with `python -m tests.agent.verl09.whole_trainer DATA OUT`.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from agent.errors import ConfigError, TaskError
from agent.recipe.data import held_out
from agent.recipe.grpo import report, trainer
from agent.recipe.grpo.__main__ import app
from agent.recipe.grpo.flaky import FlakySandboxTool
from agent.recipe.grpo.reward import compute_score, score_of, tools_score
from agent.recipe.grpo.rows import HELD_OUT_SOURCE, TRAIN_SOURCE, split, write_verl_rows
from agent.recipe.grpo.settings import (
    GrpoSettings,
    Layout,
    Loop,
    Reward,
    agent_loop_yaml,
    overrides,
    tools_yaml,
)
from agent.recipe.gsm8k import from_gsm8k
from conversations.run.store import RunFolder
from tests.conversations.exports import small_run
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


RIGHT, WRONG = call("calculate_answer", answer="42"), call("calculate_answer", answer="41")


def kept(stop_reason: str, reward: float | None) -> dict[str, Any]:
    """What turntrace's agent loop tells a reward function."""
    return {"extras": {"turntrace": {"stop_reason": stop_reason, "reward": reward}}}


@pytest.mark.parametrize(
    ("text", "stop_reason", "reward", "by_text", "by_tools"),
    [
        (RIGHT + ENDED, "stop", 1.0, 1.0, 1.0),
        (WRONG + ENDED, "stop", 0.0, 0.0, 0.0),
        (RIGHT + ENDED, "length", 1.0, 0.0, 0.0),  # the last sentence was cut off
        (RIGHT, "max_turns", 1.0, 0.0, 0.0),
        (RIGHT + ENDED, "deadline", 1.0, 0.0, 0.0),
        (RIGHT + ENDED, "stop", 0.5, 1.0, 0.5),  # the tools' reward is another one
        ("I do not know.", "stop", None, 0.0, 0.0),
    ],
)
def test_how_a_conversation_ended_is_turntraces_to_say(
    text: str, stop_reason: str, reward: float | None, by_text: float, by_tools: float
) -> None:
    info = kept(stop_reason, reward)
    assert compute_score("gsm8k", text, "42", info) == by_text
    assert tools_score("gsm8k", text, "42", info) == by_tools
    raw = text.partition("\nuser\n")[0]
    record = replace(
        next(iter(small_run())),
        messages=[{"role": "assistant", "content": "", "raw": raw}],
        stop_reason=stop_reason,
        reward=reward,
        infra_error=False,
        ground_truth="42",
    )
    assert score_of(record, from_tools=False) == by_text
    assert score_of(record, from_tools=True) == by_tools
    assert score_of(replace(record, infra_error=True, reward=None), from_tools=True) is None


def test_verls_own_loop_has_no_reward_of_tools() -> None:
    with pytest.raises(ValueError, match="extras"):
        tools_score("gsm8k", RIGHT + ENDED, "42", {})
    with pytest.raises(ConfigError, match="--loop verl"):
        GrpoSettings(loop=Loop.verl, reward=Reward.tools)


@pytest.mark.parametrize("reward", Reward)
def test_the_reward_function_of_a_run_is_one_that_its_file_has(
    reward: Reward, tmp_path: Path
) -> None:
    words = overrides(GrpoSettings(reward=reward), Layout(tmp_path), tmp_path)
    found = dict(word.split("=", 1) for word in words)
    name = found["reward.custom_reward_function.name"].strip("'")
    assert name == ("tools_score" if reward is Reward.tools else "compute_score")
    file = Path(found["reward.custom_reward_function.path"].strip("'"))
    assert f"def {name}(" in file.read_text(encoding="utf-8")


def steps_of_a_run(layout: Layout, reward: Reward = Reward.function) -> None:
    """A run whose step 0 has four training conversations and five held-out ones: three that ended,
    of which two are right, one that is right and did not end, one that infrastructure failed."""
    layout.root.mkdir(exist_ok=True)
    layout.settings.write_text(json.dumps({"reward": reward}))
    healthy = next(one for one in small_run() if not one.infra_error)
    endings = [(RIGHT, "stop", 1.0), (RIGHT, "stop", 1.0), (WRONG, "stop", 0.0),
               (RIGHT, "length", 1.0)]  # fmt: skip
    with RunFolder.create(layout.steps / "step-0-host-1", {"step": "0"}) as folder:
        for source in (TRAIN_SOURCE, HELD_OUT_SOURCE):
            for number, (raw, stop_reason, value) in enumerate(endings):
                record = replace(
                    healthy,
                    id=f"{source}-{number}-0",
                    task_id=f"{source}-{number}",
                    sample=0,
                    messages=[{"role": "assistant", "content": "", "raw": raw}],
                    data_source=source,
                    stop_reason=stop_reason,
                    reward=value,
                    ground_truth="42",
                )
                folder.append(record)
        failed = replace(record, id="failed-0", task_id="failed", reward=None, infra_error=True)
        folder.append(failed)


@pytest.mark.parametrize("reward", Reward)
def test_the_report_counts_by_the_rule_of_the_training(tmp_path: Path, reward: Reward) -> None:
    layout = Layout(tmp_path)
    steps_of_a_run(layout, reward)
    entry = {"step": 1, "data": {"val-core/gsm8k-held-out/acc/mean@1": 0.5}}
    (tmp_path / "metrics-0.jsonl").write_text(json.dumps(entry) + "\n")
    text = report.steps_table(report.read_report(layout))
    assert "| 0 | 0.500 [0.150, 0.850] | 4 | 3 |" in text  # with the old rule three are right
    # verl was killed before it wrote the step's metrics: its records are left.
    (row,) = [line for line in text.splitlines() if line.startswith("| 1 | 0.500 |")]
    assert "| 3 of 4 |" in row


def test_a_report_of_a_run_in_progress_takes_half_written_steps(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    steps_of_a_run(layout)
    (layout.steps / "step-1-host-1" / "tokenizer").mkdir(parents=True)  # no run.json yet
    steps_of_a_run(other := Layout(tmp_path / "other"))
    shutil.copytree(other.steps / "step-0-host-1", layout.steps / "step-2-host-1")
    torn = layout.steps / "step-2-host-1"
    (torn / "run.json").write_text((torn / "run.json").read_text().replace('"0"', '"2"'))
    lines = (torn / "trajectories.jsonl").read_bytes()
    (torn / "trajectories.jsonl").write_bytes(lines[:-40])
    read = report.read_report(layout)
    assert (read.held_out[0].score.count, read.held_out[2].score.count) == (4, 4)
    assert read.unread == []
    assert [line for line in report.verified(layout) if "step-1" in line] == []
    first, rest = lines.split(b"\n", 1)
    (torn / "trajectories.jsonl").write_bytes(first[:50] + b"\n" + rest)
    read = report.read_report(layout)
    assert "step-2-host-1" in " ".join(read.unread)
    assert "not counted: " in report.steps_table(read)
    assert read.held_out[0].score.count == 4


def test_metrics_of_steps_that_a_later_start_does_again_are_superseded(tmp_path: Path) -> None:
    def line(step: int, **data: float) -> str:
        return json.dumps({"step": step, "data": data}) + "\n"

    timed = [line(step, **{"timing_s/step": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics-0.jsonl").write_text(line(0, val=0.1) + "".join(timed))
    (tmp_path / "metrics-1.jsonl").write_text(line(1, val=0.2))
    found = report.read_metrics(Layout(tmp_path))
    assert found == {0: {"val": 0.1}, 1: {"timing_s/step": 1.0, "val": 0.2}}


def test_runs_of_the_same_name_are_two_lines_and_the_report_is_the_first_ones(
    tmp_path: Path,
) -> None:
    roots = [tmp_path / name / "grpo" for name in ("one", "other")]
    for number, root in enumerate(roots):
        root.mkdir(parents=True)
        (root / "settings.json").write_text('{"reward": "function"}')
        data = {"timing_s/step": 1.0, "critic/score/mean": 0.25 + number / 2}
        (root / "metrics-0.jsonl").write_text(json.dumps({"step": 1, "data": data}) + "\n")
    done = CliRunner().invoke(app, ["report", str(roots[0]), "--against", str(roots[1])])
    assert done.exit_code == 0
    assert "| 1 | 0.250 |" in (roots[0] / "report.md").read_text()
    drawn = (roots[0] / "curve.svg").read_text()
    assert drawn.count("<polyline") == 2
    assert all(str(root) in drawn for root in roots)
    assert not (roots[1] / "report.md").exists()


def test_a_report_of_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run of this recipe"):
        report.read_report(Layout(tmp_path / "nothing"))


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
    settings = replace(GrpoSettings(), held_out=5)
    trainer.lay_out(settings, layout, data, tmp_path)
    trainer.lay_out(settings, layout, data, tmp_path)
    with pytest.raises(ConfigError, match="lr"):
        trainer.lay_out(replace(settings, lr=1.0), layout, data, tmp_path)
    with pytest.raises(ConfigError, match="model"):
        trainer.lay_out(settings, layout, data, tmp_path / "other")
    layout.settings.unlink()  # as a kill leaves it
    trainer.lay_out(settings, layout, data, tmp_path)
    assert layout.settings.is_file()


@pytest.mark.parametrize("argument", ["attention_backend", "=triton", "backends=[triton"])
def test_an_engine_argument_is_a_name_and_a_value(tmp_path: Path, argument: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    words = ("train", "none.jsonl", "--out", str(tmp_path / "run"), "--model", str(tmp_path))
    done = CliRunner().invoke(app, [*words, "--engine", argument])
    assert isinstance(done.exception, ConfigError)
    assert "NAME=VALUE" in str(done.exception)


def test_what_cannot_be_laid_out_leaves_nothing(tmp_path: Path) -> None:
    layout, data = Layout(tmp_path / "run"), gsm8k(tmp_path / "train.jsonl", 30)
    with pytest.raises(TaskError, match="a step needs 32"):
        trainer.lay_out(replace(GrpoSettings(), held_out=5), layout, data, tmp_path)
    with pytest.raises(TaskError, match="cannot be read"):
        trainer.lay_out(GrpoSettings(), layout, tmp_path / "none.jsonl", tmp_path)
    assert not layout.root.exists()
    layout.root.mkdir()
    (layout.root / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        trainer.lay_out(GrpoSettings(prompts=4, held_out=5), layout, data, tmp_path)
    assert [file.name for file in layout.root.iterdir()] == ["thesis.txt"]


def test_steps_that_are_done_again_are_set_aside(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for step in (0, 3, 4):
        (layout.steps / f"step-{step}-host-1").mkdir(parents=True)
    checkpoint = layout.checkpoints / "global_step_3"
    (checkpoint / "actor").mkdir(parents=True)
    for part in ("actor/model_0.pt", "actor/optim_0.pt", "actor/extra_state_0.pt", "data.pt"):
        (checkpoint / part).write_text("")
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
    layout.settings.write_text('{"reward": "function"}')
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
    layout.settings.write_text('{"reward": "function"}')
    failed = "Error executing tool 'code_interpreter': the sandbox is not reachable"
    rows = [{"output": failed, "score": 1.0}, {"output": "fine", "score": 0.0}]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    (layout.dumps / "1.jsonl").write_text(whole + '{"output": "torn')
    entry = {"step": 1, "data": {"timing_s/step": 1.0, "critic/score/mean": 0.5}}
    (tmp_path / "metrics-0.jsonl").write_text(json.dumps(entry) + "\n")
    assert "1 of 2, told the model" in report.steps_table(report.read_report(layout))


def test_wilsons_interval_holds_the_share_and_stays_within_0_and_1() -> None:
    low, high = report.interval(12, 64)
    assert (round(low, 3), round(high, 3)) == (0.111, 0.300)  # Wilson 1927, worked by hand
    assert report.interval(0, 10)[0] == 0.0
    assert report.interval(10, 10)[1] == pytest.approx(1.0)
