"""Sums up a replay: the first few divergences with both sides, then the counts; also as JSON.

What records hold is untrusted: it is printed as text, control characters escaped, never as markup.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agent.replay.outcome import DIVERGED, FAILED, IDENTICAL, Line, Tally
from agent.replay.request import ReplayRequest
from agent.runs.progress import say
from agent.terminal import one_line

SHOWN = 5
"""Divergences that are printed; all of them are in the new run's replay.jsonl."""
_WIDTH = 400

_WHERE = {
    "prompt": "the prompt",
    "sampled": "a sampled token",
    "logprob": "a log-prob",
    "turn": "what the engine said of a turn",
    "call": "a tool call",
    "answer": "a tool's answer",
    "delta": "what was appended after a turn",
    "end": "how it ended",
    "record": "another field",
}


def show_report(tally: Tally, request: ReplayRequest, console: Console) -> None:
    """Prints the divergences and the tables."""
    for line in tally.diverged[:SHOWN]:
        for text in _block(line):
            say(console, text)
    if (more := len(tally.diverged) - SHOWN) > 0:
        say(console, f"... and {more} more: see {request.out}/replay.jsonl\n")
    what = f"{request.run}: {request.model} model, {request.tools} tools"
    say(console, what if request.from_turn is None else f"{what}, from turn {request.from_turn}")
    console.print(_outcomes(tally))
    if tally.answers:
        console.print(_tools(tally))
    if tally.logprob_difference is not None:
        say(
            console,
            f"log-probs of tokens sampled alike differ by at most {tally.logprob_difference:.3g}",
        )


def as_json(tally: Tally, request: ReplayRequest) -> dict[str, Any]:
    """The whole report as one object.

    `diverged` holds a line, as in replay.jsonl, for each trajectory that is not identical.
    """
    return {
        "run": str(request.run),
        "out": str(request.out),
        "model": request.model,
        "tools": request.tools,
        "from_turn": request.from_turn,
        "outcomes": {name: tally.outcomes[name] for name in (IDENTICAL, DIVERGED, FAILED)},
        "first_difference": dict(tally.kinds),
        "answers": {name: dataclasses.asdict(each) for name, each in tally.answers.items()},
        "logprob_difference": tally.logprob_difference,
        "diverged": tally.diverged,
    }


def _outcomes(tally: Tally) -> Table:
    table = Table()
    table.add_column("trajectories")
    table.add_column("", justify="right")
    table.add_row("identical", str(tally.outcomes[IDENTICAL]))
    table.add_row("diverged", str(tally.outcomes[DIVERGED]))
    for kind, count in tally.kinds.most_common():
        table.add_row(f"  first at {_WHERE[kind]}", str(count))
    table.add_row("failed because of infrastructure", str(tally.outcomes[FAILED]))
    return table


def _tools(tally: Tally) -> Table:
    table = Table()
    for name in ("tool", "calls compared", "same", "different", "in"):
        table.add_column(name, justify="left" if name in ("tool", "in") else "right")
    for name, each in sorted(tally.answers.items()):
        counts = each.compared, each.compared - each.different, each.different
        table.add_row(Text(one_line(name)), *map(str, counts), ", ".join(each.fields))
    return table


def _block(line: Line) -> list[str]:
    first = line["first"]
    lines = (
        [f"{one_line(line['id'])}  {_place(first)}"]
        if first
        else [f"{one_line(line['id'])}  the same"]
    )
    if line["error"]:
        lines.append(f"  failed    {one_line(line['error'])}")
    if first:
        lines += [f"  both      ...{one_line(first['before'])}"] if first["before"] else []
        lines += [f"  {name}  {_side(first[name])}" for name in ("recorded", "replayed")]
    for other in line["elsewhere"][:SHOWN]:
        lines.append(
            f"  also {one_line(other['call_id'] or 'create')} {one_line(other['name'] or '')}"
        )
        lines += [f"    {name}  {_side(other[name])}" for name in ("recorded", "replayed")]
    return [*lines, ""]


def _place(first: dict[str, Any]) -> str:
    parts = [f"branch {first['branch']}"] if first.get("branch") else []
    parts += [f"turn {first['turn']}"] if first["turn"] is not None else []
    parts += [f"token {first['token']}"] if first["token"] is not None else []
    parts += [one_line(first["call_id"])] if first["call_id"] else []
    parts += [one_line(first["name"])] if first["name"] else []
    return f"{', '.join([*parts, _WHERE[first['kind']]])} differs"


def _side(value: Any) -> str:
    """One side in one line: tokens as text with the first id and log-prob, the rest as JSON."""
    if isinstance(value, dict) and set(value) == {"ids", "text", "logprob"}:
        if not value["ids"]:
            return "(ends here)"
        logprob = "" if value["logprob"] is None else f", log-prob {value['logprob']:.4f}"
        return (
            f"{json.dumps(_cut(value['text']), ensure_ascii=True)}  (id {value['ids'][0]}{logprob})"
        )
    return one_line(_cut(json.dumps(value, ensure_ascii=False)))


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."
