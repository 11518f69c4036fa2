"""A run folder of the version before, with `turntrace/1` records: every command reads it as before.

`turntrace_1/` was written by that version on a scripted engine: conversations that finished, were
interrupted, failed because of infrastructure, ran into a limit, had malformed calls, a simulated
user or no JSON form. Its tokenizer is the embedded model's, and is added here.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from agent.commands.show import Screen
from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.loop.batch import run_tasks
from agent.loop.calls import Dispatcher
from agent.loop.runtime import LoopSettings, Runtime
from agent.loop.tasks import read_tasks
from agent.replay.continuation import continuing
from agent.replay.request import ReplayRequest
from agent.replay.runner import DIVERGED, replay_run
from conversations import atif
from conversations.errors import ExportError
from conversations.export import job
from conversations.export.formats import export_names
from conversations.export.groups import Statistics
from conversations.imports.job import import_run
from conversations.page import build
from conversations.run.open_run import Run, open_run
from conversations.run.store import RunFolder, read_manifest
from conversations.trajectory import line_hash, record_hash
from conversations.truncate import Shortened, cut_to_tokens
from conversations.verify import verify_run
from tests.agent.loop.test_users import patient
from tests.conversations.synthetic import TOOLS
from tests.helpers import hermes_template, logprobs
from tools.registry import load_tools

GOLDEN = Path(__file__).parent / "turntrace_1"
FINISHED, UNFINISHED = 12, 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the run, with its tokenizer."""
    copy = tmp_path / "old"
    shutil.copytree(GOLDEN, copy)
    hermes_template().tokenizer.save_pretrained(copy / "tokenizer")
    return copy


@pytest.fixture
def run(folder: Path) -> Run:
    return open_run(folder)


def defects(folder: Path) -> list[str]:
    found: list[str] = []
    verify_run(folder, on_defect=lambda defect: found.append(str(defect)))
    return found


def test_it_verifies(folder: Path) -> None:
    assert defects(folder) == []
    verdict = verify_run(folder)
    assert verdict.digest == read_manifest(folder)["digest"]
    assert (verdict.counts["done"], verdict.counts["unfinished"]) == (FINISHED, UNFINISHED)
    assert any("1 records" in note for note in verdict.notes), "the one without a JSON form"


def test_a_change_is_still_found(folder: Path) -> None:
    file = folder / "trajectories.jsonl"
    file.write_text(file.read_text().replace('"reward":0.5', '"reward":1.5', 1))
    assert any("hash" in line for line in defects(folder))


def test_it_reads_with_warnings_of_a_kind(run: Run) -> None:
    kinds = {one.id: [warning.kind for warning in one.warnings] for one in run}
    assert kinds["control-0"] == ["control_tokens", "unknown_tool_kwargs"]
    assert kinds["padded-0"] == ["unknown_ids"]
    assert kinds["unjson-0"] == ["partial"]
    assert {record["schema"] for record in run.records()} == {"turntrace/1"}
    assert [one.id for one in run.unfinished()] == [
        "cut_in_a_turn-0",
        "cut_between-0",
        "cut_at_once-0",
    ]


def test_it_replays_to_the_same(folder: Path, tmp_path: Path) -> None:
    request = ReplayRequest(folder, tmp_path / "again", argv=["replay", "old"])
    code, report = replay_run(request, Console(file=io.StringIO()))
    assert [line["id"] for line in report["diverged"]] == ["unjson-0"], "it has no JSON form"
    assert report["outcomes"] == {"identical": FINISHED - 1, "diverged": 1, "failed": 0}
    assert code == DIVERGED
    assert {record["schema"] for record in open_run(tmp_path / "again").records()} == {
        "turntrace/2"
    }
    assert defects(tmp_path / "again") == []


ROWS = {
    "verl-rl": 9,
    "verl-sft": 7,
    "dataproto": 1,
    "trl-sft": 8,
    "trl-preference": 0,
    "openrlhf-sft": 8,
    "openrlhf-prompts": 9,
    "openrlhf-preference": 0,
    "sharegpt": 7,
    "openai": 8,
    "atif": 9,
    "rows": 8,
    "parquet": 9,
}
"""What that version exported (`openai` and `rows` came later); there are no groups for pairs."""


@pytest.mark.parametrize("to", export_names())
def test_it_exports(run: Run, tmp_path: Path, to: str) -> None:
    if not ROWS[to]:
        with pytest.raises(ExportError, match="nothing is left"):
            job.export_run(run, to, tmp_path / "out")
    else:
        assert job.export_run(run, to, tmp_path / "out").rows == ROWS[to]


def test_it_comes_back_from_atif_as_it_was_written(run: Run, tmp_path: Path) -> None:
    for record in run.records():
        again = atif.record_of(atif.document(record))
        assert again["sha256"] == record["sha256"] == line_hash(again) == record_hash(record)
    job.export_run(run, "atif", tmp_path / "atif")
    done = import_run(tmp_path / "atif" / "trajectories.jsonl", "atif", tmp_path / "back")
    assert done.defects == []
    back = open_run(tmp_path / "back")
    assert list(back) == [one for one in run if not one.infra_error]


def test_it_shows_and_views(run: Run, tmp_path: Path) -> None:
    said = io.StringIO()
    screen = Screen(Console(file=said, width=200), full=True)
    for record in run.records():
        screen.head(record)
        screen.messages(record)
        screen.tokens(run, record)
    assert "control_tokens: " in said.getvalue()
    with build(run) as page:
        assert page.shown == FINISHED
        assert page.write(tmp_path / "page.html") > 0
    statistics = Statistics()
    for record in run.records(check=False):
        statistics.add(record)
    assert statistics.trajectories == FINISHED


async def test_it_resumes(folder: Path) -> None:
    """Failures run again, what was interrupted is resumed, and the whole of it verifies."""
    template = hermes_template()

    def cut(text: str, limit: int = 48, side: str = "middle") -> Shortened | None:
        return cut_to_tokens(text, limit, side, template)

    def respond(prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        ids = [*template.encode(" So it is."), template.end_id]
        return Generation(ids, logprobs(ids), "stop", prompt_tokens=len(prompt_ids))

    runtime = Runtime(
        ScriptedEngine(respond),
        template,
        LoopSettings(700, 400, 1100, max_turns=4),
        Dispatcher(load_tools(TOOLS), max_parallel_calls=16, shorten=cut),
        interactions=patient()[0],
    )
    manifest = read_manifest(folder)
    with RunFolder.resume(folder, manifest) as store:
        assert len(store.done) == FINISHED - 3
        assert len(store.unfinished) == UNFINISHED
        tasks = read_tasks(folder / "tasks.jsonl", None)
        make = continuing(runtime, store.unfinished)
        await run_tasks(tasks, runtime, make=make, store=store)
        store.close({"asked": FINISHED + UNFINISHED, "done": FINISHED + UNFINISHED})
    whole = open_run(folder)
    assert len(whole) == FINISHED + UNFINISHED
    assert [warning.kind for warning in whole["cut_in_a_turn-0"].warnings] == ["resumed"]
    schemas = {record["id"]: record["schema"] for record in whole.records()}
    assert schemas["finished-0"] == "turntrace/1"
    assert schemas["cut_in_a_turn-0"] == whole.manifest["schema"] == "turntrace/2"
    assert len((folder / "superseded.jsonl").read_text().splitlines()) >= 3
    assert defects(folder) == []


def test_it_resumes_with_the_same_config_of_today(folder: Path, tmp_path: Path) -> None:
    """Keys that the old version did not know are no difference."""
    manifest = json.loads(json.dumps(read_manifest(folder)))
    manifest["config"]["rollout"]["turntrace"]["of_tomorrow"] = 7
    with RunFolder.resume(folder, manifest) as store:
        assert store.manifest["config"]["rollout"]["turntrace"]["of_tomorrow"] == 7
