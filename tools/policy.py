"""What a tool's `config` says about its calls: time, concurrency, rate, retries, size, breaker.

Invariant: read and checked once, when the tool is loaded. The dispatcher follows a Policy and
reads no config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from tools.base import BaseTool, ToolConfigError
from tools.reading import STRICT, check_keys, read

MAX_RETRIES = 10
MAX_RATE = 1e6

M = TypeVar("M", bound=BaseModel)

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Side = Literal["left", "middle", "right"]


class BreakerConfig(TypedDict, total=False):
    """`circuit_breaker` as it is written; both keys are optional."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    failures: Count | None
    cooldown_s: Seconds | None


class PolicyConfig(TypedDict, total=False):
    """The keys of a tool's `config` that belong to the dispatcher; `Policy` says what they mean.

    ends_conversation: a call that succeeds is the conversation's last
    idempotent: a call may be sent again although the first one may have had an effect
    """

    __pydantic_config__ = STRICT  # type: ignore[misc]

    ends_conversation: bool
    timeout_s: Seconds | None
    max_concurrency: Count | None
    rate_limit: Annotated[float, Field(gt=0, le=MAX_RATE)] | None
    idempotent: bool
    retries: Annotated[int, Field(ge=0, le=MAX_RETRIES)]
    max_response_tokens: Count | None
    response_side: Side | None
    circuit_breaker: BreakerConfig | None


class _OwnLimits(TypedDict, total=False):
    """What a tool class says about itself; `num_workers` is what verl's configs call it."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    timeout_s: Seconds | None
    max_concurrency: Count | None
    num_workers: Count | None
    idempotent: bool | None


_POLICY_KEYS = frozenset(PolicyConfig.__annotations__)

# `type` is verl's: native or mcp. The registry reads it.
DISPATCH_KEYS = _POLICY_KEYS | {"type"}


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When to stop calling a backend that keeps failing.

    After `failures` attempts in a row that failed or timed out in the backend, no call is sent for
    `cooldown_s`. Then one call at a time probes the backend; the first answer closes the breaker.
    """

    failures: int = 5
    cooldown_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Policy:
    """How a tool's calls are dispatched. Limits hold over all conversations; None: no limit.

    timeout_s: seconds for one attempt, from its start. A call takes at most `retries + 1` times as
        long, plus its pauses and its waits for a slot and for the rate; the conversation's deadline
        ends those waits. A tool that ignores its cancellation is abandoned after one more second.
    max_concurrency: attempts that run at a time
    rate_limit: attempts that start in any one second; 0.5 is one in two seconds
    retries: further attempts after a backend failure or a time-out, after 0.25 to 0.5 s, then twice
        as long each time, at most 8 s. Only for `idempotent` tools: a failed call may have had an
        effect. What the tool itself answers is final, a ToolError included.
    max_response_tokens: how much of an answer the model sees; None: the run's
        `max_tool_response_length`
    response_side: where a longer answer is cut: left, middle or right; None: the run's
        `tool_response_truncate_side`
    circuit_breaker: when to stop calling a backend that keeps failing
    """

    timeout_s: float = BaseTool.timeout_s
    max_concurrency: int | None = None
    rate_limit: float | None = None
    retries: int = 0
    max_response_tokens: int | None = None
    response_side: str | None = None
    circuit_breaker: BreakerPolicy | None = None


def read_policy_config(config: Mapping[str, Any], *, verl: bool = False) -> PolicyConfig:
    """The dispatcher's part of a tool's `config`. Raises ToolConfigError.

    verl: the class derives from verl's, whose `rate_limit` is its own: calls at a time
    """
    keys = _POLICY_KEYS - {"rate_limit"} if verl else _POLICY_KEYS
    return read(PolicyConfig, {key: config[key] for key in config if key in keys}, "config")


def read_policy(config: Mapping[str, Any], tool: object, *, verl: bool = False) -> Policy:
    """The policy that `config` asks for; the tool's own limits hold where it says nothing.

    verl: as for `read_policy_config`. Raises ToolConfigError.
    """
    given = read_policy_config(config, verl=verl)
    own = _own_limits(tool)
    if given.get("retries") and not given.get("idempotent", own.get("idempotent")):
        raise ToolConfigError(
            "config.retries needs idempotent: true; a call that failed may have had an effect, "
            "and the next attempt has it again"
        )
    chosen: dict[str, Any] = {
        **given,
        "timeout_s": given.get("timeout_s") or own.get("timeout_s"),
        "max_concurrency": _concurrency(config, given, own),
        "circuit_breaker": _breaker(given.get("circuit_breaker")),
    }
    names = [field.name for field in fields(Policy)]
    return Policy(**{key: chosen[key] for key in names if chosen.get(key) is not None})


def read_own(model: type[M], config: Mapping[str, Any]) -> M:
    """A tool's own keys of its `config`, as its model. Raises ToolConfigError."""
    own = {key: value for key, value in config.items() if key in model.model_fields}
    return read(model, own, "config")


def with_rate_limit(config: dict[str, Any], is_on: bool) -> dict[str, Any]:
    """`config`, without its `rate_limit` if verl's `enable_global_rate_limit` is off."""
    return {key: value for key, value in config.items() if is_on or key != "rate_limit"}


def check_config_keys(config: Mapping[str, Any], own: frozenset[str] | None) -> None:
    """Refuses a key of `config` that neither the tool nor the dispatcher knows."""
    if own is not None:
        check_keys(config, own | DISPATCH_KEYS, "config")


def _own_limits(tool: object) -> _OwnLimits:
    keys = ("timeout_s", "max_concurrency", "idempotent")
    return read(_OwnLimits, {key: getattr(tool, key, None) for key in keys}, type(tool).__name__)


def _concurrency(config: Mapping[str, Any], given: PolicyConfig, own: _OwnLimits) -> int | None:
    """`max_concurrency`, else the tool's own, else `num_workers`."""
    if "max_concurrency" in given:
        return given["max_concurrency"]
    if (limit := own.get("max_concurrency")) is not None:
        return limit
    return read(_OwnLimits, {"num_workers": config.get("num_workers")}, "config").get("num_workers")


def _breaker(given: BreakerConfig | None) -> BreakerPolicy | None:
    if given is None:
        return None
    default = BreakerPolicy()
    return BreakerPolicy(
        given.get("failures") or default.failures, given.get("cooldown_s") or default.cooldown_s
    )
