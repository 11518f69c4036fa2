from __future__ import annotations

from tests.bench.gpu.report import table


def test_a_case_is_the_median_of_its_rounds_but_the_first() -> None:
    def speed(value: int) -> dict[str, float]:
        return {"tokens_per_s": value, "cpu_s": 1.0}

    rounds = {"ideal": (1, 200, 400, 300), "ours": (1, 150, 150, 150)}
    cases = {f"64 conversations, 50 ms, {name}, round {i + 1}": speed(value) for name, of in rounds.items() for i, value in enumerate(of)}
    text = table({"machine": {}, "load": cases, "sync": {"release": {"used_gib": 41}}})
    assert "| 64 | 50 ms | 300 | 0.500 |" in text
    assert "- release: used_gib 41" in text


def test_a_contender_that_failed_has_no_ratio() -> None:
    cases = {
        "8 conversations, 0 ms, ideal, round 1": {"tokens_per_s": 10, "cpu_s": 1.0},
        "8 conversations, 0 ms, ours, round 1": {"error": "EngineError: gone"},
    }
    assert "| 8 | 0 ms | 10 | - |" in table({"load": cases})
