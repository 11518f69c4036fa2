"""Which programs are run, in which versions, and how they come here: `npm install` by name."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AgentProgram:
    """A program of the npm registry. `NAME.sh` beside this file runs it.

    `without`: cases that it has nothing for. `ends_at`: cases at which it ends by itself, with what
    it does; there it need not come to a last turn. `least_window`: tokens of the smallest context
    that it can be told to compact.
    """

    name: str
    package: str
    version: str
    without: tuple[str, ...] = ()
    ends_at: Mapping[str, str] = field(default_factory=dict)
    least_window: int = 0


PROGRAMS = {
    program.name: program
    for program in (
        AgentProgram("claude", "@anthropic-ai/claude-code", "2.1.332", least_window=100_000),
        AgentProgram(
            "codex",
            "@openai/codex",
            "0.171.0",
            ends_at={"overflow": "asks for a new thread; it compacts before, by its own count"},
        ),
        AgentProgram(
            "opencode",
            "opencode-ai",
            "1.18.33",
            ends_at={"overflow": "compacts and goes on, and yet ends with exit code 1"},
        ),
        AgentProgram("qwen", "@qwen-code/qwen-code", "0.24.4"),
        AgentProgram("pi", "@mariozechner/pi-coding-agent", "0.73.1", without=("sub-agent",)),
    )
}


def fetch(program: AgentProgram, into: Path) -> Path:
    """The folder with the program's `node_modules`, fetched if it is not there yet."""
    folder = into / f"{program.name}-{program.version}"
    done = folder / ".fetched"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = f"{program.package}@{program.version}"
        command = ["npm", "install", "--prefix", folder, "--no-audit", "--no-fund", wanted]
        subprocess.run(command, check=True, timeout=600)
        done.touch()
    return folder
