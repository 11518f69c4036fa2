"""`turntrace doctor`: its options. The work is in `doctor_work.py`."""

from __future__ import annotations

import typer

from agent.commands.options import ConfigOption, SetOption


def doctor(config: ConfigOption = None, set_: SetOption = None) -> None:
    """Check this machine, one line a finding. Exit code 1 if a run would fail."""
    from agent.commands.doctor_work import examine

    raise typer.Exit(examine(config, set_ or []))
