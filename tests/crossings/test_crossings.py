"""Features crossed with faults: each ends in the right record, which verifies without a defect and
exports without an error.

What broke before broke where two features met. Every pair of a feature and a fault runs with a user
and without one.
"""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agent.engines.scoring import Scores, read_scores
from agent.errors import EngineError
from agent.scoring.compare import Comparison
from agent.scoring.work import score_run
from conversations.branches import sequences
from conversations.images.reading import ImageLimits, picture_of
from conversations.open_run import open_run
from conversations.run.store import read_trajectories
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from conversations.verify import verify_run
from tests import virtual_time
from tests.conversations.shipped_templates import trl_template
from tests.crossings.exports import PAIRS, without_rows
from tests.crossings.features import FEATURES, IMPOSSIBLE, open_store
from tests.crossings.world import FAULTS, SCRIPTS, USER_REWARDS, Fault, World, picture
from tests.vision import vision_template

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

_IN_ANY_FORMAT = [name for name in FEATURES if name not in ("branches", "tool asks", "images")]
"""The limits of branches are hermes' lengths; images have a template of their own."""
FORMAT_CELLS = [
    pytest.param(name, feature, fault, id=f"{name}-{feature}-{fault}")
    for row, name in enumerate(SCRIPTS)
    for column, fault in enumerate(FAULTS)
    for feature in [_IN_ANY_FORMAT[(3 * column + 5 * row) % len(_IN_ANY_FORMAT)]]
    if column % len(SCRIPTS) == row and (feature, fault) not in IMPOSSIBLE
]
"""Other call formats in turn: every fault in one of them, in another feature each."""


@pytest.mark.parametrize(("feature", "fault", "with_user"), CELLS)
def test_a_fault_in_a_feature_ends_in_the_right_record(
    feature: str,
    fault: str,
    with_user: bool,
    smollm2: ChatTemplate,
    tmp_path: Path,
    kept: list[Trajectory],
) -> None:
    ends_in_the_right_record(feature, World(FAULTS[fault], smollm2, tmp_path, with_user), kept)


@pytest.mark.parametrize(("name", "feature", "fault"), FORMAT_CELLS)
def test_a_fault_in_another_call_format_ends_in_the_right_record(
    name: str, feature: str, fault: str, tmp_path: Path
) -> None:
    with_user = FAULTS[fault].user is not None
    world = World(FAULTS[fault], trl_template(name), tmp_path, with_user, SCRIPTS[name])
    ends_in_the_right_record(feature, world, [])


WITH_IMAGES = ("resume", "stop after", "recorded replay", "live replay", "fork")


@pytest.mark.parametrize("feature", WITH_IMAGES)
def test_images_go_through_whatever_goes_on_with_a_record(
    feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task's image and the tool's, which stand in the prompt and in both answers."""
    monkeypatch.setattr(virtual_time, "run", asyncio.run)  # images are read in threads
    template = vision_template("qwen2_5_vl", "hermes")
    world = World(FAULTS["nothing"], template, tmp_path, with_user=False)
    kept: list[Trajectory] = []
    ends_in_the_right_record(feature, world, kept)
    [record] = kept
    [shown] = {image["sha256"] for image in record.images}
    assert len(record.images) == 3
    assert [line.images for line in record.tool_calls] == [[shown]] * 2
    assert [file.name for file in (world.out / "images").iterdir()] == [f"{shown}.png"]
    undisturbed = replace(world, folder=tmp_path / "undisturbed")
    undisturbed.folder.mkdir()
    ends_in_the_right_record("images", undisturbed, kept)
    assert record.images == kept[1].images
    assert record.prompt_ids + record.response_ids == kept[1].prompt_ids + kept[1].response_ids


def ends_in_the_right_record(feature: str, world: World, kept: list[Trajectory]) -> None:
    world.write_files()
    FEATURES[feature](world)
    assert defects(world.out) == []
    if not world.fault.is_kept:
        assert not list(finished(world.out))
        return
    (record,) = [one for one in finished(world.out) if one.task_id != "t1"]
    assert_ended(record, world.fault, with_user=world.with_user)
    kept.append(record)


@pytest.fixture(scope="module")
def kept() -> list[Trajectory]:
    """Every record that the cells left."""
    return []


@pytest.fixture(scope="module")
def all_records(
    kept: list[Trajectory], smollm2: ChatTemplate, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every record that was kept so far, under an id of its own, in one run folder.

    A clean one stands in for them if only some tests run; there are always eight.
    """
    folder = tmp_path_factory.mktemp("all")
    world = World(FAULTS["nothing"], smollm2, folder, with_user=False)
    world.write_files()
    plain = replace(world, folder=tmp_path_factory.mktemp("plain"))
    plain.write_files()
    FEATURES["plain"](plain)
    with open_store(world) as store:
        store.image_store().put(picture_of(picture(), ImageLimits()).png)
        for number, record in enumerate([*kept, *(8 * list(finished(plain.out)))]):
            store.append(replace(record, id=f"t{number}-0", task_id=f"t{number}"))
        store.close({})
    return world.out


class Scripted:
    """Scores as SGLang would answer, or does what `behaviour` says from the fourth request on."""

    def __init__(self, behaviour: str) -> None:
        self.behaviour, self.requests = behaviour, 0

    def describe(self) -> dict[str, str]:
        return {"name": "crossing"}

    async def score(self, ids: Sequence[int], first: int, *, likeliest: int) -> Scores:
        await asyncio.sleep(0)
        self.requests += 1
        behaviour = self.behaviour if self.requests > 3 else "answers"
        if behaviour == "dies":
            raise EngineError("the engine answered with status 503")
        if behaviour == "hangs":
            await asyncio.Event().wait()
        value = math.nan if behaviour == "NaN" else -0.5
        shift = 1 if behaviour == "other vocabulary" else 0
        scored = [[value, token + shift, None] for token in ids[first:]]
        meta = {
            "input_token_logprobs": [[None, ids[first - 1], None], *scored],
            "input_top_logprobs": [None, *([[value, 0, None]] * likeliest for _ in scored)],
        }
        return read_scores({"meta_info": meta}, list(ids), first, likeliest)


@pytest.mark.parametrize("behaviour", ["answers", "dies", "NaN", "other vocabulary", "hangs"])
def test_a_scorer_that_fails_is_named_and_loses_no_record(
    all_records: Path, behaviour: str
) -> None:
    """`verify --engine` over the records of all cells: compared, left out or failed, each one."""
    before = (all_records / "trajectories.jsonl").read_bytes()
    scorer, lines = Scripted(behaviour), io.BytesIO()
    comparison = Comparison(scorer.describe())

    async def run() -> None:
        async with asyncio.timeout(1 if behaviour == "hangs" else None):
            await score_run(open_run(all_records), scorer, comparison, lines)

    if behaviour == "hangs":
        with pytest.raises(TimeoutError):
            virtual_time.run(run())
    else:
        virtual_time.run(run())
    assert (all_records / "trajectories.jsonl").read_bytes() == before
    done = lines.getvalue().count(b"\n")
    assert done + len(comparison.failed) <= len(open_run(all_records).ids)
    if behaviour != "hangs":
        assert done + len(comparison.failed) == len(open_run(all_records).ids)
    assert (len(comparison.failed) > 0) == (behaviour in ("dies", "NaN", "other vocabulary"))
    assert 0 < comparison.records <= scorer.requests


def test_every_format_takes_the_records_of_all_cells(all_records: Path, tmp_path: Path) -> None:
    assert without_rows(open_run(all_records), tmp_path) == PAIRS


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
