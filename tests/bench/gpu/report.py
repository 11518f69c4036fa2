"""The figures as Markdown tables."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

CASE = re.compile(
    r"(?P<size>\d+) conversations, (?P<nap>\d+) ms, (?P<name>\w+), round (?P<round>\d+)"
)
CONTENDERS = ("client", "pixels", "ours", "stored", "trainer", "verl")

Cases = dict[tuple[int, int], dict[str, dict[str, Any]]]
"""Figures by (conversations, tool ms) and contender: the median of the rounds."""


def table(found: dict[str, Any]) -> str:
    """Of every case the median of its rounds; the other figures as they are."""
    lines = [
        "## Machine",
        *(f"- {name}: {_pairs(value)}" for name, value in found.get("machine", {}).items()),
        "",
    ]
    in_process = _medians(found.get("load", {}))
    for part, cases in found.items():
        if part in ("machine", "warm-up"):
            continue
        medians = _medians(cases)
        if medians:
            lines += [
                f"## {part}",
                *_shares(medians, in_process if part == "server" else {}),
                "",
                *_beyond(medians),
                "",
            ]
        plain = {case: value for case, value in cases.items() if not CASE.fullmatch(case)}
        if plain:
            lines += [
                f"## {part}{', further' if medians else ''}",
                *(f"- {case}: {_pairs(value)}" for case, value in plain.items()),
                "",
            ]
    return "\n".join(lines)


def errors(found: dict[str, Any]) -> int:
    """How many figures are missing because something failed."""
    return sum("error" in value for cases in found.values() for value in cases.values())


def _medians(cases: dict[str, Any]) -> Cases:
    rounds: dict[tuple[int, int], dict[str, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for case, value in cases.items():
        if match := CASE.fullmatch(case):
            rounds[int(match["size"]), int(match["nap"])][match["name"]].append(value)
    return {
        key: {name: _median(counted) for name, counted in of.items()}
        for key, of in sorted(rounds.items())
    }


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure. Empty where a round failed."""
    if any("error" in figures for figures in rounds):
        return {}
    values = {
        name: [figures[name] for figures in rounds if figures[name] is not None]
        for name in rounds[0]
    }
    return {name: round(statistics.median(of), 3) if of else None for name, of in values.items()}


def _shares(cases: Cases, in_process: Cases) -> Iterator[str]:
    """Tokens/s, and what the engine did meanwhile."""
    names = [name for name in CONTENDERS if any(name in figures for figures in cases.values())]
    head = ["conversations", "tool", "ideal tok/s", *(f"{name} / ideal" for name in names)]
    head += [
        "GPU busy %, ideal / ours",
        "engine without a request %, ideal / ours",
        "requests at once",
        "waiting for tools %",
        "cached %",
    ]
    if in_process:
        head += ["ideal / in process", "ours / in process"]
    yield from _head(head)
    for (size, nap), figures in cases.items():
        ideal, ours = figures.get("ideal", {}), figures.get("ours") or figures.get("trainer", {})
        cells = [
            size,
            f"{nap} ms",
            ideal.get("tokens_per_s", "-"),
            *(_ratio(figures.get(name, {}), ideal) for name in names),
        ]
        cells += [
            f"{_cell(ideal, 'gpu_busy')} / {_cell(ours, 'gpu_busy')}",
            f"{_idle(ideal)} / {_idle(ours)}",
            _cell(ours, "in_flight"),
        ]
        cells += [_percent(ours.get("tool_share")), _percent(ours.get("cached_share"))]
        if in_process:
            inner = in_process.get((size, nap), {})
            cells += [
                _ratio(figures.get(name, {}), inner.get(name, {})) for name in ("ideal", "ours")
            ]
        yield f"| {' | '.join(map(str, cells))} |"


def _beyond(cases: Cases) -> Iterator[str]:
    """Where the wall time beyond the ideal loop's went."""
    yield from _head(
        ["conversations", "tool", "", "wall s", "beyond ideal s", "before the first request s",
         "after the last answer s",
         "loop CPU ms a turn", "loop lag ms, p50 / p99", "writing records s"]
    )  # fmt: skip
    for (size, nap), figures in cases.items():
        for name in ("ideal", *CONTENDERS):
            if one := figures.get(name):
                beyond = (
                    round(one["wall_s"] - figures["ideal"]["wall_s"], 3)
                    if figures.get("ideal")
                    else "-"
                )
                cells = [
                    size,
                    f"{nap} ms",
                    name,
                    one["wall_s"],
                    beyond,
                    one["head_s"],
                    one["tail_s"],
                ]
                cells += [
                    one["loop_ms_per_turn"],
                    f"{one['lag_p50_ms']} / {one['lag_p99_ms']}",
                    one["writing_s"],
                ]
                yield f"| {' | '.join(map(str, cells))} |"


def _head(names: list[str]) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)


def _ratio(figures: dict[str, Any], ideal: dict[str, Any]) -> str:
    if "tokens_per_s" not in figures or "tokens_per_s" not in ideal:
        return "-"
    return f"{figures['tokens_per_s'] / ideal['tokens_per_s']:.3f}"


def _idle(figures: dict[str, Any]) -> str:
    return _percent(figures["idle_s"] / figures["wall_s"] if figures else None)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _cell(figures: dict[str, Any], name: str) -> Any:
    value = figures.get(name)
    return "-" if value is None else value


def _pairs(value: dict[str, Any]) -> str:
    return ", ".join(f"{name} {figure}" for name, figure in value.items())
