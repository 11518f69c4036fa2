"""`code_interpreter`: runs the model's code on a SandboxFusion server; by default the embedded one.

A program that fails is an answer: the model reads its output and traceback as a ToolError. Only a
sandbox that fails, or that cannot be reached, is a BackendError.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import httpx
import pydantic

from tools.backend import Backend, remote_url
from tools.base import BackendError, BaseTool, ToolConfigError, ToolError, ToolResponse
from tools.policy import Count, read_own, with_rate_limit
from tools.reading import STRICT, first_problem
from tools.sandbox_sessions import TrajectorySessions
from tools.servers import embedded
from tools.servers.sandbox.wire import CommandRunResult, RunCodeRequest, RunCodeResponse

PATH = "/run_code"

# For the server's answer and for our own deadline, on top of the time to compile and to run.
_SLACK_S = 10.0


class SandboxConfig(pydantic.BaseModel):
    """The tool's own keys of `config`; all are optional.

    sandbox_fusion_url: a server's address, `/run_code` may be left out; absent or `embedded`: a
        local server, started on demand
    default_timeout: seconds that the code may run
    default_language: python, bash or cpp; other servers run more
    memory_limit_mb: of all processes of a run together
    num_workers: calls at a time; with the embedded server never more than twice the cores
    packages: installed packages that programs on the embedded server may import
    session: true: a trajectory's calls run in one Python interpreter, which remembers variables;
        needs a server of turntrace's
    enable_global_rate_limit: verl's; false: the dispatcher's `rate_limit` does not count
    """

    model_config = STRICT

    sandbox_fusion_url: str | None = None
    default_timeout: float = pydantic.Field(30.0, gt=0, allow_inf_nan=False)
    default_language: str = "python"
    memory_limit_mb: int = 1024
    num_workers: Count = 10
    packages: list[Annotated[str, pydantic.Field(min_length=1)]] | None = None
    session: bool = False
    enable_global_rate_limit: bool = True


class SandboxFusionTool(BaseTool):
    """Takes `code`, answers with what it printed.

    config: `SandboxConfig`. The dispatcher's `rate_limit` is calls a second; verl's own class takes
    it for calls at a time. Parameters `language` and `timeout` count only if the schema offers
    them. The code runs as the model sent it: a markdown fence is a SyntaxError, which the model
    reads with its place, and the value of a last expression is not printed.
    """

    config_keys = frozenset(SandboxConfig.model_fields)

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        own = read_own(SandboxConfig, config)
        super().__init__(with_rate_limit(config, own.enable_global_rate_limit), tool_schema)
        self._offered = tool_schema["function"].get("parameters", {}).get("properties", {}).keys()
        remote = _remote(own.sandbox_fusion_url)
        self._packages = _packages(own.packages, is_remote=remote is not None)
        self._default = RunCodeRequest(
            code="",
            language=own.default_language,
            run_timeout=own.default_timeout,
            compile_timeout=own.default_timeout,
            memory_limit_MB=own.memory_limit_mb,
        )
        self.timeout_s = 2 * (own.default_timeout + _SLACK_S)
        self.max_concurrency = _workers(own.num_workers, is_remote=remote is not None)
        self._backend = Backend(
            "the sandbox",
            remote,
            self._embedded,
            PATH,
            connections=self.max_concurrency,
            timeout_s=self.timeout_s - _SLACK_S,
        )
        self._sessions = None
        if own.session:
            self._check_session()
            self._sessions = TrajectorySessions(self._backend, own.memory_limit_mb)

    async def start(self) -> None:
        """Starts the embedded server, or probes a remote one and what the config needs of it.

        Raises ToolsError.
        """
        await self._backend.start()
        if "default_language" in self.config:
            await self._check_language()
        if self._sessions is not None:
            await self._sessions.check()

    def _check_session(self) -> None:
        if self._default.language != "python" or "language" in self._offered:
            raise ToolConfigError(
                "config.session: a session is Python; leave out default_language and the parameter "
                "language, or session"
            )

    async def _check_language(self) -> None:
        """Raises ToolConfigError if the server lists its languages and lacks this one.

        SandboxFusion's own server lists none.
        """
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
            f"the sandbox at {answer.url} sent an invalid answer: "
            f"{first_problem(error, RunCodeResponse)}"
        ) from error


def _remote(given: object) -> httpx.URL | None:
    url = remote_url("sandbox_fusion_url", given, PATH)
    return (
        url
        if url is None or url.path.endswith(PATH)
        else url.copy_with(path=url.path.rstrip("/") + PATH)
    )


def _packages(given: list[str] | None, *, is_remote: bool) -> tuple[str, ...]:
    if is_remote and given:
        raise ToolConfigError(
            "config.packages is for the embedded server; start your own server with --packages"
        )
    return tuple(sorted(set(given or ())))


def _workers(given: int, *, is_remote: bool) -> int:
    # The embedded server runs one program a core; as many again wait, so that no core is idle.
    return given if is_remote else min(given, 2 * (os.cpu_count() or 1))


def _seconds(given: Any, limit: float) -> float:
    """A call's time limit, from the model's `timeout`. Raises ToolError if that is unusable."""
    if given is None:
        return limit
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not given > 0:
        raise ToolError(f"timeout must be a number of seconds above 0, got {given!r:.80}")
    return min(given, limit)


def _unicode(text: str) -> str:
    """A model can write half of a surrogate pair, which JSON over the wire cannot carry."""
    return text.encode("utf-8", errors="replace").decode()


def _shown(result: CommandRunResult, request: RunCodeRequest) -> str:
    """What the model reads: output, errors, and how it ended if these do not say so."""
    text = _joined(result.stdout or "", result.stderr or "")
    if result.status == "TimeLimitExceeded":
        return _joined(text, f"The time limit of {request.run_timeout:g} s was exceeded.")
    if result.return_code not in (0, 1, None) or (result.return_code == 1 and not result.stderr):
        return _joined(text, f"Exit code: {result.return_code}")
    return text or "The code ran and printed nothing."


def _joined(first: str, second: str) -> str:
    return first + ("\n" if first and second and not first.endswith("\n") else "") + second
