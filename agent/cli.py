"""The command line: each command reads its options and hands over. Heavy modules are imported inside the commands.

Invariant: a user's mistake is one `error:` line on stderr and exit code 2; any other exception keeps its traceback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from agent.commands.export import export, stats
from agent.commands.import_ import import_
from agent.commands.index import index
from agent.commands.replay import replay
from agent.commands.rescore import rescore
from agent.commands.serve_search import serve_search
from agent.commands.show import show
from agent.commands.tools import tools_app
from agent.commands.verify import verify
from agent.commands.view import view
from agent.errors import AgentError
from agent.packages import how_to_install
from agent.terminal import one_line
from conversations.errors import ConversationsError
from tools.base import ToolsError

app = typer.Typer(
    name="turntrace",
    help="Multi-turn, tool-calling conversations with every token's author on record.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
serve_app = typer.Typer(help="Serve an embedded tool backend.", no_args_is_help=True)
tasks_app = typer.Typer(help="Write a task file.", no_args_is_help=True)
app.add_typer(tasks_app, name="tasks")
app.add_typer(serve_app, name="serve")
app.add_typer(tools_app, name="tools")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="config.yaml; without it the embedded model runs.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a config key: rollout.temperature=0.7"
    ),
]


def main() -> int:
    """Runs the command of `sys.argv`; returns 2 after a user's mistake, otherwise exits with the command's own code."""
    try:
        app(prog_name="turntrace")
    except (AgentError, ConversationsError, ToolsError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("agent", "conversations", "tools"):
            raise
        missing = f"the Python package {error.name!r} is not installed"
        print(f"error: {missing}; {how_to_install(error.name)}", file=sys.stderr)
        return 2
    return 0


@app.command()
def run(
    tasks: Annotated[
        Path, typer.Argument(help="JSONL or Parquet, in verl's schema or plain prompts.")
    ],
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    config: ConfigOption = None,
    tools: Annotated[
        str | None,
        typer.Option(
            help="tools.yaml, or the name of a shipped one: gsm8k, geo3k, search, sandbox, mcp, all."
        ),
    ] = None,
    n: Annotated[int | None, typer.Option(min=1, help="Samples of each task.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Run only the first so many tasks.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="With --resume: although config, tools, model or tasks differ."
        ),
    ] = False,
    validate: Annotated[bool, typer.Option("--validate", help="Sample with val_kwargs.")] = False,
    stop_after: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Stop after so many seconds; what is unfinished is kept, and --resume goes on with it.",
        ),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Run every task to its end; trajectories are written as they finish."""
    from agent.config.config import load_config

    overrides = [*(set_ or []), *_tools_override(tools), *_n_override(n, validate)]
    loaded = load_config(config, overrides)
    for notice in loaded.notices():
        print(f"note: {notice}", file=sys.stderr)
    from rich.console import Console

    from agent.runs.job import RunRequest
    from agent.runs.job import run as run_request

    request = RunRequest(
        tasks, out, loaded, limit, resume, force, validate, sys.argv[1:], stop_after
    )
    raise typer.Exit(run_request(request, Console()))


def _tools_override(tools: str | None) -> list[str]:
    """--tools says what the config could say too, but relative to where the user is."""
    if tools is None:
        return []
    path = Path(tools)
    is_file = bool(path.suffix) or path.name != tools  # a bare name is a shipped config's
    if is_file and not path.is_file():
        raise AgentError(
            f"--tools {tools}: there is no such file; a shipped config goes by its bare name (gsm8k)"
        )
    value = str(path.resolve()) if is_file else tools
    return [
        f"rollout.multi_turn.tool_config_path={json.dumps(value)}",
        "rollout.multi_turn.enable=true",
    ]


def _n_override(n: int | None, validate: bool) -> list[str]:
    if n is None:
        return []
    return [f"rollout.val_kwargs.n={n}" if validate else f"rollout.n={n}"]


@tasks_app.command("gsm_symbolic")
def gsm_symbolic(
    size: Annotated[int, typer.Option(min=1, help="Number of problems.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed gives the same problems.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default gsm_symbolic-SIZE-SEED.jsonl")
    ] = None,
) -> None:
    """Generated grade-school problems with answers (reasoning-gym)."""
    from agent.commands.task_sources import write_gsm_symbolic

    path = out or Path(f"gsm_symbolic-{size}-{seed}.jsonl")
    print(f"{write_gsm_symbolic(path, size, seed)} tasks written to {path}")


@tasks_app.command("gsm8k")
def gsm8k(
    source: Annotated[
        Path, typer.Argument(help="GSM8K's own JSONL: question, and an answer ending in #### 42.")
    ],
    out: Annotated[Path, typer.Option(help="File to write.")],
) -> None:
    """GSM8K's problems as tasks."""
    from agent.commands.task_sources import write_gsm8k

    print(f"{write_gsm8k(source, out)} tasks written to {out}")


@serve_app.command("sandbox")
def serve_sandbox(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Programs at a time; default: one a CPU.")
    ] = None,
    packages: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="Installed packages that programs may import: numpy,sympy"
        ),
    ] = "",
    sessions: Annotated[
        int, typer.Option(min=0, help="Python sessions at a time, at most.")
    ] = 1024,
    session_idle_s: Annotated[
        float, typer.Option(min=1, help="A session ends when nobody calls for so many seconds.")
    ] = 900,
    cold: Annotated[
        bool, typer.Option("--cold", help="A bubblewrap of its own for each program: slower.")
    ] = False,
) -> None:
    """SandboxFusion's /run_code, isolated by bubblewrap. Prints its port, ends on Ctrl-C or SIGTERM."""
    from tools.servers.sandbox.server import Options, names, serve_until_ended

    options = Options(host, port, workers, names(packages), sessions, session_idle_s, cold)
    try:
        serve_until_ended(options)
    except OSError as error:
        raise AgentError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
        ) from error


@app.command()
def doctor(config: ConfigOption = None, set_: SetOption = None) -> None:
    """Check this machine, one line a finding; exit code 1 where something would fail."""
    from agent.commands.doctor import examine

    raise typer.Exit(examine(config, set_ or []))


@app.command()
def model(
    name: Annotated[
        str, typer.Argument(help="smollm2-tools, smollm2-base, or a cached Hugging Face id.")
    ] = "smollm2-tools",
) -> None:
    """Print a model's local folder, built first where it is an embedded one."""
    from agent.model.base import resolve_model

    print(resolve_model(name))


@app.command()
def version() -> None:
    """Print the versions that a run depends on."""
    from agent.runs.manifest import versions

    for name, found in versions().items():
        print(f"{name} {found or 'not installed'}")


app.command()(index)
serve_app.command("search")(serve_search)
app.command()(export)
app.command()(stats)
app.command("import")(import_)
app.command()(replay)
app.command()(rescore)
app.command()(verify)
app.command()(show)
app.command()(view)
