"""SandboxFusion's `POST /run_code`, in the real server's format; sessions of our own.

A program that fails is an answer: `Failed`, with its exit code and output. `SandboxError` means
that the sandbox failed. Both come with HTTP 200. A request that cannot be served (no code, an
unknown language) is a 422.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in path:
        raise ValueError("must be a relative path without '..'")
    return path


def _base64(text: str) -> str:
    try:
        base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"must be base64: {error}") from error
    return text


RelativePath = Annotated[str, AfterValidator(_inside)]
Base64 = Annotated[str, AfterValidator(_base64)]


class RunCodeRequest(BaseModel):
    """Times in seconds, memory in MiB (-1: the server's default), paths from the working folder."""

    model_config = ConfigDict(allow_inf_nan=False)

    code: str
    language: str
    stdin: str | None = None
    compile_timeout: float = Field(default=10, gt=0)
    run_timeout: float = Field(default=10, gt=0)
    memory_limit_MB: int = -1  # noqa: N815 - the wire's name
    files: dict[RelativePath, Base64 | None] = {}
    fetch_files: list[RelativePath] = []


class CommandRunResult(BaseModel):
    """`return_code` is None if the program did not end by itself."""

    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    execution_time: float | None = None
    return_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None


class RunCodeResponse(BaseModel):
    status: Literal["Success", "Failed", "SandboxError"]
    message: str = ""
    compile_result: CommandRunResult | None = None
    run_result: CommandRunResult | None = None
    executor_pod_name: str | None = None
    files: dict[str, str] = {}


# ---------------------------------------------------------------------- sessions, our own


class SessionRequest(BaseModel):
    """Starts a Python session. Memory in MiB of all its processes; -1: the server's default."""

    memory_limit_MB: int = -1  # noqa: N815 - the wire's name


class SessionCode(BaseModel):
    """Code for a session; `run_timeout` is in seconds, for this call."""

    model_config = ConfigDict(allow_inf_nan=False)

    code: str
    stdin: str | None = None
    run_timeout: float = Field(default=10, gt=0)


class SessionResponse(RunCodeResponse):
    """`session_ended`: nothing of the session is left, and its id is unknown."""

    session_ended: bool
