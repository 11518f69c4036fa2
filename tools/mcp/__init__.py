"""Tools of MCP servers. They need the extra `mcp`, and are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.extras import require

if TYPE_CHECKING:
    from tools.mcp.server import McpServer as McpServer
    from tools.mcp.tool import McpTool as McpTool
    from tools.mcp.tool import mcp_tools as mcp_tools

_HOMES = {
    "McpServer": "tools.mcp.server",
    "McpTool": "tools.mcp.tool",
    "mcp_tools": "tools.mcp.tool",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("mcp", extra="mcp")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
