"""A run replayed: recorded and live, forks, hostile parents, interrupted and resumed."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agent.commands.run_work import RunRequest, run_request
from agent.config.config import load_config
from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.errors import AgentError
from agent.loop.batch import run_tasks
from agent.loop.calls import Dispatcher
from agent.loop.runtime import LoopSettings, Runtime
from agent.loop.tasks import read_tasks
from agent.model.base import base_model_dir
from agent.replay.request import ReplayRequest
from agent.replay.runner import DIVERGED, replay_run
from agent.replay.trust import OWN_TOOLS
from agent.runs.ending import DONE, INCOMPLETE
from conversations.errors import ConversationsError, RunFolderError
from conversations.run.open_run import Run, open_run
from conversations.run.store import TRAJECTORIES, RunFolder, read_manifest
from conversations.trajectory import Trajectory, record_hash
from conversations.verify import verify_run
from tests.command import turntrace
from tests.helpers import (
    call,
    child_env,
    fresh_tokenizer,
    hermes_template,
)
from tools.base import ToolsError
from tools.registry import MCP_TOOL, SHIPPED, load_tools

CONFIG = """
model_path: smollm2-base
rollout:
  name: scripted
  prompt_length: 1024
  response_length: 512
  multi_turn: {enable: true, tool_config_path: tools.yaml}
  turntrace: {recorded: script}
"""
TOOLS = """
tools:
  - function: desk:look
  - class_name: desk.Count
    config: {}
    tool_schema:
      type: function
      function:
        name: count
        description: Adds to a count.
        parameters:
          type: object
          required: [by]
          properties: {by: {type: integer}, also: {type: integer}}
"""
DESK = '''
"""Tools that a test can change while they are there: by files in the folder that DESK names."""
import asyncio, os, pathlib, time
from tools.base import BackendError, BaseTool, ToolResponse

def told(what):
    return (pathlib.Path(os.environ["DESK"]) / what).exists()

async def look(question: str) -> str:
    """Looks something up."""
    if told("slow") and question != "q0":
        (pathlib.Path(os.environ["DESK"]) / f"called-{question}").touch()
        await asyncio.sleep(60)
    if told("down"):
        raise BackendError("no route to host")
    return f"\\x1b[31mlost {question}" if told("changed") else f"found {question}"

class Count(BaseTool):
    def __init__(self, config, tool_schema):
        super().__init__(config, tool_schema)
        self.counts = {}

    async def create(self, instance_id=None, **kwargs):
        self.counts[instance_id] = 100 if told("miscounting") else 0
        return instance_id, ToolResponse("counting" if told("talking") else None)

    async def execute(self, instance_id, parameters, **kwargs):
        self.counts[instance_id] += parameters["by"]
        count = self.counts[instance_id]
        metrics = {"n": count, "run_time": time.perf_counter()}
        return ToolResponse(f"count is {count}, by {list(parameters)}"), 0.5, metrics

    async def calc_reward(self, instance_id, **kwargs):
        return float(self.counts[instance_id])

    async def release(self, instance_id, **kwargs):
        del self.counts[instance_id]
'''
TASKS = 5
MALFORMED = '<tool_call>{"name": "count", "arguments": {"by": 1}</tool_call>'


def script(question: str, turn: int, *, other: bool = False, wordy: bool = False) -> str:
    """What the model says: t3 errs, t4 makes no call; the `other` model adds 4 instead of 3."""
    first = f"Let me look.{call('look', question=question)}{call('count', also=1, by=2)}"
    if question == "q3":
        first = f"{MALFORMED}{call('nobody', x=1)}{call('count', by='two')}{call('count', by=2)}"
    second = call("count", by=4 if other else 3)
    said = (
        ["It is I."]
        if question == "q4"
        else [f"Well, {first}" if wordy else first, second, "It is done."]
    )
    return said[turn]


def write_script(folder: Path, tasks: Path, **variant: bool) -> None:
    """A run whose tokens the scripted engine plays back."""
    template = hermes_template()

    def respond(prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        text = template.decode(prompt_ids)
        question = text.rpartition("<|im_start|>user\nq:")[2].partition("<|im_end|>")[0]
        ids = [
            *template.encode(script(question, text.count("<|im_start|>assistant") - 1, **variant)),
            template.end_id,
        ]
        return Generation(ids, [-0.25] * len(ids), "stop")

    dispatcher = Dispatcher(
        load_tools(tasks.parent / "tools.yaml"), max_parallel_calls=16, shorten=lambda text: None
    )
    runtime = Runtime(ScriptedEngine(respond), template, LoopSettings(1024, 512, 1536), dispatcher)

    async def main() -> None:
        with RunFolder.create(folder, {}) as store:
            await run_tasks(read_tasks(tasks), runtime, store=store)

    folder.mkdir()
    asyncio.run(main())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with tools of their own, and the run `parent` made there."""
    folder = tmp_path_factory.mktemp("project")
    files = {"tools.yaml": TOOLS, "desk.py": DESK, "config.yaml": CONFIG}
    files["tasks.jsonl"] = "".join(
        json.dumps({"id": f"t{i}", "prompt": f"q:q{i}", "data_source": "desk"}) + "\n"
        for i in range(TASKS)
    )
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "still").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DESK", str(folder / "still"))
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        write_script(folder / "script", folder / "tasks.jsonl")
        write_script(folder / "other", folder / "tasks.jsonl", other=True)
        write_script(folder / "wordy", folder / "tasks.jsonl", wordy=True)
        request = RunRequest(
            Path("tasks.jsonl"),
            Path("parent"),
            load_config("config.yaml"),
            None,
            False,
            False,
            False,
            ["run", "..."],
        )
        assert run_request(request, Console(file=io.StringIO())) == DONE
    return folder


@pytest.fixture
def desk(tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of files that tell the tools how to behave; the current one is the project."""
    folder = tmp_path / "desk"
    folder.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setenv("DESK", str(folder))
    monkeypatch.setattr(sys, "path", [*sys.path, str(project)])
    return folder


class Replayed:
    """What a replay came to."""

    def __init__(self, out: Path, code: int, report: dict[str, Any], said: str) -> None:
        self.out, self.code, self.report, self.said = out, code, report, said

    @property
    def run(self) -> Run:
        return open_run(self.out)

    @property
    def defects(self) -> list[str]:
        """What `turntrace verify` says of the new run."""
        found: list[str] = []
        verify_run(self.out, on_defect=lambda defect: found.append(str(defect)))
        return found

    def first(self, trajectory_id: str) -> dict[str, Any]:
        found: dict[str, Any] = next(
            line["first"] for line in self.report["diverged"] if line["id"] == trajectory_id
        )
        return found


Again = Callable[..., Replayed]


@pytest.fixture
def again(tmp_path: Path, desk: Path) -> Again:
    """Replays `parent`, or `run`, into a new folder."""

    def replayed(run: Path = Path("parent"), out: str = "new", **options: Any) -> Replayed:
        said = io.StringIO()
        request = ReplayRequest(run, tmp_path / out, argv=["replay", str(run)], **options)
        code, report = replay_run(request, Console(file=said, width=200))
        return Replayed(tmp_path / out, code, report, said.getvalue())

    return replayed


LIVE_TOOLS = {"tools": "live", "trust_tools": True}


def same(one: Trajectory, other: Trajectory) -> bool:
    """The same but for clocks and names."""
    return stripped(one) == stripped(other)


def stripped(record: Trajectory) -> dict[str, Any]:
    fields = json.loads(record.to_line())
    for name in ("sha256", "started_at", "wall_s", "parent", "id", "sample"):
        del fields[name]
    return fields


# ---------------------------------------------------------------------- the same again


def test_both_recorded_is_the_same_record_in_a_run_that_names_its_parent(
    again: Again, project: Path
) -> None:
    done = again()
    parent = open_run(project / "parent")
    assert done.code == DONE
    assert done.report["outcomes"] == {"identical": TASKS, "diverged": 0, "failed": 0}
    assert set(done.run.ids) == set(parent.ids)
    assert all(same(parent[name], done.run[name]) for name in parent.ids)
    assert done.run["t0-0"].parent == {"run": "parent", "id": "t0-0", "turn": None}
    manifest = done.run.manifest
    assert manifest["parent"]["run"] == "parent"
    assert (
        len(manifest["parent"]["run_sha256"])
        == len(manifest["parent"]["trajectories_sha256"])
        == 64
    )
    assert manifest["replay"] == {
        "model": "recorded",
        "tools": "recorded",
        "from_turn": None,
        "n": 1,
    }
    assert {name: manifest[name] for name in ("config", "tools", "tasks", "n")} == {
        name: parent.manifest[name] for name in ("config", "tools", "tasks", "n")
    }
    assert [
        line["outcome"]
        for line in map(json.loads, (done.out / "replay.jsonl").read_text().splitlines())
    ] == ["identical"] * TASKS
    assert done.defects == []


def test_a_replay_is_replayed_like_any_run(again: Again) -> None:
    first = again()
    second = again(run=first.out, out="newer")
    assert (second.code, second.report["outcomes"]["identical"]) == (DONE, TASKS)
    assert second.run["t1-0"].parent == {"run": "new", "id": "t1-0", "turn": None}


def test_both_recorded_imports_nothing_and_needs_no_model(project: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(project / "parent", tmp_path / "elsewhere")
    done = turntrace(
        "replay",
        str(copy),
        "--out",
        "new",
        "--json",
        "--set",
        "model_path=no/such-model",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (
        DONE,
        f"{copy}: recorded model, recorded tools\n" + done.stderr.split("\n", 1)[1],
    )
    assert json.loads(done.stdout)["outcomes"] == {"identical": TASKS, "diverged": 0, "failed": 0}


def test_live_tools_that_did_not_change_give_the_same_answers(again: Again) -> None:
    done = again(**LIVE_TOOLS)
    assert (done.code, done.report["outcomes"]["identical"]) == (DONE, TASKS)
    assert done.report["answers"] == {
        "look": {"compared": 3, "different": 0, "fields": []},
        "count": {"compared": 8, "different": 0, "fields": []},
    }
    assert done.run["t0-0"].reward == 5.0


def test_a_live_model_that_samples_the_same_is_identical_and_keeps_the_recorded_reward(
    again: Again, project: Path
) -> None:
    done = again(model="live")
    assert (done.code, done.report["outcomes"]["identical"], done.report["logprob_difference"]) == (
        DONE,
        TASKS,
        0.0,
    )
    assert [record.reward for record in done.run] == [
        record.reward for record in open_run(project / "parent")
    ]


def test_both_live_runs_again(again: Again, desk: Path) -> None:
    assert again(model="live", **LIVE_TOOLS).code == DONE
    (desk / "changed").touch()
    other = again(out="newer", model="live", **LIVE_TOOLS)
    assert other.code == INCOMPLETE  # the scripted model has no turn after another answer
    assert other.report["outcomes"] == {"identical": 2, "diverged": 0, "failed": 3}


# ---------------------------------------------------------------------- where it goes another way


def test_a_changed_tool_is_shown_with_turn_call_and_both_texts(again: Again, desk: Path) -> None:
    (desk / "changed").touch()
    done = again(**LIVE_TOOLS)
    assert done.code == DIVERGED
    assert done.report["outcomes"] == {"identical": 2, "diverged": 3, "failed": 0}
    assert done.report["first_difference"] == {"answer": 3}
    first = done.first("t1-0")
    assert (first["kind"], first["turn"], first["call_id"], first["name"]) == (
        "answer",
        0,
        "call_0_0",
        "look",
    )
    assert (first["recorded"], first["replayed"]) == (
        {"response": "found q1"},
        {"response": "\x1b[31mlost q1"},
    )
    assert "turn 0, call_0_0, look, a tool's answer differs" in done.said
    assert "found q0" in done.said
    assert "\x1b" not in done.said


def test_the_record_of_a_changed_tool_ends_where_the_model_would_have_seen_something_else(
    again: Again, desk: Path
) -> None:
    (desk / "changed").touch()
    done = again(**LIVE_TOOLS)
    record = done.run["t0-0"]
    assert (record.stop_reason, record.num_turns, record.reward, record.infra_error) == (
        "cancelled",
        1,
        None,
        False,
    )
    assert record.error is not None
    assert record.error.startswith("replay: turn 1 was sampled after other tokens, from token ")
    assert "lost q0" in hermes_template().decode(record.response_ids)
    assert done.defects == []
    assert record.tool_calls[0].response == "\x1b[31mlost q0"
    # the calls after the end were made all the same, on the same instances, and compared
    assert done.report["answers"]["count"] == {"compared": 8, "different": 0, "fields": []}
    assert (
        again(run=done.out, out="newer").code == DONE
    )  # and such a record is replayed like any other


def test_answers_after_the_first_difference_are_compared_too(again: Again, desk: Path) -> None:
    (desk / "miscounting").touch()
    done = again(**LIVE_TOOLS)
    line = next(line for line in done.report["diverged"] if line["id"] == "t0-0")
    assert line["first"]["call_id"] == "call_0_1"
    assert line["first"]["replayed"] == {
        "response": "count is 102, by ['also', 'by']",
        "metrics": {"n": 102},
    }
    assert [(other["call_id"], other["replayed"]["metrics"]) for other in line["elsewhere"]] == [
        ("call_1_0", {"n": 105})
    ]
    assert done.report["answers"]["count"] == {
        "compared": 8,
        "different": 8,
        "fields": ["response", "metrics"],
    }
    assert done.report["answers"]["look"]["different"] == 0


def test_other_schemas_and_lost_tools_are_noted_and_the_prompt_stays(
    again: Again, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        TOOLS.replace("Adds to a count.", "Adds.").replace("  - function: desk:look\n", "")
    )
    done = again(tools="live", tools_config=str(other))
    assert "note: there is no tool look now: its calls cannot be answered as they were" in done.said
    assert "note: the schema of count is not the recorded one" in done.said
    assert (done.first("t0-0")["kind"], done.first("t0-0")["replayed"]["status"]) == (
        "answer",
        "unknown_tool",
    )
    assert "Adds to a count." in hermes_template().decode(done.run["t0-0"].prompt_ids)


def test_a_tool_that_says_something_when_created_differs_in_the_prompt(
    again: Again, desk: Path
) -> None:
    (desk / "talking").touch()
    first = again(**LIVE_TOOLS).first("t0-0")
    assert first["kind"] == "prompt"
    assert "counting" in first["replayed"]["text"]


def test_a_tool_whose_backend_is_down_is_a_failure_that_resume_mends(
    again: Again, desk: Path
) -> None:
    (desk / "down").touch()
    failed = again(**LIVE_TOOLS)
    assert failed.code == INCOMPLETE
    assert failed.report["outcomes"] == {"identical": 2, "diverged": 0, "failed": 3}
    assert failed.run["t0-0"].infra_error
    assert failed.defects == []
    (desk / "down").unlink()
    mended = again(resume=True, **LIVE_TOOLS)
    assert (mended.code, mended.report["outcomes"]) == (
        DONE,
        {"identical": TASKS, "diverged": 0, "failed": 0},
    )
    assert sorted(mended.run.ids) == [f"t{i}-0" for i in range(TASKS)]


def test_another_model_differs_at_a_token_and_ends_at_a_call_without_an_answer(
    again: Again, project: Path
) -> None:
    done = again(model="live", overrides=[f"rollout.turntrace.recorded={project / 'other'}"])
    assert done.report["outcomes"] == {"identical": 1, "diverged": 4, "failed": 0}
    parent, record = open_run(project / "parent")["t0-0"], done.run["t0-0"]
    first = done.first("t0-0")
    token = first["token"]
    ids = parent.prompt_ids + parent.response_ids, record.prompt_ids + record.response_ids
    assert (first["kind"], first["turn"]) == ("sampled", 1)
    assert ids[0][:token] == ids[1][:token]
    assert (ids[0][token], ids[1][token]) == (
        first["recorded"]["ids"][0],
        first["replayed"]["ids"][0],
    )
    assert (
        first["recorded"]["text"][0],
        first["replayed"]["text"][0],
        first["recorded"]["logprob"],
    ) == ("3", "4", -0.25)
    assert (record.stop_reason, record.reward) == ("cancelled", None)
    assert record.error == "replay: call_1_0 (count) is a call without a recorded answer"
    assert [(line.status, line.response) for line in record.tool_calls][-1] == ("cancelled", None)
    assert done.defects == []
    assert len(record.turns) == 2
    assert again(run=done.out, out="newer").code == DONE


def test_a_model_of_other_words_and_the_same_calls_is_served_to_its_end(
    again: Again, project: Path
) -> None:
    done = again(model="live", overrides=[f"rollout.turntrace.recorded={project / 'wordy'}"])
    record = done.run["t0-0"]
    assert done.first("t0-0")["kind"] == "sampled"
    assert (record.stop_reason, record.num_turns, record.reward) == ("stop", 3, 5.0)
    assert [line.response for line in record.tool_calls] == [
        "found q0",
        "count is 2, by ['also', 'by']",
        "count is 5, by ['by']",
    ]


# ---------------------------------------------------------------------- forks


def test_a_fork_keeps_the_parents_tokens_and_goes_on_in_the_state_its_tools_were_in(
    again: Again, project: Path
) -> None:
    recorded = [f"rollout.turntrace.recorded={project / 'other'}"]
    forked = again(
        model="live", from_turn=1, n=2, ids=["t0-0", "t1-0"], overrides=recorded, **LIVE_TOOLS
    )
    assert forked.code == DONE
    assert sorted(forked.run.ids) == ["t0-0", "t0-1", "t1-0", "t1-1"]
    parent, record = open_run(project / "parent")["t0-0"], forked.run["t0-1"]
    kept = parent.turns[1].start - len(parent.prompt_ids)
    assert record.parent == {"run": "parent", "id": "t0-0", "turn": 1}
    assert (record.prompt_ids, record.tools, record.turns[0]) == (
        parent.prompt_ids,
        parent.tools,
        parent.turns[0],
    )
    for name in ("response_ids", "response_mask", "response_logprobs"):
        assert getattr(record, name)[:kept] == getattr(parent, name)[:kept]
    assert record.turns[1].start == parent.turns[1].start
    assert [line.response for line in record.tool_calls][-1] == "count is 6, by ['by']"
    assert (record.stop_reason, record.num_turns, record.reward) == ("stop", 3, 6.0)
    assert forked.defects == []
    assert again(run=forked.out, out="newer").code == DONE  # its kept turns stay kept
    assert open_run(again(run=forked.out, out="newest").out)["t0-1"].parent == {
        "run": "new",
        "id": "t0-1",
        "turn": 1,
    }


def test_a_fork_from_turn_0_keeps_the_prompt_alone(again: Again) -> None:
    forked = again(model="live", from_turn=0, **LIVE_TOOLS)
    assert forked.report["outcomes"] == {"identical": TASKS, "diverged": 0, "failed": 0}
    assert forked.run["t0-0"].parent == {"run": "parent", "id": "t0-0", "turn": 0}


def test_a_fork_says_where_its_tools_did_not_come_into_the_state_they_were_in(
    again: Again, desk: Path
) -> None:
    (desk / "miscounting").touch()
    forked = again(model="live", from_turn=1, ids=["t0-0"], **LIVE_TOOLS)
    assert forked.code == INCOMPLETE  # and the scripted model has no turn after that
    [line] = forked.report["diverged"]
    assert [
        (other["call_id"], other["replayed"]["metrics"]["n"]) for other in line["elsewhere"]
    ] == [("call_0_1", 102)]
    assert "also call_0_1 count" in forked.said


def test_a_fork_whose_tools_cannot_be_brought_back_has_failed(again: Again, desk: Path) -> None:
    """A reward out of tools in another state would be no reward of this conversation."""
    (desk / "down").touch()
    recorded = ["rollout.turntrace.recorded=parent"]
    forked = again(model="live", from_turn=1, ids=["t0-0"], overrides=recorded, **LIVE_TOOLS)
    assert (forked.code, forked.report["outcomes"]["failed"]) == (INCOMPLETE, 1)
    record = forked.run["t0-0"]
    assert (record.infra_error, record.reward, record.num_turns) == (True, None, 1)
    assert "call_0_0 could not be made again" in str(record.error)
    assert "could not be made again" in forked.said
    (desk / "down").unlink()
    assert (
        again(
            model="live", from_turn=1, ids=["t0-0"], overrides=recorded, resume=True, **LIVE_TOOLS
        ).code
        == DONE
    )


def test_trajectories_that_do_not_reach_the_turn_are_left_out_and_named(again: Again) -> None:
    forked = again(model="live", from_turn=2, **LIVE_TOOLS)
    assert "note: 1 trajectories do not reach turn 2: left out (t4-0)" in forked.said
    assert len(forked.run) == TASKS - 1
    with pytest.raises(AgentError, match=r"nothing.* 5 .*turn 3"):
        again(out="newer", model="live", from_turn=3, **LIVE_TOOLS)


def test_a_fork_needs_the_parents_tokenizer(again: Again, tmp_path: Path) -> None:
    tokenizer = fresh_tokenizer(base_model_dir())
    tokenizer.add_tokens(["<|other|>"])
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(
        AgentError,
        match=r"tokenizer.*parent",
    ):
        again(
            model="live", from_turn=1, overrides=[f"model_path={tmp_path / 'model'}"], **LIVE_TOOLS
        )
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    with pytest.raises(AgentError, match=r"^model_path: [^\n]*tokenizer[^\n]*$"):
        again(model="live", overrides=[f"model_path={tmp_path / 'model'}"])


def test_a_record_that_was_cut_off_before_a_turn_can_be_gone_on_with(
    again: Again, desk: Path, project: Path
) -> None:
    """What a replay with changed tools left is where a live model takes over."""
    (desk / "changed").touch()
    cut = again(**LIVE_TOOLS, ids=["t0-0"])
    went_on = again(run=cut.out, out="newer", model="live", from_turn=1, **LIVE_TOOLS)
    record = went_on.run["t0-0"]
    assert record.response_ids == cut.run["t0-0"].response_ids
    assert went_on.defects == []
    assert record.error is not None
    assert record.error.startswith(
        "no recorded turn follows"
    )  # the scripted engine's own words: it was asked


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"from_turn": 1},
            "--from-turn",
        ),
        ({"n": 2}, "--n 2"),
        ({"trust_tools": True}, "--tools live"),
        ({"ids": ["t9-0"]}, "has no trajectory 't9-0'"),
        (
            {"tools": "live"},
            r"desk:look.*--tools-config FILE",
        ),
        ({"tools": "live", "tools_config": "none.yaml"}, "none.yaml: there is no such file"),
        (
            {"model": "live", "overrides": ["model_path=no/such-model"]},
            "model_path: 'no/such-model' is neither",
        ),
        (
            {"model": "live", "overrides": ["rollout.turntrace.recorded=gone"]},
            "rollout.turntrace.recorded: there is no gone",
        ),
        ({"config": Path("none.yaml")}, "none.yaml: no such config file"),
        ({"overrides": ["rollout.nn=1"]}, "--set rollout.nn: unknown key"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_run(
    again: Again, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(
        (AgentError, ConversationsError, ToolsError), match=rf"^[^\n]*{says}[^\n]*$"
    ):
        again(**options)
    assert not (tmp_path / "new" / "run.json").exists()


def changed_run(
    project: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], *, forge: bool
) -> Path:
    """A copy of `parent` with one record changed."""
    copy = shutil.copytree(project / "parent", tmp_path / "copy")
    lines = (copy / TRAJECTORIES).read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if json.loads(line)["id"] == "t0-0")
    record = json.loads(lines[index])
    change(record)
    if forge:
        record["sha256"] = record_hash(record)
    lines[index] = json.dumps(record)
    (copy / TRAJECTORIES).write_text("\n".join([*lines, ""]))
    return copy


@pytest.mark.parametrize(
    ("change", "forge", "says"),
    [
        (
            lambda r: r["response_ids"].__setitem__(3, 7),
            False,
            "does not match its hash: it was changed after it was written",
        ),
        (
            lambda r: r["turns"][0].update(end=10**6),
            True,
            "cannot be replayed: the turn does not span its sampled segment",
        ),
        (
            lambda r: r.update(prompt_ids="x"),
            True,
            'cannot be replayed: prompt_ids is "x", expected',
        ),
        (
            lambda r: r["response_ids"].__setitem__(0, -5),
            True,
            "cannot be replayed: response_ids.0 is -5",
        ),
        (lambda r: r["messages"].pop(), True, "cannot be replayed: 3 turns, 2 sampled messages"),
        (
            lambda r: r["tools"][0]["function"].update(parameters=7),
            True,
            "cannot be replayed: tool_schema.function.parameters must be",
        ),
        (
            lambda r: r.update(extra={"tools_kwargs": 7}),
            True,
            "cannot be replayed: trajectory t0-0: extra: tools_kwargs must be",
        ),
        (
            lambda r: r["tool_calls"][0].update(turn=99),
            True,
            "cannot be replayed: call_0_0 is of turn 99, there are 3",
        ),
    ],
)
def test_a_parent_that_was_tampered_with_is_refused(
    again: Again,
    project: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    forge: bool,
    says: str,
) -> None:
    copy = changed_run(project, tmp_path, change, forge=forge)
    with pytest.raises(ConversationsError, match=rf"^[^\n]*{says}[^\n]*$"):
        again(run=copy)


def test_a_forged_answer_is_replayed_and_found_out_by_live_tools(
    again: Again, project: Path, tmp_path: Path
) -> None:
    def lie(record: dict[str, Any]) -> None:
        record["tool_calls"][0]["response"] = "found another"

    copy = changed_run(project, tmp_path, lie, forge=True)
    forged = again(run=copy)
    assert forged.report["first_difference"] == {
        "delta": 1
    }  # the tokens hold another answer than the ledger
    assert again(run=copy, out="newer", **LIVE_TOOLS).report["answers"]["look"]["different"] == 1


def manifest_changed(
    project: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> Path:
    copy = shutil.copytree(project / "parent", tmp_path / "copy")
    manifest = read_manifest(copy)
    change(manifest)
    (copy / "run.json").write_text(json.dumps(manifest))
    return copy


def test_a_run_made_with_another_sglang_replays_and_starts_no_engine_of_ours(
    again: Again, project: Path, tmp_path: Path
) -> None:
    name = "rollout.engine_kwargs.sglang.of_another_version"

    def change(manifest: dict[str, Any]) -> None:
        manifest["config"]["rollout"].update(name="sglang")
        manifest["config"]["rollout"]["engine_kwargs"]["sglang"] = {"of_another_version": True}

    copy = manifest_changed(project, tmp_path, change)
    assert again(run=copy).code == 0
    with pytest.raises(AgentError, match=rf"{name}: unknown key"):
        again(run=copy, out="live", model="live")
    with pytest.raises(AgentError, match=r"--set .*of_no_version: unknown key"):
        again(run=copy, out="set", overrides=["rollout.engine_kwargs.sglang.of_no_version=1"])


def _server(manifest: dict[str, Any]) -> None:
    manifest["config"]["rollout"].update(name="sglang_server")
    manifest["config"]["rollout"]["server"]["urls"] = ["http://evil.example"]


def _engine(manifest: dict[str, Any]) -> None:
    manifest["config"]["rollout"].update(name="sglang")
    manifest["config"]["rollout"]["engine_kwargs"]["sglang"] = {"trust_remote_code": True}


def _loader(manifest: dict[str, Any]) -> None:
    manifest["config"]["rollout"].update(name="sglang", load_format="remote")


def _shipped_tools(address: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        schema = {
            "type": "function",
            "function": {
                "name": "code_interpreter",
                "parameters": {"type": "object", "properties": {}},
            },
        }
        entry = {
            "class_name": "tools.sandbox.SandboxFusionTool",
            "config": {"sandbox_fusion_url": address},
            "tool_schema": schema,
        }
        manifest["tools"] = json.dumps({"tools": [entry]})

    return change


def _mcp_tools(manifest: dict[str, Any]) -> None:
    manifest["tools"] = json.dumps(
        {
            "tools": [
                {"class_name": MCP_TOOL, "config": {"command": "touch", "args": ["/tmp/owned"]}}
            ]
        }
    )


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (
            _server,
            {"model": "live"},
            "http://evil.example",
        ),
        (
            _engine,
            {"model": "live"},
            "sets rollout.engine_kwargs.sglang.trust_remote_code, which a run may not",
        ),
        (_loader, {"model": "live"}, "sets rollout.load_format: remote, which a run may not"),
        (
            _shipped_tools("http://evil.example/run_code"),
            {"tools": "live"},
            "has a tool that calls http://evil.example/run_code",
        ),
        (_mcp_tools, {"tools": "live"}, "names a tool that is not turntrace's own"),
        (
            lambda m: m.update(tools=[1]),
            {"tools": "live"},
            "run.json does not hold the tools of the run",
        ),
        (
            lambda m: m.update(tools="- x"),
            {"tools": "live"},
            "names a tool that is not turntrace's own",
        ),
        (
            lambda m: m.update(config=7),
            {},
            "run.json holds no config; give the run's with --config FILE",
        ),
        (
            lambda m: m["config"]["rollout"].update(prompt_length="x"),
            {},
            "the run's config: rollout.prompt_length: ",
        ),
    ],
)
def test_what_a_run_folder_names_is_neither_imported_nor_called(
    again: Again,
    project: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    options: dict[str, Any],
    says: str,
) -> None:
    copy = manifest_changed(project, tmp_path, change)
    with pytest.raises(
        (AgentError, ConversationsError, ToolsError), match=rf"^[^\n]*{says}[^\n]*$"
    ):
        again(run=copy, **options)


def test_turntraces_own_tools_are_taken_from_the_run(
    again: Again, project: Path, tmp_path: Path
) -> None:
    schema = {
        "type": "function",
        "function": {"name": "count", "parameters": {"type": "object", "properties": {}}},
    }
    entry = {"class_name": "tools.gsm8k.Gsm8kTool", "config": {}, "tool_schema": schema}
    done = again(
        run=manifest_changed(project, tmp_path, lambda m: m.update(tools=json.dumps([entry]))),
        tools="live",
    )
    assert done.first("t0-0")["replayed"]["status"] == "unknown_tool"
    assert done.report["answers"]["count"]["different"] == 8


def test_a_new_shipped_tool_is_trusted_only_on_purpose() -> None:
    """Whoever ships another tool decides here what a stranger's run folder may have it do."""
    assert set(SHIPPED) - OWN_TOOLS == {MCP_TOOL}
    assert set(SHIPPED) > OWN_TOOLS


def test_the_users_own_tools_take_the_place_of_the_runs(again: Again, project: Path) -> None:
    assert again(tools="live", tools_config="tools.yaml").code == DONE
    assert again(out="newer", tools="live", config=Path("config.yaml")).code == DONE


# ------------------------------------------------------------- the command, interrupted and resumed


def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on(
    project: Path, tmp_path: Path, desk: Path
) -> None:
    (desk / "slow").touch()
    out = tmp_path / "new"
    words = ["replay", "parent", "--out", str(out), "--tools", "live", "--trust-tools"]
    command = [sys.executable, "-m", "agent", *words]
    with subprocess.Popen(
        command, cwd=project, env=child_env({"DESK": str(desk)}), stdout=subprocess.PIPE, text=True
    ) as process:
        for _ in range(1200):
            if (
                (out / TRAJECTORIES).exists()
                and len((out / TRAJECTORIES).read_text().splitlines()) == 3
                and len(list(desk.glob("c*"))) == 2
            ):
                break
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"interrupted: 3 of {TASKS} trajectories are in {out}" in said
    assert f"turntrace {' '.join(words)} --resume" in said
    (desk / "slow").unlink()
    resumed = turntrace(*words, "--resume", cwd=project, DESK=str(desk))
    assert resumed.returncode == DONE, resumed.stderr
    assert sorted(open_run(out).ids) == [f"t{i}-0" for i in range(TASKS)]
    assert sorted(
        json.loads(line)["id"] for line in (out / "replay.jsonl").read_text().splitlines()
    ) == sorted(open_run(out).ids)


def test_a_folder_that_holds_another_replay_is_refused(again: Again) -> None:
    again(ids=["t4-0"])
    with pytest.raises(RunFolderError, match="already holds"):
        again()
    with pytest.raises(RunFolderError, match=r'replay\.tools .*"recorded".*"live"'):
        again(resume=True, **LIVE_TOOLS)
    with pytest.raises(RunFolderError, match="n was null"):
        again(resume=True)
    assert len(again(resume=True, force=True).run) == TASKS


def test_what_a_kill_tore_is_mended(again: Again, desk: Path, tmp_path: Path) -> None:
    (desk / "changed").touch()
    whole = again(**LIVE_TOOLS)
    lines = (whole.out / TRAJECTORIES).read_bytes().splitlines(keepends=True)
    (whole.out / TRAJECTORIES).write_bytes(b"".join(lines[:3]) + lines[3][:500])
    notes = (whole.out / "replay.jsonl").read_text().splitlines(keepends=True)
    (whole.out / "replay.jsonl").write_text("".join(notes[:4]) + notes[4][:50])
    mended = again(resume=True, **LIVE_TOOLS)
    assert mended.code == DIVERGED
    assert mended.report["outcomes"] == whole.report["outcomes"]
    assert mended.report["answers"] == whole.report["answers"]
    assert (
        again(resume=True, **LIVE_TOOLS).report["outcomes"] == whole.report["outcomes"]
    )  # nothing is left to do
    (whole.out / "replay.jsonl").unlink()
    assert (
        again(resume=True, **LIVE_TOOLS).report["outcomes"] == whole.report["outcomes"]
    )  # the records say it, too
    assert read_manifest(whole.out)["counts"]["done"] == TASKS


def test_the_report_as_json_and_the_exit_code(project: Path, tmp_path: Path, desk: Path) -> None:
    (desk / "changed").touch()
    words = [
        "replay",
        "parent",
        "--out",
        str(tmp_path / "new"),
        "--tools",
        "live",
        "--tools-config",
        "tools.yaml",
        "--json",
    ]
    done = turntrace(*words, "--ids", "t0-0,t1-0", cwd=project, DESK=str(desk))
    assert done.returncode == DIVERGED, done.stderr
    report = json.loads(done.stdout)
    assert report["outcomes"] == {"identical": 0, "diverged": 2, "failed": 0}
    assert report["diverged"][0]["first"]["recorded"] == {"response": "found q0"}
    assert "recorded model, live tools" in done.stderr
    assert read_manifest(tmp_path / "new")["n"] is None  # only some of the run
