"""The sandbox server as a command.

python -m tools.servers.sandbox [--host 127.0.0.1] [--port 8080] [--workers N] [--packages NAMES]
"""

from __future__ import annotations

import argparse
import sys

from tools.base import ToolsError
from tools.servers.process import announce
from tools.servers.sandbox.server import Options, package_names, run_sandbox_server


def main() -> int:
    """The command. 0 after an orderly end, 1 where nothing could be served."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog="tools.servers.sandbox",
        description="SandboxFusion's /run_code, isolated by bubblewrap.",
    )
    parser.add_argument("--host", default=default.host)
    parser.add_argument("--port", type=int, default=default.port, help="0 takes a free one")
    parser.add_argument("--workers", type=int, help="programs at a time; default: one a CPU")
    parser.add_argument(
        "--packages",
        type=package_names,
        default=(),
        help="installed packages that programs see: numpy,sympy",
    )
    parser.add_argument(
        "--sessions", type=int, default=default.sessions, help="at most so many at a time"
    )
    parser.add_argument(
        "--session-idle-s",
        type=float,
        default=default.session_idle_s,
        help="a session without calls ends after so long",
    )
    parser.add_argument(
        "--cold", action="store_true", help="a bubblewrap of its own for each program"
    )
    parser.add_argument(
        "--with-parent", action="store_true", help="end when stdin ends or the parent does"
    )
    try:
        run_sandbox_server(Options(**vars(parser.parse_args())))
    except (ToolsError, OSError) as error:
        announce(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
