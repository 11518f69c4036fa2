"""Gateways that can be killed, each a process: `python -m tests.agent.gateway.forked`.

Imports once, then forks one gateway for each line `PORT OUT` on its stdin and prints its pid, and
once it is gone "gone". A run that is there already is resumed. Answers take `DELAY_S`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.agent.gateway.live import Obedient, live

DELAY_S = 0.02


def serve(port: int, out: Path, engine: Obedient) -> None:
    """Serves until it is killed, or until SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    resume = (out / "run.json").exists()
    try:
        with live(out, engine=engine, port=port, resume=resume):
            signal.pause()
    except KeyboardInterrupt:
        pass


def main() -> None:
    engine = Obedient(delay_s=DELAY_S)
    for line in sys.stdin:
        port, out = line.split(maxsplit=1)
        if child := os.fork():
            print(child, flush=True)
            os.waitpid(child, 0)
            print("gone", flush=True)
        else:
            serve(int(port), Path(out.strip()), engine)
            os._exit(0)


if __name__ == "__main__":
    main()
