"""Task files: verl's schema from JSONL and Parquet, stable ids, mistakes with file and line."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from agent.commands.tasks_work import whole_number, write_gsm8k, write_gsm_symbolic
from agent.errors import TaskError
from agent.loop.tasks import Task, read_tasks, recorded_task, task_file_hash, without_nulls
from conversations.trajectory import Trajectory
from tests.helpers import ROOT

VERL_ROW = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "system", "content": "Use tools."}, {"role": "user", "content": "2+2?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "agent_name": "tool_agent",
    "extra_info": {
        "split": "train",
        "index": 0,
        "need_tools_kwargs": True,
        "tools_kwargs": {"calc_gsm8k_reward": {"create_kwargs": {"ground_truth": "4"}}},
    },
}


def jsonl(folder: Path, *rows: Any, name: str = "tasks.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


def as_parquet(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "tasks.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def error_of(path: Path) -> str:
    with pytest.raises(TaskError) as caught:
        list(read_tasks(path))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_row_in_verls_schema(tmp_path: Path) -> None:
    [task] = read_tasks(jsonl(tmp_path, VERL_ROW))
    assert task == Task(
        id=task.id,
        messages=VERL_ROW["prompt"],
        tools_kwargs={"calc_gsm8k_reward": {"create_kwargs": {"ground_truth": "4"}}},
        ground_truth="4",
        data_source="openai/gsm8k",
        extra={
            key: VERL_ROW[key] for key in ("ability", "reward_model", "agent_name", "extra_info")
        },
    )
    assert len(task.id) == 16


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi"},
        {"prompt": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}]},
    ],
)
def test_plain_rows(tmp_path: Path, row: dict[str, Any]) -> None:
    [task] = read_tasks(jsonl(tmp_path, row))
    assert (task.messages, task.tools_kwargs, task.extra) == (
        [{"role": "user", "content": "hi"}],
        {},
        None,
    )


def test_parquets_null_filled_keys_are_no_keys(tmp_path: Path) -> None:
    other = {
        "prompt": [
            {
                "role": "assistant",
                "content": "x",
                "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
            }
        ],
        "extra_info": {"tools_kwargs": {"code_interpreter": {"create_kwargs": {"files": ["a"]}}}},
    }
    tasks = list(read_tasks(as_parquet(tmp_path, VERL_ROW, other)))
    assert [task.tools_kwargs for task in tasks] == [
        {"calc_gsm8k_reward": {"create_kwargs": {"ground_truth": "4"}}},
        {"code_interpreter": {"create_kwargs": {"files": ["a"]}}},
    ]
    assert tasks[0].messages == VERL_ROW["prompt"]
    assert tasks[1].extra == {"extra_info": other["extra_info"]}


def test_jsonl_and_parquet_give_the_same_task(tmp_path: Path) -> None:
    rows = [
        VERL_ROW,
        {"prompt": [{"role": "user", "content": "x"}], "reward_model": {"ground_truth": "5"}},
    ]
    assert list(read_tasks(jsonl(tmp_path, *rows))) == list(read_tasks(as_parquet(tmp_path, *rows)))


def test_many_parquet_batches_keep_order(tmp_path: Path) -> None:
    path = as_parquet(tmp_path, *({"id": index, "prompt": "x"} for index in range(700)))
    assert [task.id for task in read_tasks(path)] == [str(index) for index in range(700)]


def test_repeated_rows_are_numbered_and_ids_stay(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "a"})
    a, b, a1, a2 = (task.id for task in read_tasks(path))
    assert (a1, a2) == (f"{a}#1", f"{a}#2")
    assert a != b
    assert [task.id for task in read_tasks(path, limit=3)] == [a, b, a1]


def test_a_rows_own_id_is_kept(tmp_path: Path) -> None:
    assert [
        task.id
        for task in read_tasks(
            jsonl(tmp_path, {"id": 7, "prompt": "a"}, {"id": "x", "prompt": "a"})
        )
    ] == ["7", "x"]


def test_the_same_id_twice_names_both_places(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"id": 7, "prompt": "a"}, "\n", {"id": "7", "prompt": "b"})
    said = error_of(path)
    assert said.startswith(f"{path}:3: the id '7'")
    assert f"{path}:1" in said


def test_reading_is_lazy(tmp_path: Path) -> None:
    tasks = read_tasks(jsonl(tmp_path, {"prompt": "a"}, {"prompt": "b"}, "{broken\n"))
    assert [task.messages[0]["content"] for task in itertools.islice(tasks, 2)] == ["a", "b"]
    with pytest.raises(TaskError, match=r"tasks\.jsonl:3"):
        next(tasks)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{broken\n", ":1: not a JSON object on one line"),
        ("[\n", "write one object a line instead"),
        ('["prompt"]\n', ':1: a task is a JSON object such as {"prompt": "..."}, got list'),
        ({"question": "a"}, "neither prompt nor messages"),
        ({"question": "a"}, "its keys: question"),
        (
            {"question": "a", "answer": "#### 4"},
            "turntrace tasks gsm8k makes tasks of GSM8K's own file",
        ),
        ({"prompt": "a", "messages": []}, "both prompt and messages"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": 3}, "prompt must be a text or a list of messages, got int 3"),
        ({"prompt": []}, "messages must be a non-empty list"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, "message 0 has role 'robot'"),
        ({"prompt": "a", "extra_info": "x"}, "extra_info must be an object, got str 'x'"),
        ({"prompt": "a", "reward_model": ["4"]}, "reward_model must be an object, got list"),
        ({"prompt": "a", "tools_kwargs": {"t": 1}}, "tools_kwargs.t must be an object, got int 1"),
        (
            {"prompt": "a", "extra_info": {"tools_kwargs": {"t": {"create_kwarg": {}}}}},
            "extra_info.tools_kwargs.t.create_kwarg is not known",
        ),
        (
            {"prompt": "a", "extra_info": {"need_tools_kwargs": True}},
            "need_tools_kwargs is true but there are no tools_kwargs",
        ),
        ({"prompt": "a", "id": ""}, "id must be a string or an integer"),
        ({"prompt": "a", "id": True}, "id must be a string or an integer, got bool True"),
        ({"prompt": "a <image>", "images": ["http://["]}, "is no address"),
        ('{"prompt": "a", "x": ' + "[" * 650 + "]" * 650 + "}\n", "nested too deeply"),
        ('{"prompt": "a", "score": NaN}\n', "score holds what JSON cannot"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, row: Any, says: str) -> None:
    path = jsonl(tmp_path, row)
    text = error_of(path)
    assert text.startswith(f"{path}:1: ")
    assert says in text


def test_a_tools_image_is_in_the_task_files_folder(tmp_path: Path) -> None:
    kwargs = {"zoom": {"create_kwargs": {"image": "a.png"}}}
    [task] = read_tasks(jsonl(tmp_path, {"prompt": "a", "tools_kwargs": kwargs}))
    assert task.tools_kwargs["zoom"]["create_kwargs"] == {"image": str(tmp_path / "a.png")}


def test_a_record_makes_nobody_read_a_file() -> None:
    lines = (ROOT / "tests/conversations/turntrace_1/trajectories.jsonl").read_text().splitlines()
    record = Trajectory.from_line(lines[0])
    shown = {**record.messages[0], "content": [{"type": "image", "image": "/etc/hostname"}]}
    kwargs = {"zoom": {"create_kwargs": {"image": "/etc/hostname"}}}
    for changed in (
        replace(record, messages=[shown, *record.messages[1:]]),
        replace(record, extra={"tools_kwargs": kwargs}),
    ):
        with pytest.raises(TaskError, match=r"names no image|is a file"):
            recorded_task(changed)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.symlink_to("/proc/self/mem")  # opens, and fails when read, for root too
    assert error_of(path) == f"{path}: cannot be read: Input/output error"


def test_a_null_ground_truth_is_none_given(tmp_path: Path) -> None:
    row = {"prompt": "a", "reward_model": {"ground_truth": "4"}}
    tasks = read_tasks(
        jsonl(tmp_path, {**row, "ground_truth": None}, {**row, "ground_truth": 0}, row)
    )
    assert [task.ground_truth for task in tasks] == ["4", 0, "4"]


def test_a_bad_parquet_row_is_named(tmp_path: Path) -> None:
    path = as_parquet(tmp_path, {"prompt": "a", "image": b"x"})
    assert error_of(path).startswith(f"{path}: row 1: image holds what JSON cannot")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "no such task file"),
        ("tasks.csv", b"a,b", "a task file ends in .jsonl"),
        ("tasks", b"x", "not without a suffix"),
        ("empty.jsonl", b"", "holds no tasks"),
        ("blank.json", b"\n\n", "holds no tasks"),
        ("latin.jsonl", b'{"prompt": "\xe9"}', "is not UTF-8 text"),
        ("bad.parquet", b"PAR1 nothing", "cannot be read as Parquet after row 0"),
    ],
)
def test_a_file_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    text = error_of(path)
    assert text.startswith(str(path))
    assert says in text


@pytest.mark.parametrize("name", ["tasks", "tasks.jsonl"])
def test_a_folder_is_said_to_be_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert error_of(tmp_path / name) == f"{tmp_path / name}: is a folder; name a task file in it"


def test_an_empty_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    assert "holds no tasks" in error_of(path)


def test_a_byte_order_mark_and_odd_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes('\ufeff{"prompt": "a"}\r\n{"prompt": "b\u2028c"}'.encode())
    assert [task.messages[0]["content"] for task in read_tasks(path)] == ["a", "b\u2028c"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_without_nulls_leaves_no_null_key_and_is_idempotent(value: Any) -> None:
    cleaned = without_nulls(value)
    assert without_nulls(cleaned) == cleaned
    assert ": null" not in json.dumps(cleaned)


def test_gsm_symbolic_is_reproducible_and_reads_back(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert write_gsm_symbolic(first, size=20, seed=3) == 20
    write_gsm_symbolic(second, size=20, seed=3)
    write_gsm_symbolic(other, size=20, seed=4)
    assert task_file_hash(first) == task_file_hash(second) != task_file_hash(other)
    tasks = list(read_tasks(first))
    assert {task.data_source for task in tasks} == {"reasoning_gym/gsm_symbolic"}
    assert all(task.ground_truth.isdigit() for task in tasks)
    assert tasks[5].extra["extra_info"] == {"index": 5, "split": "test", "seed": 3}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("42", "42"),
        ("42.0", "42"),
        ("-3.00", "-3"),
        ("1.5", "1.5"),
        ("0.25", "0.25"),
        ("42.", "42."),
        ("v1.0", "v1.0"),
    ],
)
def test_whole_numbers_have_no_decimals(answer: str, text: str) -> None:
    assert whole_number(answer) == text


def test_gsm8k_rows_take_the_final_number(tmp_path: Path) -> None:
    source = jsonl(
        tmp_path,
        {"question": "Q", "answer": "1000+3=<<1000+3=1003>>1,003\n#### 1,003"},
        name="train.jsonl",
    )
    out = tmp_path / "made" / "tasks.jsonl"
    assert write_gsm8k(source, out) == 1
    [task] = read_tasks(out)
    assert (task.ground_truth, task.data_source, task.messages[0]["content"]) == (
        "1003",
        "openai/gsm8k",
        "Q",
    )
    assert task.extra["extra_info"]["split"] == "train"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q"},
        {"question": "Q", "answer": "42"},
        {"question": "Q", "answer": 42},
        "{",
        "[1]",
    ],
)
def test_a_bad_gsm8k_row_leaves_no_file(tmp_path: Path, row: Any) -> None:
    source = jsonl(tmp_path, {"question": "Q", "answer": "#### 1"}, row, name="train.jsonl")
    with pytest.raises(TaskError, match=r"train\.jsonl:2: "):
        write_gsm8k(source, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
