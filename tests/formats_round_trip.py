"""Random calls through a format's writer or a real chat template, and back through its parser.

    python -m tests.formats_round_trip N [--format NAME] [--template FILE ...] [--seed S]

N calls' turns a format (or a template, which needs --format). Prints what came back exactly, and
the first turns that did not; the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from conversations.formats.format import CallFormat, ParameterTypes
from conversations.formats.registry import format_named
from conversations.messages import ToolCall
from tests.conversations.formats.written import ONE_CALL, WRITERS, Sample, random_sample, render


def came_back(form: CallFormat, text: str, sample: Sample) -> bool:
    """Whether exactly these calls stand in the text, with the types of their values."""
    turn = form.parse(text, ParameterTypes.of(sample.tools))
    if not all(isinstance(call, ToolCall) for call in turn.calls):
        return False
    read = [[call.name, call.arguments] for call in turn.calls if isinstance(call, ToolCall)]
    wanted = [[name, arguments] for name, arguments in sample.calls]
    return json.dumps(read, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def failures(name: str, turns: int, seed: int, template: str | None) -> Iterator[str]:
    """The turns whose calls do not come back."""
    form, rng = format_named(name), random.Random(seed)
    most = 1 if template and name in ONE_CALL else 3
    for _ in range(turns):
        sample = random_sample(rng, name, most=most)
        text = render(template, sample) if template else WRITERS[name](sample.calls)
        if not came_back(form, text, sample):
            yield text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("turns", type=int)
    parser.add_argument("--format", choices=sorted(WRITERS))
    parser.add_argument("--template", type=Path, nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    names = [asked.format] if asked.format else sorted(WRITERS)
    failed = 0
    for name in names:
        for path in asked.template or [None]:
            template = path.read_text() if path else None
            wrong = list(failures(name, asked.turns, asked.seed, template))
            failed += len(wrong)
            print(f"{name} {path or 'written'}: {asked.turns - len(wrong)} of {asked.turns} exact")
            for text in wrong[:3]:
                print("   ", repr(text[:2000]))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
