"""Reading a run folder: lazily, by id, by group, as a table; what is still being written,
copied, damaged or hostile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import conversations
from conversations.errors import ConversationsError, RunFolderError
from conversations.run.open_run import open_run
from conversations.run.store import TRAJECTORIES, UNFINISHED, RunFolder
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory, Turn, record_hash
from tests.conversations.test_trajectory import trajectory

ORDER = [("b", 1), ("a-7", 0), ("b", 0), ("a-7", 2), ("é\u2028", 0)]


def numbered(task: str, sample: int, **fields: Any) -> Trajectory:
    return trajectory(id=f"{task}-{sample}", task_id=task, sample=sample, **fields)


def written(path: Path, trajectories: Sequence[Trajectory], **manifest: Any) -> Path:
    with RunFolder.create(path, manifest) as folder:
        for each in trajectories:
            folder.append(each)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "run", [numbered(task, sample) for task, sample in ORDER], seed=7)


def test_trajectories_come_in_file_order_by_id_and_by_group(path: Path) -> None:
    run = conversations.open_run(path)
    assert (run.path, run.manifest["seed"], len(run)) == (path, 7, 5)
    assert (
        list(run.ids)
        == [f"{task}-{sample}" for task, sample in ORDER]
        == [each.id for each in run]
        == [r["id"] for r in run.records()]
    )
    assert run["a-7-2"] == numbered("a-7", 2)
    assert run.record("b-1") == next(run.records(check=False))
    assert [(task, [each.sample for each in samples]) for task, samples in run.groups()] == [
        ("b", [0, 1]),
        ("a-7", [0, 2]),
        ("é\u2028", [0]),
    ]
    assert "b-0" in run
    assert "b-2" not in run


def test_an_unknown_id_names_what_may_have_been_meant(path: Path, tmp_path: Path) -> None:
    for asked, answer in (
        ("b", "there is b-1, b-0"),
        ("a-7-1", "there is a-7-"),
        ("xyzzy", "its first are b-1, a-7-0, b-0"),
    ):
        with pytest.raises(RunFolderError, match=f"has no trajectory '{asked}'; {answer}"):
            open_run(path)[asked]
    with pytest.raises(RunFolderError, match="has none yet"):
        open_run(written(tmp_path / "empty", []))["b-0"]


def test_a_run_that_is_being_written_is_what_it_was_when_opened(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, {}) as folder:
        assert len(open_run(tmp_path)) == 0
        folder.append(numbered("t", 0))
        with (tmp_path / TRAJECTORIES).open("ab") as torn:
            torn.write(numbered("t", 1).to_line().encode()[:200])
            torn.flush()
            run = open_run(tmp_path)
            torn.write(numbered("t", 1).to_line().encode()[200:] + b"\n")
        assert [each.id for each in run] == ["t-0"]
        assert [each.id for each in open_run(tmp_path)] == ["t-0", "t-1"]
        folder.append_unfinished(numbered("t", 2))
        assert [each.id for each in open_run(tmp_path).unfinished()] == ["t-2"]


def test_a_resume_that_drops_lines_does_not_disturb_a_reader(tmp_path: Path) -> None:
    written(tmp_path, [numbered("t", 0, infra_error=True), numbered("t", 1)])
    run = open_run(tmp_path)
    RunFolder.resume(tmp_path, {}).close()
    assert list(open_run(tmp_path).ids) == ["t-1"]
    assert [each.id for each in run] == ["t-0", "t-1"]


def test_reading_needs_no_right_to_write_and_leaves_no_trace(path: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(path, tmp_path / "copied", ignore=shutil.ignore_patterns(".lock"))
    before = sorted(copied.iterdir())
    for file in (*before, copied):
        file.chmod(0o500 if file.is_dir() else 0o400)
    assert [each.id for each in open_run(copied)] == list(open_run(path).ids)
    assert sorted(copied.iterdir()) == before
    copied.chmod(0o700)


def test_reading_holds_one_record_at_a_time(tmp_path: Path) -> None:
    """60 MB of records within 30 MB of memory beyond what the imports take."""
    big = "x" * 1_000_000
    written(tmp_path, [numbered(f"t{index}", 0, extra=big) for index in range(60)])
    program = (
        "import resource, sys, conversations\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "run = conversations.open_run(sys.argv[1])\n"
        "assert len(run) == 60 and sum(len(each.extra) for each in run) == 60_000_000\n"
        "assert run['t59-0'].extra\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000


# ---------------------------------------------------------------------- what is wrong is one line


def line(**changes: Any) -> bytes:
    """A record line with the right hash, its keys in no order."""
    record = {**json.loads(trajectory().to_line()), **changes}
    return json.dumps({**record, "sha256": record_hash(record)}).encode() + b"\n"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\n", "1: not a JSON line"),
        (b"\xff\xfe\n", "1: "),
        (b"[" * 100_000 + b"\n", "1: not a JSON line"),
        (b"[1]\n", "1: schema is 'list'"),
        (line(id=5), "1: the id is 5, expected task-sample"),
        (line(id="t-x"), "1: the id is 't-x', expected task-sample"),
        (line() + line(), "2: trajectory t-0 stands already on line 1"),
        (
            line() + line(id="u-0").replace(b'"reward": 1.0', b'"reward": 2.0'),
            "2: trajectory u-0 does not match its hash",
        ),
        (line(turns=5), "1: trajectory t-0 is damaged"),
        (line(segments=[5]), "1: trajectory t-0 is damaged"),
        (line(tool_calls=["x"]), "1: trajectory t-0 is damaged"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, data: bytes, says: str) -> None:
    written(tmp_path, [])
    (tmp_path / TRAJECTORIES).write_bytes(data)
    with pytest.raises(RunFolderError, match=rf"{TRAJECTORIES}:{says}") as caught:
        list(open_run(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_id_is_the_records_own_though_extra_holds_a_record(tmp_path: Path) -> None:
    inner = json.loads(numbered("inner", 3).to_line())
    written(
        tmp_path,
        [numbered("outer", 0, extra={"of": inner}), numbered("text", 0, extra=json.dumps(inner))],
    )
    assert list(open_run(tmp_path).ids) == ["outer-0", "text-0"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        open_run(tmp_path / "nowhere")
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(RunFolderError, match=r"run\.json cannot be read"):
        open_run(tmp_path)


@pytest.mark.parametrize("name", ["run.json", TRAJECTORIES, UNFINISHED])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders_in_place_of_files_are_refused(
    tmp_path: Path, name: str, make: Any
) -> None:
    written(tmp_path, [numbered("t", 0)])
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(RunFolderError, match=name):
        open_run(tmp_path)


# ---------------------------------------------------------------------- the tokenizer


def test_tokenizer_and_template_are_the_runs_own(tmp_path: Path, template: ChatTemplate) -> None:
    kwargs = {"enable_thinking": False}
    written(tmp_path, [], config={"rollout": {"turntrace": {"apply_chat_template_kwargs": kwargs}}})
    template.tokenizer.save_pretrained(tmp_path / "tokenizer")
    run = open_run(tmp_path)
    messages = [
        {"role": "system", "content": "Rules 1 2 3."},
        {"role": "user", "content": "é 漢字 <|im_end|>  x\n"},
    ]
    expected = ChatTemplate(template.tokenizer, kwargs=kwargs)
    assert run.template().prompt(messages, []) == expected.prompt(messages, [])
    assert run.template().stop_token_ids == expected.stop_token_ids
    assert run.template().decode([5, 6, 7, 999]) == expected.decode([5, 6, 7, 999])


def test_code_that_lies_beside_the_tokenizer_is_not_run(
    tmp_path: Path, smollm2: ChatTemplate
) -> None:
    written(tmp_path, [])
    folder = tmp_path / "tokenizer"
    smollm2.tokenizer.save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("EvilTokenizer", "TransfoXLTokenizer"):
        changed = {
            **config,
            "tokenizer_class": name,
            "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(changed))
        assert open_run(tmp_path).template().encode("hello") == smollm2.encode("hello")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    "content", ["", "{}", "[" * 100_000, '{"model": {"type": "BPE", "vocab": 5}}']
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(tmp_path: Path, content: str) -> None:
    written(tmp_path, [])
    with pytest.raises(RunFolderError, match=r"holds no tokenizer\.json"):
        open_run(tmp_path).tokenizer()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(ConversationsError, match="tokenizer") as caught:
        open_run(tmp_path).template()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- tables


def test_a_table_has_every_field(path: Path) -> None:
    import pyarrow as pa

    table = open_run(path).to_arrow()
    record = json.loads(trajectory().to_line())
    assert set(table.column_names) == {*record, "images"}  # a line without images has no such key
    assert table.schema.field("response_logprobs").type == pa.list_(pa.float32())
    assert table.schema.field("response_mask").type == pa.list_(pa.int8())
    row = table.to_pylist()[1]
    assert (row["id"], row["response_ids"], row["response_mask"], row["reward"]) == (
        "a-7-0",
        [3, 4, 5],
        [1, 1, 0],
        1.0,
    )
    assert row["response_logprobs"][2] is None
    assert row["segments"][2] == {"kind": "template", "start": 4, "end": 5}
    not_served = {"response_id": None, "asked": None, "notes": None}
    assert row["turns"] == [{**turn, "resumed": [], **not_served} for turn in record["turns"]]
    for name in ("messages", "tool_calls", "tools", "extra", "ground_truth", "reward_parts"):
        assert json.loads(row[name]) == record[name]
    assert row["parent"] is None


def test_a_table_says_where_turns_were_gone_on_with(tmp_path: Path) -> None:
    turn = Turn(2, 4, "stop", 2, resumed=[[3, "7"]])
    table = open_run(written(tmp_path, [numbered("t", 0, turns=[turn])])).to_arrow(["turns"])
    assert table.to_pylist()[0]["turns"][0]["resumed"] == [{"token": 3, "weight_version": "7"}]


def test_a_table_of_some_columns(path: Path, tmp_path: Path) -> None:
    frame = open_run(path).to_pandas(columns=["id", "reward", "stop_reason"])
    assert list(frame.columns) == ["id", "reward", "stop_reason"]
    assert frame["reward"].sum() == 5.0
    assert len(open_run(written(tmp_path / "empty", [])).to_arrow()) == 0
    with pytest.raises(RunFolderError, match=r"'rewards'.* schema, id, "):
        open_run(path).to_arrow(["id", "rewards"])


def test_what_fits_no_table_is_one_line(tmp_path: Path) -> None:
    written(tmp_path, [numbered("t", 0, response_ids=[1, 2, 10**30])])
    with pytest.raises(RunFolderError, match="t-0 to t-0 "):
        open_run(tmp_path).to_arrow()
