"""The search server as a command.

python -m tools.servers.search [--corpus FILE | --index FOLDER] [--host HOST] [--port 8000]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.base import ToolsError
from tools.extras import require
from tools.servers.process import announce, end_quietly_on_signals


def main() -> int:
    """The command. 0 after an orderly end, 1 where nothing could be served."""
    parser = argparse.ArgumentParser(
        prog="tools.servers.search", description="Search-R1's /retrieve over a BM25 index."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--corpus",
        type=Path,
        help="JSONL; indexed first where that is to do; default: 10,033 Wikipedia leads",
    )
    what.add_argument("--index", type=Path, help="a folder that `turntrace index` made")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument(
        "--with-parent", action="store_true", help="end when stdin ends or the parent does"
    )
    options = parser.parse_args()
    end_quietly_on_signals()
    try:
        require("tantivy", extra="search")
        from tools.servers.search.index import index_of
        from tools.servers.search.server import serve_index

        index = options.index or index_of(options.corpus)
        serve_index(index, options.host, options.port, with_parent=options.with_parent)
    except (ToolsError, OSError) as error:
        announce(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
