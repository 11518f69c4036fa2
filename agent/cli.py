"""The command line: it assembles the commands of `agent.commands`.

Heavy modules are imported inside the commands. Invariant: a user's mistake is one `error:` line on
stderr and exit code 2; any other exception keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from agent.commands.about import model, version
from agent.commands.advantages import advantages
from agent.commands.doctor import doctor
from agent.commands.export import export, stats
from agent.commands.gateway import gateway
from agent.commands.import_ import import_
from agent.commands.index import index
from agent.commands.replay import replay
from agent.commands.rescore import rescore
from agent.commands.run import run
from agent.commands.serve import serve_app
from agent.commands.show import show
from agent.commands.tasks import tasks_app
from agent.commands.tools import tools_app
from agent.commands.verify import verify
from agent.commands.view import view
from agent.errors import AgentError
from agent.packages import how_to_install
from agent.terminal import drop_output, one_line
from conversations.errors import ConversationsError
from tools.base import ToolsError

OUTPUT_LOST = 1
"""The exit code if stdout cannot be written."""
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer itself does not export it

app = typer.Typer(
    name="turntrace",
    help="Multi-turn, tool-calling conversations with every token's author on record.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(tasks_app, name="tasks")
app.add_typer(serve_app, name="serve")
app.add_typer(tools_app, name="tools")
COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "gateway": gateway,
    "replay": replay,
    "rescore": rescore,
    "advantages": advantages,
    "verify": verify,
    "show": show,
    "view": view,
    "stats": stats,
    "export": export,
    "import": import_,
    "index": index,
    "model": model,
    "doctor": doctor,
    "version": version,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> int:
    """Runs the command of `sys.argv`.

    Returns 2 after a user's mistake; otherwise exits with the command's own code.
    """
    # A light install has no torch: transformers would advise to install it in every command.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        try:
            return app(prog_name="turntrace", standalone_mode=False) or 0
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # at exit, an error of it would be a traceback
    except (AgentError, ConversationsError, ToolsError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except UsageError as error:
        if line := _usage_line(error):
            print(line, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("agent", "conversations", "tools"):
            raise
        missing = f"the Python package {error.name!r} is not installed"
        print(f"error: {missing}; {how_to_install(error.name)}", file=sys.stderr)
        return 2
    except OSError as error:
        if not _is_of_stdout(error):
            raise
        drop_output(sys.stdout)
        if error.errno != errno.EPIPE:  # then the reader has gone, as `head` does
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return OUTPUT_LOST


def _usage_line(error: Any) -> str:
    """What is wrong with the command as it was typed; empty if typer has printed the help."""
    message = str(error.format_message())
    if type(error).__name__ == "NoArgsIsHelpError":
        return message.strip()
    command = error.ctx.command_path if error.ctx else "turntrace"
    return f"error: {command}: {one_line(message).rstrip('.')}; see {command} --help"


def _is_of_stdout(error: OSError) -> bool:
    """Whether `error` came from a print: commands report files of their own by name."""
    of_output = (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EFBIG)
    return error.filename is None and error.errno in of_output
