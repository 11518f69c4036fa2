"""A `turntrace/1` line reads in today's form, and its hash is that of the line as it stands."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from conversations.checks.facts import RunFacts
from conversations.checks.record import check_line
from conversations.errors import RecordError
from conversations.trajectory import Trajectory, line_hash, read_record, record_hash
from conversations.upgrade import OLD_SCHEMA, as_written, upgraded
from conversations.warning import KINDS, RecordWarning, WarningKind
from tests.conversations.test_trajectory import trajectory

OLD_WARNINGS = {
    "the response of call_0_0 holds control tokens as text: <|im_end|>, <|im_start|>": (
        "control_tokens"
    ),
    "the chat template drops earlier <think> blocks; the sampled tokens were kept": (
        "history_rewritten"
    ),
    "the model sampled ids that the tokenizer does not have: does the engine run the model of "
    "model_path?": "unknown_ids",
    "tools_kwargs names 'a\nb', which is not a tool of this run": "unknown_tool_kwargs",
    "tool toy: release failed: ValueError: no": "release_failed",
    "interaction patient: finalize_interaction failed: RuntimeError: broken": "user_failed",
    "interaction patient: start_interaction took more than 0.5 s": "user_failed",
    "cut off when 8 conversations were done (over_sample_rate)": "over_sampled",
    "gone on with from token 17, where it was cut off": "resumed",
    "gone on with: toy answered otherwise when its calls were made again": "tools_differ",
    "the user, asked again, answers turn 0 otherwise than recorded; the recorded answer stands": (
        "user_differs"
    ),
    "the steps have no timestamps: started_at is 1970": "imported",
    "imported without token ids, mask and log-probs: no step is a generation": "imported",
    "something else": "other",
}


def old_line(**changes: Any) -> str:
    """A line as a version with `turntrace/1` wrote it."""
    record = json.loads(trajectory().to_line())
    rest = {key: value for key, value in record.items() if key not in ("sha256", "branches")}
    rest |= {"schema": OLD_SCHEMA, "warnings": list(OLD_WARNINGS), **changes}
    return json.dumps({**rest, "sha256": line_hash(rest)})


def test_each_old_warning_has_its_kind() -> None:
    record = read_record(old_line())
    found = {warning["text"]: warning["kind"] for warning in record["warnings"]}
    assert found == OLD_WARNINGS
    assert set(OLD_WARNINGS.values()) < set(KINDS) == set(get_args(WarningKind))


def test_the_hash_of_an_old_line_is_that_of_the_line_in_either_form() -> None:
    line = json.loads(old_line())
    record = upgraded(line)
    assert record["branches"] == []
    assert as_written(record) == line
    assert record_hash(record) == line["sha256"] == line_hash(line)


def test_an_old_record_is_written_as_a_new_one() -> None:
    again = Trajectory.from_line(Trajectory.from_line(old_line()).to_line())
    assert again == Trajectory.from_line(old_line())
    assert json.loads(again.to_line())["schema"] == "turntrace/2"


def test_an_old_failure_that_had_no_json_form_is_partial() -> None:
    error = "trajectory t-0 cannot be written as JSON: Object of type date"
    line = old_line(infra_error=True, error=error, warnings=[])
    assert Trajectory.from_line(line).warnings[0].kind == "partial"
    assert as_written(read_record(line)) == json.loads(line)
    assert check_line(line.encode() + b"\n", RunFacts()).partial


@pytest.mark.parametrize(
    "changes",
    [{"branches": []}, {"warnings": [{"kind": "other", "text": "x"}]}, {"warnings": "x"}],
)
def test_an_old_line_holds_nothing_new(changes: dict[str, Any]) -> None:
    name = next(iter(changes))
    with pytest.raises(RecordError, match=name):
        read_record(old_line(**changes))
    [finding] = check_line(old_line(**changes).encode() + b"\n", RunFacts()).findings
    assert name in finding.what


def test_a_changed_old_line_does_not_match_its_hash() -> None:
    with pytest.raises(RecordError, match="hash"):
        read_record(old_line().replace("something else", "something more"))


def test_damaged_branches_are_named() -> None:
    line = json.loads(trajectory().to_line()) | {"branches": [{"parent": None, "reason": "new"}]}
    text = json.dumps({**line, "sha256": line_hash(line)})
    with pytest.raises(RecordError, match="t-0 is damaged"):
        Trajectory.from_line(text)
    findings = check_line(text.encode() + b"\n", RunFacts()).findings
    assert any("branches.0.turns" in finding.what for finding in findings)


def test_a_kind_that_is_not_known_is_a_defect() -> None:
    warning = RecordWarning("else", "text")  # type: ignore[arg-type]
    line = trajectory(warnings=[warning]).to_line()
    findings = check_line(line.encode() + b"\n", RunFacts()).findings
    assert any("warnings.0.kind" in finding.what for finding in findings)
