"""`code_interpreter`: runs the model's code on a SandboxFusion server, the embedded one unless told otherwise.

A program that fails is an answer: its output and traceback go to the model as a ToolError. Only a sandbox that fails,
or that cannot be reached, is a BackendError.
"""

from __future__ import annotations

import os
from collections.abc import Container
from typing import Any

import httpx
import pydantic

from tools.backend import Backend, remote_url
from tools.base import BackendError, BaseTool, ToolConfigError, ToolError, ToolResponse
from tools.sandbox_sessions import Sessions
from tools.servers import embedded
from tools.servers.sandbox.wire import CommandRunResult, RunCodeRequest, RunCodeResponse

PATH = "/run_code"

# A call may take as long as compiling and running, and some slack each for the server's answer and for our own deadline.
_SLACK_S = 10.0


class SandboxFusionTool(BaseTool):
    """Takes `code`, answers with what it printed.

    config (all optional): `sandbox_fusion_url` (its `/run_code` may be left out; absent or `embedded`: a local server,
    started on demand), `default_timeout` (30 s), `default_language` (python), `memory_limit_mb` (1024), `num_workers`
    (calls at a time: 10; with the embedded server never more than twice the cores), `packages` (installed ones that
    programs on the embedded server may import), `session` (true: a trajectory's calls run in one Python interpreter,
    which remembers variables; needs a server of turntrace's). The dispatcher's `rate_limit` is calls a second, and none
    where verl's `enable_global_rate_limit` is false; there, it was calls at a time.
    Parameters `language` and `timeout` count only where the schema offers them.
    """

    config_keys = frozenset(
        {
            "sandbox_fusion_url",
            "default_timeout",
            "default_language",
            "memory_limit_mb",
            "num_workers",
            "packages",
            "session",
            "enable_global_rate_limit",
        }
    )

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        if config.get("enable_global_rate_limit") is False:
            config = {key: value for key, value in config.items() if key != "rate_limit"}
        super().__init__(config, tool_schema)
        self._offered = tool_schema["function"].get("parameters", {}).get("properties", {}).keys()
        remote = _remote(config.get("sandbox_fusion_url"))
        self._packages = _packages(config.get("packages"), is_remote=remote is not None)
        self._default = _default_request(config)
        self.timeout_s = 2 * (self._default.run_timeout + _SLACK_S)
        self.max_concurrency = _workers(config.get("num_workers"), is_remote=remote is not None)
        self._backend = Backend(
            "the sandbox",
            remote,
            self._embedded,
            PATH,
            connections=self.max_concurrency,
            timeout_s=self.timeout_s - _SLACK_S,
        )
        self._sessions = (
            Sessions(self._backend, self._default.memory_limit_MB)
            if _session(config, self._offered)
            else None
        )

    async def start(self) -> None:
        """Starts the embedded server where it is used. Raises ToolsError, also where one is away or lacks what the config asks for."""
        await self._backend.start()
        if "default_language" in self.config:
            await self._check_language()
        if self._sessions is not None:
            await self._sessions.check()

    async def _check_language(self) -> None:
        """Raises ToolConfigError where the server says that it does not run the language; SandboxFusion's own says nothing."""
        try:
            languages = (await self._backend.send("GET", path="v1/info")).json()["languages"]
        except (BackendError, ValueError, LookupError, TypeError):
            return
        language = self._default.language
        if isinstance(languages, list) and language not in languages:
            offered = ", ".join(map(str, languages))
            raise ToolConfigError(
                f"config.default_language: the sandbox does not run {language!r}; it runs {offered}"
            )

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        request = self._asked(parameters)
        notes: tuple[str, str] = ("", "")
        if self._sessions is None:
            response = _parsed(
                self._succeeded(
                    await self._backend.send("POST", request.model_dump_json().encode())
                )
            )
        else:
            response, notes = await self._sessions.run(instance_id, request)
        if response.status == "SandboxError":
            raise BackendError(f"the sandbox failed: {response.message}")
        result = response.run_result or response.compile_result
        if result is None:
            raise BackendError(
                f"the sandbox answered {response.status} without a result: {response.message}"
            )
        metrics = {
            "status": result.status,
            "return_code": result.return_code,
            "execution_time": result.execution_time,
        }
        text = _joined(_joined(notes[0], _shown(result, request)), notes[1])
        if response.status != "Success":
            raise ToolError(text, metrics)
        return ToolResponse(text), None, metrics

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        if self._sessions is not None:
            await self._sessions.end(instance_id)

    async def close(self) -> None:
        if self._sessions is not None:
            await self._sessions.close()
        await self._backend.close()

    async def _embedded(self) -> embedded.EmbeddedServer:
        return embedded.sandbox_with(*self._packages)

    def _asked(self, parameters: dict[str, Any]) -> RunCodeRequest:
        update: dict[str, Any] = {"code": _unicode(str(parameters.get("code", "")))}
        if "language" in self._offered:
            update["language"] = parameters.get("language", self._default.language)
        if "timeout" in self._offered:
            update["run_timeout"] = _seconds(parameters.get("timeout"), self._default.run_timeout)
        return self._default.model_copy(update=update)

    def _succeeded(self, answer: httpx.Response) -> httpx.Response:
        if answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY and "language" in self._offered:
            raise ToolError(f"the sandbox refused the call: {answer.text}")
        return self._backend.succeeded(answer)


def _parsed(answer: httpx.Response) -> RunCodeResponse:
    try:
        return RunCodeResponse.model_validate_json(answer.content)
    except pydantic.ValidationError as error:
        raise BackendError(
            f"the sandbox at {answer.url} answered nonsense: ValidationError: {error}"
        ) from error


def _remote(given: object) -> httpx.URL | None:
    url = remote_url("sandbox_fusion_url", given, PATH)
    return (
        url
        if url is None or url.path.endswith(PATH)
        else url.copy_with(path=url.path.rstrip("/") + PATH)
    )


def _packages(given: object, *, is_remote: bool) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(name, str) and name for name in given):
        raise ToolConfigError(
            f"config.packages must be a list of names of installed packages, got {given!r}"
        )
    if is_remote and given:
        raise ToolConfigError(
            "config.packages is for the embedded server; a server of your own is started with --packages"
        )
    return tuple(sorted(set(given)))


def _session(config: dict[str, Any], offered: Container[str]) -> bool:
    given = config.get("session", False)
    if not isinstance(given, bool):
        raise ToolConfigError(f"config.session must be true or false, got {given!r}")
    if given and (config.get("default_language", "python") != "python" or "language" in offered):
        raise ToolConfigError(
            "config.session: a session is Python; leave default_language and the parameter language out, or session"
        )
    return given


def _workers(given: Any, *, is_remote: bool) -> int:
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise ToolConfigError(f"config.num_workers must be a whole number above 0, got {given!r}")
    workers = given or 10
    # The embedded server runs as many at a time as there are cores; as many again keep it from waiting for the next.
    return workers if is_remote else min(workers, 2 * (os.cpu_count() or 1))


def _seconds(given: Any, limit: float) -> float:
    """The time limit that a model asked for, if it did; what no schema keeps it from writing must not look like the sandbox's fault."""
    if given is None:
        return limit
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not given > 0:
        raise ToolError(f"timeout must be a number of seconds above 0, got {given!r:.80}")
    return min(given, limit)


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
        key = {"memory_limit_MB": "memory_limit_mb", "language": "default_language"}.get(
            str(first["loc"][0]), "default_timeout"
        )
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
