"""Rules: other clients' files are read; a key is used, known to change nothing, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.base import ToolConfigError
from tools.mcp.config import McpServerConfig, read_servers


def servers(tmp_path: Path, text: Any, **rest: Any) -> list[McpServerConfig]:
    file = tmp_path / "servers.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    return read_servers({"mcp_servers_config_path": "servers.json", **rest}, tmp_path)


def named(**server: Any) -> dict[str, Any]:
    return {"mcpServers": {"one": server}}


def test_a_server_that_is_switched_off_is_not_there(tmp_path: Path) -> None:
    document = {
        "mcpServers": {
            "off": {"command": "a", "disabled": True},
            "on": {"command": "b", "disabled": False},
            "off too": {"command": "c", "enabled": False},
            "on too": {"command": "d", "enabled": True},
            "broken but off": {"disabled": True, "timeout": 5, "unknown": 1},
        }
    }
    assert [server.command for server in servers(tmp_path, document)] == ["b", "d"]
    with pytest.raises(ToolConfigError, match="enabled"):
        servers(tmp_path, named(command="a", disabled=True))
    with pytest.raises(ToolConfigError, match=r"'one'.disabled .*'yes'"):
        servers(tmp_path, named(command="a", disabled="yes"))


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ({"url": "http://h/mcp", "type": "http"}, "http://h/mcp"),
        ({"serverUrl": "http://h/mcp"}, "http://h/mcp"),
        ({"httpUrl": "http://h/mcp", "trust": True}, "http://h/mcp"),
        ({"url": "http://h/mcp", "type": "streamableHttp"}, "http://h/mcp"),
        ({"command": "a", "type": "stdio", "alwaysAllow": ["x"]}, None),
        ({"command": "a", "transport": "stdio", "autoApprove": [], "description": "d"}, None),
    ],
)
def test_other_clients_keys_are_read(
    tmp_path: Path, server: dict[str, Any], url: str | None
) -> None:
    """Windsurf's, Gemini's, Roo's, Cline's and VS Code's."""
    for top in ("mcpServers", "servers"):
        (read,) = servers(tmp_path, {top: {"one": server}})
        assert read.url == url


def test_which_tools_are_offered_may_be_said_in_the_file(tmp_path: Path) -> None:
    (read,) = servers(tmp_path, named(command="a", includeTools=["x", "y"]))
    assert read.tools == ["x", "y"]


@pytest.mark.parametrize(
    ("server", "place", "word"),
    [
        ({"command": "a", "timeout": 60}, "timeout", "timeout_s"),
        ({"command": "a", "disabledTools": ["x"]}, "disabledTools", "under tools"),
        ({"command": "a", "excludeTools": ["x"]}, "excludeTools", "under tools"),
        ({"url": "http://h/sse", "type": "sse"}, "type", "'sse'"),
        ({"url": "http://h/", "type": "stdio"}, "type", "'stdio'"),
        ({"command": "a", "transport": "http"}, "transport", "'http'"),
        ({"command": "a", "envFile": ".env"}, "'envFile'", "no key"),
        ({"command": "a", "oauth": {}}, "'oauth'", "no key"),
    ],
)
def test_a_key_that_changes_what_happens_is_refused_not_ignored(
    tmp_path: Path, server: dict[str, Any], place: str, word: str
) -> None:
    with pytest.raises(ToolConfigError) as caught:
        servers(tmp_path, named(**server))
    assert "mcp server 'one'" in str(caught.value)
    assert place in str(caught.value)
    assert word in str(caught.value)


def test_comments_and_trailing_commas_are_read(tmp_path: Path) -> None:
    text = """// VS Code
    {"servers": { /* one
      of two */ "a": {"url": "http://h//p", "headers": {"x": "/* no comment */ // ,}"},},
      // "b": {"command": "b"},
    },}"""
    (read,) = servers(tmp_path, text)
    assert (read.url, read.headers) == ("http://h//p", {"x": "/* no comment */ // ,}"})


@pytest.mark.parametrize(
    "text", ["{", "[]", "5", '{"mcpServers": []}', '{"mcpServers": {"a": 5}}', "[" * 100_000]
)
def test_what_is_no_such_file_is_said_with_the_form(tmp_path: Path, text: str) -> None:
    with pytest.raises(ToolConfigError) as caught:
        servers(tmp_path, text)
    assert "servers.json" in str(caught.value)
    assert '{"mcpServers": {"name"' in str(caught.value)
    assert "\\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("${SET}", "s"),
        ("${env:SET}", "s"),
        ("${SET:-other}", "s"),
        ("${UNSET_HERE:-other}", "other"),
        ("${UNSET_HERE:-}", ""),
        ("${EMPTY:-other}", "other"),
        ("${EMPTY}", ""),
        ("a${SET}b${UNSET_HERE:-c d}e", "asbc de"),
        ("$SET ${SET%s} {SET}", "$SET ${SET%s} {SET}"),
    ],
)
def test_variables_have_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, value: str
) -> None:
    monkeypatch.setenv("SET", "s")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET_HERE", raising=False)
    (read,) = read_servers({"command": "a", "env": {"X": given}, "args": [given]}, tmp_path)
    assert (read.env["X"], read.args) == (value, [value])


@pytest.mark.parametrize("given", ["${UNSET_HERE}", "${env:UNSET_HERE}", "${input:key}"])
def test_a_variable_that_is_not_there_is_refused_with_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str
) -> None:
    monkeypatch.delenv("UNSET_HERE", raising=False)
    with pytest.raises(ToolConfigError, match=r"^mcp\.headers\.Authorization: "):
        read_servers({"url": "http://h", "headers": {"Authorization": given}}, tmp_path)


def test_numbers_stand_for_text_where_text_is_wanted_and_booleans_do_not(tmp_path: Path) -> None:
    (read,) = read_servers(
        {"command": "a", "args": ["-p", 8080, 0.5], "env": {"PORT": 80}}, tmp_path
    )
    assert (read.args, read.env) == (["-p", "8080", "0.5"], {"PORT": "80"})
    with pytest.raises(ToolConfigError, match=r"mcp\.env\.ON .*True"):
        read_servers({"command": "a", "env": {"ON": True}}, tmp_path)
