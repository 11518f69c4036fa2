"""`verify` on runs that are right, stopped, damaged or hostile: no false alarm, no silence, no
crash."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.engines.engine import Generation
from agent.engines.scripted import ScriptedEngine
from agent.errors import EngineError
from agent.loop.batch import Progress, run_tasks
from agent.loop.runtime import LoopSettings, Runtime
from agent.runs.progress import counts
from conversations import verify as verify_module
from conversations.checks.clock import OutOfTime, time_limit
from conversations.checks.facts import RunFacts
from conversations.checks.finding import Defect, printable
from conversations.checks.record import check_line
from conversations.errors import RunFolderError
from conversations.run.open_run import open_run
from conversations.run.store import RUN, SUPERSEDED, TRAJECTORIES, UNFINISHED, RunFolder
from conversations.template import ChatTemplate
from conversations.trajectory import record_hash
from conversations.truncate import cut_to_tokens
from conversations.verify import Verdict, check_chunk, verify_run
from tests.conversations.exports import small_run
from tests.conversations.run.test_open_run import numbered, written
from tests.conversations.synthetic import make_run
from tests.helpers import BEHAVIOURS, Toy, call, float32, odd_text, respelled, runtime, says, task
from tools.function import tool


def verified(path: Path, jobs: int = 1) -> tuple[list[str], Verdict]:
    """The defects, as lines, and the verdict."""
    defects: list[Defect] = []
    verdict = verify_run(path, jobs=jobs, on_defect=defects.append)
    assert verdict.defects == len(defects)
    return [str(defect) for defect in defects], verdict


# ---------------------------------------------------------------------- runs that are right


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("smollm2", []),
        (
            "smollm2",
            ["rollout.response_length=200", "rollout.multi_turn.tool_response_truncate_side=left"],
        ),
        (
            "qwen2_5",
            [
                "rollout.turntrace.max_tokens=60",
                "rollout.multi_turn.tool_response_truncate_side=right",
            ],
        ),
        ("qwen3", ["rollout.turntrace.apply_chat_template_kwargs={enable_thinking: true}"]),
        (
            "qwen3",
            [
                "rollout.turntrace.apply_chat_template_kwargs={enable_thinking: false}",
                "rollout.response_length=400",
            ],
        ),
    ],
)
def test_a_clean_run_has_no_defects(
    tmp_path: Path, name: str, overrides: list[str], request: pytest.FixtureRequest
) -> None:
    template: ChatTemplate = request.getfixturevalue(name)
    make_run(
        tmp_path / "run", 80, tokenizer=template.tokenizer, overrides=overrides, seed=len(overrides)
    )
    defects, verdict = verified(tmp_path / "run")
    assert defects == []
    assert (verdict.counts["done"], verdict.notes) == (80, [])
    assert {each.stop_reason for each in open_run(tmp_path / "run")} >= {"stop", "length"}


def manifest(
    shared: Runtime, *, n: int, limit: int = 50, tools: str | None = None
) -> dict[str, Any]:
    """A run.json as a run with these settings, and tools of this YAML, has it."""
    s: LoopSettings = shared.settings
    ours = {
        "max_tokens": s.max_tokens,
        "max_consecutive_invalid_calls": s.max_consecutive_invalid_calls,
        "apply_chat_template_kwargs": {},
    }
    multi_turn = {
        "enable": True, "max_assistant_turns": s.max_turns, "max_tool_response_length": limit,
        "tool_response_truncate_side": "middle",
    }  # fmt: skip
    rollout = {
        "prompt_length": s.prompt_length,
        "response_length": s.response_length,
        "max_model_len": s.max_model_len,
    }
    return {
        "n": n,
        "limit": None,
        "tools": tools,
        "config": {"rollout": {**rollout, "multi_turn": multi_turn, "turntrace": ours}},
    }


def ran(
    path: Path, shared: Runtime, *, tasks: int = 1, n: int = 1, tools: str | None = None
) -> Path:
    """A run of `tasks` odd questions through the real loop."""
    progress = Progress(total=tasks * n)
    rng = random.Random(5)
    given = [
        task(
            f"t{index}",
            messages=[{"role": "user", "content": odd_text(rng)}],
            extra={"index": index},
        )
        for index in range(tasks)
    ]
    with RunFolder.create(path, manifest(shared, n=n, tools=tools)) as folder:
        shared.template.tokenizer.save_pretrained(path / "tokenizer")
        asyncio.run(run_tasks(given, shared, n=n, store=folder, progress=progress))
        folder.close(counts(progress))
    return path


def odd_model(template: ChatTemplate, seed: int) -> ScriptedEngine:
    """Says odd texts, in odd tokens, with every call a toy can be asked for; its turns end in
    every way turns end."""
    rng = random.Random(seed)
    does = [name for name in BEHAVIOURS if name not in ("hang", "stubborn", "nap")]

    def respond(prompt_ids: Sequence[int], sampling: Any) -> Generation:
        if rng.random() < 0.03:
            raise EngineError("gone\nfor a while")
        calls = [
            rng.choice(
                (
                    call("toy", do=rng.choice(does), text=odd_text(rng)),
                    call("nobody"),
                    call("toy", wrong=1),
                    "<tool_call>{",
                )
            )
        ]
        text = "".join([odd_text(rng), *calls * rng.choice((0, 1, 1, 2))])
        ids = respelled(template, text, rng) if rng.random() < 0.5 else template.encode(text)
        ids = [*ids, template.end_id] if rng.random() < 0.8 or not ids else ids
        return Generation(ids, [float32(rng) for _ in ids], rng.choice(("stop", "stop", "length")))

    return ScriptedEngine(respond)


@pytest.mark.parametrize("seed", range(2))
def test_whatever_tools_and_models_do_the_record_holds(
    tmp_path: Path, template: ChatTemplate, seed: int
) -> None:
    """Hundreds of odd conversations: what the loop writes, verify understands."""
    room = (4000, 600)[seed]
    limits: dict[str, Any] = {
        "max_turns": 4,
        "response_length": room,
        "max_model_len": 4096 + room,
        "max_consecutive_invalid_calls": 3,
    }
    toy = Toy(create=("say", "long")[seed], calc_reward="reward")
    cut = lambda text, limit=50, side="middle": cut_to_tokens(text, limit, side, template)  # noqa: E731
    shared = runtime(
        template, odd_model(template, seed), [toy], shorten=cut, max_parallel_calls=1, **limits
    )
    defects, verdict = verified(ran(tmp_path / "run", shared, tasks=20, n=2))
    assert defects == []
    assert verdict.counts["done"] == 40


@pytest.mark.parametrize("tokens", [5, 500])
def test_a_functions_decorator_may_say_how_long_its_answers_are(
    tmp_path: Path, smollm2: ChatTemplate, tokens: int
) -> None:
    """Less or more than the run's 50: tools.yaml names the function, and what stands in its code
    is not in run.json."""

    @tool(max_response_tokens=tokens)
    def count() -> str:
        """Counts."""
        return " ".join(map(str, range(100)))

    cut = lambda text, limit=50, side="middle": cut_to_tokens(text, limit, side, smollm2)  # noqa: E731
    for entry, wrong in (("function: my_tools:count", []), ("class_name: my_tools.Count", [True])):
        shared = runtime(smollm2, says(smollm2, call("count"), "Done."), [count], shorten=cut)
        defects, _ = verified(ran(tmp_path / entry[:5], shared, tools=f"- {entry}\n"))
        assert ["cut that the config says" in defect for defect in defects] == wrong


# ------------------------------------------------------------- runs that are not over, or not whole


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean run of 5 groups of 4."""
    return make_run(tmp_path_factory.mktemp("small") / "run", 20)


@pytest.fixture
def run(small: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(small, tmp_path / "run")


def lines_of(run: Path, name: str = TRAJECTORIES) -> list[bytes]:
    return (run / name).read_bytes().splitlines(keepends=True)


def edit_manifest(run: Path, **changes: Any) -> None:
    changed = {**json.loads((run / RUN).read_text()), **changes}
    (run / RUN).write_text(
        json.dumps({key: value for key, value in changed.items() if value is not ...})
    )


def test_a_run_that_was_stopped_is_verified_as_far_as_it_is(run: Path) -> None:
    lines = lines_of(run)
    edit_manifest(run, digest=...)
    manifest = json.loads((run / RUN).read_text())
    rollout = manifest["config"]["rollout"]
    (run / TRAJECTORIES).write_bytes(b"".join(lines[:7]))
    for changes, note in (
        (
            {"counts": ...},
            "killed: 7 finished trajectories are here",
        ),
        (
            {"counts": {"asked": 20, "done": 7}},
            "the run stopped at 7 of 20 conversations: 7 finished trajectories are here; missing",
        ),
        (
            {"counts": {"asked": 5, "done": 5}, "limit": 2},
            "a larger run was resumed for 5 conversations (--limit): 7 finished",
        ),
        (
            {
                "config": {**manifest["config"], "rollout": {**rollout, "over_sample_rate": 0.7}},
                "counts": {"asked": 6, "done": 7},
            },
            "over_sample_rate",
        ),
    ):
        (run / RUN).write_text(
            json.dumps(
                {key: value for key, value in {**manifest, **changes}.items() if value is not ...}
            )
        )
        defects, verdict = verified(run)
        assert defects == []
        assert len(verdict.notes) == 1
        assert note in verdict.notes[0]


def test_a_run_that_just_began_is_nothing_to_complain_of(run: Path) -> None:
    (run / TRAJECTORIES).unlink()
    edit_manifest(run, counts=...)
    defects, verdict = verified(run)
    assert defects == []
    assert str(verdict).endswith("0 trajectories, 0 turns, 0 tokens, 0 tool calls: no defects")


def test_a_sample_that_is_missing_is_named(run: Path) -> None:
    lines = lines_of(run)
    gone = json.loads(lines.pop(6))
    (run / TRAJECTORIES).write_bytes(b"".join(lines))
    defects, _ = verified(run)
    assert "the digest of all finished records" in defects.pop()
    assert defects == [
        f"trajectories.jsonl trajectory {gone['id']}: the group of task {gone['task_id']} "
        f"has 3 of 4 samples, missing: {gone['sample']}",
        "run.json: the number of finished trajectories, found 19, expected 20, as the run counted",
    ]


def test_a_group_too_many_is_noticed(run: Path) -> None:
    record = {**json.loads(lines_of(run)[0]), "id": "more-0", "task_id": "more", "sample": 0}
    with (run / TRAJECTORIES).open("ab") as out:
        out.write(json.dumps({**record, "sha256": record_hash(record)}).encode() + b"\n")
    defects, _ = verified(run)
    assert (
        defects[0] == "trajectories.jsonl trajectory more-1: "
        "the group of task more has 1 of 4 samples, missing: 1, 2, 3"
    )
    assert "the number of finished trajectories, found 21, expected 20" in defects[1]


def test_no_finished_sample_may_stand_twice(run: Path) -> None:
    lines = lines_of(run)
    name = json.loads(lines[3])["id"]
    (run / TRAJECTORIES).write_bytes(b"".join([*lines, lines[3]]))
    for other in (UNFINISHED, SUPERSEDED):  # there it may, until a run is closed, or for good
        (run / other).write_bytes(lines[3] * 2)
    sample = json.loads(lines[3])["sample"]
    twice = (
        f"trajectory {name}: sample {sample} of this task stands already at trajectories.jsonl:4"
    )
    assert verified(run)[0] == [f"trajectories.jsonl:21 {twice}"]


def test_a_torn_line_is_named_and_the_rest_verified(run: Path) -> None:
    data = (run / TRAJECTORIES).read_bytes()
    (run / TRAJECTORIES).write_bytes(data[:-1])
    defects, _ = verified(run)
    assert defects[0].startswith("trajectories.jsonl:20: the line is torn")


def test_the_other_files_are_checked_too(run: Path) -> None:
    record = json.loads(lines_of(run)[0])
    for name in (UNFINISHED, SUPERSEDED):
        changed = {**record, "task_id": "u", "sample": 1, "id": "u-1"}
        good, bad = (
            {**changed, "sha256": record_hash(changed)},
            {**changed, "sha256": "0" * 64, "id": "u-2", "sample": 2},
        )
        (run / name).write_bytes(
            b"".join(json.dumps(each).encode() + b"\n" for each in (good, bad))
        )
    defects, verdict = verified(run)
    assert [line.split(": it was changed")[0] for line in defects] == [
        f"{name}:2 trajectory u-2: the record does not match its hash"
        for name in (UNFINISHED, SUPERSEDED)
    ]
    assert ", 2 unfinished, 2 superseded: 2 defects" in str(verdict)


def test_what_was_cut_off_is_told_from_what_finished(tmp_path: Path, smollm2: ChatTemplate) -> None:
    """Cancelled in a tool: right in unfinished.jsonl, wrong among the finished."""

    async def cancelled(folder: RunFolder, shared: Runtime, toy: Toy) -> None:
        running = asyncio.create_task(run_tasks([task("t")], shared, store=folder))
        await toy.hanging.wait()
        running.cancel()
        await asyncio.wait([running])

    toy = Toy()
    shared = runtime(smollm2, odd_model(smollm2, 0), [toy])
    ids = [*smollm2.encode(call("toy", do="hang")), smollm2.end_id]
    shared = dataclasses.replace(
        shared,
        engine=ScriptedEngine(lambda prompt, sampling: Generation(ids, [-0.5] * len(ids), "stop")),
    )
    with RunFolder.create(tmp_path, manifest(shared, n=1)) as folder:
        smollm2.tokenizer.save_pretrained(tmp_path / "tokenizer")
        asyncio.run(cancelled(folder, shared, toy))
    defects, verdict = verified(tmp_path)
    assert defects == []
    assert "0 finished trajectories are here, 1 unfinished" in verdict.notes[0]
    (tmp_path / UNFINISHED).rename(tmp_path / TRAJECTORIES)
    assert verified(tmp_path)[0] == [
        "trajectories.jsonl:1 trajectory t-0: "
        "an interrupted conversation stands among the finished ones"
    ]


def test_a_record_of_what_could_not_be_written_is_said_to_be_partial(
    tmp_path: Path, smollm2: ChatTemplate
) -> None:
    shared = runtime(
        smollm2,
        ScriptedEngine(
            lambda prompt, sampling: Generation([5, smollm2.end_id], [-0.5, -0.5], "stop")
        ),
    )
    with RunFolder.create(tmp_path, manifest(shared, n=1)) as folder:
        smollm2.tokenizer.save_pretrained(tmp_path / "tokenizer")
        asyncio.run(run_tasks([task("t", extra={1, 2})], shared, store=folder))
    defects, verdict = verified(tmp_path)
    assert defects == []
    assert (
        "1 records of failures hold only the part that could be written: their text was not checked"
        in verdict.notes
    )


def test_counts_that_are_not_those_of_the_records_are_named(run: Path) -> None:
    counts = json.loads((run / RUN).read_text())["counts"]
    edit_manifest(
        run, counts={**counts, "turns": 1, "mean_reward": 9.0, "stop_reasons": {"stop": 20}}
    )
    defects, _ = verified(run)
    assert [line.split(",")[0] for line in defects] == [
        "run.json: counts.turns", "run.json: counts.stop_reasons", "run.json: counts.mean_reward",
    ]  # fmt: skip


def test_samples_of_a_task_share_what_the_task_gave(run: Path) -> None:
    lines = lines_of(run)
    record = json.loads(lines[5])
    record["data_source"], record["extra"] = "elsewhere", None
    lines[5] = json.dumps({**record, "sha256": record_hash(record)}).encode() + b"\n"
    (run / TRAJECTORIES).write_bytes(b"".join(lines))
    edit_manifest(run, digest=...)
    defects, _ = verified(run)
    assert len(defects) == 1
    assert (
        f"trajectories.jsonl:6 trajectory {record['id']}: "
        "data_source, extra: not as in the group's other samples" in defects[0]
    )


# ------------------------------------------------------------------- what cannot be checked is said


def test_a_run_without_its_tokenizer_says_what_was_not_checked(run: Path) -> None:
    shutil.rmtree(run / "tokenizer")
    defects, verdict = verified(run)
    assert len(defects) == 1
    assert defects[0].endswith("tokens could not be checked against messages")
    assert verdict.counts["done"] == 20


def test_a_run_json_that_says_nothing_is_said_to(run: Path) -> None:
    (run / RUN).write_text(
        json.dumps({"schema": "turntrace/1", "config": [], "n": "4", "counts": 7, "tools": 5})
    )
    defects, verdict = verified(run)
    assert defects == []
    assert len(verdict.notes) == 3
    (run / RUN).write_text("[" * 100_000)
    assert [line.split(" cannot")[0] for line in verified(run)[0]] == [f"run.json: {run / RUN}"]


def test_an_imported_run_is_checked_for_what_it_can_know(run: Path) -> None:
    edit_manifest(run, imported={"from": "verl", "files": {}})
    assert verified(run)[1].notes == [
        "the run was imported from verl: how conversations ended was not checked"
    ]
    shutil.rmtree(run / "tokenizer")
    defects, verdict = verified(run)
    assert defects == []
    assert verdict.notes[0].endswith(
        "there is no tokenizer: tokens were not checked against messages"
    )


def test_a_template_that_reads_the_clock_has_its_prompts_taken_as_recorded(run: Path) -> None:
    template = run / "tokenizer" / "chat_template.jinja"
    template.write_text("{%- set today = strftime_now('%Y') %}" + template.read_text())
    defects, verdict = verified(run)
    assert defects == []
    assert verdict.notes == ["the chat template reads the clock: prompts were taken as recorded"]


def test_what_holds_no_run_is_a_users_mistake(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunFolderError, match="holds no run"):
            verify_run(path)


# ---------------------------------------------------------------------- folders from somebody else


def test_a_template_that_never_ends_is_given_up(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "TIME_LIMIT_S", 3.0)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = run / "tokenizer" / "chat_template.jinja"
    whole = template.read_text()
    template.write_text(loop + whole)
    assert "the chat template does not come to an end within 3 s" in verified(run)[0][0]
    template.write_text("{% if 'apples' in (messages | string) %}" + loop + "{% endif %}" + whole)
    (run / TRAJECTORIES).write_bytes(b"".join(lines_of(run)[:1]))
    edit_manifest(run, counts=...)
    assert [line.partition(": ")[2] for line in verified(run)[0]] == [
        "the record could not be checked within 3 s"
    ]


def test_a_template_cannot_reach_out_of_its_sandbox(run: Path) -> None:
    template = run / "tokenizer" / "chat_template.jinja"
    mark = run / "was_here"
    template.write_text(
        "{{ cycler.__init__.__globals__.os.system('touch "
        + str(mark)
        + "') }}"
        + template.read_text()
    )
    defects, _ = verified(run)
    assert "SecurityError" in defects[0] or "unsafe" in defects[0]
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", [RUN, TRAJECTORIES, UNFINISHED, SUPERSEDED, "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("target", ["pipe", "folder", "/dev/zero", "dangling"])
def test_files_that_are_none_are_defects_or_absent(run: Path, name: str, target: str) -> None:
    """Never a hang, and never an exception of Python's own."""
    file = run / name
    file.unlink(missing_ok=True)
    make: dict[str, Callable[[Path], None]] = {"pipe": os.mkfifo, "folder": Path.mkdir}
    make.get(target, lambda path: path.symlink_to(target))(file)
    defects, _ = verified(run)
    assert defects or (target == "dangling" and name in (UNFINISHED, SUPERSEDED))


def junk(rng: random.Random) -> Any:
    values: list[Any] = [
        None, True, -1, 0, 2**31, 2**63, 10**400, -(10**400), 1e308, 0.5, "", "x", "\x1b[31m",
        "\ud83d", "é" * 5, [], {}, [[]], {"a": {}},
        [None], {"role": "tool"}, "stop", "assistant", [1, 2, 3], {"name": 5}, "sampled",
        [["sampled", 0, 5]], "🙂" * 30_000,
    ]  # fmt: skip
    return copy.deepcopy(rng.choice(values))


def spoil(value: Any, rng: random.Random) -> Any:
    """The value with one node somewhere in it replaced, dropped or doubled."""
    node, path = value, 0
    while isinstance(node, (dict, list)) and node and path < 12:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.3:
            act = rng.random()
            if act < 0.1:
                del node[key]
            elif act < 0.2 and isinstance(node, list):
                node.insert(key, node[key])
            else:
                node[key] = junk(rng)
            return value
        node, path = node[key], path + 1
    return value


@pytest.mark.parametrize("seed", range(4))
def test_no_junk_in_a_record_is_a_crash(small: Path, seed: int) -> None:
    """Junk of every type in every place, under a right hash: a finding or a number that fits,
    never our own exception."""
    opened = open_run(small)
    template = opened.template()
    facts = verify_module.facts_of(opened.manifest, template)
    rng = random.Random(seed)
    records = list(opened.records())
    for _ in range(150):
        record = copy.deepcopy(rng.choice(records))
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            record = spoil(record, rng)
        record = {**record, "sha256": record_hash(record)}
        checked = check_line(json.dumps(record).encode() + b"\n", facts)
        for finding in checked.findings:
            line = str(Defect(TRAJECTORIES, 1, checked.id, finding))
            assert line.isprintable()
            assert len(line) < 2000


def test_what_is_shown_prints() -> None:
    assert printable("a\x1b[2Jb\n\ud83d") == "a\\x1b[2Jb\\n\\ud83d"
    assert printable("é 漢") == "é 漢"


def forever() -> None:
    with time_limit(0.05):
        while True:
            pass


def test_time_runs_out() -> None:
    with pytest.raises(OutOfTime):
        forever()
    with time_limit(0.05):
        pass


# ---------------------------------------------------------------------- ranges and processes


def test_ranges_cover_every_line_once(run: Path) -> None:
    """Wherever a file is cut into ranges, in the middle of a line or at its end."""
    file = run / TRAJECTORIES
    lines = lines_of(run)
    file.write_bytes(b"".join(lines[:3]) + b"\n" + b"x\n" * 3 + lines[4])
    size = file.stat().st_size
    edges = {
        0,
        1,
        len(lines[0]) - 1,
        len(lines[0]),
        len(lines[0]) + 1,
        size - 1,
        size - len(lines[4]),
        size - len(lines[4]) - 1,
    }
    whole = [
        checked.id
        for checked in check_chunk(verify_module.Chunk(file, TRAJECTORIES, 0, size), RunFacts())
    ]
    assert len(whole) == 8
    for edge in sorted(edges):
        parts = [
            verify_module.Chunk(file, TRAJECTORIES, start, end)
            for start, end in ((0, edge), (edge, size))
            if start < end
        ]
        assert [checked.id for part in parts for checked in check_chunk(part, RunFacts())] == whole


def test_lines_beyond_all_bounds_are_not_read_into_memory(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "MAX_LINE", 1000)
    file = run / TRAJECTORIES
    file.write_bytes(b"x" * 5000 + b"\n" + b"y\n" + b"z" * 999 + b"\n" + b"w" * 3000)
    findings = [
        checked.findings[0].what[:20]
        for checked in check_chunk(verify_module.Chunk(file, TRAJECTORIES, 0, 10**6), RunFacts())
    ]
    assert findings == [
        "the line is longer t",
        "not a JSON line: Exp",
        "the line is longer t",
        "the line is longer t",
    ]


def test_processes_find_what_one_finds(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "CHUNK", 30_000)
    lines = lines_of(run)
    lines[4], lines[11] = (
        lines[4][:-30] + b"\n",
        lines[11].replace(b'"num_turns":', b'"num_turns":1', 1),
    )
    (run / TRAJECTORIES).write_bytes(b"".join(lines))
    moved: list[tuple[int, int]] = []
    defects: list[Defect] = []
    verify_run(
        run,
        jobs=3,
        on_defect=defects.append,
        on_progress=lambda done, total: moved.append((done, total)),
    )
    assert [str(defect) for defect in defects] == verified(run)[0]
    assert {line.split(":")[1].split(" ")[0] for line in verified(run)[0]} >= {"5", "12"}
    assert len(moved) > 5
    assert moved[-1][0] == moved[-1][1] == (run / TRAJECTORIES).stat().st_size


def test_a_process_that_dies_is_a_defect(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "CHUNK", 30_000)
    monkeypatch.setattr(verify_module, "check_chunk", lambda chunk, facts: os._exit(9))
    defects, _ = verified(run, jobs=2)
    assert "bytes 0 to 30000 was killed; what follows was not checked" in defects[0]


def test_nothing_is_written(run: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in run.rglob("*")}
    verified(run, jobs=2)
    assert {
        file: (file.stat().st_mtime_ns, file.stat().st_size) for file in run.rglob("*")
    } == before


def test_a_record_made_by_hand_is_no_run_of_ours(tmp_path: Path) -> None:
    """Without a tokenizer and with tokens nobody sampled: each contradiction is named."""
    defects, _ = verified(written(tmp_path / "run", [numbered("t", 0)]))
    assert any("the last turn has calls" in line for line in defects)


def test_the_digest_reveals_a_change_that_no_record_does(run: Path) -> None:
    """Another plausible log-prob under a forged hash."""
    lines = lines_of(run)
    record = json.loads(lines[0])
    index = record["response_mask"].index(1)
    record["response_logprobs"][index] = -0.125
    record["sha256"] = record_hash(record)
    lines[0] = json.dumps(record).encode() + b"\n"
    (run / TRAJECTORIES).write_bytes(b"".join(lines))
    before = json.loads((run / RUN).read_text())["digest"]
    defects, verdict = verified(run)
    assert verdict.digest != before
    assert [defect.partition(",")[0] for defect in defects] == [
        "run.json: the digest of all finished records"
    ]


PARENT = {"run": "other", "id": "t-0", "turn": None}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"parent": PARENT},
            'the parent, found {"run": "other", "id": "t-0", "turn": null}, expected none',
        ),
        ({"parent": {"run": "other"}}, "the field parent.id is missing"),
        ({"resumed": [1]}, None),
        ({"resumed": [1, 2]}, None),
        ({"resumed": [2, 2]}, "not after the last such token"),
        ({"resumed": [2, 1]}, "not after the last such token"),
        ({"resumed": [0]}, "not its own"),
    ],
)
def test_where_a_record_says_it_comes_from(
    run: Path, changes: dict[str, Any], told: str | None
) -> None:
    """A parent would allow what no conversation's first run may hold."""
    lines = lines_of(run)
    number, record = next(
        (number, record)
        for number, line in enumerate(lines)
        if (record := json.loads(line))["turns"]
    )
    turn = record["turns"][0]
    if resumed := changes.pop("resumed", None):
        turn["resumed"] = [[turn["start"] + place, "2"] for place in resumed]
    record |= changes
    record["sha256"] = record_hash(record)
    lines[number] = json.dumps(record).encode() + b"\n"
    (run / TRAJECTORIES).write_bytes(b"".join(lines))
    edit_manifest(run, digest=None)
    defects, _ = verified(run)
    if told is None:
        assert defects == []
    else:
        assert told in defects[0]


def test_a_run_made_from_another_names_the_parent_of_each_record(run: Path) -> None:
    edit_manifest(run, parent={"run": "other"})
    defects, _ = verified(run)
    assert len([line for line in defects if "the parent, found null, expected one" in line]) == len(
        lines_of(run)
    )


# ---------------------------------------------------------------------- several starts


def resumed_with_less(path: Path) -> Path:
    """The clean run, resumed by force with smaller limits; none of its records is touched."""
    shutil.copytree(small_run().path, path)
    manifest = json.loads((path / RUN).read_text())
    del manifest["counts"], manifest["digest"]
    rollout = manifest["config"]["rollout"]
    rollout |= {"response_length": 10, "prompt_length": 10}
    rollout["multi_turn"] |= {"max_tool_response_length": 8, "max_assistant_turns": 1}
    RunFolder.resume(path, {**manifest, "n": 1}, force=True).close()
    return path


def test_records_are_checked_against_the_start_that_made_them(tmp_path: Path) -> None:
    run = resumed_with_less(tmp_path / "run")
    finished = (run / TRAJECTORIES).read_text()
    assert verified(run)[0] == []
    manifest = json.loads((run / RUN).read_text())
    del manifest["earlier_starts"]
    (run / RUN).write_text(json.dumps(manifest))
    assert any("response_length" in line for line in verified(run)[0]), (
        "the other limits do not fit"
    )
    assert (run / TRAJECTORIES).read_text() == finished


@pytest.mark.parametrize("changed", [{"tasks": {"file": "other.jsonl"}}, {"n": 1}, {"limit": 3}])
def test_a_run_that_goes_on_with_fewer_tasks_keeps_the_records_of_the_others(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    """It counts what it was asked for last."""
    run = tmp_path / "run"
    shutil.copytree(small_run().path, run)
    manifest = json.loads((run / RUN).read_text())
    counts = {"asked": 3, "done": 3}
    RunFolder.resume(run, {**manifest, **changed}, force=True).close(counts)
    assert verified(run)[0] == []
    RunFolder.resume(run, {**manifest, **changed}, force=True).close({"asked": 99, "done": 99})
    assert any("finished trajectories" in line for line in verified(run)[0])


@pytest.mark.parametrize("starts", [7, ["x"], [{}], [{"config": []}], [{"config": {}}] * 99])
def test_starts_of_any_form_are_read(tmp_path: Path, starts: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run().path, run)
    manifest = json.loads((run / RUN).read_text()) | {"earlier_starts": starts}
    (run / RUN).write_text(json.dumps(manifest))
    assert verified(run)[0] == []
