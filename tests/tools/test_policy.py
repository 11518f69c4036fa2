"""Rules: every key about a tool's calls is read and has a default; each mistake is one line."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest

from conversations import truncate
from tools.base import BaseTool, ToolConfigError
from tools.function import tool
from tools.policy import DISPATCH_KEYS, BreakerPolicy, Policy, Side, read_policy
from tools.sandbox import SandboxFusionTool
from tools.search import SearchTool
from tools.toolset import loaded_tool

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object"}},
}

FULL: dict[str, Any] = {
    "ends_conversation": True,
    "timeout_s": 2,
    "max_concurrency": 3,
    "rate_limit": 0.5,
    "idempotent": True,
    "retries": 4,
    "max_response_tokens": 100,
    "response_side": "left",
    "circuit_breaker": {"failures": 2, "cooldown_s": 1.5},
}


class Strict(BaseTool):
    """Has keys of its own, so that any other is refused."""

    config_keys = frozenset({"size"})


def policy_of(config: dict[str, Any], tool_class: type[BaseTool] = Strict) -> Policy:
    return loaded_tool(tool_class(config, SCHEMA)).policy


def test_every_key_is_read() -> None:
    assert {*FULL, "type"} == DISPATCH_KEYS
    assert policy_of({**FULL, "size": 1}) == Policy(
        timeout_s=2.0,
        max_concurrency=3,
        rate_limit=0.5,
        retries=4,
        max_response_tokens=100,
        response_side="left",
        circuit_breaker=BreakerPolicy(2, 1.5),
    )


@pytest.mark.parametrize(
    "config",
    [{}, dict.fromkeys(("rate_limit", "max_response_tokens", "response_side", "circuit_breaker"))],
)
def test_without_them_nothing_is_limited_but_time(config: dict[str, Any]) -> None:
    assert dataclasses.asdict(policy_of(config)) == {
        "timeout_s": 60.0, "max_concurrency": None, "rate_limit": None, "retries": 0,
        "max_response_tokens": None, "response_side": None, "circuit_breaker": None,
    }  # fmt: skip


def test_a_breakers_keys_have_defaults() -> None:
    assert policy_of({"circuit_breaker": {}}).circuit_breaker == BreakerPolicy(5, 30.0)
    assert policy_of({"circuit_breaker": {"failures": 1}}).circuit_breaker == BreakerPolicy(1, 30.0)


def test_a_class_may_have_defaults_of_its_own() -> None:
    class Slow(Strict):
        timeout_s = 300
        max_concurrency = 4
        idempotent = True

    policy = policy_of({"retries": 1}, Slow)
    assert (policy.timeout_s, policy.max_concurrency, policy.retries) == (300.0, 4, 1)
    policy = policy_of({"timeout_s": 1, "max_concurrency": None}, Slow)
    assert (policy.timeout_s, policy.max_concurrency) == (1.0, None)
    with pytest.raises(ToolConfigError, match=r"config\.retries .*idempotent"):
        policy_of({"retries": 1, "idempotent": False}, Slow)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("timeout_s", "10", "number"),
        ("timeout_s", 0, "above 0"),
        ("max_concurrency", 0, "at least 1"),
        ("max_concurrency", True, "whole number"),
        ("idempotent", "yes", "true or false"),
    ],
)
def test_the_defaults_of_a_class_are_checked_too(key: str, value: object, word: str) -> None:
    with pytest.raises(ToolConfigError) as caught:
        policy_of({}, type("Own", (Strict,), {key: value}))
    assert str(caught.value).startswith(f"Own.{key} must be ")
    assert word in str(caught.value)


def test_a_class_that_says_none_has_the_default_time() -> None:
    assert policy_of({}, type("Own", (Strict,), {"timeout_s": None})).timeout_s == 60.0


def test_a_decorated_function_takes_them_as_keywords() -> None:
    @tool(rate_limit=2, retries=1, idempotent=True, circuit_breaker={"failures": 3})
    def look() -> str:
        return ""

    policy = loaded_tool(look).policy
    assert (policy.rate_limit, policy.retries, policy.circuit_breaker) == (
        2.0,
        1,
        BreakerPolicy(3, 30.0),
    )


@pytest.mark.parametrize(
    "config",
    [
        {"num_workers": 10, "enable_global_rate_limit": True, "rate_limit": 10},
        {"rate_limit": "any"},
    ],
)
def test_the_rate_limit_of_verls_classes_is_their_own(config: dict[str, Any]) -> None:
    """There it is a number of calls at a time, by a semaphore that the class brings itself."""
    assert read_policy(config, object(), verl=True).rate_limit is None


@pytest.mark.parametrize(("on", "rate"), [(True, 10.0), (False, None)])
@pytest.mark.parametrize(
    ("tool_class", "url"),
    [(SandboxFusionTool, "sandbox_fusion_url"), (SearchTool, "retrieval_service_url")],
)
def test_verls_own_files_load(
    tool_class: type[BaseTool], url: str, on: bool, rate: float | None
) -> None:
    """As in its examples; with our classes the rate is one."""
    config = {
        url: "http://127.0.0.1:8000",
        "num_workers": 10,
        "enable_global_rate_limit": on,
        "rate_limit": 10,
        "type": "native",
    }
    policy = policy_of(config, tool_class)
    assert (policy.max_concurrency, policy.rate_limit) == (10, rate)


def test_the_sides_are_those_of_the_cut() -> None:
    assert get_args(Side) == truncate.SIDES


RETRIED = {"idempotent": True}


@pytest.mark.parametrize(
    ("config", "place", "word"),
    [
        ({"rate_limit": 0}, "config.rate_limit", "above 0"),
        ({"rate_limit": 1e7}, "config.rate_limit", "at most 1e+06"),
        ({"rate_limit": "10/s"}, "config.rate_limit", "number, got '10/s'"),
        ({"rate_limit": 10**400}, "config.rate_limit", "number"),
        ({"timeout_s": float("inf")}, "config.timeout_s", "finite"),
        ({"timeout_s": float("nan")}, "config.timeout_s", "got nan"),
        ({"timeout_s": True}, "config.timeout_s", "number, got True"),
        ({"timeout_s": "5"}, "config.timeout_s", "number, got '5'"),
        ({"max_concurrency": 0}, "config.max_concurrency", "at least 1"),
        ({"num_workers": 1.5}, "config.num_workers", "whole number, got 1.5"),
        ({"idempotent": 1}, "config.idempotent", "true or false, got 1"),
        ({"ends_conversation": "no"}, "config.ends_conversation", "true or false, got 'no'"),
        ({"retries": 2}, "config.retries", "idempotent: true"),
        ({"retries": 11, **RETRIED}, "config.retries", "at most 10"),
        ({"retries": -1, **RETRIED}, "config.retries", "at least 0"),
        ({"retries": None, **RETRIED}, "config.retries", "whole number"),
        ({"max_response_tokens": 0}, "config.max_response_tokens", "at least 1"),
        ({"response_side": "top"}, "config.response_side", "'left', 'middle' or 'right'"),
        ({"response_side": ["left"]}, "config.response_side", "'left', 'middle' or 'right'"),
        ({"circuit_breaker": 5}, "config.circuit_breaker", "mapping, got 5"),
        ({"circuit_breaker": {"failure": 5}}, "config.circuit_breaker", "mean 'failures'?"),
        ({"circuit_breaker": {"failures": 0}}, "config.circuit_breaker.failures", "at least 1"),
        ({"circuit_breaker": {"cooldown_s": -1}}, "config.circuit_breaker.cooldown_s", "above 0"),
        ({"retry": 1}, "config", "no key 'retry'; did you mean 'retries'?"),
        ({"rate_limits": 1}, "config", "did you mean 'rate_limit'?"),
    ],
)
def test_a_mistake_is_one_line(config: dict[str, Any], place: str, word: str) -> None:
    class Workers(Strict):
        config_keys = frozenset({"num_workers"})

    with pytest.raises(ToolConfigError) as caught:
        policy_of(config, Workers)
    assert str(caught.value).startswith(f"{place} ")
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("tool_class", [SandboxFusionTool, SearchTool])
@pytest.mark.parametrize("value", ["no", "false", 0, None])
def test_text_is_no_boolean(tool_class: type[BaseTool], value: object) -> None:
    """`enable_global_rate_limit: "no"` is neither on nor off."""
    with pytest.raises(ToolConfigError, match=r"^config\.enable_global_rate_limit "):
        policy_of({"enable_global_rate_limit": value}, tool_class)
