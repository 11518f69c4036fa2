"""An `mcp:` entry of tools.yaml, read: one server, started here or reached over HTTP, and which of its tools are offered.

verl's form names a JSON file of servers, the one that other MCP clients have, too; ours says the same in place.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pydantic

from tools.base import ToolConfigError
from tools.policy import nearest

# What other clients' files say and nothing here depends on: the transport follows from `command` or `url`.
_IGNORED = frozenset({"type", "transport", "description", "disabled"})
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class McpServerConfig(pydantic.BaseModel):
    """Exactly one of `command` (spoken to over its stdin and stdout) and `url` (streamable HTTP).

    `env` is added to what the SDK deems safe to inherit (PATH, HOME, ...); nothing else is passed on. `${NAME}` anywhere
    stands for a variable of our environment: a secret then need not stand in a file that every run keeps a copy of.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = {}
    tools: list[str] | None = pydantic.Field(None, min_length=1)
    per_trajectory: bool = False
    start_timeout_s: float = pydantic.Field(60.0, gt=0)
    log: str | None = None

    @property
    def executable(self) -> str:
        """`python` is the interpreter we run in: it has what turntrace was installed with."""
        return sys.executable if self.command == "python" else str(self.command)

    @property
    def shown(self) -> str:
        """The server in messages; without user, password and query of an address, which may be keys."""
        if self.url is None:
            return f"the MCP server `{shlex.join([str(self.command), *self.args])[:200]}`"
        parts = urlsplit(self.url)
        return f"the MCP server at {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def read_servers(given: object, folder: Path) -> list[McpServerConfig]:
    """The servers of an `mcp:` mapping; `folder` is where the YAML lies. Raises ToolConfigError with one line."""
    if not isinstance(given, Mapping):
        raise ToolConfigError(
            f"mcp must be a mapping with command or url, got {type(given).__name__}"
        )
    rest = dict(given)
    path = rest.pop("mcp_servers_config_path", None)
    selected = rest.pop("tool_selected_list", None)
    if selected is not None:
        rest.setdefault("tools", selected)
    if path is None:
        return [_server(rest, "mcp")]
    return [
        _server({**server, **rest}, f"mcp server {name!r}")
        for name, server in _named_servers(path, folder).items()
    ]


def _named_servers(path: object, folder: Path) -> dict[str, dict[str, Any]]:
    """The servers of a JSON file: `{"mcpServers": {"name": {"command": ..., "args": [...]} or {"url": ...}}}`."""
    if not isinstance(path, str):
        raise ToolConfigError(
            f"mcp.mcp_servers_config_path must be a file name, got {type(path).__name__}"
        )
    file = next((found for found in (Path(path), folder / path) if found.is_file()), None)
    if file is None:
        raise ToolConfigError(
            f"mcp.mcp_servers_config_path: there is no {path}, neither here nor beside the tool config"
        )
    try:
        servers = json.loads(file.read_text(encoding="utf-8"))["mcpServers"]
        read = {
            str(name): {key: value for key, value in server.items() if key not in _IGNORED}
            for name, server in servers.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ToolConfigError(
            f'{file}: expected {{"mcpServers": {{"name": {{"command": ...}} or {{"url": ...}}}}}}'
        ) from error
    if not read:
        raise ToolConfigError(f"{file} names no server")
    for server in read.values():
        if token := server.pop("auth_token", None):  # verl's word
            server["headers"] = {
                "Authorization": f"Bearer {token}",
                **(server.get("headers") or {}),
            }
    return read


def _server(given: dict[str, Any], where: str) -> McpServerConfig:
    for key in given:
        if key not in McpServerConfig.model_fields:
            raise ToolConfigError(
                f"{where} has no key {key!r}{nearest(str(key), McpServerConfig.model_fields)}"
            )
    try:
        server = McpServerConfig.model_validate(_expanded(given, where))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ToolConfigError(f"{where}.{place}: {first['msg']}, got {first['input']!r}") from error
    if (server.command is None) == (server.url is None):
        raise ToolConfigError(
            f"{where} needs either command (a server to start) or url (a server to reach)"
        )
    if server.url is not None and not _is_http(server.url):
        raise ToolConfigError(f"{where}.url must be an http(s) address, got {server.url!r}")
    if server.cwd is not None and not Path(server.cwd).is_dir():
        raise ToolConfigError(f"{where}.cwd: there is no folder {server.cwd}")
    return server


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _expanded(value: Any, where: str) -> Any:
    """`value` with every `${NAME}` in its texts replaced from the environment."""
    if isinstance(value, Mapping):
        return {key: _expanded(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, where) for item in value]
    if not isinstance(value, str):
        return value
    missing = [name for name in _VARIABLE.findall(value) if name not in os.environ]
    if missing:
        raise ToolConfigError(f"{where}: the environment has no variable {missing[0]}")
    return _VARIABLE.sub(lambda match: os.environ[match[1]], value)
