"""The form of benchmarks.json, which others read."""

from __future__ import annotations

from tests.bench.row import Row, document


def test_a_metric_with_cases_is_an_object_and_one_without_a_number() -> None:
    rows = [
        Row(
            "loop",
            [0.3, 0.1, 0.2],
            case="turns=4",
            peer=[4.0, 1.0, 2.0],
            peer_name="verl",
            more={"floor": 0.1},
        ),
        Row("loop", [0.5], case="turns=16"),
        Row("sandbox_p50_ms", [7.0, 9.0, 8.0]),
    ]
    assert document(rows) == {
        "loop": {
            "turns=4": {
                "ours": 0.2,
                "ours_spread": [0.1, 0.3],
                "floor": 0.1,
                "peer": 2.0,
                "peer_spread": [1.0, 4.0],
                "peer_name": "verl",
                "ratio": 10.0,
            },
            "turns=16": {"ours": 0.5, "ours_spread": [0.5, 0.5]},
        },
        "sandbox_p50_ms": 8.0,
    }
