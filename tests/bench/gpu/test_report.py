"""What turns measurements into figures and figures into tables."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench.gpu.machine import flight, percentile
from tests.bench.gpu.report import errors, table
from tests.bench.gpu.server import arguments


def figures(tokens_per_s: int, **more: Any) -> dict[str, Any]:
    """Of one run, as `Outcome.figures` has them."""
    zero = (
        "cpu_s",
        "loop_cpu_s",
        "lag_p50_ms",
        "lag_p99_ms",
        "head_s",
        "tail_s",
        "idle_s",
        "in_flight",
        "writing_s",
        "loop_ms_per_turn",
    )
    none = ("gpu_busy", "cached_share", "engine_share", "tool_share")
    return {
        "tokens_per_s": tokens_per_s,
        "wall_s": 2.0,
        **dict.fromkeys(zero, 0.0),
        **dict.fromkeys(none),
        **more,
    }


def case(name: str, round_: int = 1, size: int = 64, nap: int = 50) -> str:
    return f"{size} conversations, {nap} ms, {name}, round {round_}"


def test_a_case_is_the_median_of_its_rounds() -> None:
    rounds = {"ideal": (200, 400, 300), "ours": (150, 150, 120)}
    cases = {
        case(name, i + 1): figures(value)
        for name, of in rounds.items()
        for i, value in enumerate(of)
    }
    text = table({"machine": {}, "load": cases, "sync": {"release": {"used_gib": 41}}})
    assert "| 64 | 50 ms | 300 | 0.500 |" in text
    assert "- release: used_gib 41" in text


def test_a_contender_that_failed_has_no_ratio_and_is_counted() -> None:
    found = {"load": {case("ideal"): figures(10), case("ours"): {"error": "EngineError: gone"}}}
    assert "| 64 | 50 ms | 10 | - |" in table(found)
    assert errors(found) == 1


def test_what_limits_a_figure_stands_beside_it() -> None:
    ideal = figures(100, wall_s=2.0, idle_s=0.1, loop_ms_per_turn=0.2)
    ours = figures(
        80,
        wall_s=2.5,
        head_s=0.2,
        tail_s=0.1,
        idle_s=0.5,
        writing_s=0.05,
        loop_ms_per_turn=0.5,
        lag_p99_ms=9.0,
        tool_share=0.25,
    )
    text = table({"load": {case("ideal"): ideal, case("ours"): ours}})
    assert "| 5.0 / 20.0 | 0.0 | 25.0 | - |" in text
    assert "| 64 | 50 ms | ours | 2.5 | 0.5 | 0.2 | 0.1 | 0.5 | 0.0 / 9.0 | 0.05 |" in text


def test_a_server_stands_beside_the_engine_in_process() -> None:
    inner = {case("ideal", nap=0): figures(200), case("ours", nap=0): figures(190)}
    outer = {
        case("ideal", nap=0): figures(150),
        case("client", nap=0): figures(140),
        case("ours", nap=0): figures(133),
    }
    text = table({"load": inner, "server": outer})
    assert "| 64 | 0 ms | 150 | 0.933 | 0.887 |" in text
    assert text.count("| 0.750 | 0.700 |") == 1


def test_time_without_a_request_is_head_tail_and_gaps() -> None:
    assert flight([1.0, 2.0, 6.0], [4.0, 3.0, 8.0], 0.0, 10.0) == pytest.approx(
        (1.0, 2.0, 5.0, 0.6)
    )
    assert flight([], [], 0.0, 10.0) == (0.0, 0.0, 10.0, 0.0)


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.5)) == (
        50.0,
        99.0,
        7.0,
    )


def test_a_servers_flags_leave_out_what_is_not_given() -> None:
    assert arguments(
        {
            "dp_size": 1,
            "skip_tokenizer_init": True,
            "disable_radix_cache": False,
            "mm_attention_backend": None,
        }
    ) == [
        *("--dp-size", "1"),
        "--skip-tokenizer-init",
    ]
