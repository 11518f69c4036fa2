"""An `mcp:` entry of tools.yaml: one server, started here or reached over HTTP, and its tools.

verl's form names a JSON file of servers, as other MCP clients have it; ours says the same in place.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import pydantic

from tools.base import ToolConfigError
from tools.reading import STRICT, nearest, read, unknown_key

Text = Annotated[str, pydantic.BeforeValidator(lambda value: _number_as_text(value))]
"""Text, or a number as text: YAML reads a port or a flag's value as a number."""


class McpServerConfig(pydantic.BaseModel):
    """Exactly one of `command` (spoken to over stdin and stdout) and `url` (streamable HTTP).

    `env` is added to what the SDK considers safe to inherit (PATH, HOME, ...); nothing else is
    passed on. `${NAME}` and `${NAME:-default}` in any text stand for a variable of our environment:
    a secret then need not be in a file that every run keeps a copy of.
    """

    model_config = STRICT

    command: str | None = None
    args: list[Text] = []
    env: dict[str, Text] = {}
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, Text] = {}
    tools: list[str] | None = pydantic.Field(None, min_length=1)
    per_trajectory: bool = False
    start_timeout_s: float = pydantic.Field(60.0, gt=0, allow_inf_nan=False)
    log: str | None = None

    @property
    def executable(self) -> str:
        """`python` is the interpreter that we run in: it has what turntrace was installed with."""
        return sys.executable if self.command == "python" else str(self.command)

    @property
    def shown(self) -> str:
        """The server in messages; without user, password and query of a URL, which may be keys."""
        if self.url is None:
            return f"the MCP server `{shlex.join([str(self.command), *self.args])[:200]}`"
        parts = urlsplit(self.url)
        return f"the MCP server at {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def read_servers(given: Mapping[str, Any], folder: Path) -> list[McpServerConfig]:
    """The servers of an `mcp:` mapping; `folder` holds the YAML file.

    Raises ToolConfigError with one line.
    """
    rest = dict(given)
    path = rest.pop("mcp_servers_config_path", None)
    selected = rest.pop("tool_selected_list", None)
    if selected is not None:
        rest.setdefault("tools", selected)
    if path is None:
        return [_server(rest, "mcp")]
    servers = _named_servers(path, folder)
    return [_server({**server, **rest}, f"mcp server {name!r}") for name, server in servers.items()]


def _server(given: Mapping[str, Any], where: str) -> McpServerConfig:
    for key in given:
        if key not in McpServerConfig.model_fields:
            raise ToolConfigError(unknown_key(where, key, McpServerConfig.model_fields))
    server = read(McpServerConfig, _expanded(dict(given), where), where)
    if (server.command is None) == (server.url is None):
        raise ToolConfigError(
            f"{where} needs either command (a server to start) or url (a server to reach)"
        )
    if server.url is not None and not _is_http(server.url):
        raise ToolConfigError(f"{where}.url must be an http(s) address, got {server.url!r}")
    if server.cwd is not None and not Path(server.cwd).is_dir():
        raise ToolConfigError(f"{where}.cwd: there is no folder {server.cwd}")
    return server


def _number_as_text(value: object) -> object:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number else value


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


# ---------------------------------------------------------------------- other clients' files

_TOP_KEYS = ("mcpServers", "servers")  # servers: VS Code's

# How other clients write a key of ours.
_SAME = {"serverUrl": "url", "httpUrl": "url", "includeTools": "tools"}

# What changes nothing here: there is nobody to ask for an approval, and nothing to show.
_NO_EFFECT = frozenset({"alwaysAllow", "autoApprove", "description", "icon", "name", "trust"})

_INSTEAD = {
    "disabledTools": "list the tools to offer under tools",
    "excludeTools": "list the tools to offer under tools",
    "timeout": "its unit differs between clients; write timeout_s under config in tools.yaml",
}

_TRANSPORTS = {
    "command": ("stdio", "local"),
    "url": ("http", "remote", "streamable-http", "streamableHttp", "streamable_http"),
}


def _named_servers(path: object, folder: Path) -> dict[str, dict[str, Any]]:
    """The servers of a JSON file that are not disabled; comments and trailing commas are read.

    `{"mcpServers": {"name": {"command": ..., "args": [...]} or {"url": ...}}}`.
    """
    if not isinstance(path, str):
        raise ToolConfigError(
            f"mcp.mcp_servers_config_path must be a file name, got {type(path).__name__}"
        )
    file = next((found for found in (Path(path), folder / path) if found.is_file()), None)
    if file is None:
        raise ToolConfigError(
            f"mcp.mcp_servers_config_path: there is no {path}, neither here nor beside the tool "
            "config"
        )
    servers = {
        str(name): server
        for name, server in _servers_in(file).items()
        if not _is_disabled(server, f"mcp server {name!r}")
    }
    if not servers:
        raise ToolConfigError(f"{file} names no server, or none that is enabled")
    return {name: _ours(server, f"mcp server {name!r}") for name, server in servers.items()}


def _servers_in(file: Path) -> dict[str, dict[str, Any]]:
    form = '{"mcpServers": {"name": {"command": ...} or {"url": ...}}}'
    try:
        document = json.loads(_without_comments(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ToolConfigError(f"{file}: not valid JSON: {error}; expected {form}") from error
    found = document if isinstance(document, dict) else {}
    servers = next((found[key] for key in _TOP_KEYS if key in found), None)
    if not isinstance(servers, dict) or not all(
        isinstance(server, dict) for server in servers.values()
    ):
        raise ToolConfigError(f"{file}: expected {form}")
    return servers


def _is_disabled(server: Mapping[str, Any], where: str) -> bool:
    """By `disabled: true` or `enabled: false`."""
    for key, off in (("disabled", True), ("enabled", False)):
        value = server.get(key, not off)
        if not isinstance(value, bool):
            raise ToolConfigError(f"{where}.{key} must be true or false, got {value!r}")
        if value is off:
            return True
    return False


def _ours(server: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A server of another client's file under our keys. Raises ToolConfigError.

    A key is used, or is known to change nothing here, or is refused.
    """
    made: dict[str, Any] = {}
    for key, value in server.items():
        if key in _INSTEAD:
            raise ToolConfigError(f"{where}.{key} is not read: {_INSTEAD[key]}")
        if key in _NO_EFFECT or key in ("disabled", "enabled", "type", "transport", "auth_token"):
            continue
        made[_SAME.get(key, key)] = value
    for key in ("type", "transport"):
        _check_transport(server.get(key), made, f"{where}.{key}")
    if token := server.get("auth_token"):  # verl's key
        made["headers"] = {"Authorization": f"Bearer {token}", **(made.get("headers") or {})}
    return made


def _check_transport(given: object, server: Mapping[str, Any], where: str) -> None:
    """The transport follows from `command` or `url`; a file that says another one is refused."""
    if given is None:
        return
    allowed = [name for key, names in _TRANSPORTS.items() if key in server for name in names]
    if given not in allowed:
        hint = nearest(str(given), allowed)
        raise ToolConfigError(f"{where} is {given!r}, which this server cannot be{hint}")


_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_STRING_OR_COMMA = re.compile(r'"(?:\\.|[^"\\])*"|,(?=\s*[}\]])', re.DOTALL)


def _without_comments(text: str) -> str:
    """Removes what editors allow in JSON: `//` and `/* */` comments, and trailing commas."""
    for pattern in (_STRING_OR_COMMENT, _STRING_OR_COMMA):
        text = pattern.sub(lambda match: match[0] if match[0].startswith('"') else " ", text)
    return text


# ---------------------------------------------------------------------- variables

_VARIABLE = re.compile(r"\$\{(?:env:)?(\w+)(?::-([^}]*))?\}")
_EDITORS_OWN = re.compile(r"\$\{(?:input|config|command):[^}]*\}")


def _expanded(value: Any, where: str) -> Any:
    """`value` with the variables in its texts replaced from the environment.

    `${NAME}`, `${env:NAME}` (VS Code) and `${NAME:-default}` are read.
    """
    if isinstance(value, Mapping):
        return {key: _expanded(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, where) for item in value]
    if not isinstance(value, str):
        return value
    if own := _EDITORS_OWN.search(value):
        raise ToolConfigError(
            f"{where}: {own[0]} is an editor's variable; write ${{NAME}} for one of the environment"
        )

    def replaced(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        found = os.environ.get(name)
        if found is None and default is None:
            raise ToolConfigError(f"{where}: the environment has no variable {name}")
        # As in a shell, an empty variable is as good as none if there is a default.
        return found or default or ""

    return _VARIABLE.sub(replaced, value)
