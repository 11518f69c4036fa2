"""200 seeded corruptions of a run, half of them under a forged hash, and `verify` names each:
the trajectory, the turn, the token.

What can be revealed at all, and what by nature cannot, is said in corruptions.py.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conversations.checks.finding import Defect
from conversations.run.open_run import open_run
from conversations.run.store import TRAJECTORIES
from conversations.template import ChatTemplate
from conversations.trajectory import record_hash
from conversations.verify import verify_run
from tests.conversations.corruptions import (
    ANY,
    LINES,
    REVEALED,
    UNDER_HASH_ONLY,
    Place,
    Unsuited,
    as_line,
)
from tests.conversations.synthetic import GROUP, make_run

COUNT, SEED = 200, 20261123


@dataclass(frozen=True)
class Spoilt:
    """One corruption: the line it stands on, whose it was, and the place to be named; `readable`
    says that the line still has an id."""

    name: str
    line: int
    id: str
    place: Place
    forged: bool
    readable: bool = True


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one group for each corruption."""
    return make_run(tmp_path_factory.mktemp("clean") / "run", COUNT * GROUP)


@pytest.fixture(scope="module")
def tampered(
    clean: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Spoilt], list[Defect]]:
    """The run with one record of each group spoilt, and what verify says of it."""
    folder = shutil.copytree(clean, tmp_path_factory.mktemp("tampered") / "run")
    lines = (folder / TRAJECTORIES).read_bytes().splitlines(keepends=True)
    template, rng = open_run(folder).template(), random.Random(SEED)
    order = _lines_by_group(lines, rng)
    spoilt = [_spoil(number, lines, order[number], rng, template) for number in range(COUNT)]
    (folder / TRAJECTORIES).write_bytes(b"".join(lines))
    defects: list[Defect] = []
    verify_run(folder, jobs=2, on_defect=defects.append)
    return spoilt, defects


def _lines_by_group(lines: list[bytes], rng: random.Random) -> list[list[int]]:
    """The line numbers of each group, from 0, in dealt order."""
    groups: dict[str, list[int]] = {}
    for index, line in enumerate(lines):
        groups.setdefault(json.loads(line)["task_id"], []).append(index)
    dealt = [rng.sample(group, len(group)) for group in groups.values()]
    rng.shuffle(dealt)
    return dealt


def _spoil(
    number: int, lines: list[bytes], group: list[int], rng: random.Random, template: ChatTemplate
) -> Spoilt:
    """Spoils one line of a group; kinds take turns, and every second hash is forged."""
    forged = number % 2 == 1
    record_kinds = REVEALED if forged else [*REVEALED, *UNDER_HASH_ONLY]
    while True:
        index = rng.choice(group)
        record = json.loads(lines[index])
        if rng.random() < 0.1:
            change = rng.choice(LINES)
            lines[index] = change(lines[index], rng)
            return Spoilt(change.__name__, index + 1, record["id"], Place(), forged, readable=False)
        corrupt = rng.choice(record_kinds)
        before = json.dumps(record)
        try:
            place = corrupt(record, rng, template)
        except Unsuited:
            continue
        if json.dumps(record) == before:
            continue
        if forged:
            record["sha256"] = _forged_hash(record)
        lines[index] = as_line(record)
        return Spoilt(corrupt.__name__, index + 1, record.get("id", ""), place, forged)


def _forged_hash(record: dict[str, Any]) -> str:
    try:
        return record_hash(record)
    except ValueError:  # NaN: there is no hash to forge
        return "0" * 64


def test_the_clean_run_has_no_defects(clean: Path) -> None:
    defects: list[Defect] = []
    verdict = verify_run(clean, on_defect=defects.append)
    assert [str(defect) for defect in defects] == []
    assert (verdict.defects, verdict.counts["done"], verdict.notes) == (0, COUNT * GROUP, [])


@pytest.mark.parametrize("number", range(COUNT))
def test_each_corruption_is_named(tampered: tuple[list[Spoilt], list[Defect]], number: int) -> None:
    spoilt = tampered[0][number]
    named = [defect for defect in tampered[1] if defect.line == spoilt.line]
    assert named, f"{spoilt} was not noticed"
    assert all(defect.file == TRAJECTORIES for defect in named)
    if spoilt.readable:
        assert {defect.trajectory for defect in named} == {spoilt.id}
        assert any(_fits(spoilt.place, defect) for defect in named), "\n".join(
            map(str, [spoilt, *named])
        )
        assert (
            spoilt.forged == (not any("its hash" in str(defect) for defect in named))
            or "infinite" in spoilt.name
        )


def _fits(place: Place, defect: Defect) -> bool:
    pairs = ((place.turn, defect.finding.turn), (place.token, defect.finding.token))
    return all(expected is None or expected in (ANY, found) for expected, found in pairs)


def test_nothing_else_is_accused(tampered: tuple[list[Spoilt], list[Defect]]) -> None:
    """But for the counts of run.json and the groups that miss a sample now, which is so."""
    lines = {spoilt.line for spoilt in tampered[0]}
    others = [str(defect) for defect in tampered[1] if defect.line not in lines]
    assert [line for line in others if "run.json" not in line and "missing: " not in line] == []


def test_half_of_the_hashes_are_forged(tampered: tuple[list[Spoilt], list[Defect]]) -> None:
    assert sum(spoilt.forged for spoilt in tampered[0]) == COUNT // 2
    assert len({spoilt.name for spoilt in tampered[0]}) > 45
