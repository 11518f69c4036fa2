"""A token's log-prob at another temperature, from log-probs at temperature 1.

At temperature t a token of probability p has p^(1/t) / Z, where Z is the sum of q^(1/t) over the
vocabulary. Of that sum only the likeliest tokens are known. The others are known by their number
and total probability, which bounds their part: the result is an interval. It is narrow below
temperature 1, where unlikely tokens hardly count, and wider above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

VOCABULARY = 1 << 18
"""More ids than the vocabularies of today's models have."""


def at_temperature(
    logprob: float, likeliest: Sequence[float], temperature: float
) -> tuple[float, float]:
    """The least and the greatest log-prob that the token can have at `temperature`.

    `logprob` and `likeliest` (highest first) are those at temperature 1.
    """
    if temperature == 1.0:
        return logprob, logprob
    known = list(likeliest)
    if logprob < known[-1]:  # the token itself is not among them
        known.append(logprob)
    least = log_sum(value / temperature for value in known)
    rest = 1.0 - math.fsum(map(math.exp, known))
    if rest <= 0.0:
        return logprob / temperature - least, logprob / temperature - least
    most = log_sum((least, _most_of_rest(rest, likeliest[-1], temperature)))
    return logprob / temperature - most, logprob / temperature - least


def _most_of_rest(rest: float, highest: float, temperature: float) -> float:
    """The log of the most that tokens can add which share the probability `rest`.

    None of them has a log-prob over `highest`. Below temperature 1 they add most if few share it,
    above if all do.
    """
    if temperature < 1.0:
        return math.log(rest) + (1.0 / temperature - 1.0) * highest
    return math.log(VOCABULARY) + math.log(rest / VOCABULARY) / temperature


def log_sum(values: Iterable[float]) -> float:
    """log(sum(exp(values))), safe for small values."""
    listed = list(values)
    top = max(listed)
    return top + math.log(math.fsum(math.exp(value - top) for value in listed))
