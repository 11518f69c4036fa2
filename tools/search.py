"""`search`: runs the model's queries on a Search-R1 `/retrieve` server, by default the embedded.

The model reads exactly what verl 0.6.1's SearchTool shows it, `{"result": TEXT}`; a query's text is
`Doc 1 (Title: ...)\\n...\\n\\nDoc 2 ...`, and several are joined by `\\n---\\n`
(`verl/tools/utils/search_r1_like_utils.py`). A server that fails, cannot be reached or answers
something else is a BackendError; in verl that is a text for the model.
"""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Annotated, Any

import pydantic

from tools.backend import Backend, remote_url
from tools.base import BackendError, BaseTool, ToolConfigError, ToolError, ToolResponse
from tools.extras import require
from tools.policy import Count, read_own, with_rate_limit
from tools.reading import STRICT, first_problem
from tools.servers import embedded

PATH = "/retrieve"
# Of one call; both at once are within what our server answers.
MAX_QUERIES, MAX_TOPK = 100, 500
NOTHING_FOUND = "No search results found."

# On top of the server's time: the backend's own deadline comes before the dispatcher's.
_SLACK_S = 10.0


class _Document(pydantic.BaseModel):
    contents: str


class _Hit(pydantic.BaseModel):
    document: _Document


class _Answer(pydantic.BaseModel):
    result: list[list[_Hit]]


class SearchConfig(pydantic.BaseModel):
    """The tool's own keys of `config`; all are optional.

    retrieval_service_url: a server's address, `/retrieve` may be left out; absent or `embedded`: a
        local server, started on demand
    corpus: for the embedded server: a JSONL file, indexed on first use, or a folder that
        `turntrace index` made; absent: 10,033 Wikipedia leads
    topk: documents for each query
    timeout: seconds for one answer
    num_workers: calls at a time
    enable_global_rate_limit: verl's; false: the dispatcher's `rate_limit` does not count
    """

    model_config = STRICT

    retrieval_service_url: str | None = None
    corpus: Annotated[str, pydantic.Field(min_length=1)] | None = None
    topk: int = pydantic.Field(3, ge=1, le=MAX_TOPK)
    timeout: float = pydantic.Field(30.0, gt=0, allow_inf_nan=False)
    num_workers: Count = 120
    enable_global_rate_limit: bool = True


class SearchTool(BaseTool):
    """Takes `query_list`, a list of strings; answers with the `topk` documents found for each.

    config: `SearchConfig`. The dispatcher's `rate_limit` is calls a second; verl's own class takes
    it for calls at a time.
    """

    config_keys = frozenset(SearchConfig.model_fields)
    idempotent = True

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        own = read_own(SearchConfig, config)
        super().__init__(with_rate_limit(config, own.enable_global_rate_limit), tool_schema)
        self._topk = own.topk
        self._corpus = None if own.corpus is None else Path(own.corpus).expanduser()
        self.timeout_s = own.timeout + _SLACK_S
        self.max_concurrency = own.num_workers
        remote = remote_url("retrieval_service_url", own.retrieval_service_url, PATH)
        if remote is not None and self._corpus is not None:
            raise ToolConfigError(
                "config.corpus is for the embedded server; leave it out, or retrieval_service_url"
            )
        self._backend = Backend(
            "the search server",
            remote,
            self._embedded,
            PATH,
            connections=own.num_workers,
            timeout_s=own.timeout,
        )

    async def start(self) -> None:
        """Indexes the corpus and starts the embedded server, if it is used. Raises ToolsError."""
        await self._backend.start()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        queries = _queries(parameters)
        body = {"queries": queries, "topk": self._topk, "return_scores": True}
        documents = _documents_of(await self._backend.post(json.dumps(body).encode()), len(queries))
        total = sum(map(len, documents))
        metrics = {
            "query_count": len(queries),
            "status": "success" if total else "no_results",
            "total_results": total,
        }
        text = "\n---\n".join(map(_rendered, documents)) if total else NOTHING_FOUND
        return ToolResponse(json.dumps({"result": text}, ensure_ascii=False)), None, metrics

    async def close(self) -> None:
        await self._backend.close()

    async def _embedded(self) -> embedded.EmbeddedServer:
        """The server of the corpus' index, which is made first if there is none.

        Cancelling that leaves nothing behind.
        """
        require("tantivy", extra="search")
        from tools.servers.search.index import index_of

        cancelled = threading.Event()

        def go_on(_: float) -> None:
            if cancelled.is_set():
                raise _CancelledBuildError

        try:
            return embedded.search_over(str(await asyncio.to_thread(index_of, self._corpus, go_on)))
        finally:
            cancelled.set()


class _CancelledBuildError(Exception):
    """Ends the making of an index that is no longer needed."""


def _queries(parameters: dict[str, Any]) -> list[str]:
    given = parameters.get("query_list")
    if (
        not isinstance(given, list)
        or not given
        or not all(isinstance(query, str) for query in given)
    ):
        raise ToolError("query_list must be a list of one or more strings")
    if len(given) > MAX_QUERIES:
        raise ToolError(f"query_list may hold at most {MAX_QUERIES} queries, got {len(given)}")
    # A model can write half of a surrogate pair, which other servers refuse.
    return [query.encode("utf-8", errors="replace").decode() for query in given]


def _documents_of(content: bytes, queries: int) -> list[list[str]]:
    """The documents' contents, one list for each query."""
    try:
        answer = _Answer.model_validate_json(content)
    except pydantic.ValidationError as error:
        problem = first_problem(error, _Answer)
        raise BackendError(f"the search server sent an invalid answer: {problem}") from error
    if len(answer.result) != queries:
        raise BackendError(f"the search server answered {len(answer.result)} queries of {queries}")
    return [[hit.document.contents for hit in hits] for hits in answer.result]


def _rendered(documents: list[str]) -> str:
    blocks = []
    for number, contents in enumerate(documents, 1):
        title, _, text = contents.partition("\n")
        blocks.append(f"Doc {number} (Title: {title})\n{text}\n\n")
    return "".join(blocks).strip()
