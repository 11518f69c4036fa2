"""An MCP server over stdio that sends exactly what it is told: `python scripted.py JSON`.

The JSON holds `lists`, the results of tools/list by cursor ("" is the first), and `answer`, the
result of every tools/call. Nothing is checked, so that a result may break the protocol.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def result(request: dict[str, Any], script: dict[str, Any]) -> Any:
    params = request.get("params") or {}
    if request["method"] == "initialize":
        return {
            "protocolVersion": params["protocolVersion"],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "scripted", "version": "1"},
        }
    if request["method"] == "tools/list":
        lists = script["lists"]
        return lists.get(params.get("cursor") or "", lists.get("*"))
    return script.get("answer", {})


def main() -> None:
    script = json.loads(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        if "id" in request:
            answer = {"jsonrpc": "2.0", "id": request["id"], "result": result(request, script)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
