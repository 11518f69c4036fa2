"""The figures as one Markdown table."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from typing import Any

CASE = re.compile(r"(?P<size>\d+) conversations, (?P<nap>\d+) ms, (?P<name>\w+), round (?P<round>\d+)")
CONTENDERS = ("ours", "stored", "trainer", "verl")


def table(found: dict[str, Any]) -> str:
    """Of every case the median of its rounds but the first; the other figures as they are."""
    lines = ["## Machine", *(f"- {name}: {value}" for name, value in found.get("machine", {}).items()), ""]
    for part in ("load", "server"):
        lines += _load(part, found.get(part, {}))
    rest = {part: cases for part, cases in found.items() if part not in ("machine", "warm-up")}
    for part, cases in rest.items():
        plain = {case: value for case, value in cases.items() if not CASE.fullmatch(case)}
        if plain:
            lines += [f"## {part}", *(f"- {case}: {_pairs(value)}" for case, value in plain.items()), ""]
    return "\n".join(lines)


def _load(part: str, cases: dict[str, Any]) -> list[str]:
    rounds: dict[tuple[int, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for case, value in cases.items():
        if match := CASE.fullmatch(case):
            rounds[int(match["size"]), int(match["nap"])][match["name"]].append(value)
    if not rounds:
        return []
    names = [name for name in CONTENDERS if any(name in figures for figures in rounds.values())]
    head = ["conversations", "tool", "ideal tok/s", *(f"{name} / ideal" for name in names), f"CPU s, ideal / {' / '.join(names)}"]
    head += ["GPU busy %, ideal / ours", "cached", "waiting for tools"]
    lines = [f"## {part}", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (size, nap), figures in rounds.items():
        found = {name: _median(figures[name]) for name in ("ideal", *names)}
        ideal, ours = found["ideal"], found["ours"]
        cells = [size, f"{nap} ms", ideal.get("tokens_per_s"), *(_ratio(found[name], ideal) for name in names)]
        cells += [" / ".join(str(found[name].get("cpu_s", "-")) for name in ("ideal", *names))]
        cells += [f"{ideal.get('gpu_busy')} / {ours.get('gpu_busy')}", ours.get("cached_share"), ours.get("tool_share")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure, the first round left out where there are more. Empty where the contender did not run."""
    counted = rounds[1:] or rounds
    if not counted or any("error" in figures for figures in counted):
        return {}
    return {
        name: None if value is None else round(statistics.median(figures[name] for figures in counted), 3)
        for name, value in counted[0].items()
    }


def _ratio(figures: dict[str, Any], ideal: dict[str, Any]) -> str:
    if "tokens_per_s" not in figures or "tokens_per_s" not in ideal:
        return "-"
    return f"{figures['tokens_per_s'] / ideal['tokens_per_s']:.3f}"


def _pairs(value: dict[str, Any]) -> str:
    return ", ".join(f"{name} {figure}" for name, figure in value.items())
