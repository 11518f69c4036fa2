"""Scoring: the log-probs that an engine gives to tokens it is shown, by one prefill.

A protocol of its own, beside `Engine`: conversations do not need it. SGLang computes a prompt's
log-probs at temperature 1, whatever the request says (0.5.5 has flags for the temperature, but
sets them for no request; 0.5.23 has none). `likeliest` allows another temperature: see
`agent.scoring.temperature`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from agent.errors import EngineError


@dataclass(frozen=True, slots=True)
class Scores:
    """What an engine says of `ids[first:]`: T log-probs at temperature 1, nothing filtered.

    `likeliest` [T][k] are the k highest log-probs at each place, highest first. `weight_version` is
    that of the weights that computed them, None if the engine does not report it.
    """

    logprobs: list[float]
    likeliest: list[list[float]]
    weight_version: str | None = None


@runtime_checkable
class Scorer(Protocol):
    """An engine that can score."""

    def describe(self) -> dict[str, Any]:
        """As `Engine.describe`."""
        ...

    async def score(self, ids: Sequence[int], first: int, *, likeliest: int) -> Scores:
        """The log-probs of `ids[first:]`, each after all ids before it; `first` is at least 1.

        `likeliest` is how many of the highest log-probs to return at each place. If cancelled,
        aborts the request. Raises EngineError.
        """
        ...


def score_request(ids: Sequence[int], first: int, likeliest: int) -> dict[str, Any]:
    """The fields of SGLang's request.

    Its log-probs begin one place after `logprob_start_len`. Cached tokens are used up to there
    only: everything that is scored is computed anew. One token is sampled, since SGLang's versions
    differ in what they do if none is.
    """
    return {
        "input_ids": list(ids),
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": first - 1,
        "top_logprobs_num": likeliest,
        "stream": False,
    }


def read_scores(
    answer: Mapping[str, Any], ids: Sequence[int], first: int, likeliest: int
) -> Scores:
    """SGLang's answer to `score_request`, checked. Raises EngineError if it is not data."""
    try:
        meta = answer["meta_info"]
        triples, tops = meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:]
        logprobs = [float(triple[0]) for triple in triples]
        highest = [sorted((float(top[0]) for top in place), reverse=True) for place in tops]
        scored_ids = [triple[1] for triple in triples]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise EngineError(
            f"the engine did not score the tokens: {type(error).__name__} {error}"
        ) from error
    asked = list(ids[first:])
    # SGLang 0.5.5 reports the vocabulary's last id as 0.
    same = len(scored_ids) == len(asked) and all(
        scored in (token, 0) for scored, token in zip(scored_ids, asked, strict=True)
    )
    if not same or len(highest) != len(logprobs):
        raise EngineError(
            f"the engine scored {len(scored_ids)} tokens that are not the {len(asked)} "
            "it was asked for"
        )
    if not all(_is_enough(place, likeliest) for place in highest):
        raise EngineError(f"the engine did not return the {likeliest} likeliest tokens")
    if not all(map(math.isfinite, logprobs)):
        raise EngineError("the engine returned a log-prob that is not finite")
    version = meta.get("weight_version")
    return Scores(logprobs, highest, None if version is None else str(version))


def _is_enough(highest: Sequence[float], asked: int) -> bool:
    """Whether these are log-probs, as many as asked for or the whole vocabulary's."""
    if not highest or not all(value < math.inf for value in highest):
        return False
    return len(highest) >= asked or math.fsum(map(math.exp, highest)) > 0.999
