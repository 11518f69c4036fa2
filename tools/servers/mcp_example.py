"""A small MCP server: a clock, unit conversion, and notes. `tool_configs/mcp.yaml` starts it.

It speaks over stdin and stdout and ends when its stdin does. Notes live as long as the process:
with `per_trajectory` each trajectory has its own.
"""

from __future__ import annotations

import datetime
import zoneinfo
from typing import Annotated, Literal

from mcp.server.fastmcp import FastMCP
from mcp.server.fastmcp.exceptions import ToolError
from pydantic import Field

METRES = {
    "mm": 0.001,
    "cm": 0.01,
    "m": 1.0,
    "km": 1000.0,
    "in": 0.0254,
    "ft": 0.3048,
    "yd": 0.9144,
    "mi": 1609.344,
}

Unit = Literal["mm", "cm", "m", "km", "in", "ft", "yd", "mi"]


def clock(timezone: Annotated[str, Field(description="An IANA name.")] = "UTC") -> str:
    """The date and time now, in ISO 8601."""
    try:
        return datetime.datetime.now(zoneinfo.ZoneInfo(timezone)).isoformat(timespec="seconds")
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError) as error:
        raise ToolError(f"there is no timezone {timezone!r}") from error


def convert(
    value: Annotated[float, Field(description="The length to convert.")],
    unit: Annotated[Unit, Field(description="The unit it is in.")],
    to: Annotated[Unit, Field(description="The unit wanted.")],
) -> str:
    """Converts a length."""
    return f"{value * METRES[unit] / METRES[to]:.10g} {to}"


class Notes:
    """The notes since the server was started."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def write_note(self, text: str) -> str:
        """Remembers a text."""
        self._texts.append(text)
        return f"Note {len(self._texts)} written."

    def read_notes(self) -> str:
        """All notes written so far."""
        return (
            "\n".join(f"{number}. {text}" for number, text in enumerate(self._texts, 1))
            or "There are no notes."
        )


def main() -> None:
    """Serves stdin and stdout until stdin ends."""
    server, notes = FastMCP("turntrace-example", log_level="WARNING"), Notes()
    for function in (clock, convert, notes.write_note, notes.read_notes):
        server.add_tool(function, structured_output=False)
    server.run()


if __name__ == "__main__":
    main()
