"""How the recipes' commands end."""

from __future__ import annotations

import sys

import typer

from agent.errors import AgentError
from agent.packages import not_installed
from conversations.errors import ConversationsError
from tools.base import ToolsError


def run_app(app: typer.Typer, name: str) -> int:
    """Runs the command of `sys.argv`; returns 2 after a user's mistake, which is one line."""
    try:
        app(prog_name=name)
    except (AgentError, ConversationsError, ToolsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if not (reason := not_installed(error)):
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 2
    return 0
