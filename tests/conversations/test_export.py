"""What every export does: choose, count, write whole or not at all, and say so on a card."""

from __future__ import annotations

import functools
import itertools
import json
import math
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.commands.export import FORMATS
from conversations import atif
from conversations.errors import ExportError
from conversations.export import job
from conversations.export.filters import Filters, Seen, Selection
from conversations.export.formats import export_names, get_format
from conversations.export.groups import Statistics, pass_at_k
from conversations.export.text import TextView
from conversations.export.writers import arrow_schema, fitted, merged, shape_of
from conversations.run.open_run import Run, open_run
from conversations.trajectory import INVALID_STATUSES
from conversations.upgrade import upgraded
from tests.command import turntrace
from tests.conversations.exports import exported, small_run
from tests.conversations.pages import changed_run
from tests.conversations.templates import LLAMA3
from tests.helpers import ROOT


@functools.cache
def records() -> list[dict[str, Any]]:
    return list(small_run().records())


# ---------------------------------------------------------------------- statistics


@given(
    st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))
)
def test_pass_at_k_is_the_share_of_draws_with_a_pass(numbers: tuple[int, int, int]) -> None:
    n, passed, k = numbers
    draws = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
    assert math.isclose(pass_at_k(n, passed, k), sum(map(any, draws)) / len(draws))


def record_of(task_id: str, reward: float | None, **fields: Any) -> dict[str, Any]:
    first = next(record for record in records() if not record["infra_error"])
    return {**first, "task_id": task_id, "reward": reward, **fields}


def test_statistics_count_rewards_by_group_and_no_infrastructure_failure() -> None:
    statistics = Statistics()
    for task_id, rewards in {"a": [1, 1, 0, 0], "b": [0, 0, 0, 0], "c": [1, 1]}.items():
        for reward in rewards:
            statistics.add(record_of(task_id, reward))
    statistics.add(record_of("a", None, infra_error=True))
    statistics.add(record_of("d", None))
    assert statistics.pass_at() == {
        1: (pytest.approx(0.5), 3),
        2: (pytest.approx((5 / 6 + 0 + 1) / 3), 3),
        4: (pytest.approx(0.5), 2),
    }
    assert (statistics.infra_errors, statistics.without_reward) == (1, 1)
    assert statistics.reward_mean() == pytest.approx(0.4)
    assert statistics.group_std() == pytest.approx(0.5 / 3)
    table = statistics.table()
    assert (
        table["groups with rewards"],
        table["  rewards differ"],
        table["  no sample passes"],
    ) == ("3", "1", "1")


# ---------------------------------------------------------------------- filters


FILTERS = [
    Filters(),
    Filters(include_infra_errors=True),
    Filters(min_reward=0.5),
    Filters(max_reward=0.5),
    Filters(min_reward=0.5, max_reward=0.5),
    Filters(stop_reasons=frozenset({"stop", "max_turns"})),
    Filters(valid_calls_only=True),
    Filters(mixed_groups=True),
    Filters(pass_rate=(0.2, 0.6)),
    Filters(pass_rate=(0.0, 0.3), pass_reward=0.5),
    Filters(max_tokens=600),
    Filters(dedupe=True),
    Filters(min_reward=0.1, valid_calls_only=True, mixed_groups=True, max_tokens=900),
]


def asked(filters: Filters) -> str:
    """The names of what is not as it was: a set's own text is another in each process."""
    return " ".join(
        each.name
        for each in fields(filters)
        if getattr(filters, each.name) != getattr(Filters(), each.name)
    )


@pytest.mark.parametrize("filters", FILTERS, ids=asked)
def test_what_is_kept_meets_every_filter_and_what_is_not_is_counted(filters: Filters) -> None:
    selection = Selection(small_run(), filters)
    kept = list(selection)
    assert len(kept) + selection.dropped.total() == selection.whole.trajectories == len(small_run())
    assert selection.kept.trajectories == len(kept) > 0
    expected = [record["id"] for record in records() if meets(record, filters)]
    if not filters.dedupe:
        assert [record["id"] for record in kept] == expected
    else:
        assert {record["id"] for record in kept} <= set(expected)


def meets(record: dict[str, Any], filters: Filters) -> bool:
    group = [
        one["reward"]
        for one in records()
        if one["task_id"] == record["task_id"] and one["reward"] is not None
    ]
    share = sum(reward >= filters.pass_reward for reward in group) / max(1, len(group))
    low, high = filters.pass_rate or (0, 1)
    needs_reward = filters.min_reward is not None or filters.max_reward is not None
    reward = record["reward"]
    return (
        (filters.include_infra_errors or not record["infra_error"])
        and (not needs_reward or reward is not None)
        and (filters.min_reward is None or reward >= filters.min_reward)
        and (filters.max_reward is None or reward <= filters.max_reward)
        and (not filters.stop_reasons or record["stop_reason"] in filters.stop_reasons)
        and not (
            filters.valid_calls_only
            and INVALID_STATUSES & {call["status"] for call in record["tool_calls"]}
        )
        and not (filters.mixed_groups and len(set(group)) < 2)
        and (filters.pass_rate is None or (bool(group) and low <= share <= high))
        and (
            filters.max_tokens is None
            or len(record["prompt_ids"] + record["response_ids"]) <= filters.max_tokens
        )
    )


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"stop_reasons": frozenset({"stopp"})}, "there is no stop reason stopp"),
        ({"pass_rate": (0.5, 0.2)}, "LOW <= HIGH"),
        ({"pass_rate": (math.nan, 0.2)}, "LOW <= HIGH"),
        ({"min_reward": math.nan}, "got nan"),
        ({"pass_rate": (0.0, 2.0)}, "HIGH <= 1"),
        ({"min_reward": 1.0, "max_reward": 0.0}, "is more than the most"),
    ],
)
def test_filters_that_mean_nothing_are_refused(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(ExportError, match=what):
        Filters(**fields)


def test_the_same_tokens_are_a_duplicate_and_other_ones_are_not() -> None:
    record = record_of("a", 1.0)
    duplicates = Seen()
    changed = {**record, "response_ids": [*record["response_ids"][:-1], 5]}
    assert [
        duplicates.add(one) for one in (record, changed, {**record, "id": "other"}, changed)
    ] == [False, False, True, True]


# ---------------------------------------------------------------------- text


def test_tools_stand_in_the_system_message_as_they_stood_in_the_prompt() -> None:
    run = small_run()
    view = TextView(run.template(), {})
    with_system = {True: 0, False: 0}
    for record in run.records():
        if record["turns"]:
            messages = view.messages(record)
            first = next(
                index for index, message in enumerate(messages) if message["role"] == "assistant"
            )
            asked = [message for message in messages[:first] if message["role"] != "tool"]
            tools_spoke = len(asked) != first
            if not tools_spoke:
                assert view.render(asked, generation=True) == view.prompt(record)
            with_system[record["messages"][0]["role"] == "system"] += 1
    assert all(with_system.values()), "both kinds of prompts were seen"


def test_a_template_without_a_place_for_tools_keeps_the_messages_as_they_are() -> None:
    run = open_run(small_run().path)  # its own: the template is changed
    template = run.template()
    template.tokenizer.chat_template = LLAMA3
    record = next(record for record in run.records() if record["turns"])
    messages = TextView(template, {}).messages(record)
    assert [message["content"] for message in messages][:1] == [record["messages"][0]["content"]]


# ---------------------------------------------------------------------- Parquet of any shape

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abc"), json_values, min_size=1, max_size=3),
        min_size=1,
        max_size=5,
    )
)
@settings(deadline=None)
def test_rows_of_any_shape_fit_one_schema(rows: list[dict[str, Any]]) -> None:
    """What has one type everywhere comes back as it was, nulls for what was not there; the rest
    as JSON text."""
    import pyarrow as pa

    shape: Any = None
    for row in rows:
        shape = merged(shape, shape_of(row))
    schema = arrow_schema(shape)
    table = pa.Table.from_pylist([fitted(row, shape) for row in rows], schema=schema)
    for row, back in zip(rows, table.to_pylist(), strict=True):
        for key, value in row.items():
            if key in back and isinstance(back[key], str) and not isinstance(value, str):
                assert json.loads(back[key]) == value
            elif isinstance(value, (bool, int, float, str)):
                assert back[key] == value or math.isclose(back[key], value)


# ---------------------------------------------------------------------- the folder


def test_every_format_is_there_and_says_what_it_is() -> None:
    for name in export_names():
        found = get_format(name)
        assert found.name == name
        assert found.fields
        assert found.usage
    assert ", ".join(export_names()) == FORMATS, "what --help says"
    with pytest.raises(ExportError, match=r"'openrlhf'.* verl-rl, "):
        get_format("openrlhf")


def test_the_card_names_counts_filters_hashes_and_the_command(tmp_path: Path) -> None:
    filters = Filters(min_reward=0.5, stop_reasons=frozenset({"stop"}))
    done = job.export_run(
        small_run(),
        "trl-sft",
        tmp_path / "out",
        filters,
        command="turntrace export run --to trl-sft",
    )
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for part in (
        f"# {done.rows} trajectories for TRL's SFTTrainer",
        "Filters: min_reward = 0.5, stop_reasons = stop.",
        "turntrace export run --to trl-sft",
        done.run_files["trajectories.jsonl"],
        done.files["train.parquet"][0],
        "license of the tasks | unknown",
        "pass@1",
        *(f"| {reason} | {count} |" for reason, count in done.dropped.items()),
    ):
        assert part in text
    assert done.kept.trajectories == done.rows
    assert Counter(file.name for file in (tmp_path / "out").iterdir()) == Counter(
        ["README.md", "train.parquet"]
    )


def test_the_same_export_twice_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("parquet", "trl-sft", "verl-rl", "atif"):
        folder, _ = exported(name)
        job.export_run(small_run(), name, tmp_path / name)
        for file in folder.iterdir():
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), name


def test_plain_parquet_holds_the_whole_record() -> None:
    import pandas as pd

    folder, done = exported("parquet")
    table = pd.read_parquet(folder / "trajectories.parquet")
    kept = [record for record in records() if not record["infra_error"]]
    assert len(table) == done.rows == len(kept)
    assert set(table.columns) == set(kept[0])
    for row, record in zip(table.to_dict("records"), kept, strict=True):
        for name in ("prompt_ids", "response_ids", "response_mask"):
            assert row[name].tolist() == record[name]
        assert [
            None if math.isnan(value) else value for value in row["response_logprobs"]
        ] == record["response_logprobs"]
        for name in (
            "messages",
            "tool_calls",
            "tools",
            "extra",
            "ground_truth",
            "sampling",
            "reward_parts",
        ):
            assert json.loads(row[name]) == record[name]
        assert (row["sha256"], row["stop_reason"], row["num_turns"]) == (
            record["sha256"],
            record["stop_reason"],
            record["num_turns"],
        )


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(ExportError, match="is there already"):
        job.export_run(small_run(), "parquet", out)
    with pytest.raises(ExportError, match=r"60 trajectories: .* reward"):
        job.export_run(small_run(), "parquet", tmp_path / "other", Filters(min_reward=99.0))
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "mine"]


def test_ctrl_c_leaves_nothing_half_made(tmp_path: Path) -> None:
    """The run is a pipe's worth of the same records, so that the export is still at it when the
    signal comes."""
    long_run = tmp_path / "run"
    long_run.mkdir()
    for name in ("run.json", "tokenizer"):
        (long_run / name).symlink_to(small_run().path / name)
    lines = (small_run().path / "trajectories.jsonl").read_text().splitlines()
    with (long_run / "trajectories.jsonl").open("w") as out:
        for turn in range(60):
            out.writelines(line.replace("apples-", f"apples-{turn:03d}") + "\n" for line in lines)
    script = (
        "import conversations, sys\n"
        "from conversations.export import job\n"
        "run = conversations.open_run(sys.argv[1])\n"
        "run.records = lambda *, check=True: (run.record(name, check=False) for name in run.ids)\n"
        "tell = lambda count: print(count, flush=True)\n"
        "job.export_run(run, 'verl-sft', sys.argv[2], progress=tell)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, long_run, tmp_path / "out"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "300\n":
        assert process.poll() is None
    assert list(tmp_path.glob(".out.*.partial"))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_run_without_a_tokenizer_is_exported_and_the_card_says_what_was_not_checked(
    tmp_path: Path,
) -> None:
    import conversations

    bare = tmp_path / "run"
    bare.mkdir()
    for name in ("run.json", "trajectories.jsonl"):
        (bare / name).write_bytes((small_run().path / name).read_bytes())
    done = job.export_run(conversations.open_run(bare), "openrlhf-sft", tmp_path / "out")
    assert done.verdicts == {"not checked": done.rows}
    assert "nothing was checked" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ExportError, match=r"holds no tokenizer\.json"):
        job.export_run(conversations.open_run(bare), "trl-preference", tmp_path / "pairs")


def test_memory_does_not_grow_with_the_rows_of_a_batch_writer(tmp_path: Path) -> None:
    """Rows are asked for as they are written: two batches of them are alive, never more."""
    import pyarrow as pa

    from conversations.export.writers import BATCH, write_parquet

    alive, most = 0, 0

    class Row(dict[str, Any]):
        def __init__(self) -> None:
            nonlocal alive, most
            super().__init__(x=1)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    write = write_parquet("x.parquet", lambda: pa.schema([("x", pa.int64())]))
    assert write((Row() for _ in range(BATCH * 5)), tmp_path) == BATCH * 5
    assert most <= 2 * BATCH


# ---------------------------------------------------------------------- the command


def test_the_command_exports_and_a_mistake_is_one_line(tmp_path: Path) -> None:
    run = small_run().path
    done = turntrace(
        "export",
        run,
        "--to",
        "trl-sft",
        "--out",
        tmp_path / "out",
        "--min-reward",
        "0.5",
        "--dedupe",
    )
    assert done.returncode == 0, done.stderr
    assert "left out: reward" in done.stdout
    assert (
        f"turntrace export {run} --to trl-sft --out {tmp_path / 'out'} --min-reward 0.5"
        in (tmp_path / "out" / "README.md").read_text()
    )
    for arguments, what in {
        ("--to", "trl"): "error: there is no format 'trl'",
        ("--to", "atif", "--pass-rate", "x"): "error: --pass-rate x: a band is LOW:HIGH",
    }.items():
        failed = turntrace("export", run, "--out", tmp_path / "no", *arguments)
        assert (failed.returncode, failed.stdout) == (2, "")
        assert failed.stderr.startswith(what)
        assert failed.stderr.count("\n") == 1


def test_a_reward_that_is_no_number_is_refused() -> None:
    """No reward is as large as it: every sample would fail."""
    done = turntrace("stats", small_run().path, "--pass-reward", "nan")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--pass-reward" in done.stderr


def test_stats_prints_the_groups(tmp_path: Path) -> None:
    done = turntrace("stats", small_run().path)
    assert done.returncode == 0, done.stderr
    assert "pass@4" in done.stdout


# ---------------------------------------------------------------------- foreign records


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("messages", [1]), ("response_ids", ["x"]), ("tool_calls", [{}]), ("reward", "x"),
        ("stop_reason", [1]), ("turns", {}), ("branches", [1]),
    ],
)  # fmt: skip
def test_a_record_of_another_form_is_named_under_a_forged_hash(
    tmp_path: Path, name: str, value: object
) -> None:
    def change(number: int, record: dict[str, Any]) -> None:
        record.update({name: value} if number == 0 else {})

    path = changed_run(tmp_path / "run", small_run().path, change)
    for command in (["stats"], ["export", "--to", "openai", "--out", tmp_path / "out"]):
        done = turntrace(command[0], path, *command[1:])
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert f"trajectory {records()[0]['id']}: " in done.stderr
        assert name in done.stderr
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- text that is no Unicode

HALF = "half \ud83d of a pair"


@pytest.fixture(scope="module")
def half_a_pair(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run with half a surrogate pair in the texts of one task, keys of its row included."""

    def change(number: int, record: dict[str, Any]) -> None:
        if number % 2:
            for message in record["messages"]:
                message["content"] += HALF
            record["extra"] = {HALF: [HALF]}
            record["warnings"] = [{"kind": "other", "text": HALF}]

    path = tmp_path_factory.mktemp("half") / "run"
    return open_run(changed_run(path, small_run().path, change))


@pytest.mark.parametrize("to", export_names())
def test_half_a_surrogate_pair_ends_no_export(half_a_pair: Run, tmp_path: Path, to: str) -> None:
    whole, done = exported(to)[1], job.export_run(half_a_pair, to, tmp_path / "out")
    assert done.rows == whole.rows
    for file in (tmp_path / "out").glob("*.jsonl"):
        for row in map(json.loads, file.read_text(encoding="ascii").splitlines()):
            assert to == "atif" or json.dumps(row, ensure_ascii=False).encode()
    for file in (tmp_path / "out").glob("*.parquet"):
        rows = pq.read_table(file).to_pylist()
        assert len(rows) == done.rows
        if to in ("verl-sft", "verl-rl"):
            assert "half \ufffd of a pair" in json.dumps(rows, ensure_ascii=False)


def test_atif_keeps_half_a_surrogate_pair(half_a_pair: Run, tmp_path: Path) -> None:
    job.export_run(half_a_pair, "atif", tmp_path / "out")
    lines = (tmp_path / "out" / "trajectories.jsonl").read_text().splitlines()
    first = upgraded(atif.record_of(json.loads(lines[0])))
    assert first == half_a_pair.record(first["id"])
