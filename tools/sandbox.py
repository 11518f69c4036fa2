"""`code_interpreter`: runs the model's code on a SandboxFusion server, the embedded one unless told otherwise.

A program that fails is an answer: its output and traceback go to the model as a ToolError. Only a sandbox that fails,
or that cannot be reached, is a BackendError.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import httpx
import pydantic

from tools.base import BackendError, BaseTool, ToolConfigError, ToolError, ToolResponse
from tools.servers import embedded
from tools.servers.wire import CommandRunResult, RunCodeRequest, RunCodeResponse

EMBEDDED = "embedded"

# A call may take as long as compiling and running, and some slack each for the server's answer and for our own deadline.
_SLACK_S = 10.0
_CONNECT_S = 10.0
_CONNECT_RETRIES = 3


class SandboxFusionTool(BaseTool):
    """Takes `code`, answers with what it printed.

    config (all optional): `sandbox_fusion_url` (its `/run_code` may be left out; absent or `embedded`: a local server,
    started on demand), `default_timeout` (30 s), `default_language` (python), `memory_limit_mb` (1024), `num_workers`
    (calls at a time: 10; the embedded server's tool never has more than there are cores). The
    dispatcher's `rate_limit` is calls a second, and none where verl's `enable_global_rate_limit` is false; there, it was
    calls at a time.
    Parameters `language` and `timeout` count only where the schema offers them.
    """

    config_keys = frozenset(
        {
            "sandbox_fusion_url",
            "default_timeout",
            "default_language",
            "memory_limit_mb",
            "num_workers",
            "enable_global_rate_limit",
        }
    )

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        if config.get("enable_global_rate_limit") is False:
            config = {key: value for key, value in config.items() if key != "rate_limit"}
        super().__init__(config, tool_schema)
        self._offered = tool_schema["function"].get("parameters", {}).get("properties", {}).keys()
        self._remote = _remote_url(config.get("sandbox_fusion_url"))
        self._default = _default_request(config)
        self.timeout_s = 2 * (self._default.run_timeout + _SLACK_S)
        self.max_concurrency = _workers(config.get("num_workers"), is_remote=self._remote is not None)
        self._client: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._holds_server = False

    async def start(self) -> None:
        """Starts the embedded server where it is used. Raises SandboxUnavailable."""
        await self._url()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        request = self._asked(parameters)
        response = await self._send(request)
        if response.status == "SandboxError":
            raise BackendError(f"the sandbox failed: {response.message}")
        result = response.run_result or response.compile_result
        if result is None:
            raise BackendError(f"the sandbox answered {response.status} without a result: {response.message}")
        metrics = {"status": result.status, "return_code": result.return_code, "execution_time": result.execution_time}
        text = _shown(result, request)
        if response.status != "Success":
            raise ToolError(text, metrics)
        return ToolResponse(text), None, metrics

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.aclose()
        if self._holds_server:
            self._holds_server = False
            await asyncio.to_thread(embedded.sandbox.release)

    def _asked(self, parameters: dict[str, Any]) -> RunCodeRequest:
        update: dict[str, Any] = {"code": _unicode(str(parameters.get("code", "")))}
        if "language" in self._offered:
            update["language"] = parameters.get("language", self._default.language)
        if "timeout" in self._offered:
            update["run_timeout"] = min(parameters.get("timeout", self._default.run_timeout), self._default.run_timeout)
        return self._default.model_copy(update=update)

    async def _send(self, request: RunCodeRequest) -> RunCodeResponse:
        url, client = await self._url(), self._connected()
        try:
            answer = await client.post(url, content=request.model_dump_json(), headers={"content-type": "application/json"})
            if answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY and "language" in self._offered:
                raise ToolError(f"the sandbox refused the call: {answer.text}")
            answer.raise_for_status()
            return RunCodeResponse.model_validate_json(answer.content)
        except (httpx.HTTPError, pydantic.ValidationError) as error:
            raise BackendError(f"the sandbox at {url}: {type(error).__name__}: {error}") from error

    async def _url(self) -> str:
        if self._remote:
            return self._remote
        if not self._holds_server:
            self._holds_server = True
            embedded.sandbox.acquire()
        if not embedded.sandbox.is_running:
            await asyncio.to_thread(embedded.sandbox.url)
        return f"{embedded.sandbox.url()}/run_code"

    def _connected(self) -> httpx.AsyncClient:
        """The client of the running loop; connections of a loop that is gone cannot be used, nor closed."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            limits = httpx.Limits(max_connections=self.max_concurrency, max_keepalive_connections=self.max_concurrency)
            transport = httpx.AsyncHTTPTransport(retries=_CONNECT_RETRIES, limits=limits)
            timeout = httpx.Timeout(self.timeout_s - _SLACK_S, connect=_CONNECT_S, pool=None)
            self._client, self._loop = httpx.AsyncClient(transport=transport, timeout=timeout), loop
        return self._client


def _remote_url(url: object) -> str | None:
    if url is None or url == EMBEDDED:
        return None
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise ToolConfigError(f"config.sandbox_fusion_url must be {EMBEDDED!r} or an http(s) address, got {url!r}")
    return url if url.rstrip("/").endswith("/run_code") else f"{url.rstrip('/')}/run_code"


def _workers(given: Any, *, is_remote: bool) -> int:
    if given is not None and (not isinstance(given, int) or given < 1):
        raise ToolConfigError(f"config.num_workers must be a whole number above 0, got {given!r}")
    workers = given or 10
    return workers if is_remote else min(workers, os.cpu_count() or 1)


def _default_request(config: dict[str, Any]) -> RunCodeRequest:
    seconds = config.get("default_timeout", 30)
    try:
        return RunCodeRequest(
            code="",
            language=config.get("default_language", "python"),
            run_timeout=seconds,
            compile_timeout=seconds,
            memory_limit_MB=config.get("memory_limit_mb", 1024),
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = {"memory_limit_MB": "memory_limit_mb", "language": "default_language"}.get(str(first["loc"][0]), "default_timeout")
        raise ToolConfigError(f"config.{key}: {first['msg']}, got {first['input']!r}") from error


def _unicode(text: str) -> str:
    """A model can write half of a surrogate pair as an escape; JSON over the wire cannot carry it."""
    return text.encode("utf-8", errors="replace").decode()


def _shown(result: CommandRunResult, request: RunCodeRequest) -> str:
    """What the model reads: the output, then the errors, then how it ended where these do not say so."""
    text = _joined(result.stdout or "", result.stderr or "")
    if result.status == "TimeLimitExceeded":
        return _joined(text, f"The time limit of {request.run_timeout:g} s was exceeded.")
    if result.return_code not in (0, 1, None) or (result.return_code == 1 and not result.stderr):
        return _joined(text, f"Exit code: {result.return_code}")
    return text or "The code ran and printed nothing."


def _joined(first: str, second: str) -> str:
    return first + ("\n" if first and second and not first.endswith("\n") else "") + second
