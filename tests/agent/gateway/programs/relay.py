"""A connection that breaks once: `python relay.py COMMAND...` runs a command behind it.

Carries bytes between the command and the endpoint in its environment. The answer to the second
request for a turn is cut in its midst, with a reset on both sides, as a lost connection ends.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import struct
import sys
from urllib.parse import urlsplit

CUT = 2
TURN = re.compile(rb"^POST \S*/(messages|chat/completions|responses)(\?\S*)? HTTP", re.M)
VARIABLES = ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL")


class Relay:
    """Connections to one host and port; `turns` counts the requests for turns."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.turns = 0
        self.is_cutting = False

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the command's."""
        there, back = await asyncio.open_connection(self.host, self.port)
        forth = asyncio.create_task(self._forth(reader, back))
        try:
            while part := await there.read(1 << 16):
                if self.is_cutting:
                    self.is_cutting = False
                    writer.write(part[: len(part) // 2])
                    await writer.drain()
                    _reset(back)
                    _reset(writer)
                    return
                writer.write(part)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            forth.cancel()
            writer.close()
            back.close()

    async def _forth(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while part := await reader.read(1 << 16):
            if TURN.search(part):
                self.turns += 1
                self.is_cutting = self.turns == CUT
            back.write(part)
            await back.drain()
        back.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def main(command: list[str]) -> int:
    gateway = urlsplit(os.environ[VARIABLES[0]])
    relay = Relay(gateway.hostname or "", gateway.port or 80)
    server = await asyncio.start_server(relay.carry, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    changed = {name: os.environ[name].replace(gateway.netloc, address) for name in VARIABLES}
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **changed})
    return await process.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
