"""Features crossed with faults: each ends in the right record, which verifies without a defect and
exports without an error.

What broke before broke where two features met. Every pair of a feature and a fault runs with a user
and without one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conversations.branches import sequences
from conversations.errors import ExportError
from conversations.export import formats, job
from conversations.open_run import open_run
from conversations.run.store import read_trajectories
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from conversations.verify import verify_run
from tests.crossings.features import FEATURES, IMPOSSIBLE, open_store
from tests.crossings.world import FAULTS, USER_REWARDS, Fault, World

CELLS = [
    pytest.param(
        feature, fault, with_user, id=f"{feature}-{fault}-{'user' if with_user else 'alone'}"
    )
    for row, feature in enumerate(FEATURES)
    for column, fault in enumerate(FAULTS)
    if (feature, fault) not in IMPOSSIBLE
    for with_user in [FAULTS[fault].user is not None or (row + column) % 2 == 0]
]
"""Every pair of a feature and a fault; every other one has a user."""


@pytest.mark.parametrize(("feature", "fault", "with_user"), CELLS)
def test_a_fault_in_a_feature_ends_in_the_right_record(
    feature: str,
    fault: str,
    with_user: bool,
    smollm2: ChatTemplate,
    tmp_path: Path,
    kept: list[Trajectory],
) -> None:
    world = World(FAULTS[fault], smollm2, tmp_path, with_user)
    world.write_files()
    FEATURES[feature](world)
    assert defects(world.out) == []
    if not world.fault.is_kept:
        assert not list(finished(world.out))
        return
    (record,) = [one for one in finished(world.out) if one.task_id != "t1"]
    assert_ended(record, world.fault, with_user=with_user)
    kept.append(record)


@pytest.fixture(scope="module")
def kept() -> list[Trajectory]:
    """Every record that the cells left."""
    return []


def test_every_format_takes_the_records_of_all_cells(
    kept: list[Trajectory], smollm2: ChatTemplate, tmp_path: Path
) -> None:
    """Runs last in this file: every record, under an id of its own, in one run folder."""
    world = World(FAULTS["nothing"], smollm2, tmp_path, with_user=False)
    world.write_files()
    with open_store(world) as store:
        for number, record in enumerate(kept):
            store.append(replace(record, id=f"t{number}-0", task_id=f"t{number}"))
        store.close({})
    run = open_run(world.out)
    for name in formats.export_names():
        try:
            job.export_run(run, name, tmp_path / f"as-{name}")
        except ExportError as error:
            if "nothing is left to export" not in str(error):
                raise


def finished(out: Path) -> list[Trajectory]:
    return list(read_trajectories(out)) if (out / "trajectories.jsonl").exists() else []


def defects(out: Path) -> list[str]:
    found: list[str] = []
    verify_run(out, on_defect=lambda defect: found.append(str(defect)))
    return found


def assert_ended(record: Trajectory, fault: Fault, *, with_user: bool) -> None:
    assert (record.stop_reason, record.infra_error) == (fault.stop_reason, fault.infra_error)
    assert (fault.error or "") in (record.error or "")
    statuses = [line.status for part in sequences(record) for line in part.tool_calls]
    assert statuses == ["ok", fault.status]
    if fault.infra_error:
        assert record.reward is None
    elif fault.stop_reason == "stop":
        users = {"user_turn_rewards": USER_REWARDS} if with_user else {}
        assert record.reward_parts == {"desk": 1.0, **users}
        assert record.reward == 1.0 + sum(USER_REWARDS) * with_user
