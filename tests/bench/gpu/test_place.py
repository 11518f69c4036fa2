"""Which runs are made in which order, and what becomes of those that fail or have no time left."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tests.bench.gpu.load import CONVERSATION_TOKENS, Outcome
from tests.bench.gpu.machine import Usage
from tests.bench.gpu.model import conversations_held, qwen3_shape
from tests.bench.gpu.place import Contender, Place


def place(folder: Path, minutes: float = 1.0) -> Place:
    options = {
        "dry": False,
        "contenders": None,
        "json": folder / "figures.json",
        "minutes": minutes,
        "until": time.time() + 60 * minutes,
    }
    return Place(argparse.Namespace(**options, naps=[0, 50], rounds=2), folder)


def noted(called: list[str], name: str) -> Contender:
    def run(size: int, nap_s: float) -> Outcome:
        called.append(f"{name} {size} {nap_s:g}")
        if name == "broken":
            raise RuntimeError("a long\nstory")
        return Outcome(size, 100, Usage(wall_s=2.0))

    return run


def test_repeats_come_last_and_only_where_they_are_short(tmp_path: Path) -> None:
    called: list[str] = []
    contenders = {name: noted(called, name) for name in ("ideal", "verl")}
    place(tmp_path).measure(
        "load", contenders, [64, 512], reset=lambda: called.append("reset"), once=("verl",)
    )
    first = [
        f"{name} {size} {nap}"
        for size in (64, 512)
        for nap in ("0", "0.05")
        for name in ("ideal", "verl")
    ]
    assert [one for one in called if one != "reset"] == [
        "ideal 64 0",
        "verl 64 0",
        "ideal 512 0",
        *first,
        "ideal 64 0",
        "ideal 64 0.05",
    ]
    assert called.count("reset") == len(called) / 2


def test_a_run_that_fails_is_one_line_and_the_others_go_on(tmp_path: Path) -> None:
    here = place(tmp_path)
    here.measure(
        "server", {name: noted([], name) for name in ("broken", "ours")}, [64], reset=lambda: None
    )
    found = here.figures.read()["server"]
    assert found["64 conversations, 0 ms, broken, round 1"] == {"error": "RuntimeError: story"}
    assert found["64 conversations, 0 ms, ours, round 2"]["tokens_per_s"] == 50


def test_nothing_begins_when_the_time_is_over(tmp_path: Path) -> None:
    here, called = place(tmp_path, minutes=-1.0), list[str]()
    here.measure("load", {"ideal": noted(called, "ideal")}, [64], reset=lambda: None)
    assert (called, here.figures.read()) == ([], {})


def test_an_engine_is_asked_for_no_more_than_fits_its_gpu(tmp_path: Path) -> None:
    assert (
        conversations_held(qwen3_shape(tmp_path / "model"), 0.8 * 80 * 2**30, CONVERSATION_TOKENS)
        == 576
    )
