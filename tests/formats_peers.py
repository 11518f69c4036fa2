"""Turns of other projects' tests through our parsers: exact, shown, or named with the difference.

    python -m tests.formats_peers TURNS.jsonl ... [--tools TOOLS.json]

Each line is a JSON object:

    format     a call format's name, ours or another project's; without it hermes
    input      the text of a turn
    expected   its calls, [[name, arguments], ...]; or {"calls": ..., "content": ...}, null for what
               the test leaves open, "content_exact": false if the content need only be in ours
    kind, test, id, why    names of the case, and why ours differs
    broken, truncated      true for a turn with a call that is not well-formed
    in_think   true if the prompt opened the thought

TOOLS.json has the OpenAI schemas of the tools offered. A sound turn is exact if names, arguments
and their types are those expected and the content is, if the case says it. A broken one is shown if
the parser reports a malformed call. Turns that are neither are printed with the reason, the case's
own or one of `WHY`; the exit code is 1 if there are any without a reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversations.formats.format import ParameterTypes
from conversations.formats.registry import format_named
from conversations.messages import ParsedTurn, ToolCall

Case = dict[str, Any]

_OTHER_NAMES = {
    "qwen3.5": "qwen3_coder",
    "nemotron3": "qwen3_coder",
    "glm4.5": "glm45",
    "deepseek_v3.1": "deepseek_v31",
}
"""Names in the files that are no alias of a format."""


_UNION = 'the parameter may be a string or an integer, and the template writes 7 and "7" alike'
_WHOLE_CALL = "a whole call in harmony: the recipient makes it one, in any channel"
WHY = {
    "typed value": _UNION,
    "broken: no constrain": _WHOLE_CALL,
    "broken: analysis channel": _WHOLE_CALL,
    "broken: thought then call": _WHOLE_CALL,
    "broken: recipient in the role, as the template writes it": _WHOLE_CALL,
}
"""Why ours differs from a case that has no reason of its own, by the case's kind or test."""


def outcome(case: Case, turn: ParsedTurn) -> tuple[str, str]:
    """(a column of the table, what differs). Nothing differs in the columns exact and shown."""
    good = [[call.name, call.arguments] for call in turn.calls if isinstance(call, ToolCall)]
    errors = [call.error for call in turn.calls if not isinstance(call, ToolCall)]
    expected = case["expected"]
    calls, content = expected, None
    if isinstance(expected, dict):
        calls, content = expected.get("calls"), expected.get("content")
    if case.get("broken") or case.get("truncated"):
        return ("shown", "") if errors else ("not shown", f"reads {_json(good)}")
    if calls is not None and _json(good) != _json(calls):
        return "differs", f"reads {_json(good)} {errors}, the test {_json(calls)}"
    is_exact = not isinstance(expected, dict) or expected.get("content_exact", True)
    is_content = turn.content == content if is_exact else (content or "") in turn.content
    if content is not None and not is_content:
        return "differs", f"content {turn.content!r}, the test {content!r}"
    return "exact", ""


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)  # 1, 1.0 and True differ


def outcomes(path: Path, types: ParameterTypes) -> Iterator[tuple[Case, str, str]]:
    """Each case of a file, its column and what differs."""
    for line in path.read_text(encoding="utf-8").splitlines():
        case = {"format": "hermes", **json.loads(line)}
        form = format_named(_OTHER_NAMES.get(case["format"], case["format"]))
        turn = form.parse(case["input"], types, in_think=bool(case.get("in_think")))
        yield case, *outcome(case, turn)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("turns", type=Path, nargs="+")
    parser.add_argument("--tools", type=Path)
    asked = parser.parse_args()
    tools = json.loads(asked.tools.read_text(encoding="utf-8")) if asked.tools else []
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    unexplained = 0
    for path in asked.turns:
        for case, column, difference in outcomes(path, ParameterTypes.of(tools)):
            counts[case["format"]][column] += 1
            if difference:
                why = case.get("why") or WHY.get(case.get("kind") or case.get("test", ""))
                unexplained += why is None
                name = " ".join(str(case[key]) for key in ("id", "kind", "test") if key in case)
                print(
                    f"{case['format']} {name}: {case['input']!r}\n    {difference}\n    why: {why}"
                )
    columns = ("exact", "differs", "shown", "not shown")
    print(f"{'format':16}" + "".join(f"{name:>12}" for name in columns))
    for name, seen in counts.items():
        print(f"{name:16}" + "".join(f"{seen[column]:12}" for column in columns))
    print(f"{sum(map(Counter.total, counts.values()))} turns, {unexplained} unexplained")
    return min(unexplained, 1)


if __name__ == "__main__":
    sys.exit(main())
