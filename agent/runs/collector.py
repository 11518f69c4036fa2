"""Python's garbage collector in a process that runs conversations and nothing else.

A live conversation is about a thousand objects that a collection walks, and frees none of: records
and messages have no cycles. With 1,024 conversations Python's own settings spend a fifth of the
loop's CPU on that (`python -m tests.bench.collector`).
"""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 50_000
"""So many new objects start a collection; Python's own number is 700. A few MB of cycles wait."""


def settle_collector() -> None:
    """What is loaded by now is never walked again, and collections become rare.

    For processes of our own: it changes the process's collector.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
