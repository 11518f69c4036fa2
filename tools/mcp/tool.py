"""Tools of an MCP server: one entry of tools.yaml is a server, and yields all its tools.

The list is fetched when the config is loaded, over a connection of its own: the tools of a run are
known before it begins, and stay the same. A server that fails is a BackendError; the model reads
what a tool itself answers, errors included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcp import McpError, types

from tools.base import BackendError, BaseTool, ToolConfigError, ToolError, ToolResponse
from tools.mcp.config import McpServerConfig, read_servers
from tools.mcp.connection import CallAnswer
from tools.mcp.server import McpServer, run_apart
from tools.policy import read_policy_config
from tools.reading import nearest, read
from tools.toolset import LoadedTool, loaded_tool

MAX_DEPTH = 64
"""How deep arguments may be nested; the SDK's serializer ends the connection over deeper ones."""


class McpTool(BaseTool):
    """One tool of a server. A subclass may show results differently (`shown`).

    config: the dispatcher's keys, for each of the server's tools; verl's `timeout` is `timeout_s`
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
        images = [
            f"data:{block.mimeType};base64,{block.data}"
            for block in result.content
            if isinstance(block, types.ImageContent)
        ]
        return ToolResponse(text, image=images or None), None, {}

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        await self._server.drop(instance_id)

    async def close(self) -> None:
        await self._server.close()

    def shown(self, result: CallAnswer) -> str:
        """A result as the model reads it: its texts, with a note for each part that is neither text
        nor image.

        If there is no content, the structured content as JSON.
        """
        text = "\n".join(filter(None, map(_block, result.content)))
        if not result.content and result.structuredContent is not None:
            return json.dumps(result.structuredContent, ensure_ascii=False)
        return text


def mcp_tools(
    tool_class: type[McpTool], config: dict[str, Any], mcp: Mapping[str, Any], path: Path
) -> list[LoadedTool]:
    """The tools of an entry's servers; `path` is the YAML file.

    Starts or reaches each server for as long as it takes to list its tools. Raises ToolConfigError:
    a wrong config, a server that cannot be had, a tool that cannot be offered.
    """
    if "timeout" in config:
        config = {"timeout_s": config["timeout"], **config}
    timeout_s = read_policy_config(config).get("timeout_s") or BaseTool.timeout_s
    loaded: list[LoadedTool] = []
    for server_config in read_servers(mcp, path.resolve().parent):
        server = McpServer(server_config, timeout_s)
        offered = _offered(server)
        for name in _selected(offered, server_config):
            try:
                tool = read(types.Tool, offered[name], "")
                loaded.append(loaded_tool(tool_class(dict(config), openai_schema(tool), server)))
            except ToolConfigError as error:
                others = ", ".join(other for other in offered if other != name) or "..."
                raise ToolConfigError(
                    f"{server_config.shown}: its tool {name!r} cannot be offered: {error}; "
                    f"`tools: [{others:.200}]` under mcp leaves it out"
                ) from error
    return loaded


def openai_schema(tool: types.Tool) -> dict[str, Any]:
    """A tool as the OpenAI function schema that the model sees; its parameters are the server's."""
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description or "",
            "parameters": tool.inputSchema,
        },
    }


def _offered(server: McpServer) -> dict[str, dict[str, Any]]:
    """What the server lists, by name, otherwise unchecked. Raises ToolConfigError."""
    shown = server.config.shown
    try:
        listed = run_apart(server.listed())
    except BackendError as error:
        raise ToolConfigError(str(error)) from error
    except McpError as error:
        raise ToolConfigError(f"{shown} does not list its tools: {error}") from error
    offered: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(listed):
        name = tool.get("name")
        if not isinstance(name, str) or not name:
            raise ToolConfigError(f"{shown}: its tool number {index + 1} has no name")
        if name in offered:
            raise ToolConfigError(f"{shown} lists two tools named {name!r}")
        offered[name] = tool
    return offered


def _selected(offered: Mapping[str, Any], config: McpServerConfig) -> list[str]:
    """The names under `tools`, in that order; all of them if it is not given."""
    if config.tools is None:
        if not offered:
            raise ToolConfigError(f"{config.shown} has no tools")
        return list(offered)
    for name in config.tools:
        if name not in offered:
            raise ToolConfigError(f"{config.shown} has no tool {name!r}{nearest(name, offered)}")
    return config.tools


def _sendable(value: Any, depth: int = 0) -> Any:
    """Arguments that JSON can carry. Raises ToolError: a model can write NaN and deep nesting."""
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


def _block(block: types.ContentBlock | dict[str, Any]) -> str:
    if isinstance(block, dict):  # of a kind that the SDK does not know
        return f"[{block.get('mimeType') or block.get('type') or 'data'!s:.80}, not shown]"
    if isinstance(block, types.TextContent):
        return block.text
    if isinstance(block, types.ImageContent):
        return ""  # shown as an image, or noted as not shown
    if isinstance(block, types.ResourceLink):
        return f"[{block.name}: {block.uri}]"
    if not isinstance(block, types.EmbeddedResource):
        return f"[{block.mimeType}, not shown]"
    resource = block.resource
    if isinstance(resource, types.TextResourceContents):
        return resource.text
    return f"[{resource.mimeType or 'data'}, not shown]"
