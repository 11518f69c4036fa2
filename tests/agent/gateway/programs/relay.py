"""A connection that breaks once: `python relay.py COMMAND...` runs a command behind it.

Carries bytes between the command and the endpoint in its environment. The answer to a key's second
request for a turn is cut in its midst, with a reset on both sides, as a lost connection ends.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import struct
import sys
from collections import Counter
from collections.abc import Collection
from urllib.parse import urlsplit

CUT = 2
TURN = re.compile(rb"^POST \S*/(messages|chat/completions|responses)(\?\S*)? HTTP", re.M)
VARIABLES = ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL")


KEY = re.compile(rb"^(?:authorization: bearer|x-api-key:) *(\S+)", re.M | re.I)


class Relay:
    """Connections to one host and port. `turns` counts the requests for turns by their key; only
    those of `keys` are cut, None: all. `broken` counts the connections that were.
    """

    def __init__(self, host: str, port: int, keys: Collection[str] | None = None) -> None:
        self.host, self.port, self.keys = host, port, keys
        self.turns: Counter[str] = Counter()
        self.broken = 0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the command's."""
        there, back = await asyncio.open_connection(self.host, self.port)
        cuts = asyncio.Event()
        forth = asyncio.create_task(self._forth(reader, back, cuts))
        try:
            while part := await there.read(1 << 16):
                if cuts.is_set():
                    self.broken += 1
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

    async def _forth(
        self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, cuts: asyncio.Event
    ) -> None:
        while part := await reader.read(1 << 16):
            if TURN.search(part):
                found = KEY.search(part)
                key = found[1].decode() if found else ""
                self.turns[key] += 1
                if self.turns[key] == CUT and (self.keys is None or key in self.keys):
                    cuts.set()
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
