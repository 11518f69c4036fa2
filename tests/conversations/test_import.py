"""What comes in from elsewhere: as far as it carries tokens, named where it does not, refused
line by line where it is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import conversations
from conversations.atif import document
from conversations.branches import rows
from conversations.errors import ImportFileError
from conversations.imports import atif, atif_steps, job
from conversations.imports.atif import CHANGED
from conversations.imports.continuations import REFERENCE
from conversations.imports.files import SourceDocument
from conversations.imports.job import Imported, import_run
from conversations.open_run import open_run
from conversations.trajectory import Trajectory
from conversations.verify import verify_run
from tests.command import turntrace
from tests.conversations.exports import small_run

TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "d",
        "parameters": {"type": "object", "properties": {}},
    },
}


def foreign() -> dict[str, Any]:
    """Another harness's document, with ids of the run's own tokenizer: two generations with a
    call in between."""
    template = small_run().template()
    asked = [{"role": "user", "content": "What is 6 times 7?"}]
    prompt = [token for _, ids in template.prompt(asked, [TOOL]) for token in ids]
    call = '<tool_call>\n{"name": "calculator", "arguments": {"a": 6}}\n</tool_call>'
    first = [*template.encode(call), template.end_id]
    gap = [
        token
        for _, ids in template.delta([{"role": "tool", "content": "42"}]).pieces
        for token in ids
    ]
    second = [*template.encode("It is 42."), template.end_id]

    def metrics(prompt_ids: list[int], ids: list[int]) -> dict[str, Any]:
        return {
            "prompt_token_ids": prompt_ids,
            "completion_token_ids": ids,
            "logprobs": [-0.5] * len(ids),
        }

    return {
        "schema_version": "ATIF-v1.6",
        "session_id": "s",
        "agent": {"name": "other", "version": "2", "model_name": "m", "tool_definitions": [TOOL]},
        "steps": [
            {
                "step_id": 1,
                "source": "user",
                "message": "What is 6 times 7?",
                "timestamp": "2026-01-01T00:00:00Z",
            },
            {
                "step_id": 2,
                "source": "agent",
                "message": "",
                "tool_calls": [
                    {"tool_call_id": "abc", "function_name": "calculator", "arguments": {"a": 6}}
                ],
                "observation": {
                    "results": [
                        {"source_call_id": "abc", "content": [{"type": "text", "text": "42"}]}
                    ]
                },
                "metrics": metrics(prompt, first),
            },
            {
                "step_id": 3,
                "source": "agent",
                "message": "It is 42.",
                "metrics": metrics(prompt + first + gap, second),
                "timestamp": "2026-01-01T00:00:02Z",
            },
        ],
        "extra": {"reward": 1},
    }


def take(
    tmp_path: Path, *documents: Any, kind: str = "atif", **options: Any
) -> tuple[Imported, list[Trajectory]]:
    file = tmp_path / "in.jsonl"
    file.write_text(
        "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in documents)
    )
    done = import_run(file, kind, tmp_path / "run", **options)
    return done, list(conversations.open_run(tmp_path / "run"))


def test_tokens_of_another_harness_become_a_record(tmp_path: Path) -> None:
    _, [one] = take(tmp_path, foreign(), tokenizer=small_run().path / "tokenizer")
    assert [kind for kind, _, _ in one.segments] == [
        "prompt",
        "sampled",
        "template",
        "tool",
        "template",
        "sampled",
    ]
    assert one.response_logprobs == [-0.5 if own else None for own in one.response_mask]
    assert [turn.start for turn in one.turns] == [turn.prompt_tokens for turn in one.turns]
    assert (
        one.messages[1]["raw"]
        == '<tool_call>\n{"name": "calculator", "arguments": {"a": 6}}\n</tool_call>'
    )
    assert [(line.call_id, line.status, line.response) for line in one.tool_calls] == [
        ("call_0_0", "ok", "42")
    ]
    assert (one.id, one.stop_reason, one.reward, one.wall_s) == ("s-0", "stop", 1.0, 2.0)
    assert texts(one) == [atif_steps.NO_STOP_REASON, atif_steps.LEDGER]
    verdict = []
    verify_run(tmp_path / "run", jobs=1, on_defect=lambda defect: verdict.append(str(defect)))
    assert verdict == []


def test_embedded_subagents_become_branches(tmp_path: Path) -> None:
    silent = foreign() | {"trajectory_id": "silent"}
    without_ids(silent)
    helper = foreign() | {"trajectory_id": "helper"}
    found = foreign() | {"subagent_trajectories": [helper, silent]}
    _, [one] = take(tmp_path, found, tokenizer=small_run().path / "tokenizer")
    (branch,) = one.branches
    assert (branch.parent, branch.reason) == (None, "new")
    assert branch.client["trajectory_id"] == "helper"
    assert branch.response_ids == one.response_ids
    assert any("silent" in text for text in texts(one))
    assert verify_run(tmp_path / "run").defects == 0


def segments(folder: Path, **names: str | None) -> Path:
    """A folder of documents: {name: the file that it says it is continued in}."""
    folder.mkdir()
    for name, later in names.items():
        found = foreign() | {"session_id": "s"} | ({REFERENCE: later} if later else {})
        (folder / f"{name}.json").write_text(json.dumps(found))
    return folder


def imported(source: Path, out: Path) -> list[Trajectory]:
    import_run(source, "atif", out, tokenizer=small_run().path / "tokenizer")
    assert verify_run(out).defects == 0
    return list(open_run(out))


def test_a_continuation_is_a_branch_of_what_it_continues(tmp_path: Path) -> None:
    """The files come in the order of their names, so the continuations first."""
    source = segments(tmp_path / "in", b_last=None, c_next="b_last.json", d_first="./c_next.json")
    [one] = imported(source, tmp_path / "run")
    assert [branch.client for branch in one.branches] == [
        {"continuation": "c_next.json"},
        {"continuation": "b_last.json"},
    ]
    assert [branch.reason for branch in one.branches] == ["new", "new"]
    assert all(branch.response_ids == one.response_ids for branch in one.branches)
    masks = sum(sum(row.trajectory.response_mask) for row in rows(one))
    assert masks == 3 * sum(one.response_mask)


@pytest.mark.parametrize(
    ("names", "records", "word"),
    [
        ({"a": "elsewhere.json"}, 1, "elsewhere.json"),
        ({"a": "../outside.json"}, 1, "outside.json"),
        ({"a": "a.json"}, 1, "a.json"),
        ({"a": "b.json", "b": "a.json"}, 1, None),
        ({"a": "c.json", "b": "c.json", "c": None}, 2, "c.json"),
    ],
    ids=["missing", "outside", "itself", "circle", "two of one"],
)
def test_every_file_is_imported_once_whatever_references_say(
    tmp_path: Path, names: dict[str, str | None], records: int, word: str | None
) -> None:
    (tmp_path / "outside.json").write_text(json.dumps(foreign()))
    found = imported(segments(tmp_path / "in", **names), tmp_path / "run")
    assert len(found) == records
    assert sum(1 + len(one.branches) for one in found) == len(names)
    said = [text for one in found for text in texts(one) if "continued" in text]
    assert len(said) == (word is not None)
    assert all(word in text for text in said if word)


def test_a_damaged_continuation_is_named_and_harms_no_other(tmp_path: Path) -> None:
    source = segments(tmp_path / "in", first="next.json")
    (source / "next.json").write_text('{"schema_version": "ATIF-v1.8"')
    [one] = imported(source, tmp_path / "run")
    assert one.branches == []
    assert any("next.json" in text for text in texts(one))


def own_document() -> dict[str, Any]:
    return document(next(iter(small_run().records())))


def lines(count: int) -> str:
    return "".join(f"{json.dumps(foreign())}\n" for _ in range(count))


@pytest.mark.parametrize(
    ("head", "name", "text", "records"),
    [
        (foreign, "b.jsonl", lambda: lines(3), 4),
        (foreign, "b.json", lambda: json.dumps([foreign()] * 3), 4),
        (foreign, "b.json", lambda: json.dumps([foreign()]), 2),
        (foreign, "b.jsonl", str, 1),
        (foreign, "b.json", lambda: json.dumps(own_document()), 2),
        (own_document, "b.json", lambda: json.dumps(foreign()), 2),
    ],
    ids=["lines", "list", "list of one", "no line", "own continuation", "own head"],
)
def test_what_is_no_continuation_is_imported_by_itself(
    tmp_path: Path,
    head: Callable[[], dict[str, Any]],
    name: str,
    text: Callable[[], str],
    records: int,
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.json").write_text(json.dumps(head() | {REFERENCE: name}))
    (source / name).write_text(text())
    done = import_run(source, "atif", tmp_path / "run", tokenizer=small_run().path / "tokenizer")
    found = list(open_run(tmp_path / "run"))
    assert (len(found), done.trajectories, done.defects) == (records, records, [])
    assert [branch for one in found for branch in one.branches] == []
    warned = sum(name in text for text in done.warnings)
    assert warned == (head is foreign)


def test_what_continues_a_defect_stands_alone(tmp_path: Path) -> None:
    source = segments(tmp_path / "in", a="b.json", b="c.json", c=None)
    (source / "a.json").write_text(json.dumps(foreign() | {REFERENCE: "b.json", "steps": []}))
    done = import_run(source, "atif", tmp_path / "run", tokenizer=small_run().path / "tokenizer")
    [one] = open_run(tmp_path / "run")
    assert (one.id, [branch.client for branch in one.branches]) == (
        "s-0",
        [{"continuation": "c.json"}],
    )
    assert [line.partition("a.json")[1] for line in done.defects] == ["a.json"]


def with_an_image_by_path(found: dict[str, Any]) -> None:
    source = {"media_type": "image/png", "path": "secret.png"}
    found["steps"][0]["message"] = [{"type": "image", "source": source}]


def without_steps(found: dict[str, Any]) -> None:
    found["steps"] = []


def with_a_damaged_subagent(found: dict[str, Any]) -> None:
    helper = foreign() | {"trajectory_id": "helper"}
    with_an_image_by_path(helper)
    found["subagent_trajectories"] = [helper]


@pytest.mark.parametrize(
    ("damage", "branches"),
    [(with_an_image_by_path, 0), (without_steps, 0), (with_a_damaged_subagent, 1)],
)
def test_a_continuation_that_cannot_be_read_leaves_its_head_whole(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], branches: int
) -> None:
    source = segments(tmp_path / "in", first="next.json")
    later = foreign()
    damage(later)
    (source / "next.json").write_text(json.dumps(later))
    [one] = imported(source, tmp_path / "run")
    assert (len(one.turns), len(one.branches)) == (2, branches)
    assert sum("next.json was left out" in text for text in texts(one)) == 1


def test_without_the_tokenizer_what_was_not_known_is_said(tmp_path: Path) -> None:
    _, [one] = take(tmp_path, foreign())
    assert [kind for kind, _, _ in one.segments] == ["prompt", "sampled", "tool", "sampled"]
    assert {atif_steps.RAW_IS_TEXT, atif_steps.GAPS_WHOLE} <= set(texts(one))


def texts(one: Trajectory) -> list[str]:
    """The texts of its warnings, all of the kind that an import has."""
    assert {warning.kind for warning in one.warnings} <= {"imported", "unproven"}
    return [warning.text for warning in one.warnings]


def without_ids(found: dict[str, Any]) -> None:
    del found["steps"][1]["metrics"]["completion_token_ids"]
    del found["steps"][1]["metrics"]["logprobs"]


def broken_sequence(found: dict[str, Any]) -> None:
    found["steps"][2]["metrics"]["prompt_token_ids"][3] += 1


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (without_ids, "step 2 has no prompt_token_ids"),
        (broken_sequence, "step 3 does not start with all tokens before it"),
    ],
)
def test_no_token_id_is_invented(tmp_path: Path, damage: Callable[[Any], None], why: str) -> None:
    found = foreign()
    damage(found)
    done, [one] = take(tmp_path, found, tokenizer=small_run().path / "tokenizer")
    assert (one.prompt_ids, one.response_ids, one.turns, one.segments, done.with_ids) == (
        [],
        [],
        [],
        [],
        0,
    )
    assert any(why in text for text in texts(one))
    assert [message["role"] for message in one.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert all(message.get("raw") is None for message in one.messages)


def test_log_probs_that_are_missing_or_no_float32_are_named(tmp_path: Path) -> None:
    found = foreign()
    del found["steps"][1]["metrics"]["logprobs"]
    found["steps"][2]["metrics"]["logprobs"][0] = -0.1
    _, [one] = take(tmp_path, found)
    first, second = one.turns
    shift = len(one.prompt_ids)
    assert one.response_logprobs[: first.end - shift] == [None] * (first.end - first.start)
    assert one.response_logprobs[second.start - shift] == pytest.approx(-0.1)
    assert {atif_steps.NO_LOGPROBS, atif_steps.NOT_FLOAT32} <= set(texts(one))


def twice_the_same_id(found: dict[str, Any]) -> None:
    calls = found["steps"][1]["tool_calls"]
    calls.append({**calls[0], "arguments": {"a": 7}})
    results = found["steps"][1]["observation"]["results"]
    results.append({"source_call_id": "abc", "content": "49"})


def twice_the_same_id_and_one_answer(found: dict[str, Any]) -> None:
    twice_the_same_id(found)
    found["steps"][1]["observation"]["results"].pop()


def without_definitions(found: dict[str, Any]) -> None:
    del found["agent"]["tool_definitions"]


def flat_definitions(found: dict[str, Any]) -> None:
    function = TOOL["function"]
    schema = {"input_schema": {"type": "object", "properties": {}}}
    found["agent"]["tool_definitions"] = [{"name": function["name"], **schema}]  # type: ignore[index]


def nameless_definitions(found: dict[str, Any]) -> None:
    found["agent"]["tool_definitions"] = [{"tool": "calculator"}]


def without_logprobs(found: dict[str, Any]) -> None:
    del found["steps"][1]["metrics"]["logprobs"]


def another_prompt(found: dict[str, Any]) -> None:
    found["steps"][0]["message"] = "What is 7 times 6?"


def thinking(found: dict[str, Any]) -> None:
    found["steps"][1]["reasoning_content"] = "six sevens"


CHANGES = [
    twice_the_same_id,
    twice_the_same_id_and_one_answer,
    without_definitions,
    flat_definitions,
    nameless_definitions,
    without_logprobs,
    without_ids,
    broken_sequence,
    another_prompt,
    thinking,
]


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_imported_verifies(
    tmp_path: Path, change: Callable[[Any], None], with_tokenizer: bool
) -> None:
    """With whatever the source lacks; nothing but a named warning may be the price."""
    found = foreign()
    change(found)
    options = {"tokenizer": small_run().path / "tokenizer"} if with_tokenizer else {}
    done, _ = take(tmp_path, found, foreign(), **options)
    assert (done.trajectories, done.defects) == (2, [])
    defects: list[str] = []
    verify_run(tmp_path / "run", on_defect=lambda defect: defects.append(str(defect)))
    assert defects == []


def test_calls_that_share_an_id_keep_their_own_answers(tmp_path: Path) -> None:
    found = foreign()
    twice_the_same_id(found)
    _, [one] = take(tmp_path, found)
    assert [(line.call_id, line.response) for line in one.tool_calls] == [
        ("call_0_0", "42"),
        ("call_0_1", "49"),
    ]
    without_ids(found)
    (tmp_path / "second").mkdir()
    _, [one] = take(tmp_path / "second", found)
    assert [call["id"] for call in one.messages[1]["tool_calls"]] == ["abc", "abc#2"]
    assert [message.get("tool_call_id") for message in one.messages[2:4]] == ["abc", "abc#2"]


def test_messages_that_do_not_match_their_tokens_are_a_warning(tmp_path: Path) -> None:
    found = foreign()
    another_prompt(found)
    _, [one] = take(tmp_path, found, tokenizer=small_run().path / "tokenizer")
    assert one.prompt_ids
    assert [warning.kind for warning in one.warnings][-1] == "unproven"
    assert any("not compared" in note for note in verify_run(tmp_path / "run").notes)


def test_an_error_of_the_reader_is_a_defect_of_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reader:
        def __init__(self, template: object) -> None:
            self._read = atif.AtifReader(None)

        def __call__(self, document: SourceDocument) -> Trajectory:
            if document.value["session_id"] == "bad":
                raise ZeroDivisionError("a bug")
            return self._read(document)

    monkeypatch.setattr(job, "_reader", lambda kind, template, *_: Reader(template))
    done, _ = take(tmp_path, foreign() | {"session_id": "bad"}, foreign())
    assert done.trajectories == 1
    [line] = done.defects
    assert "in.jsonl:1: " in line
    assert "ZeroDivisionError" in line


def test_a_list_of_documents_comes_in_one_by_one(tmp_path: Path) -> None:
    _, found = take(tmp_path, [foreign(), foreign() | {"session_id": "t"}])
    assert [one.id for one in found] == ["s-0", "t-0"]
    file = tmp_path / "list.json"
    file.write_text(json.dumps([foreign(), 7]))
    done = import_run(file, "atif", tmp_path / "other")
    assert done.trajectories == 1
    [line] = done.defects
    assert line.startswith(f"{file}[1]: ")


def at(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    return change


METRICS = ("steps", 1, "metrics")
BAD = {
    "schema_version is 'ATIF-v2.0'": at("schema_version", value="ATIF-v2.0"),
    "schema_version is None": at("schema_version", value=None),
    "steps.1.metrics.logprobs: 1 log-probs for": at(*METRICS, "logprobs", value=[-1.0]),
    "steps.1.metrics.logprobs.0: 0.5 is no log-probability": at(*METRICS, "logprobs", 0, value=0.5),
    "steps.1.metrics.completion_token_ids: -4 is no token id": at(
        *METRICS, "completion_token_ids", 0, value=-4
    ),
    "steps.1.metrics.prompt_token_ids: 4294967296 is no token id": at(
        *METRICS, "prompt_token_ids", 0, value=1 << 32
    ),
    "steps.1.metrics.prompt_token_ids.0: Input should be a valid integer": at(
        *METRICS, "prompt_token_ids", 0, value="7"
    ),
    "steps.0.source: Input should be 'system', 'user' or 'agent'": at(
        "steps", 0, "source", value="me"
    ),
    "steps.2.nonsense: Extra inputs are not permitted": at("steps", 2, "nonsense", value=1),
    "it has no steps": at("steps", value=[]),
    "the reward in extra is 'much', expected a finite number": at("extra", "reward", value="much"),
    "some timestamps have a time zone": at("steps", 2, "timestamp", value="2026-01-01T00:00:02"),
    "is not a JSON document: it holds NaN": at(*METRICS, "logprobs", 0, value=float("nan")),
    "is not a JSON document: it holds Infinity": at(*METRICS, "logprobs", 0, value=float("inf")),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_document_is_one_line_and_the_others_come_in(tmp_path: Path, what: str) -> None:
    bad = foreign()
    BAD[what](bad)
    done, found = take(tmp_path, foreign(), bad)
    assert len(found) == done.trajectories == 1
    counts = conversations.open_run(tmp_path / "run").manifest["counts"]
    assert (counts["asked"], counts["done"]) == (2, 1)
    [line] = done.defects
    assert line.startswith(f"{tmp_path / 'in.jsonl'}:2: ")
    assert what in line


def own() -> dict[str, Any]:
    return json.loads(
        json.dumps(
            document(next(record for record in small_run().records() if record["num_turns"] > 1))
        )
    )


def test_a_document_of_ours_that_was_edited_says_so(tmp_path: Path) -> None:
    found = own()
    found["steps"][-1]["message"] += "!"
    _, [one] = take(tmp_path, found)
    assert CHANGED in texts(one)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (at("extra", "turntrace", "tail_ids", value=None), "extra.turntrace is damaged"),
        (at("extra", "turntrace", "response_mask", value=[1]), "response_mask has another length"),
        (
            at("extra", "turntrace", "surprise", value=1),
            "extra.turntrace: the field surprise is not known",
        ),
        (at("steps", 0, "extra", value={}), "extra.turntrace is damaged"),
    ],
)
def test_a_document_of_ours_that_was_damaged_is_refused(
    tmp_path: Path, change: Any, what: str
) -> None:
    found = own()
    change(found)
    with pytest.raises(ImportFileError, match="no trajectory") as caught:
        take(tmp_path, found)
    assert what in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_documents_are_told_apart(tmp_path: Path) -> None:
    """The same session is a group; the same trajectory twice is a defect."""
    named = {**foreign(), "trajectory_id": "t"}
    done, found = take(tmp_path, foreign(), foreign(), named, copy.deepcopy(named))
    assert [one.id for one in found] == ["s-0", "s-1", "t-0"]
    assert done.defects == [f"{tmp_path / 'in.jsonl'}:4: trajectory_id 't' is there already"]


ROWS: list[Any] = [
    {"input": "user\nhi\n", "output": "hello", "gts": "42", "score": 1.0, "step": 3, "acc": True},
    {"input": "user\nhi\n", "output": "bye", "gts": "42", "score": 0, "step": 3, "acc": False},
    {"input": "user\nhi\n", "output": "bye", "gts": "42", "score": 0.5, "step": 4},
]


def test_a_verl_dump_is_messages_and_rewards(tmp_path: Path) -> None:
    bad = [
        {**ROWS[0], "score": "high"},
        {**ROWS[0], "output": None},
        {**ROWS[0], "step": 1.5},
        "[1]",
        "{",
    ]
    done, found = take(tmp_path, *ROWS, *bad, kind="verl")
    assert [one.reward for one in found] == [1.0, 0.0, 0.5]
    assert [one.sample for one in found] == [0, 1, 0]
    assert found[0].task_id == found[1].task_id != found[2].task_id
    assert all(
        "no token ids" in texts(one)[0] and not one.prompt_ids + one.response_ids for one in found
    )
    assert (found[0].ground_truth, found[0].extra) == ("42", {"step": 3, "acc": True})
    assert [line.partition(":")[2].partition(":")[0] for line in done.defects] == [
        "4",
        "5",
        "6",
        "7[0]",
        "8",
    ]


def test_verls_own_writer_is_what_is_read(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    trainer = SimpleNamespace(global_steps=7)
    RayPPOTrainer._dump_generations(
        trainer,
        ["q", "q"],
        ["a", "b"],
        ["42", None],
        [1.0, 0.0],
        {"acc": [1, 0]},
        str(tmp_path / "dumps"),
    )
    done = import_run(tmp_path / "dumps", "verl", tmp_path / "run")
    assert (done.trajectories, done.defects) == (2, [])
    assert [one.reward for one in conversations.open_run(tmp_path / "run")] == [1.0, 0.0]


def test_a_tokenizer_is_refused_where_text_lacks_its_tokens(tmp_path: Path) -> None:
    with pytest.raises(ImportFileError, match="special tokens"):
        take(tmp_path, *ROWS, kind="verl", tokenizer=small_run().path / "tokenizer")


def test_the_command_names_defects_and_a_mistake_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    edited = {**foreign(), "trajectory_id": "t\x1b[31m"}
    file.write_text(json.dumps(foreign()) + "\nnonsense\n" + 2 * (json.dumps(edited) + "\n"))

    done = turntrace("import", file, "--from", "atif", "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "2 trajectories in" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr.startswith(f"{file}:2: is not a JSON document")
    for arguments, what in {
        (file, "--from", "atif", "--out", tmp_path / "run"): "is there already",
        (file, "--from", "csv", "--out", tmp_path / "no"): "--from csv: allowed are atif, verl",
        (
            tmp_path / "none.jsonl",
            "--from",
            "atif",
            "--out",
            tmp_path / "no",
        ): "there is no such file",
        (file, "--from", "atif", "--out", tmp_path / "no", "--images", file): "no such folder",
        (file, "--from", "verl", "--out", tmp_path / "no", "--images", tmp_path): "for --from atif",
    }.items():
        failed = turntrace("import", *arguments)
        assert failed.returncode == 2
        assert what in failed.stderr
        assert failed.stderr.count("\n") == 1
