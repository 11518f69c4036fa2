"""Runs inside the isolation, on the standard library: `relay.py PORT FOLDER PROGRAM ARGUMENTS`.

Carries each connection to 127.0.0.1:PORT on to the gateway's unix socket, runs the program, and
ends with its exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys

SOCKET, ENVIRONMENT = "/tmp/.gateway.sock", "/opt/environment.json"


async def relay_until_it_ends(
    port: int, folder: str, argv: list[str], environment: dict[str, str]
) -> int:
    """Relays while the program runs; returns its exit code."""
    server = await asyncio.start_server(_carry_both_ways, "127.0.0.1", port)
    program = await asyncio.create_subprocess_exec(*argv, cwd=folder, env=environment)
    code = await program.wait()
    server.close()
    return code if code >= 0 else 128 - code


async def _carry_both_ways(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        inner_reader, inner_writer = await asyncio.open_unix_connection(SOCKET)
    except OSError:
        writer.transport.abort()
        return
    out = asyncio.create_task(_carry(reader, inner_writer))
    back = asyncio.create_task(_carry(inner_reader, writer))
    await asyncio.wait((out, back))


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies until the end; a connection that breaks is broken on the other side too."""
    try:
        while part := await reader.read(1 << 16):
            writer.write(part)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
    except OSError:
        writer.transport.abort()


if __name__ == "__main__":
    with open(ENVIRONMENT, encoding="utf-8") as file:
        given = json.load(file)
    sys.exit(asyncio.run(relay_until_it_ends(int(sys.argv[1]), sys.argv[2], sys.argv[3:], given)))
