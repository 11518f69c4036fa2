"""Mutated turns through every call format: no exception, nothing lost, only values that JSON holds.

    python -m tests.formats_fuzz N [--format NAME] [--seed S]

N mutated turns a format. A turn begins as one that the format's writer made out of random calls,
with text and thoughts around it. Mutations cut it, repeat, move or drop its pieces, and put other
formats' tags into it. The first failure is raised with the text. A format takes part if
`tests.conversations.formats.written.WRITERS` has its name.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator

from conversations.formats.format import CallFormat, ParameterTypes
from conversations.formats.registry import format_named
from conversations.messages import ParsedTurn, ToolCall
from tests.conversations.formats.written import CLOSING_TAGS, WRITERS, random_sample
from tests.conversations.formats.written_json import JSON_TAGS

_TOKEN = re.compile(r"<[^<>]*>|\w+|\s+|.", re.DOTALL)
FRAMES = {
    "gpt_oss": r"<\|(?:start|channel|constrain)\|>[\w\s]{0,80}|<\|\w{1,9}\|>",
    "kimi_k3": r"<\|(?:open|close)\|>(?:think|response|message)<\|sep\|>",
    "muse_glimmer": r"<\|start\|>assistant| to=[^\s<]{1,200}<\|message\|>|<\|eom\|>",
    "functionary_v32": r"(?:\A|>>>)all\n",
}
"""What belongs to no message in formats whose turn is a row of messages, by format."""

_AROUND = ("", "", "Text. ", "<think>\nhm\n</think>\n\n", "<think>", "</think>", "\n", "é漢🙂")
_TAGS = (
    *CLOSING_TAGS,
    *JSON_TAGS,
    *("<tool_call>", "<function=f>", "<function=", "<parameter=x>", "<arg_key>", "<arg_value>"),
    *('<invoke name="f">', '<parameter name="x">', "<minimax:tool_call>", "<seed:tool_call>"),
    *("<|tool_call>", "call:f{", "{", "}", "[", "]", '"', "'", ",", ":", "\\", "\\ud800", "NaN"),
    *(
        "<｜DSML｜tool_calls>",
        '<｜DSML｜invoke name="f">',
        "\n",
        " ",
        "<think>",
        "<",
        ">",
        "9" * 5000,
    ),
)


def mutated(rng: random.Random, text: str) -> str:
    """The text after one to four mutations of its pieces."""
    pieces = _TOKEN.findall(text)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not pieces:
            break
        start = rng.randrange(len(pieces))
        end = min(len(pieces), start + rng.choice((1, 1, 2, 5, 20)))
        kind = rng.randrange(6)
        if kind == 0:
            del pieces[start:end]
        elif kind == 1:
            pieces[start:start] = pieces[start:end]
        elif kind == 2:
            moved = pieces[start:end]
            del pieces[start:end]
            place = rng.randrange(len(pieces) + 1)
            pieces[place:place] = moved
        elif kind == 3:
            pieces.insert(start, rng.choice(_TAGS))
        elif kind == 4:
            pieces[start] = rng.choice(_TAGS)
        else:
            del pieces[start:]
    return "".join(pieces)


def covers(text: str, turn: ParsedTurn) -> bool:
    """Whether the text is the content with the blocks of the calls put in, in order.

    A block's text may stand in the content too: every place it could have been taken from counts.
    """
    behind, taken = {0}, 0
    for call in turn.calls:
        places = {
            p for start in behind for p in _places(text, turn.content, start, taken, call.raw)
        }
        behind = {place + len(call.raw) for place in places}
        taken += len(call.raw)
    return any(text[start:] == turn.content[start - taken :] for start in behind)


def _places(text: str, content: str, start: int, taken: int, block: str) -> Iterator[int]:
    """Where a block may stand, if the text from `start` on up to it is content."""
    place = text.find(block, start)
    while block and place >= 0 and text[start:place] == content[start - taken : place - taken]:
        yield place
        place = text.find(block, place + 1)


def covers_messages(text: str, turn: ParsedTurn, frame: str) -> bool:
    """Whether blocks, content and reasoning hold all characters but blanks and what frames them."""
    thought = _characters(turn.reasoning or "", frame)
    # What stood around a block or a frame may look like a frame now.
    said = [_characters(turn.content, each) + thought for each in (frame, r"(?!)")]
    left = [_without_blocks(text, turn, joint) for joint in ("\n", "")]
    return any(each is not None and _characters(each, frame) in said for each in left)


def _characters(text: str, frame: str) -> Counter[str]:
    return Counter("".join(re.sub(frame, "\n", text).split()))


def _without_blocks(text: str, turn: ParsedTurn, joint: str) -> str | None:
    """The text with the blocks, which come in order, taken out of it."""
    kept, position = [], 0
    for call in turn.calls:
        start = text.find(call.raw, position)
        if start < 0:
            return None
        kept.append(text[position:start])
        position = start + len(call.raw)
    return joint.join([*kept, text[position:]])


def check(form: CallFormat, text: str, types: ParameterTypes, in_think: bool) -> ParsedTurn:
    """Parses a text; raises AssertionError with it if the contract of `parse` is broken."""
    try:
        turn = form.parse(text, types, in_think=in_think)
        frame = FRAMES.get(form.name)
        is_covered = covers_messages(text, turn, frame) if frame else covers(text, turn)
        assert is_covered, "content and blocks do not cover the text"
        for call in turn.calls:
            assert call.name or not isinstance(call, ToolCall), "a call without a name"
            if isinstance(call, ToolCall):
                json.dumps([call.name, call.arguments], allow_nan=False).encode()
                json.dumps(call.arguments, ensure_ascii=False).encode()
            else:
                assert call.error, "no reason"
    except Exception as error:
        raise AssertionError(f"{form.name}: {error!r} with {text!r}") from error
    return turn


def turns(name: str, rng: random.Random) -> Iterator[tuple[str, ParameterTypes]]:
    """Mutated turns of a format, without end."""
    while True:
        sample = random_sample(rng, name)
        text = rng.choice(_AROUND) + WRITERS[name](sample.calls) + rng.choice(_AROUND)
        types = ParameterTypes.of(sample.tools)
        for _ in range(8):
            yield mutated(rng, text), types


def fuzz(name: str, count: int, seed: int) -> Counter[str]:
    """How many calls, malformed calls and turns without either came out of `count` turns."""
    form, rng = format_named(name), random.Random(f"{name} {seed}")
    seen: Counter[str] = Counter()
    for (text, types), _ in zip(turns(name, rng), range(count), strict=False):
        turn = check(form, text, types, in_think=rng.random() < 0.1)
        seen["none"] += not turn.calls
        for call in turn.calls:
            seen["good" if isinstance(call, ToolCall) else "malformed"] += 1
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--format", choices=sorted(WRITERS))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for name in [asked.format] if asked.format else sorted(WRITERS):
        started = time.perf_counter()
        seen = fuzz(name, asked.count, asked.seed)
        took = time.perf_counter() - started
        print(f"{name}: {asked.count} turns, {dict(seen)}, {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
