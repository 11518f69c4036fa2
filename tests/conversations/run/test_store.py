"""The run folder: nothing lost, nothing twice, whatever moment the process was killed in."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conversations.errors import RecordError, RunFolderError
from conversations.run.store import (
    RUN,
    SUPERSEDED,
    TRAJECTORIES,
    UNFINISHED,
    RunFolder,
    read_manifest,
    read_trajectories,
)
from conversations.trajectory import Trajectory, read_record
from tests.conversations.test_trajectory import trajectory
from tests.helpers import ROOT

MANIFEST = {
    "config": {"rollout": {"temperature": 1.0, "n": 2}},
    "tools": "tools: []",
    "model": {"path": "m"},
    "tasks": "t.jsonl",
    "n": 1,
}


def record(task_id: str, sample: int = 0, **fields: Any) -> Trajectory:
    return trajectory(id=f"{task_id}-{sample}", task_id=task_id, sample=sample, **fields)


def lines(path: Path, name: str = TRAJECTORIES) -> list[str]:
    file = path / name
    return file.read_text().splitlines() if file.exists() else []


def ids(path: Path, name: str = TRAJECTORIES) -> list[str]:
    return [read_record(line)["id"] for line in lines(path, name)]


def run_with(path: Path, *trajectories: Trajectory) -> None:
    with RunFolder.create(path, MANIFEST) as run:
        for one in trajectories:
            run.append(one)


# ---------------------------------------------------------------------- writing and reading


def test_what_is_appended_reads_back(tmp_path: Path) -> None:
    written = [record("a"), record("a", 1), record("b")]
    run_with(tmp_path / "deep" / "run", *written)
    assert list(read_trajectories(tmp_path / "deep" / "run")) == written
    assert list(read_trajectories(tmp_path / "deep" / "run" / TRAJECTORIES)) == written


def test_a_line_is_in_the_file_when_append_returns(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, MANIFEST) as run:
        for count in range(1, 4):
            run.append(record(str(count)))
            assert len(lines(tmp_path)) == count


def test_the_manifest_says_what_was_run(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, {**MANIFEST, "created": "now", "odd": "é\ud83d"})
    run.close({"done": 3})
    run.close({"done": 4})
    manifest = read_manifest(tmp_path)
    assert manifest["schema"] == "turntrace/2"
    assert (manifest["counts"], manifest["created"], manifest["config"]) == (
        {"done": 3},
        "now",
        MANIFEST["config"],
    )


def test_a_task_and_sample_is_written_once(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, MANIFEST) as run:
        run.append(record("a"))
        with pytest.raises(RunFolderError, match=r"a-0 .*unique"):
            run.append(record("a"))
        run.append(record("a", 1))
    assert ids(tmp_path) == ["a-0", "a-1"]


def test_what_has_no_json_leaves_no_trace(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, MANIFEST) as run:
        with pytest.raises(RecordError):
            run.append(record("a", extra=float("nan")))
        assert run.done == set()
        run.append(record("a"))
    assert ids(tmp_path) == ["a-0"]


def test_a_run_is_never_written_over(tmp_path: Path) -> None:
    run_with(tmp_path, record("a"))
    with pytest.raises(RunFolderError, match="already holds"):
        RunFolder.create(tmp_path, MANIFEST)
    assert ids(tmp_path) == ["a-0"]


def test_a_refused_create_leaves_no_lock(tmp_path: Path) -> None:
    run_with(tmp_path)
    with pytest.raises(RunFolderError):
        RunFolder.create(tmp_path, MANIFEST)
    RunFolder.resume(tmp_path, MANIFEST).close()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": "other/1"}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN).write_text(content)
    with pytest.raises(RunFolderError, match=r"run\.json"):
        read_manifest(tmp_path)
    with pytest.raises(RunFolderError, match=r"run\.json"):
        RunFolder.resume(tmp_path, MANIFEST)


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="run folder"):
        RunFolder.create(tmp_path / "file" / "run", MANIFEST)
    with pytest.raises(RunFolderError, match="cannot be read"):
        list(read_trajectories(tmp_path / "none.jsonl"))


def test_a_changed_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    run_with(tmp_path, record("a"), record("b"))
    file = tmp_path / TRAJECTORIES
    file.write_text(file.read_text().replace('"id":"b-0"', '"id":"c-0"'))
    reading = read_trajectories(tmp_path)
    assert next(reading).id == "a-0"
    with pytest.raises(
        RunFolderError, match=rf"{TRAJECTORIES}:2: trajectory c-0 does not match its hash"
    ):
        next(reading)


def test_a_full_disk_is_one_clear_line_and_the_run_goes_on_later(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, MANIFEST)
    run.append(record("a"))
    (tmp_path / UNFINISHED).symlink_to(
        "/dev/full"
    )  # opened at the first append; reading it would never end
    with pytest.raises(
        RunFolderError,
        match=r"unfinished\.jsonl .*No space",
    ):
        run.append_unfinished(record("b"))
    run.append(record("c"))
    run.close()
    (tmp_path / UNFINISHED).unlink()
    with RunFolder.resume(tmp_path, MANIFEST) as again:
        assert again.done == {("a", 0), ("c", 0)}


def test_a_sync_that_fails_is_not_kept_quiet(tmp_path: Path) -> None:
    """A device that takes the bytes and cannot sync them."""
    run = RunFolder.create(tmp_path, MANIFEST)
    (tmp_path / UNFINISHED).symlink_to("/dev/null")

    def append_until_the_sync_has_run() -> None:
        for _ in range(1000):
            run.append_unfinished(record("a"))
            time.sleep(0.02)

    with pytest.raises(RunFolderError, match="Invalid argument"):
        append_until_the_sync_has_run()
    run.close()

    run = RunFolder.create(tmp_path / "quick", MANIFEST)
    (tmp_path / "quick" / UNFINISHED).symlink_to("/dev/null")
    run.append_unfinished(record("a"))
    with pytest.raises(RunFolderError, match="Invalid argument"):
        run.close()


def test_counts_are_those_of_the_last_close(tmp_path: Path) -> None:
    """While a run is gone on with, and after a kill, run.json does not say what an earlier stop
    counted."""
    RunFolder.create(tmp_path, MANIFEST).close({"done": 3})
    with RunFolder.resume(tmp_path, MANIFEST) as folder:
        assert "counts" not in read_manifest(tmp_path)
        folder.close({"done": 4})
    assert read_manifest(tmp_path)["counts"] == {"done": 4}


@pytest.mark.parametrize("counts", [None, {"done": 1}])
def test_a_manifest_that_cannot_be_written_is_one_clear_line(
    tmp_path: Path, counts: dict[str, int] | None
) -> None:
    run_with(tmp_path, record("a"))
    run = RunFolder.resume(tmp_path, MANIFEST)
    (tmp_path / "run.json.new").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match=r"run\.json .*No space"):
        run.close(counts) if counts else (run.close(), RunFolder.resume(tmp_path, MANIFEST))
    assert not (tmp_path / "run.json.new").is_symlink(), "nothing half written is left"
    RunFolder.resume(tmp_path, MANIFEST).close()  # the failure left no lock
    assert ids(tmp_path) == ["a-0"]


# ---------------------------------------------------------------------- one writer


def test_a_second_writer_is_refused_in_this_process(tmp_path: Path) -> None:
    with (
        RunFolder.create(tmp_path, MANIFEST),
        pytest.raises(RunFolderError, match="another process"),
    ):
        RunFolder.resume(tmp_path, MANIFEST)
    RunFolder.resume(tmp_path, MANIFEST).close()


def test_a_second_writer_is_refused_and_a_killed_one_frees_the_folder(tmp_path: Path) -> None:
    hold = (
        "import sys; from conversations.run.store import RunFolder; "
        "run = RunFolder.create(sys.argv[1], {}); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    holder = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            RunFolderError,
            match=r"another process .*--out",
        ):
            RunFolder.resume(tmp_path, {})
        with pytest.raises(RunFolderError):
            RunFolder.create(tmp_path, {})
    finally:
        holder.kill()
        holder.communicate()
    RunFolder.resume(tmp_path, {}).close()


# ---------------------------------------------------------------------- resume


def test_resume_goes_on_where_the_run_ended(tmp_path: Path) -> None:
    run_with(tmp_path, record("a"), record("b"))
    with RunFolder.resume(tmp_path, MANIFEST) as run:
        assert run.done == {("a", 0), ("b", 0)}
        with pytest.raises(RunFolderError, match="there already"):
            run.append(record("a"))
        run.append(record("c"))
    assert ids(tmp_path) == ["a-0", "b-0", "c-0"]


def test_resume_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"run\.json .*--resume"):
        RunFolder.resume(tmp_path / "none", MANIFEST)
    assert not (tmp_path / "none").exists()


def test_infra_errors_run_again_and_the_old_record_is_kept_aside(tmp_path: Path) -> None:
    run_with(
        tmp_path,
        record("a"),
        record("b", infra_error=True, reward=None, stop_reason="engine_error"),
        record("c"),
    )
    failed = lines(tmp_path)[1]
    with RunFolder.resume(tmp_path, MANIFEST) as run:
        assert run.done == {("a", 0), ("c", 0)}
        assert ids(tmp_path) == ["a-0", "c-0"]
        assert lines(tmp_path, SUPERSEDED) == [failed]
        run.append(record("b"))
    assert ids(tmp_path) == ["a-0", "c-0", "b-0"]
    with RunFolder.resume(tmp_path, MANIFEST) as run:
        assert run.done == {("a", 0), ("b", 0), ("c", 0)}
    assert lines(tmp_path, SUPERSEDED) == [failed]


def test_unfinished_ones_are_handed_out_and_stay_until_they_have_ended(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, MANIFEST) as run:
        run.append(record("a"))
        run.append_unfinished(record("b", stop_reason="cancelled"))
        run.append_unfinished(record("c", stop_reason="cancelled"))
    first = lines(tmp_path, UNFINISHED)
    with RunFolder.resume(tmp_path, MANIFEST) as run:
        assert run.done == {("a", 0)}
        assert {key: one.to_line() for key, one in run.unfinished.items()} == {
            ("b", 0): first[0],
            ("c", 0): first[1],
        }
        run.append(record("b"))
        run.append_unfinished(record("c", stop_reason="cancelled", wall_s=2.0))
        assert lines(tmp_path, UNFINISHED)[:2] == first  # a kill now loses nothing
    assert [json.loads(line)["wall_s"] for line in lines(tmp_path, UNFINISHED)] == [2.0]
    assert sorted(lines(tmp_path, SUPERSEDED)) == sorted(first)


def test_an_unfinished_record_written_again_as_it_was_replaces_nothing(tmp_path: Path) -> None:
    """As where a conversation is cut off before it stood again."""
    for make in (RunFolder.create, RunFolder.resume, RunFolder.resume):
        with make(tmp_path, MANIFEST) as run:
            run.append_unfinished(record("a"))
    assert (ids(tmp_path, UNFINISHED), lines(tmp_path, SUPERSEDED)) == (["a-0"], [])


def test_an_unfinished_line_that_is_damaged_is_set_aside(tmp_path: Path) -> None:
    run_with(tmp_path, record("a"))
    (tmp_path / UNFINISHED).write_text("{}\n")
    with RunFolder.resume(tmp_path, MANIFEST) as run:
        assert run.unfinished == {}
    assert (lines(tmp_path, UNFINISHED), lines(tmp_path, SUPERSEDED)) == ([], ["{}"])


def test_a_run_with_another_config_is_refused_with_all_its_differences(tmp_path: Path) -> None:
    run_with(tmp_path, record("a"))
    other = {
        **MANIFEST,
        "config": {"rollout": {"temperature": 0.7, "top_k": 5}},
        "n": 4,
        "created": "later",
        "tools": "x" * 100,
    }
    with pytest.raises(RunFolderError) as raised:
        RunFolder.resume(tmp_path, other)
    message = str(raised.value)
    for part in (
        "config.rollout.temperature was 1.0, is 0.7", "config.rollout.n was 2, is null",
        "config.rollout.top_k was null, is 5",
        "n was 1, is 4", "tools was \"tools: []\", is \"xxxxx", "(102 characters)", "--force",
    ):  # fmt: skip
        assert part in message
    assert "\n" not in message
    assert "created" not in message
    RunFolder.resume(tmp_path, MANIFEST).close()  # the refusal left no lock
    with RunFolder.resume(tmp_path, other, force=True) as run:
        assert run.done == {("a", 0)}
    assert read_manifest(tmp_path)["n"] == 4


def test_resume_keeps_when_the_run_was_created(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, {**MANIFEST, "created": "first"}).close()
    RunFolder.resume(tmp_path, {**MANIFEST, "created": "second"}).close({"done": 1})
    assert read_manifest(tmp_path)["created"] == "first"


def test_a_task_that_is_there_twice_is_named(tmp_path: Path) -> None:
    run_with(tmp_path, record("a"), record("b"))
    with (tmp_path / TRAJECTORIES).open("a") as file:
        file.write(lines(tmp_path)[0] + "\n")
    with pytest.raises(
        RunFolderError, match=rf"{TRAJECTORIES}:3 holds trajectory a-0 a second time"
    ):
        RunFolder.resume(tmp_path, MANIFEST)


def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_touched(tmp_path: Path) -> None:
    run_with(tmp_path, record("a"), record("b"), record("c"))
    file = tmp_path / TRAJECTORIES
    damaged = lines(tmp_path)[0] + "\n{oops\n" + lines(tmp_path)[2] + "\n"
    file.write_text(damaged)
    with pytest.raises(RunFolderError, match=rf"{TRAJECTORIES}:2 is damaged"):
        RunFolder.resume(tmp_path, MANIFEST)
    assert file.read_text() == damaged


@pytest.mark.parametrize("number", [1, 3])
def test_a_whole_line_that_was_changed_is_refused_and_never_cut(
    tmp_path: Path, number: int
) -> None:
    run_with(tmp_path, record("a"), record("b"), record("c"))
    file = tmp_path / TRAJECTORIES
    content = lines(tmp_path)
    content[number - 1] = content[number - 1].replace('"reward":', '"reward":0')
    file.write_text("\n".join(content) + "\n")
    before = file.read_bytes()
    with pytest.raises(RunFolderError, match=rf"{TRAJECTORIES}:{number} is damaged: "):
        RunFolder.resume(tmp_path, MANIFEST)
    assert file.read_bytes() == before


def test_the_same_tools_and_model_in_another_folder_are_the_same(tmp_path: Path) -> None:
    def manifest(folder: str, tools: str = "tools: []", sha256: str = "0") -> dict[str, Any]:
        config = {
            "model_path": f"{folder}/m",
            "rollout": {"multi_turn": {"tool_config_path": f"{folder}/tools.yaml"}},
        }
        return {
            "config": config,
            "tools": tools,
            "model": {"path": f"{folder}/m", "sha256": sha256},
        }

    RunFolder.create(tmp_path, manifest("/a")).close()
    RunFolder.resume(tmp_path, manifest("/b")).close()
    with pytest.raises(RunFolderError, match=r"differently: tools was "):
        RunFolder.resume(tmp_path, manifest("/b", tools="tools: [1]"))
    with pytest.raises(RunFolderError, match=r"model\.sha256 .*\"0\".*\"1\""):
        RunFolder.resume(tmp_path, manifest("/b", sha256="1"))


# ---------------------------------------------------------------------- killed at any moment


def test_a_hundred_places_to_be_torn_at(tmp_path: Path) -> None:
    """A kill leaves any prefix of the file: whole lines stay, the torn one goes, its
    conversation runs again."""
    rng = random.Random(1)
    written = [record(f"t{number}", extra="é" * rng.randrange(30)) for number in range(8)]
    run_with(tmp_path / "whole", *written)
    content = (tmp_path / "whole" / TRAJECTORIES).read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == 10]
    places = {
        0,
        len(content),
        *ends,
        *(end - 1 for end in ends),
        *(end + 1 for end in ends[:-1]),
        *rng.sample(range(len(content)), 100),
    }
    path = tmp_path / "torn"
    RunFolder.create(path, MANIFEST).close()
    for place in sorted(places):
        (path / TRAJECTORIES).write_bytes(content[:place])
        whole = sum(end <= place for end in ends)
        with RunFolder.resume(path, MANIFEST) as run:
            assert run.done == {(one.task_id, 0) for one in written[:whole]}
            for one in written[whole:]:
                run.append(one)
        assert (path / TRAJECTORIES).read_bytes() == content


@pytest.mark.parametrize("name", [UNFINISHED, SUPERSEDED])
def test_torn_lines_elsewhere(tmp_path: Path, name: str) -> None:
    run_with(tmp_path, record("a"), record("b", infra_error=True))
    aside = record("z", stop_reason="cancelled").to_line()
    for place in (0, 1, len(aside) // 2, len(aside)):
        (tmp_path / name).write_text(f"{aside}\n{aside[:place]}")
        with RunFolder.resume(tmp_path, MANIFEST) as run:
            assert run.done == {("a", 0)}
            run.append(record("b", infra_error=True))
        assert ids(tmp_path, name).count("z-0") == 1
        assert "b-0" in ids(tmp_path, SUPERSEDED)
        assert ids(tmp_path) == ["a-0", "b-0"]
        (tmp_path / SUPERSEDED).unlink()


def test_killed_between_setting_aside_and_dropping(tmp_path: Path) -> None:
    """The old lines are in both places: nothing is lost, and nothing is set aside twice."""
    with RunFolder.create(tmp_path, MANIFEST) as run:
        run.append(record("a"))
        run.append(record("b", infra_error=True))
        run.append_unfinished(record("c"))
    (tmp_path / SUPERSEDED).write_text(f"{lines(tmp_path)[1]}\n{lines(tmp_path, UNFINISHED)[0]}\n")
    with RunFolder.resume(tmp_path, MANIFEST) as run:
        assert run.done == {("a", 0)}
        run.append(record("c"))
    (tmp_path / TRAJECTORIES).write_text(lines(tmp_path)[0] + "\n")
    assert (ids(tmp_path), ids(tmp_path, UNFINISHED), ids(tmp_path, SUPERSEDED)) == (
        ["a-0"],
        [],
        ["b-0", "c-0"],
    )


def test_killed_while_setting_aside(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, MANIFEST) as run:
        for name in "abcd":
            run.append(record(name, infra_error=True))
    content = (tmp_path / TRAJECTORIES).read_bytes()
    for place in range(0, len(content), len(content) // 40):
        (tmp_path / TRAJECTORIES).write_bytes(content)
        (tmp_path / SUPERSEDED).write_bytes(content[:place])
        RunFolder.resume(tmp_path, MANIFEST).close()
        assert (tmp_path / SUPERSEDED).read_bytes() == content
        assert (tmp_path / TRAJECTORIES).read_bytes() == b""


@pytest.mark.parametrize(
    "leftover", ["run.json.new", "trajectories.jsonl.new", "unfinished.jsonl.new"]
)
def test_killed_while_replacing_a_file(tmp_path: Path, leftover: str) -> None:
    run_with(tmp_path, record("a"), record("b", infra_error=True))
    (tmp_path / leftover).write_text('{"half')
    with RunFolder.resume(tmp_path, MANIFEST) as run:
        assert run.done == {("a", 0)}
    assert read_manifest(tmp_path)["schema"] == "turntrace/2"


def test_killed_before_the_manifest_was_there(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "run.json.new").write_text("{")
    RunFolder.create(tmp_path, MANIFEST).close()


def test_a_last_line_of_many_megabytes(tmp_path: Path) -> None:
    run_with(tmp_path, record("a"), record("b", extra="x" * 3_000_000))
    file = tmp_path / TRAJECTORIES
    os.truncate(file, file.stat().st_size - 1)
    with RunFolder.resume(tmp_path, MANIFEST) as run:
        assert run.done == {("a", 0)}


def test_records_are_plain_json_lines(tmp_path: Path) -> None:
    run_with(tmp_path, record("a", extra="a\u2028b\nc\u0085é"))
    content = (tmp_path / TRAJECTORIES).read_bytes()
    assert content.isascii()
    assert content.count(b"\n") == 1
    assert json.loads(content)["extra"] == "a\u2028b\nc\u0085é"


# ---------------------------------------------------------------------- the digest of a run


def digest_of(path: Path) -> object:
    return read_manifest(path).get("digest")


def test_the_digest_is_of_all_records_however_often_resumed(tmp_path: Path) -> None:
    records = [record(name) for name in "abcd"]
    one, two = tmp_path / "one", tmp_path / "two"
    with RunFolder.create(one, MANIFEST) as run:
        for each in records:
            run.append(each)
        run.close({"done": 4})
    for part in (records[:2], records[2:]):
        make = RunFolder.resume if (two / "run.json").exists() else RunFolder.create
        with make(two, MANIFEST) as run:
            assert digest_of(two) is None
            run.append(record(f"x{part[0].task_id}", infra_error=True))
            for each in part:
                run.append(each)
            run.close({"done": 3})
    with RunFolder.resume(two, MANIFEST) as run:
        run.close({"done": 4})
    hashes = "".join(json.loads(line)["sha256"] for line in lines(one))
    assert digest_of(one) == digest_of(two) == hashlib.sha256(hashes.encode()).hexdigest()


# --------------------------------------------------------------------- odd files and forced resumes


@pytest.mark.parametrize("text", [b"\xff\xfe\n", b'{"schema": "turntrace/2", "id": "\xe9"}\n'])
def test_a_file_that_is_not_utf8_is_one_line(tmp_path: Path, text: bytes) -> None:
    run_with(tmp_path, record("a"))
    with (tmp_path / TRAJECTORIES).open("ab") as out:
        out.write(text)
    with pytest.raises(RunFolderError, match=r"trajectories.jsonl:2: ") as raised:
        list(read_trajectories(tmp_path))
    assert "\n" not in str(raised.value)
    with pytest.raises(RunFolderError, match=r"trajectories.jsonl:2 "):
        RunFolder.resume(tmp_path, MANIFEST)


def test_a_forced_resume_keeps_what_the_earlier_starts_were(tmp_path: Path) -> None:
    run_with(tmp_path, record("a"))
    configs = [MANIFEST, *({**MANIFEST, "config": {"rollout": {"n": n}}} for n in (3, 4))]
    for manifest in configs[1:]:
        RunFolder.resume(tmp_path, manifest, force=True).close()
    RunFolder.resume(tmp_path, configs[-1], force=True).close()  # the same again is no new start
    manifest = read_manifest(tmp_path)
    assert manifest["config"] == configs[-1]["config"]
    assert [one["config"] for one in manifest["earlier_starts"]] == [
        one["config"] for one in configs[:-1]
    ]


OLD_TOOLS = """
tools:
  - class_name: tools.gsm8k.Gsm8kTool  # graded by the number
    config: {method: flexible}
"""


@pytest.mark.parametrize(
    ("tools", "is_same"),
    [
        (OLD_TOOLS.replace("# graded by the number", "# another comment"), True),
        ("tools:\n- {class_name: tools.gsm8k.Gsm8kTool, config: {method: flexible}}\n", True),
        (OLD_TOOLS.replace("flexible", "strict"), False),
        ("{no: yaml", False),
    ],
)
def test_comments_of_a_tool_config_are_no_difference(
    tmp_path: Path, tools: str, is_same: bool
) -> None:
    """A shipped config may be worded otherwise in the next version."""
    RunFolder.create(tmp_path, {"tools": OLD_TOOLS}).close()
    if is_same:
        RunFolder.resume(tmp_path, {"tools": tools}).close()
    else:
        with pytest.raises(RunFolderError, match="tools"):
            RunFolder.resume(tmp_path, {"tools": tools})
