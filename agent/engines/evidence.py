"""Per-token evidence: what an engine tells of each token beside its log-prob, if it is asked to.

top_logprobs   the k likeliest tokens at each sampled place, with their log-probs
sampling_mask  the tokens that top-k and top-p had left to sample from, at each sampled place
routed_experts the experts that each layer chose, at each place of the sequence that was computed

An engine that can give evidence takes `evidence=` in `generate`. What it does not give is None: a
conversation is never lost for its evidence. `conversations.evidence` has the form on disk.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class EvidenceRequest:
    """What is asked for: `top_logprobs` is k, 0 for none.

    `routed_from` is the first place of the sequence whose experts are still unknown.
    """

    top_logprobs: int = 0
    sampling_mask: bool = False
    routed_experts: bool = False
    routed_from: int = 0

    def flags(self) -> dict[str, Any]:
        """The fields of SGLang's request that ask for it.

        Source: `GenerateReqInput` in sglang/srt/managers/io_struct.py (sampling masks since 0.5.16,
        routed experts in 0.5.12).
        """
        asked: dict[str, Any] = {}
        if self.top_logprobs:
            asked["top_logprobs_num"] = self.top_logprobs
        if self.sampling_mask:
            asked["return_sampling_mask"] = True
        if self.routed_experts:
            asked["return_routed_experts"] = True
        return asked

    def fields(self) -> dict[str, Any]:
        """All fields for the next turn: `flags`, and from which place on experts are returned."""
        start = {"routed_experts_start_len": self.routed_from} if self.routed_experts else {}
        return {**self.flags(), **start}


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of one turn of T tokens.

    `top_ids` and `top_logprobs` are [T, k]; a place with fewer tokens is filled up with -1 and NaN.
    `masks` has the ids of each place. `experts` is [R, n] from `routed_from` to the last place but
    one: n is layers times experts of a token, layer by layer.
    """

    top_ids: NDArray[np.int32] | None = None
    top_logprobs: NDArray[np.float32] | None = None
    masks: list[list[int]] | None = None
    experts: NDArray[np.int16] | None = None


def read_evidence(meta: Mapping[str, Any], asked: EvidenceRequest, tokens: int) -> Evidence:
    """The evidence in an answer's `meta_info`, of a turn of `tokens`.

    What is missing or does not have the turn's length is None. The engine never sees the last
    token of a turn, so it has no experts for it.
    """
    prompt_tokens = meta.get("prompt_tokens")
    places = prompt_tokens + tokens - 1 - asked.routed_from if type(prompt_tokens) is int else 0
    top_ids, top_logprobs = _top(meta.get("output_top_logprobs"), asked.top_logprobs, tokens)
    return Evidence(
        top_ids,
        top_logprobs,
        _masks(meta.get("output_token_sampling_mask"), tokens) if asked.sampling_mask else None,
        _experts(meta.get("routed_experts"), places) if asked.routed_experts else None,
    )


def _top(given: Any, k: int, tokens: int) -> tuple[Any, Any]:
    """[[log-prob, id, text], ...] of each place, as two arrays."""
    import numpy as np

    if not k or not isinstance(given, list) or len(given) != tokens:
        return None, None
    ids = np.full((tokens, k), -1, np.int32)
    logprobs = np.full((tokens, k), np.nan, np.float32)
    try:
        for place, entries in enumerate(given):
            for rank, entry in enumerate((entries or [])[:k]):
                logprobs[place, rank], ids[place, rank] = entry[0], entry[1]
    except (IndexError, OverflowError, TypeError, ValueError):
        return None, None
    return ids, logprobs


def _masks(given: Any, tokens: int) -> list[list[int]] | None:
    if not isinstance(given, list) or len(given) != tokens:
        return None
    is_data = all(isinstance(ids, list) and set(map(type, ids)) <= {int} for ids in given)
    return given if is_data else None


def _experts(given: Any, places: int) -> Any:
    """Base64 of int32, a row of one length for each place."""
    import numpy as np

    try:
        flat = np.frombuffer(base64.b64decode(given, validate=True), np.int32)
    except (TypeError, ValueError):
        return None
    if places <= 0 or not flat.size or flat.size % places or flat.min() < 0 or flat.max() > 32767:
        return None
    return flat.reshape(places, -1).astype(np.int16)
