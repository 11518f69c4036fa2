"""An HTTP server that misbehaves on request: `{"do": ...}` in a POST's body says how.

Run as a process of its own.

python tests/chaos_server.py PORT    prints the port once it listens; 0 takes a free one
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys

HUGE_BYTES = 10_000_000
DELAY_S = 0.05


async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while await answer(await asked(reader), writer):
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def asked(reader: asyncio.StreamReader) -> str:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    assert length, head
    return str(json.loads(await reader.readexactly(int(length[1])))["do"])


async def answer(do: str, writer: asyncio.StreamWriter) -> bool:
    """Does what was asked for; returns whether the connection stays."""
    await asyncio.sleep(DELAY_S)
    if do == "die":
        os._exit(1)
    if do == "hang":
        await asyncio.sleep(3600)
    if do == "close":
        return False
    body = {"ok": b'{"text": "fine"}', "huge": b'{"text": "%s"}' % (b"x" * HUGE_BYTES)}.get(
        do, b"<html>no JSON</html>"
    )
    status = b"500 Internal Server Error" if do == "500" else b"200 OK"
    writer.write(
        b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        % (status, len(body))
    )
    writer.write(body[: len(body) // 2] if do == "half" else body)
    return do != "half"


async def main(port: int) -> None:
    server = await asyncio.start_server(connected, "127.0.0.1", port, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
