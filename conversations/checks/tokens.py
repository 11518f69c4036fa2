"""Tokens, authors, log-probs and turns against each other. Needs no tokenizer."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import pairwise

from conversations.checks.finding import Finding, differs, first_of, quoted
from conversations.tokens import PROMPT, SAMPLED, TOOL
from conversations.trajectory import Trajectory

ROUNDING = 1e-3
"""A log-prob may be this far above 0: an engine's softmax rounds."""


PADDING = 4096
"""A model's vocabulary may be larger than its tokenizer's, usually by some hundred ids, and the
model may sample one of those.
"""


def token_findings(
    trajectory: Trajectory, known_ids: int | None = None, *, needs_logprobs: bool = True
) -> Iterator[Finding]:
    """Lengths, segments, mask, log-probs and turns against each other, and ids too large.

    `known_ids` is the size of the tokenizer. Without `needs_logprobs` a sampled token may lack its
    log-prob: a source of imports may not have them.
    """
    length = len(trajectory.response_ids)
    for name in ("response_mask", "response_logprobs"):
        if len(getattr(trajectory, name)) != length:
            yield Finding(
                differs(
                    f"{name} has another length than response_ids",
                    len(getattr(trajectory, name)),
                    length,
                )
            )
            return
    covered = list(_segments(trajectory))
    yield from covered
    if not covered:
        yield from _mask(trajectory)
        yield from _turns(trajectory)
    yield from _logprobs(trajectory, needs_logprobs)
    if known_ids is not None:
        yield from _unknown_ids(trajectory, known_ids)


def turn_at(trajectory: Trajectory, token: int) -> int | None:
    """The turn that a token belongs to, or comes after; None before the first."""
    return next(
        (k for k in range(len(trajectory.turns) - 1, -1, -1) if trajectory.turns[k].start <= token),
        None,
    )


def _segments(trajectory: Trajectory) -> Iterator[Finding]:
    """Segments cover everything in order, none is empty, and neighbours differ.

    The prompt ends at the first sampled token.
    """
    total, prompt = (
        len(trajectory.prompt_ids) + len(trajectory.response_ids),
        len(trajectory.prompt_ids),
    )
    position, before = 0, None
    for kind, start, end in trajectory.segments:
        if start != position or end <= start or end > total:
            what = (
                f"segments do not cover the tokens in order, found {quoted([kind, start, end])}, "
                f"expected one from {position} within {total}"
            )
            yield Finding(what, turn_at(trajectory, position), min(start, position))
            return
        if kind == before:
            yield Finding(
                f"two {kind} segments stand side by side, expected one",
                turn_at(trajectory, start),
                start,
            )
        if (kind == PROMPT) != (start < prompt) and not (kind == TOOL and start < prompt):
            side = "before" if start < prompt else "after"
            what = f"a {kind} segment stands {side} the first sampled token"
            yield Finding(what, token=start)
        if start < prompt < end:
            yield Finding(
                differs(f"prompt_ids end inside a {kind} segment", prompt, end), token=prompt
            )
        position, before = end, kind
    if position != total:
        yield Finding(
            differs("segments do not cover the tokens", position, total),
            turn_at(trajectory, position),
            position,
        )
    elif trajectory.response_ids and not any(
        kind == SAMPLED and start == prompt for kind, start, _ in trajectory.segments
    ):
        yield Finding("the response does not begin with a sampled token", token=prompt)


def _mask(trajectory: Trajectory) -> Iterator[Finding]:
    prompt, mask = len(trajectory.prompt_ids), trajectory.response_mask
    for kind, start, end in trajectory.segments:
        expected = int(kind == SAMPLED)
        if mask[max(start - prompt, 0) : max(end - prompt, 0)].count(1 - expected):
            wrong = [
                token
                for token in range(max(start, prompt), end)
                if mask[token - prompt] != expected
            ]
            what = differs(f"the response mask in a {kind} segment", 1 - expected, expected)

            def finding(token: int, what: str = what) -> Finding:
                return Finding(what, turn_at(trajectory, token), token)

            yield from first_of(wrong, finding)


def _unknown_ids(trajectory: Trajectory, known: int) -> Iterator[Finding]:
    ids = trajectory.prompt_ids + trajectory.response_ids
    if max(ids, default=0) < known + PADDING:
        return

    def say(token: int) -> Finding:
        what = (
            f"the token id is far above the tokenizer's, found {ids[token]}, expected below {known}"
        )
        return Finding(what, turn_at(trajectory, token), token)

    yield from first_of([token for token, found in enumerate(ids) if found >= known + PADDING], say)


def _turns(trajectory: Trajectory) -> Iterator[Finding]:
    """Each spans exactly one sampled segment."""
    sampled = [(start, end) for kind, start, end in trajectory.segments if kind == SAMPLED]
    turns = trajectory.turns
    if trajectory.num_turns != len(turns):
        yield Finding(differs("num_turns", trajectory.num_turns, len(turns)))
    if len(sampled) != len(turns):
        yield Finding(
            differs("the number of turns", len(turns), len(sampled)) + " sampled segments"
        )
    for k, turn in enumerate(turns):
        if turn.prompt_tokens != turn.start:
            yield Finding(
                differs("prompt_tokens", turn.prompt_tokens, turn.start) + ", its start", k
            )
        if k < len(sampled) and (turn.start, turn.end) != sampled[k]:
            spans = (turn.start, turn.end), sampled[k]
            first = min(
                a for a, b in zip(spans[0] + spans[1], spans[1] + spans[0], strict=True) if a != b
            )
            yield Finding(differs("the turn does not span its sampled segment", *spans), k, first)
        places = [turn.start, *(place for place, _ in turn.resumed or ()), turn.end]
        for before, token in pairwise(places[:-1]):
            if not before < token < turn.end:
                what = (
                    "the turn was resumed at a token that is not its own, "
                    "or not after the last such token"
                )
                yield Finding(differs(what, token, [before, turn.end]), k, token)
        if turn.cached_tokens is not None and turn.cached_tokens > turn.start:
            yield Finding(differs("cached_tokens", turn.cached_tokens, f"at most {turn.start}"), k)
    for k, (one, two) in enumerate(pairwise(turns)):
        if two.start < one.end:
            yield Finding(
                differs("the turn begins before the last one ends", two.start, one.end),
                k + 1,
                two.start,
            )


def _logprobs(trajectory: Trajectory, needed: bool) -> Iterator[Finding]:
    """A float32 where the mask is 1, null elsewhere."""
    prompt, mask, logprobs = (
        len(trajectory.prompt_ids),
        trajectory.response_mask,
        trajectory.response_logprobs,
    )

    def at(index: int, expected: str) -> Finding:
        return Finding(
            differs("the log-prob", logprobs[index], expected),
            turn_at(trajectory, prompt + index),
            prompt + index,
        )

    pairs = list(enumerate(zip(mask, logprobs, strict=True)))
    yield from first_of(
        [i for i, (m, value) in pairs if needed and m and value is None],
        lambda i: at(i, "a number: the token was sampled"),
    )
    yield from first_of(
        [i for i, (m, value) in pairs if not m and value is not None],
        lambda i: at(i, "null: the token was not sampled"),
    )
    numbers = [(i, value) for i, (_, value) in pairs if value is not None]
    rounded = array("f", [value for _, value in numbers]).tolist()
    inexact = [i for (i, value), single in zip(numbers, rounded, strict=True) if value != single]
    yield from first_of(inexact, lambda i: at(i, "a float32"))
    yield from first_of(
        [i for i, value in numbers if value > ROUNDING], lambda i: at(i, "at most 0")
    )
