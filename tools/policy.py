"""What a tool's `config` in tools.yaml says about its calls: time, concurrency, rate, retries, size, circuit breaker.

Invariant: read and checked once, when the tool is loaded, with one line for each mistake; whoever dispatches calls does
as a Policy says and asks no config.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypedDict

from tools.base import BaseTool, ToolConfigError

SIDES = ("left", "middle", "right")
MAX_RETRIES = 10
MAX_RATE = 1e6
MAX_FLOAT = sys.float_info.max


class BreakerConfig(TypedDict, total=False):
    """`circuit_breaker` as it is written: both keys may be left out, but not the mapping itself."""

    failures: int
    cooldown_s: float


class PolicyConfig(TypedDict, total=False):
    """The keys of a tool's `config` that are the dispatcher's; `Policy` says what they mean.

    With `ends_conversation: true` a call that succeeds is the conversation's last.
    """

    ends_conversation: bool
    timeout_s: float
    max_concurrency: int | None
    rate_limit: float | None
    idempotent: bool
    retries: int
    max_response_tokens: int | None
    response_side: str | None
    circuit_breaker: BreakerConfig | None


# `type` is verl's, and only `native` is known.
DISPATCH_KEYS = frozenset(PolicyConfig.__annotations__) | {"type"}


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """After `failures` attempts in a row that the backend failed or did not answer in time, no call is sent for
    `cooldown_s`; then one at a time probes, and the first that is answered ends it."""

    failures: int = 5
    cooldown_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Policy:
    """How a tool's calls are dispatched. Limits hold over all conversations of a run; None: no limit.

    timeout_s            of each attempt, from the moment it begins. A call takes at most `retries + 1` times as long and
                         its pauses, beside its waits for a slot and the rate, which the conversation's deadline ends;
                         a tool that ignores its cancellation is left behind a second later
    max_concurrency      attempts that run at a time
    rate_limit           attempts that begin in any one second; 0.5 is one in two seconds
    retries              further attempts after a backend failure or a time-out, after 0.25 to 0.5 s, then twice as long
                         each time and at most 8 s. Only for tools that are `idempotent`: a call that failed may have
                         taken effect. What the tool itself answers, a ToolError included, is final
    max_response_tokens  what the model sees of an answer; None: the run's `max_tool_response_length`
    response_side        what is cut away of a longer one: left, middle, right; None: the run's
                         `tool_response_truncate_side`
    circuit_breaker      when to stop asking a backend that keeps failing
    """

    timeout_s: float = BaseTool.timeout_s
    max_concurrency: int | None = None
    rate_limit: float | None = None
    retries: int = 0
    max_response_tokens: int | None = None
    response_side: str | None = None
    circuit_breaker: BreakerPolicy | None = None


def read_policy(config: Mapping[str, Any], tool: object, *, verl: bool = False) -> Policy:
    """The policy that `config` asks for; where it does not, the tool's own `timeout_s`, `max_concurrency`, `idempotent` count.

    `verl`: the class derives from verl's, whose `rate_limit` is the class's own business (a number of calls at a time).
    Raises ToolConfigError.
    """
    return Policy(
        timeout_s=_number(config, "timeout_s")
        or _number(*_own(tool, "timeout_s"))
        or BaseTool.timeout_s,
        max_concurrency=_concurrency(config, tool),
        rate_limit=None if verl else _number(config, "rate_limit", at_most=MAX_RATE),
        retries=_retries(config, tool),
        max_response_tokens=_whole(config, "max_response_tokens"),
        response_side=_side(config),
        circuit_breaker=_breaker(config),
    )


def check_config_keys(config: Mapping[str, Any], own: frozenset[str] | None) -> None:
    """Refuses a key of `config` that neither the tool nor the dispatcher knows, naming the nearest right one."""
    if own is not None:
        _check_keys(config, own | DISPATCH_KEYS, "config")


def nearest(wrong: str, right: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or what is allowed when nothing comes near."""
    right = sorted(right)
    if close := get_close_matches(wrong, right, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(right)}" if right else ""


def _check_keys(config: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for key in config:
        if key not in known:
            raise ToolConfigError(f"{where} has no key {key!r}{nearest(str(key), known)}")


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """A key that is true or false. Raises ToolConfigError."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ToolConfigError(f"config.{key} must be true or false, got {value!r}")
    return value


def _number(
    config: Mapping[str, Any], key: str, where: str = "config", at_most: float = MAX_FLOAT
) -> float | None:
    """A number above 0, infinity and NaN refused; None where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= at_most:
        most = f" and at most {at_most:g}" if at_most < MAX_FLOAT else ""
        raise ToolConfigError(f"{where}.{key} must be a number above 0{most}, got {value!r}")
    return float(value)


def _whole(
    config: Mapping[str, Any], key: str, where: str = "config", at_least: int = 1
) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ToolConfigError(
            f"{where}.{key} must be a whole number above {at_least - 1}, got {value!r}"
        )
    return value


def _concurrency(config: Mapping[str, Any], tool: object) -> int | None:
    """`max_concurrency`, else the tool's own, else `num_workers`, which is what verl's tools call it."""
    if "max_concurrency" in config:
        return _whole(config, "max_concurrency")
    own = _whole(*_own(tool, "max_concurrency"))
    return _whole(config, "num_workers") if own is None else own


def _own(tool: object, key: str) -> tuple[dict[str, Any], str, str]:
    """What the tool itself says of a key, as the readers of `config` take it."""
    return {key: getattr(tool, key, None)}, key, type(tool).__name__


def _retries(config: Mapping[str, Any], tool: object) -> int:
    value = config.get("retries", 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_RETRIES:
        raise ToolConfigError(
            f"config.retries must be a whole number from 0 to {MAX_RETRIES}, got {value!r}"
        )
    if not flag(config, "idempotent", getattr(tool, "idempotent", False)) and value:
        raise ToolConfigError(
            "config.retries needs idempotent: true; a call that failed may have taken effect, and would again"
        )
    return value


def _side(config: Mapping[str, Any]) -> str | None:
    side = config.get("response_side")
    if side is not None and side not in SIDES:
        raise ToolConfigError(
            f"config.response_side must be one of {', '.join(SIDES)}, got {side!r}"
        )
    return side


def _breaker(config: Mapping[str, Any]) -> BreakerPolicy | None:
    value, where = config.get("circuit_breaker"), "config.circuit_breaker"
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ToolConfigError(
            f"{where} must be a mapping with failures and cooldown_s, got {value!r}"
        )
    _check_keys(value, frozenset(BreakerConfig.__annotations__), where)
    default = BreakerPolicy()
    failures, cooldown_s = _whole(value, "failures", where), _number(value, "cooldown_s", where)
    return BreakerPolicy(failures or default.failures, cooldown_s or default.cooldown_s)
