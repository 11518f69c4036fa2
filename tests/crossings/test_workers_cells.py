"""Workers crossed with the faults: one Ray and two workers run all cells at once.

Each row says what its tool, its user and its model do, so that a fault's neighbours in the same
worker are other cells. One cell ends its worker's process, and all that ran there begin again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.config.config import load_config
from agent.loop.batch import run_tasks
from agent.loop.tasks import Task, row_task
from agent.model.base import base_model_dir
from agent.runs.manifest import save_tokenizer
from agent.runs.parts import config_interactions, config_tools, load_template, prepare
from agent.workers.pool import WorkerPool
from conversations.open_run import open_run
from conversations.run.store import UNFINISHED, RunFolder, read_trajectories
from tests.crossings.exports import PAIRS, without_rows
from tests.crossings.rows import DIES, REFUSED, start_model
from tests.crossings.test_crossings import assert_ended, defects
from tests.crossings.world import FAULTS, QUESTION, USERS, Fault, World
from tests.crossings.world import TOOLS as DESK

DEADLINE_S = 6.0
FAULTS_HERE = {
    **{name: FAULTS[name] for name in FAULTS if name not in ("user ignores", "user exits")},
    "worker dies": Fault("worker dies", tool="kills"),
}
"""The two that are left out differ from their neighbours inside `agent.loop.users` alone."""
WITH_USER = ("nothing", "tool raises", "engine dies", "worker dies")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The files of all cells: a model that refuses an answer, the desk, a user of each kind."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(
        base_model_dir(), folder / "model", ignore=shutil.ignore_patterns("*.safetensors")
    )
    file = folder / "model" / "chat_template.jinja"
    refusal = (
        "{%- for message in messages %}{%- if message.role == 'tool' and '" + REFUSED + "' in "
        "message.content %}{{ raise_exception('it refuses these messages') }}{%- endif %}"
        "{%- endfor %}"
    )
    # A template that copies answers as they are is not asked about each of them.
    trimmed = file.read_text().replace("{{- message.content }}", "{{- message.content | trim }}")
    file.write_text(refusal + trimmed)
    text = DESK.format(behaviour="answers", shows="false")
    (folder / "tools.yaml").write_text(text.replace("world.Desk", "rows.RowsDesk"))
    kinds = ["asks", *(fault.user for fault in FAULTS_HERE.values() if fault.user)]
    users = [USERS.format(behaviour=kind).replace("name: user", f"name: {kind}") for kind in kinds]
    first, *more = (text.strip().partition("\n") for text in users)
    (folder / "interactions.yaml").write_text(
        "\n".join([first[0], first[2], *(part[2] for part in more)])
    )
    rollout = {
        "name": "scripted",
        "prompt_length": 4096,
        "response_length": 4096,
        "max_model_len": 8192,
        "max_num_seqs": 64,
        "multi_turn": {
            "enable": True,
            "tool_config_path": str(folder / "tools.yaml"),
            "interaction_config_path": str(folder / "interactions.yaml"),
        },
        "turntrace": {"recorded": str(folder), "conversation_deadline_s": DEADLINE_S},
    }
    written = {"model_path": str(folder / "model"), "rollout": rollout}
    (folder / "config.yaml").write_text(json.dumps(written))
    template = load_template(load_config(folder / "config.yaml"))
    return World(FAULTS["nothing"], template, folder, with_user=False)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the pool has told the user."""
    return []


@pytest.fixture(scope="module")
def pool(world: World, said: list[str]) -> Iterator[WorkerPool]:
    """Two workers on a Ray of their own."""
    pytest.importorskip("ray")
    config = load_config(world.folder / "config.yaml")
    parts = prepare(config, config_tools(config), config_interactions(config))
    light = {"USE_TORCH": "0", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    before = {name: os.environ.get(name) for name in light}
    os.environ.update(light)
    with WorkerPool(parts, 2, start=start_model, say=said.append) as started:
        yield started
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def task_of(world: World, fault: Fault) -> Task:
    behaviour = "refused" if fault.refuses else fault.tool
    kwargs = {"behaviour": behaviour, "note": str(world.folder / f"{fault.name}.note")}
    extra: dict[str, Any] = {"tools_kwargs": {"desk": {"create_kwargs": kwargs}}}
    if fault.user or fault.name in WITH_USER:
        extra["interaction_kwargs"] = {"name": fault.user or "asks"}
    question = f"{QUESTION} {DIES}" if fault.dies else QUESTION
    return row_task({"id": fault.name, "prompt": question, "extra_info": extra}, fault.name)


def opened(world: World) -> RunFolder:
    store = RunFolder.create(world.out, world.manifest())
    save_tokenizer(world.out, world.template.tokenizer)
    return store


def in_pool(pool: WorkerPool, tasks: list[Task], store: RunFolder) -> Any:
    return run_tasks(tasks, pool.runtime, make=pool.making({}), converse=pool.converse, store=store)


def test_faults_in_workers_end_in_the_right_records(
    pool: WorkerPool, world: World, said: list[str], tmp_path: Path
) -> None:
    faults = {name: fault for name, fault in FAULTS_HERE.items() if not fault.cancels}
    with opened(world) as store:
        pool.run(in_pool(pool, [task_of(world, fault) for fault in faults.values()], store))
        store.close({})
    records = {record.task_id: record for record in read_trajectories(world.out)}
    assert records.keys() == faults.keys()
    assert [line.count(" died (") for line in said] == [1]
    for name, fault in faults.items():
        with_user = fault.user is not None or name in WITH_USER
        assert_ended(records[name], fault, with_user=with_user)
    assert defects(world.out) == []
    assert without_rows(open_run(world.out), tmp_path) == PAIRS


def test_a_cancelled_run_keeps_what_hangs_in_a_worker(
    pool: WorkerPool, world: World, tmp_path: Path
) -> None:
    cancelled = dataclasses.replace(world, folder=tmp_path)
    shutil.copy(world.tools_path, cancelled.tools_path)
    fault = FAULTS_HERE["cancelled"]

    async def run(store: RunFolder) -> None:
        running = asyncio.ensure_future(in_pool(pool, [task_of(cancelled, fault)], store))
        while not (tmp_path / f"{fault.name}.note").exists():
            assert not running.done()
            await asyncio.sleep(0.02)
        running.cancel()
        await asyncio.wait((running,))
        assert running.cancelled()

    with opened(cancelled) as store:
        pool.run(run(store))
        store.close({})
    [record] = read_trajectories(cancelled.out / UNFINISHED)
    assert_ended(record, fault, with_user=False)
    assert not (cancelled.out / "trajectories.jsonl").exists()
    assert defects(cancelled.out) == []
