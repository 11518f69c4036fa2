"""One line of the table: what was measured, ours and the peer's, and what we allow ourselves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """`metric` and `case` are the keys in benchmarks.json; a row without a case stands there as a
    plain number.

    `samples` are repeats of ours, `peer` those of the peer, in one run and interleaved; the figures
    are their medians. `limit` is the budget, in the same unit. `more` goes into the file beside the
    figures.
    """

    metric: str
    samples: Sequence[float]
    case: str | None = None
    peer: Sequence[float] = ()
    peer_name: str = ""
    limit: float | None = None
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> float:
        return statistics.median(self.samples)

    @property
    def ratio(self) -> float | None:
        """How many times the peer's figure is ours."""
        return statistics.median(self.peer) / self.ours if self.peer else None

    def cells(self) -> tuple[str, ...]:
        """The row as text: what, ours, peer, ratio, budget, note."""
        name = self.metric if self.case is None else f"{self.metric}, {self.case}"
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        limit = "" if self.limit is None else f"<= {self.limit:g}"
        note = "; ".join(filter(None, [self.peer_name, self.note]))
        return name, _with_spread(self.samples), _with_spread(self.peer), ratio, limit, note

    def entry(self) -> Any:
        """The row as benchmarks.json has it."""
        if self.case is None:
            return round(self.ours, 4)
        spread = [round(min(self.samples), 4), round(max(self.samples), 4)]
        entry = {"ours": round(self.ours, 4), "ours_spread": spread, **self.more}
        if self.ratio is None:
            return entry
        peer_spread = [round(min(self.peer), 4), round(max(self.peer), 4)]
        peer = {
            "peer": round(statistics.median(self.peer), 4),
            "peer_spread": peer_spread,
            "peer_name": self.peer_name,
        }
        return {**entry, **peer, "ratio": round(self.ratio, 2)}


def _with_spread(samples: Sequence[float]) -> str:
    if not samples:
        return ""
    middle = f"{statistics.median(samples):.3g}"
    return middle if len(samples) == 1 else f"{middle} ({min(samples):.3g}-{max(samples):.3g})"


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """All rows as one object: a metric with cases is an object by case, another a number."""
    found: dict[str, Any] = {}
    for row in rows:
        if row.case is None:
            found[row.metric] = row.entry()
        else:
            found.setdefault(row.metric, {})[row.case] = row.entry()
    return found
