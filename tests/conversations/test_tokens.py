"""The token sequence: append only, one author a token, mask and log-probs as views."""

from __future__ import annotations

import json
import random

import pytest

from conversations.tokens import KINDS, PROMPT, SAMPLED, TEMPLATE, TOOL, USER, TokenSequence
from tests.helpers import float32


def test_views_of_one_conversation() -> None:
    tokens = TokenSequence()
    tokens.append(PROMPT, [1, 2])
    tokens.append_sampled([3, 4], [-0.5, -0.25])
    tokens.append(TEMPLATE, [5])
    tokens.append(TOOL, [6, 7])
    tokens.append(TEMPLATE, [8])
    tokens.append_sampled([9], [-1.0])
    assert tokens.ids == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (tokens.prompt_ids(), tokens.response_ids()) == ([1, 2], [3, 4, 5, 6, 7, 8, 9])
    assert (len(tokens), tokens.prompt_length, tokens.response_length) == (9, 2, 7)
    assert tokens.response_mask() == [1, 1, 0, 0, 0, 0, 1]
    assert tokens.response_logprobs() == [-0.5, -0.25, None, None, None, None, -1.0]
    assert tokens.segments() == [
        ("prompt", 0, 2), ("sampled", 2, 4), ("template", 4, 5), ("tool", 5, 7), ("template", 7, 8),
        ("sampled", 8, 9),
    ]  # fmt: skip


def test_nothing_and_prompt_only() -> None:
    tokens = TokenSequence()
    assert (
        tokens.segments(),
        tokens.prompt_ids(),
        tokens.response_ids(),
        tokens.response_mask(),
    ) == ([], [], [], [])
    tokens.append(PROMPT, [1])
    assert (
        tokens.segments(),
        tokens.prompt_ids(),
        tokens.response_ids(),
        tokens.response_length,
    ) == ([("prompt", 0, 1)], [1], [], 0)


def test_neighbours_of_one_author_are_one_segment() -> None:
    tokens = TokenSequence()
    for ids in ([1], [], [2]):
        tokens.append(PROMPT, ids)
    assert tokens.segments() == [("prompt", 0, 2)]


def test_ids_and_logprobs_belong_together() -> None:
    tokens = TokenSequence()
    with pytest.raises(ValueError, match=r"2 .* 1 log-probs"):
        tokens.append_sampled([1, 2], [-1.0])
    assert len(tokens) == 0


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_appends(seed: int) -> None:
    rng = random.Random(seed)
    tokens = TokenSequence()
    authors: list[str] = []
    expected: list[float | None] = []
    for _ in range(60):
        kind = rng.choice(
            [PROMPT, TOOL]
            if SAMPLED not in authors and rng.random() < 0.9
            else [SAMPLED, TOOL, USER, TEMPLATE]
        )
        ids = [rng.randrange(1000) for _ in range(rng.randrange(5))]
        before = list(tokens.ids)
        if kind == SAMPLED:
            values = [float32(rng) for _ in ids]
            tokens.append_sampled(ids, values)
            expected += values
        else:
            tokens.append(kind, ids)
            expected += [None] * len(ids)
        assert tokens.ids == before + ids
        if rng.random() < 0.3:
            assert json.loads(tokens.ids.json()) == tokens.ids
        authors += [kind] * len(ids)
    segments = tokens.segments()
    assert [kind for kind, start, end in segments for _ in range(start, end)] == authors
    assert all(kind in KINDS for kind, _, _ in segments)
    first = len(authors) if tokens.prompt_length is None else tokens.prompt_length
    assert tokens.response_mask() == [int(kind == SAMPLED) for kind in authors[first:]]
    assert tokens.response_logprobs() == expected[first:]
    assert tokens.prompt_ids() + tokens.response_ids() == tokens.ids
