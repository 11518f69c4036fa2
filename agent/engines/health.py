"""Whether an SGLang server is well and what it serves; if it is not well, why, in one line.

Invariant: no tokens are sampled here. A router that does not report its model is well all the same.
"""

from __future__ import annotations

from typing import Any

import httpx

from agent.config.secrets import without_userinfo

INFO_PATHS = ("/get_server_info", "/get_model_info")
"""The paths at which a server reports its model. A router may have one, the other or neither."""
INFO_KEYS = ("model_path", "version", "dtype", "weight_version")
_NOT_THERE = (404, 405, 501)


class NotReadyError(Exception):
    """The server is not there, not well, or not an SGLang server."""


async def what_it_serves(client: httpx.AsyncClient) -> dict[str, Any]:
    """Those of INFO_KEYS that the server reports, once it is well. Raises NotReadyError."""
    if (await _get(client, "/health", 404)).status_code == 404:
        raise NotReadyError(
            "it has no /health, so it is not an SGLang server's address; a path such as /v1 does "
            "not belong there"
        )
    for path in INFO_PATHS:
        answer = await _get(client, path, *_NOT_THERE)
        if answer.is_success:
            return _info(path, answer)
    answer = await _get(client, "/generate", *_NOT_THERE)
    if answer.status_code == 404:  # an SGLang server answers 405, because it is for POST
        raise NotReadyError("it has no /generate, so it is not an SGLang server")
    return {}


async def _get(client: httpx.AsyncClient, path: str, *allowed: int) -> httpx.Response:
    try:
        answer = await client.get(path)
    except httpx.HTTPError as error:
        raise NotReadyError(f"GET {path}: {reason(error)}") from error
    if answer.is_success or answer.status_code in allowed:
        return answer
    raise NotReadyError(f"GET {path}: {refusal(answer)}")


def _info(path: str, answer: httpx.Response) -> dict[str, Any]:
    try:
        reported = answer.json()
    except (ValueError, RecursionError) as error:
        raise NotReadyError(
            f"GET {path} returned {answer.text[:200]!r} instead of JSON; is that an SGLang server?"
        ) from error
    if not isinstance(reported, dict):
        return {}
    return {key: reported[key] for key in INFO_KEYS if isinstance(reported.get(key), str)}


def reason(error: httpx.HTTPError) -> str:
    """An httpx error for a message: without the password of an address, never empty."""
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection within its timeout"
    if isinstance(error, httpx.TimeoutException):
        return "no answer within its timeout"
    return without_userinfo(str(error)) or type(error).__name__


def refusal(response: httpx.Response) -> str:
    """An answer with an error status, in one line and in the server's own words."""
    said = _message(response)
    if response.has_redirect_location:
        said = (
            f"a redirect to {without_userinfo(response.headers['location'])}; redirects are not "
            "followed"
        )
    elif response.status_code in (401, 403):
        said = "; ".join(
            filter(
                None, (said, "check rollout.server.api_key, or the environment's SGLANG_API_KEY")
            )
        )
    return f"status {response.status_code}: {said}".removesuffix(": ")


def _message(response: httpx.Response) -> str:
    try:
        body = response.json()
        error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, RecursionError):
        text = response.text
    return " ".join(str(text).split())[:500]
