"""An MCP server over the SDK that misbehaves on request.

`python misbehaving.py stdio|http|json [LOG]`: `http` answers calls with event streams, `json` with
JSON. Over HTTP it prints its port first. Calls and cancellations go to LOG, one line each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import mcp.types as types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "either": {
            "anyOf": [{"type": "string", "maxLength": 3}, {"$ref": "#/$defs/Point"}],
            "default": "abc",
        },
        "mode": {"enum": [1, "zwei", None, 2.5]},
        "points": {
            "type": "array",
            "items": {"$ref": "#/$defs/Point"},
            "minItems": 1,
            "default": [],
        },
        "größe": {"type": "number", "description": "Ünïcode 漢字 🙂", "exclusiveMinimum": 0},
    },
    "required": ["either"],
    "additionalProperties": False,
    "$defs": {
        "Point": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
            "required": ["x", "y"],
        }
    },
}
TEXT: dict[str, Any] = {"type": "object", "properties": {"text": {}}}
NAMES = (
    "echo",
    "count",
    "add",
    "hang",
    "slow",
    "die",
    "huge",
    "error",
    "raise",
    "image",
    "structured",
    "nothing",
    "garbage",
    "environment",
)

server: Server[Any] = Server("misbehaving")
kept: list[str] = []


def note(line: str) -> None:
    if len(sys.argv) > 2:
        with Path(sys.argv[2]).open("a") as file:
            file.write(line + "\n")


async def list_tools(request: types.ListToolsRequest) -> types.ServerResult:
    """One tool a page."""
    index = int(request.params.cursor or 0) if request.params else 0
    names = ["schema", *NAMES]
    tool = types.Tool(
        name=names[index], description=f"The {names[index]}.", inputSchema=TEXT if index else SCHEMA
    )
    following = str(index + 1) if index + 1 < len(names) else None
    return types.ServerResult(types.ListToolsResult(tools=[tool], nextCursor=following))


server.request_handlers[types.ListToolsRequest] = (
    list_tools  # the decorators look into calls, which is our task
)


async def call_tool(request: types.CallToolRequest) -> types.ServerResult:
    name, arguments = request.params.name, request.params.arguments or {}
    note(f"called {name}")
    try:
        return types.ServerResult(await answer(name, arguments.get("text", ""), arguments))
    except asyncio.CancelledError:
        note(f"cancelled {name}")
        raise


server.request_handlers[types.CallToolRequest] = call_tool


async def answer(name: str, text: Any, arguments: dict[str, Any]) -> types.CallToolResult:
    if name == "hang":
        await asyncio.sleep(600)
    if name == "slow":
        await asyncio.sleep(float(text))
    if name == "die":
        print("dying as told", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "raise":
        raise ValueError(f"no: {text}")
    if name == "garbage":
        print("this is no JSON-RPC", flush=True)
    if name == "add":
        kept.append(text)
    if name == "error":
        return types.CallToolResult(
            content=[types.TextContent(type="text", text="it did not work")], isError=True
        )
    if name == "structured":
        return types.CallToolResult(content=[], structuredContent={"größe": [1, {"a": None}]})
    return types.CallToolResult(content=content(name, text, arguments))


def content(name: str, text: Any, arguments: dict[str, Any]) -> list[types.ContentBlock]:
    said = {
        "huge": lambda: "x" * int(text or 0),
        "count": lambda: str(len(kept)),
        "environment": lambda: json.dumps([sorted(os.environ), os.getcwd(), os.getpid()]),
        "schema": lambda: json.dumps(arguments, ensure_ascii=False),
    }.get(name, lambda: str(text))()
    blocks: list[types.ContentBlock] = [types.TextContent(type="text", text=said)]
    if name == "image":
        blocks.append(types.ImageContent(type="image", data="QUJD", mimeType="image/png"))
        blocks.append(types.TextContent(type="text", text="behind"))
    return [] if name == "nothing" else blocks


async def serve_stdio() -> None:
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


def serve_http(json_response: bool) -> None:
    import uvicorn  # takes a while that most tests need not wait
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
    from starlette.applications import Starlette
    from starlette.routing import Mount

    manager = StreamableHTTPSessionManager(server, json_response=json_response)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with manager.run():
            yield

    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", int(os.environ.get("PORT", "0"))))
    listening.listen()
    print(listening.getsockname()[1], flush=True)
    app = Starlette(routes=[Mount("/mcp", app=manager.handle_request)], lifespan=lifespan)
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listening])


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        asyncio.run(serve_stdio())
    else:
        serve_http(sys.argv[1] == "json")
