"""Cutting by tokens: never more than the limit beside the marker, whole characters, work bounded
by the limit."""

from __future__ import annotations

import random
import re

import pytest

from conversations.template import ChatTemplate
from conversations.truncate import SIDES, cut_to_tokens, is_cut_of
from tests.helpers import odd_text

MARKER = re.compile(r"\n\.\.\. \[(\d+) characters cut\] \.\.\.\n")


def cut(text: str, limit: int, side: str, template: ChatTemplate) -> str:
    shortened = cut_to_tokens(text, limit, side, template)
    assert shortened is not None
    return shortened.text


def parts(text: str, shown: str) -> tuple[str, str]:
    """What was kept of the beginning and of the end; the marker's count is right."""
    (found,) = [
        match
        for match in MARKER.finditer(shown)
        if text.startswith(shown[: match.start()]) and text.endswith(shown[match.end() :])
    ]
    head, tail = shown[: found.start()], shown[found.end() :]
    assert int(found.group(1)) == len(text) - len(head) - len(tail)
    return head, tail


@pytest.mark.parametrize("side", SIDES)
def test_a_text_that_fits_is_left_alone(template: ChatTemplate, side: str) -> None:
    text = "word " * 40
    tokens = len(template.encode(text))
    assert cut_to_tokens(text, tokens, side, template) is None
    assert cut_to_tokens(text, tokens - 1, side, template) is not None
    assert cut_to_tokens("", 1, side, template) is None


def test_the_side_is_the_side_that_is_cut_away(smollm2: ChatTemplate) -> None:
    text = " ".join(str(number) for number in range(500))
    head, tail = parts(text, cut(text, 20, "right", smollm2))
    assert head.startswith("0 1 2")
    assert not tail
    head, tail = parts(text, cut(text, 20, "left", smollm2))
    assert tail.endswith("498 499")
    assert not head
    head, tail = parts(text, cut(text, 20, "middle", smollm2))
    assert head.startswith("0 1 2")
    assert tail.endswith("498 499")


@pytest.mark.parametrize("side", SIDES)
def test_what_is_kept_fits_and_fills_the_limit(template: ChatTemplate, side: str) -> None:
    rng = random.Random(side)
    longer = 0
    for _ in range(300):
        text = rng.choice(("", " ", "\n")).join(odd_text(rng) for _ in range(rng.randrange(1, 12)))
        limit = rng.randrange(1, 60)
        shown = cut_to_tokens(text, limit, side, template)
        tokens = len(template.encode(text))
        if shown is None:
            assert tokens <= limit
            continue
        assert tokens > limit
        longer += 1
        head, tail = parts(text, shown.text)
        kept = len(template.encode(head)) + len(template.encode(tail))
        assert kept <= limit, (text, head, tail)
        assert (
            kept >= limit - 16
        )  # a character of several tokens is dropped whole, on either side of a cut
    assert longer > 150


@pytest.mark.parametrize("side", SIDES)
def test_a_cut_is_known_without_its_limit(smollm2: ChatTemplate, side: str) -> None:
    text = "one\n... [7 characters cut] ...\ntwo " * 9
    for limit in range(1, 60, 7):
        shown = cut(text, limit, side, smollm2)
        assert is_cut_of(shown, text)
        assert not is_cut_of(shown, text + "x")
        assert not is_cut_of(shown + "x", text)
        assert not is_cut_of(re.sub(r"\[\d+ ", "[8 ", shown), text)
    assert not is_cut_of(text, text)


@pytest.mark.parametrize("side", SIDES)
def test_what_is_cut_is_counted_in_tokens(template: ChatTemplate, side: str) -> None:
    """To the token where little was cut; where much was, as if all of it were like its
    beginning."""
    text = " ".join(f"row {number}: {number * 7919 % 10007}" for number in range(400))
    for limit in (8, 300):
        for length in (3000, len(text), 50_000):
            whole = (text + "\n") * (length // len(text)) if length > len(text) else text[:length]
            shown = cut_to_tokens(whole, limit, side, template)
            assert shown is not None
            head, tail = parts(whole, shown.text)
            removed = whole[len(head) : len(whole) - len(tail)]
            few = len(removed) <= max(256, 8 * limit)
            assert shown.tokens_cut == pytest.approx(
                len(template.encode(removed)), rel=0 if few else 0.1
            )


@pytest.mark.parametrize("side", SIDES)
def test_characters_of_several_tokens_stay_whole(smollm2: ChatTemplate, side: str) -> None:
    """SmolLM2 spends several tokens on such characters: half of one would be shown as U+FFFD."""
    text = "漢🙂é\u2028" * 300
    for limit in range(1, 40):
        shown = cut(text, limit, side, smollm2)
        head, tail = parts(text, shown)
        assert len(smollm2.encode(head)) + len(smollm2.encode(tail)) <= limit
        assert "\ufffd" not in smollm2.decode(smollm2.encode(shown))


class Counted(str):
    """Counts the characters that slices hand out."""

    work = 0

    def __getitem__(self, key: object) -> str:
        part = str.__getitem__(self, key)  # type: ignore[index]
        Counted.work += len(part)
        return part


@pytest.mark.parametrize("side", SIDES)
def test_ten_megabytes_cost_what_a_hundred_kilobytes_cost(smollm2: ChatTemplate, side: str) -> None:
    work = []
    for size in (100_000, 10_000_000):
        Counted.work = 0
        assert cut_to_tokens(Counted("tool output\n" * (size // 12)), 256, side, smollm2)
        work.append(Counted.work)
    assert work[0] == work[1] < 20_000


def test_an_unknown_side_is_named(smollm2: ChatTemplate) -> None:
    with pytest.raises(ValueError, match=r"side .*'top'"):
        cut_to_tokens("x" * 100, 1, "top", smollm2)
