"""The search server: Search-R1's `POST /retrieve` over one index, and `GET /health`.

    POST /retrieve {"queries": [str], "topk": 3, "return_scores": false}
    -> {"result": [[{"id", "contents"}, ...], ...]}, one list a query, the best document first
       with return_scores:
       {"result": [[{"document": {"id", "contents"}, "score": float}, ...], ...]}

(Search-R1's `search_r1/search/retrieval_server.py`; verl always asks for scores.) A request that
cannot be served is a 4xx whose `detail` names the field; every query is valid. The line that
announces the port names the corpus and its license.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tools.servers.process import serve_until_ended
from tools.servers.search.index import Hit, SearchIndex, staleness

DEFAULT_TOPK = 3
MAX_TOPK = 1000
MAX_DOCUMENTS = 50_000
"""In one answer: `topk` for each query. A trainer asks for a whole batch at once."""
MAX_REQUEST_BYTES = 16 * 2**20


class _Refused(Exception):  # noqa: N818 - an answer, not an error of ours
    """A request that gets a 4xx. `where` is the path of the field."""

    def __init__(self, code: int, where: Sequence[str | int], message: str) -> None:
        super().__init__(message)
        self.code, self.where = code, ["body", *where]

    def response(self) -> Response:
        return JSONResponse({"detail": [{"loc": self.where, "msg": str(self)}]}, self.code)


@dataclass(frozen=True, slots=True)
class _RetrieveRequest:
    queries: list[str]
    topk: int
    return_scores: bool


def search_app(index: SearchIndex) -> Starlette:
    """The ASGI app over an open index. Queries run in threads, one for each core."""
    threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="search")

    async def retrieve(request: Request) -> Response:
        try:
            wanted = _read(await _body(request))
        except _Refused as refused:
            return refused.response()
        except ClientDisconnect:
            return Response(status_code=400)  # the client is gone
        loop = asyncio.get_running_loop()
        hits = await asyncio.gather(
            *(
                loop.run_in_executor(threads, index.search, query, wanted.topk)
                for query in wanted.queries
            )
        )
        return Response(_answer(hits, wanted.return_scores), media_type="application/json")

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", **index_facts(index)})

    return Starlette(
        routes=[Route("/retrieve", retrieve, methods=["POST"]), Route("/health", health)]
    )


def index_facts(index: SearchIndex) -> dict[str, Any]:
    """The corpus, the number of its documents, and their license if it is known."""
    said = {
        "corpus": index.manifest["name"],
        "documents": index.manifest["documents"],
        "license": index.manifest["license"],
    }
    return {key: value for key, value in said.items() if value is not None}


def _answer(hits: Sequence[Sequence[Hit]], return_scores: bool) -> bytes:
    """The documents are JSON already: they are joined, not encoded again."""
    lists = (
        b", ".join(_hit(hit) if return_scores else hit.document for hit in each) for each in hits
    )
    return b'{"result": [' + b", ".join(b"[" + each + b"]" for each in lists) + b"]}"


def _hit(hit: Hit) -> bytes:
    return b'{"document": %b, "score": %b}' % (hit.document, repr(hit.score).encode())


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_REQUEST_BYTES:
            raise _Refused(413, [], f"the request is over {MAX_REQUEST_BYTES // 2**20} MiB")
    return bytes(body)


def _read(body: bytes) -> _RetrieveRequest:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Refused(400, [], f"not JSON: {error or 'nested too deeply'}") from error
    if not isinstance(given, dict):
        raise _Refused(422, [], f"expected an object, got {_kind(given)}")
    queries = given.get("queries")
    if not isinstance(queries, list):
        raise _Refused(422, ["queries"], f"must be a list of strings, got {_kind(queries)}")
    for number, query in enumerate(queries):
        if not isinstance(query, str):
            raise _Refused(422, ["queries", number], f"must be a string, got {_kind(query)}")
    topk = given.get("topk")
    topk = DEFAULT_TOPK if topk is None else topk
    if not isinstance(topk, int) or isinstance(topk, bool) or not 1 <= topk <= MAX_TOPK:
        raise _Refused(
            422,
            ["topk"],
            f"must be a whole number from 1 to {MAX_TOPK}, got {json.dumps(topk)[:40]}",
        )
    if len(queries) * topk > MAX_DOCUMENTS:
        raise _Refused(
            422,
            ["queries"],
            f"{len(queries)} queries with topk {topk} ask for more than {MAX_DOCUMENTS} documents",
        )
    scores = given.get("return_scores", False)
    if not isinstance(scores, bool):
        raise _Refused(422, ["return_scores"], f"must be true or false, got {_kind(scores)}")
    return _RetrieveRequest(queries, topk, scores)


def _kind(value: object) -> str:
    names = {
        dict: "object",
        list: "array",
        str: "string",
        bool: "boolean",
        int: "number",
        float: "number",
    }
    return names.get(type(value), "null")


def serve_index(index: Path, host: str, port: int, *, with_parent: bool = False) -> None:
    """Serves an index folder until the process is ended.

    Raises SearchUnavailable and OSError (a port in use) before it serves.
    """
    opened = SearchIndex(index)
    if stale := staleness(index):
        print(f"note: {stale}", file=sys.stderr, flush=True)
    serve_until_ended(search_app(opened), host, port, index_facts(opened), with_parent=with_parent)
