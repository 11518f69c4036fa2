"""The segment encoder: the tokenizer's own ids, whatever the text and whatever the tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conversations.encoding import REMEMBERED_CHARACTERS, SegmentEncoder
from conversations.template import ChatTemplate
from tests.helpers import odd_text

ALPHABET = "abcdefgh ▁\n<>|"


def encoder(tokenizer: Tokenizer, added: Sequence[AddedToken]) -> SegmentEncoder:
    tokenizer.add_tokens(list(added))
    return SegmentEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def small_tokenizer(pre_tokenizer: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    vocabulary = {character: index for index, character in enumerate(ALPHABET)}
    pairs = ["ab", "▁a", "cd", "<|"]
    vocabulary |= {pair: len(vocabulary) + index for index, pair in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(pair[0], pair[1]) for pair in pairs]))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def texts(names: Sequence[str], seed: int) -> list[str]:
    """Texts of the small alphabet with added tokens strewn in."""
    rng = random.Random(seed)
    return [
        "".join(
            rng.choice((*ALPHABET[:9], "\n", "ab ", *names, *names))
            for _ in range(rng.randrange(12))
        )
        for _ in range(300)
    ]


def check(subject: SegmentEncoder, samples: Sequence[str]) -> None:
    for text in [*samples, *samples]:  # the second time from memory
        assert subject.encode(text) == list(subject.whole(text)), repr(text)


def test_real_tokenizers_give_the_same_ids_segment_by_segment(template: ChatTemplate) -> None:
    subject, rng = SegmentEncoder(template.tokenizer), random.Random(0)
    assert subject.by_segment
    check(subject, [odd_text(rng) for _ in range(1000)])


def test_of_overlapping_added_tokens_the_longest_is_taken() -> None:
    subject = encoder(
        small_tokenizer(), [AddedToken(name, normalized=False) for name in ("<|", "<|a", "<|ab|>")]
    )
    assert subject.by_segment
    check(subject, texts(["<|", "<|a", "<|ab|>", "|>"], seed=1))


@pytest.mark.parametrize(
    "added",
    [
        AddedToken("<|e|>", normalized=False, lstrip=True),
        AddedToken("<|e|>", normalized=False, rstrip=True),
        AddedToken("<|e|>", normalized=False, single_word=True),
        AddedToken("<|e|>", normalized=True),
    ],
)
def test_added_tokens_that_take_of_their_surroundings_are_left_to_the_tokenizer(
    added: AddedToken,
) -> None:
    subject = encoder(small_tokenizer(), [added])
    assert not subject.by_segment
    check(subject, texts(["<|e|>", " <|e|> "], seed=2))


def test_a_tokenizer_that_marks_the_beginning_of_a_text_encodes_it_whole() -> None:
    subject = encoder(
        small_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="first")),
        [AddedToken("<|e|>", normalized=False)],
    )
    assert not subject.by_segment
    check(subject, texts(["<|e|>"], seed=3))


def test_a_tokenizer_that_marks_every_segment_goes_by_segment() -> None:
    tokenizer = small_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="always"))
    tokenizer.normalizer = normalizers.Lowercase()
    subject = encoder(tokenizer, [AddedToken("<|e|>", normalized=False)])
    assert subject.by_segment
    check(subject, texts(["<|e|>", "<|E|>"], seed=4))


def test_a_tokenizer_without_added_tokens() -> None:
    check(encoder(small_tokenizer(), []), texts([], seed=5))


def test_what_is_returned_is_the_callers_own() -> None:
    subject = encoder(small_tokenizer(), [AddedToken("<|e|>", normalized=False)])
    first = subject.encode("abc")
    first.append(7)
    assert subject.encode("abc") == list(subject.whole("abc"))


def test_long_segments_are_not_remembered() -> None:
    subject = encoder(small_tokenizer(), [AddedToken("<|e|>", normalized=False)])
    before = subject.remembered
    subject.encode("a" * (REMEMBERED_CHARACTERS + 1))
    assert subject.remembered == before
    subject.encode("abcabc")
    assert subject.remembered == before + 1


def test_the_fast_encoder_gives_the_tokenizers_ids(template: ChatTemplate) -> None:
    subject, exact = SegmentEncoder(template.tokenizer), SegmentEncoder(template.tokenizer)
    assert subject.use_fast(["x"])
    rng = random.Random(7)
    for _ in range(1500):
        text = "".join(odd_text(rng) for _ in range(3))
        assert subject.encode(text) == exact.encode(text), repr(text)
        assert list(subject.whole(text)) == list(exact.whole(text)), repr(text)


def test_a_tokenizer_that_it_cuts_otherwise_keeps_its_own_encoder() -> None:
    tokenizer = small_tokenizer(pre_tokenizers.Metaspace())
    subject = encoder(tokenizer, [AddedToken("<|a|>", normalized=True, lstrip=True)])
    before = subject.encode("ab <|a|> a")
    subject.use_fast(["ab"])
    assert subject.encode("ab <|a|> a") == before


def test_what_checks_a_record_does_not_use_the_fast_encoder(template: ChatTemplate) -> None:
    assert ChatTemplate(template.tokenizer).encoder == "tokenizers"
