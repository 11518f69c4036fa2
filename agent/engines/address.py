"""A server's address and key, checked before anything is sent, and the httpx client for them.

Invariant: an invalid address or header is a ConfigError here, in one line that shows neither key
nor password.
"""

from __future__ import annotations

import contextlib
import ssl
import urllib.request

import httpx

from agent.config.secrets import without_userinfo
from agent.errors import ConfigError
from tools.transport import AiohttpTransport

CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 2.0
"""Idle connections are dropped before the server drops them (after 5 s), which would break a turn.
"""


def certificates() -> ssl.SSLContext:
    """The certificates that https servers are checked against. Raises ConfigError."""
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            "the environment's SSL_CERT_FILE or SSL_CERT_DIR names certificates that cannot be "
            f"read: {reason}; correct it, or unset it to use the usual ones"
        ) from error


def server_url(given: str) -> httpx.URL:
    """The server URL without a trailing slash. Raises ConfigError if it is not a valid URL."""
    shown = f"rollout.server.urls: {without_userinfo(given)!r}"
    if not given.startswith(("http://", "https://")):
        raise ConfigError(f"{shown} must start with http:// or https://")
    try:
        url = httpx.URL(given.strip().rstrip("/"))
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"{shown} is not a valid URL: {error}") from error
    if not url.host or not 0 < (url.port or 1) < 1 << 16 or url.query or url.fragment:
        raise ConfigError(
            f"{shown} must be an address like http://HOST:30000, with nothing after its path"
        )
    return url


def authorization(api_key: str | None) -> dict[str, str]:
    """The header with the key, without blanks around it, such as a file's last newline."""
    if not api_key or not (key := api_key.strip()):
        return {}
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            "rollout.server.api_key (or SGLANG_API_KEY) holds characters that no HTTP header can "
            "carry; copy the key again"
        )
    return {"Authorization": f"Bearer {key}"}


def basic_auth(url: httpx.URL) -> dict[str, str]:
    """The header with the name and password that stand in the address, as httpx sends it."""
    if not url.userinfo:
        return {}
    request = httpx.Request("GET", url)
    signed = next(httpx.BasicAuth(url.username, url.password).auth_flow(request))
    return {"Authorization": signed.headers["authorization"]}


def connections(url: httpx.URL, context: ssl.SSLContext, size: int) -> AiohttpTransport:
    """At most `size` connections, through the environment's proxy if it names one.

    Raises ConfigError if that proxy cannot be used.
    """
    return AiohttpTransport(
        connections=size, keepalive_s=KEEPALIVE_S, context=context, proxy=_proxy(url)
    )


def proxied(url: httpx.URL) -> str:
    """The end of an error message if a proxy of the environment stands before the server."""
    if not (proxy := _proxy(url)):
        return ""
    shown = without_userinfo(proxy)
    return f" (through the environment's proxy {shown}; NO_PROXY={url.host} avoids it)"


def _proxy(url: httpx.URL) -> str | None:
    """The environment's proxy for the address. Raises ConfigError if it is not an HTTP proxy."""
    with contextlib.suppress(OSError):  # a name that cannot be looked up
        proxies = urllib.request.getproxies()
        proxy = proxies.get(url.scheme) or proxies.get("all")
        if proxy and not urllib.request.proxy_bypass(url.host):
            proxy = proxy if "://" in proxy else f"http://{proxy}"
            if not proxy.startswith(("http://", "https://")):
                shown = without_userinfo(proxy)
                raise ConfigError(
                    f"rollout.server.urls: the environment's proxy {shown} is not an HTTP proxy; "
                    f"NO_PROXY={url.host} avoids it"
                )
            return proxy
    return None
