"""Tools that an MCP server offers: one entry of tools.yaml is a server, and yields as many tools as it has.

The list is fetched when the config is loaded, over a connection of its own, so that the tools of a run are known, and
stay the same, before it begins. A server that fails is a BackendError; what a tool says went wrong is for the model.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mcp import McpError, types

from tools.base import BackendError, BaseTool, ToolConfigError, ToolError, ToolResponse
from tools.mcp.config import McpServerConfig, read_servers
from tools.mcp.server import McpServer, run_apart
from tools.policy import nearest

MAX_DEPTH = 64
"""How deep arguments may be nested. Some more, and the SDK's serializer would end the connection with an error."""


class McpTool(BaseTool):
    """One tool of a server. A subclass may show results otherwise (`shown`).

    config: the dispatcher's own keys, for each of the server's tools; verl's `timeout` is our `timeout_s`.
    """

    config_keys = frozenset({"timeout"})

    def __init__(
        self, config: dict[str, Any], tool_schema: dict[str, Any], server: McpServer
    ) -> None:
        super().__init__(config, tool_schema)
        self._server = server

    async def start(self) -> None:
        await self._server.start()

    async def create(
        self, instance_id: str | None = None, **create_kwargs: Any
    ) -> tuple[str, ToolResponse]:
        instance_id, response = await super().create(instance_id)
        self._server.hold(instance_id)
        return instance_id, response

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        try:
            result = await self._server.call(instance_id, self.name, _sendable(parameters))
        except McpError as error:
            raise ToolError(f"Error: {error.error.message}", {"code": error.error.code}) from error
        text = self.shown(result)
        if result.isError:
            raise ToolError(text or f"Error: {self.name} failed and did not say why")
        return ToolResponse(text), None, {}

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        await self._server.drop(instance_id)

    async def close(self) -> None:
        await self._server.close()

    def shown(self, result: types.CallToolResult) -> str:
        """A result as the model reads it: its texts, a note for what is no text; without either its structured content."""
        text = "\n".join(filter(None, map(_block, result.content)))
        if not result.content and result.structuredContent is not None:
            return json.dumps(result.structuredContent, ensure_ascii=False)
        return text


def mcp_tools(
    tool_class: type[McpTool], config: dict[str, Any], mcp: object, path: Path
) -> list[McpTool]:
    """The tools of an entry's servers. Starts or reaches each of them for as long as it takes to list its tools.

    Raises ToolConfigError: a wrong config, a server that is not to be had, a name in `tools` that it does not have.
    """
    if "timeout" in config:
        config = {"timeout_s": config["timeout"], **config}
    timeout_s = config.get("timeout_s", BaseTool.timeout_s)
    made: list[McpTool] = []
    for server_config in read_servers(mcp, path.resolve().parent):
        server = McpServer(
            server_config, timeout_s if isinstance(timeout_s, (int, float)) else BaseTool.timeout_s
        )
        try:
            offered = run_apart(server.listed())
        except BackendError as error:
            raise ToolConfigError(str(error)) from error
        except McpError as error:
            raise ToolConfigError(
                f"{server_config.shown} does not list its tools: {error}"
            ) from error
        made += [
            tool_class(dict(config), openai_schema(tool), server)
            for tool in _selected(offered, server_config)
        ]
    return made


def openai_schema(tool: types.Tool) -> dict[str, Any]:
    """A tool as the OpenAI function schema that the model is shown; its parameters are the server's, nothing dropped."""
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description or "",
            "parameters": tool.inputSchema,
        },
    }


def _selected(offered: list[types.Tool], config: McpServerConfig) -> list[types.Tool]:
    """Those of `tools`, in that order; all of them where it is not given."""
    named = {tool.name: tool for tool in offered}
    if config.tools is None:
        if not offered:
            raise ToolConfigError(f"{config.shown} has no tools")
        return offered
    for name in config.tools:
        if name not in named:
            raise ToolConfigError(f"{config.shown} has no tool {name!r}{nearest(name, named)}")
    return [named[name] for name in config.tools]


def _sendable(value: Any, depth: int = 0) -> Any:
    """Arguments as JSON over the wire can carry them. A model can write half of a surrogate pair, NaN, and endless nesting."""
    if depth > MAX_DEPTH:
        raise ToolError("Error: the arguments are nested too deeply")
    if isinstance(value, str):
        return value.encode("utf-8", errors="replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError(f"Error: {value} is no number in JSON")
    if isinstance(value, dict):
        return {_sendable(key): _sendable(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_sendable(item, depth + 1) for item in value]
    return value


def _block(block: types.ContentBlock) -> str:
    if isinstance(block, types.TextContent):
        return block.text
    if isinstance(block, types.ResourceLink):
        return f"[{block.name}: {block.uri}]"
    if isinstance(block, types.EmbeddedResource):
        resource = block.resource
        return (
            resource.text
            if isinstance(resource, types.TextResourceContents)
            else f"[{resource.mimeType or 'data'}, not shown]"
        )
    return f"[{block.mimeType}, not shown]"
