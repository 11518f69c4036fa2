"""What `fastokens` saves: the encoding of new text, and the loop's CPU a turn.

The peer is the same with `tokenizers`, interleaved repeat by repeat in one process.

    python -m tests.bench.encoder [--quick]
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
from time import process_time

from conversations.template import ChatTemplate
from tests.bench import loop_cpu
from tests.bench.row import Row
from tests.bench.workload import Workload, workload

METRIC = "encoder_cpu_ms"
TURNS = 16
NEW_CHARACTERS = 12_000
"""Some 5,000 tokens."""
PEER = "tokenizers"


def rows(work: Workload, *, quick: bool) -> list[Row]:
    """A row for new text, and one for the loop."""
    slow = dataclasses.replace(work, template=ChatTemplate(work.template.tokenizer))
    repeats = 3 if quick else 7
    text = [(encode_ms(work.template), encode_ms(slow.template)) for _ in range(3 * repeats)]
    loop_cpu.ours_ms(work, TURNS)
    loop = [(loop_cpu.ours_ms(work, TURNS), loop_cpu.ours_ms(slow, TURNS)) for _ in range(repeats)]
    used = work.template.encoder
    cases = ((f"{NEW_CHARACTERS} new characters", text), (f"loop, turns={TURNS}", loop))
    return [
        Row(
            METRIC, [ours for ours, _ in pairs], case=case,
            peer=[peer for _, peer in pairs], peer_name=PEER, note=f"ours: {used}",
        )
        for case, pairs in cases
    ]  # fmt: skip


_words = itertools.count(1)


def new_text(characters: int) -> str:
    """Code and words that were never encoded before."""
    rng = random.Random(next(_words))
    letters = "abcdefghijklmnoprstuwy"
    words = ["".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(characters // 5)]
    lines = (
        f"    {one}_{other} = {one}({rng.randrange(10**4)}, '{other}')  # {one} {other}\n"
        for one, other in zip(words[::2], words[1::2], strict=False)
    )
    return "".join(lines)[:characters]


def encode_ms(template: ChatTemplate) -> float:
    """CPU ms to encode a new text."""
    text = new_text(NEW_CHARACTERS)
    started = process_time()
    template.encode(text)
    return 1e3 * (process_time() - started)


if __name__ == "__main__":
    for row in rows(workload(), quick="--quick" in sys.argv):
        print(*row.cells(), sep=" | ")
