"""Per-token evidence on disk: `evidence/SHA256.safetensors` in a run folder, one for a trajectory.

A record names its file in `engine.evidence`:

    sha256    the file's hash; None if the engine gave nothing
    asked     what the config asked for: top_logprobs (k), sampling_mask, routed_experts
    sent      the engine's own request fields, as of the last turn
    honoured  for each kind, how many places have it

Arrays of the file, for S sampled tokens in the order of the response (a place without evidence has
the values in brackets):

    top_ids        int32   [S, k]  the k likeliest tokens, likeliest first (-1)
    top_logprobs   float32 [S, k]  their log-probs, of the distribution sampled from (NaN)
    mask_lengths   int32   [S]     how many tokens could have been sampled (-1)
    mask_ids       int32   [sum]   those tokens, place after place
    routed_experts int16   [P, n]  experts of the first P places of `prompt_ids + response_ids`:
                                   layer by layer, n = layers * experts of a token

Source of the format: https://github.com/huggingface/safetensors. It holds numbers only; reading it
runs no code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversations.errors import RecordError
from conversations.extras import safetensors
from conversations.run.hash_store import HashStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from conversations.trajectory import Trajectory

FOLDER = "evidence"
MOST_BYTES = 1 << 31
"""Of a file: 300,000 tokens with the experts of 60 layers are half of it."""
DTYPES = {
    "top_ids": "int32",
    "top_logprobs": "float32",
    "mask_lengths": "int32",
    "mask_ids": "int32",
    "routed_experts": "int16",
}
KINDS = {
    "top_logprobs": ("top_ids", "top_logprobs"),
    "sampling_mask": ("mask_lengths", "mask_ids"),
    "routed_experts": ("routed_experts",),
}
"""The arrays of each kind."""

Arrays = Mapping[str, "NDArray[Any]"]


def evidence_store(run: Path) -> HashStore:
    """The files of a run folder."""
    return HashStore(run / FOLDER, ".safetensors")


def packed(arrays: Arrays) -> bytes:
    """The content of the file. Equal arrays give equal bytes."""
    data: bytes = safetensors().save({name: arrays[name] for name in sorted(arrays)})
    return data


def unpacked(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a file. Raises RecordError if it is none, or has others than `DTYPES`."""
    package = safetensors()
    try:
        arrays: dict[str, NDArray[Any]] = package.load(data)
    except Exception as error:  # safetensors has an exception of its own, written in Rust
        raise RecordError(f"the evidence is no safetensors file: {error}") from error
    for name, array in arrays.items():
        if str(array.dtype) != DTYPES.get(name):
            raise RecordError(f"the evidence has an array {name!r} of {array.dtype}")
    return arrays


def evidence_of(run: Path, trajectory: Trajectory) -> dict[str, NDArray[Any]]:
    """The arrays of a trajectory; empty if it has no evidence.

    Raises RunFolderError or RecordError if the file is missing, changed or no evidence.
    """
    sha256 = evidence_hash(trajectory.engine)
    if sha256 is None:
        return {}
    return unpacked(evidence_store(run).read(sha256, most=MOST_BYTES))


def evidence_hash(engine: Any) -> str | None:
    """The hash that a record's `engine` names; None if it names none."""
    named = engine.get("evidence") if isinstance(engine, Mapping) else None
    sha256 = named.get("sha256") if isinstance(named, Mapping) else None
    return sha256 if isinstance(sha256, str) else None


def honoured(arrays: Arrays) -> dict[str, int]:
    """For each kind that the arrays have, how many places have it."""
    found = {}
    if "top_ids" in arrays:
        found["top_logprobs"] = int((arrays["top_ids"] >= 0).any(axis=1).sum())
    if "mask_lengths" in arrays:
        found["sampling_mask"] = int((arrays["mask_lengths"] >= 0).sum())
    if "routed_experts" in arrays:
        found["routed_experts"] = len(arrays["routed_experts"])
    return found


def mismatches(arrays: Arrays, trajectory: Trajectory) -> Iterator[str]:
    """What of the arrays cannot be true of the trajectory, one phrase each."""
    for kind, names in KINDS.items():
        if any(name in arrays for name in names) and not all(name in arrays for name in names):
            yield f"{kind} needs the arrays {' and '.join(names)}"
            return
    mask = trajectory.response_mask
    sampled = [token for token, one in zip(trajectory.response_ids, mask, strict=False) if one]
    yield from _top_mismatches(arrays, sampled)
    yield from _mask_mismatches(arrays, sampled)
    if (experts := arrays.get("routed_experts")) is not None:
        most = len(trajectory.prompt_ids) + len(trajectory.response_ids)
        if experts.ndim != 2 or len(experts) > most:
            yield f"routed_experts has the shape {experts.shape}, for {most} tokens"


def _top_mismatches(arrays: Arrays, sampled: list[int]) -> Iterator[str]:
    import numpy as np

    ids, logprobs = arrays.get("top_ids"), arrays.get("top_logprobs")
    if ids is None or logprobs is None:
        return
    if ids.ndim != 2 or ids.shape != logprobs.shape or len(ids) != len(sampled):
        yield (
            f"top_ids and top_logprobs have the shapes {ids.shape} and {logprobs.shape}, "
            f"for {len(sampled)} sampled tokens"
        )
        return
    if ((ids < 0) != np.isnan(logprobs)).any():
        yield "top_ids and top_logprobs are missing at different places"
    if (logprobs[:, 1:] > logprobs[:, :-1]).any():
        yield "top_logprobs is not in order, the likeliest first"


def _mask_mismatches(arrays: Arrays, sampled: list[int]) -> Iterator[str]:
    import numpy as np

    lengths, ids = arrays.get("mask_lengths"), arrays.get("mask_ids")
    if lengths is None or ids is None:
        return
    if lengths.shape != (len(sampled),) or ids.ndim != 1:
        yield f"mask_lengths has the shape {lengths.shape}, for {len(sampled)} sampled tokens"
        return
    ends = np.cumsum(np.maximum(lengths, 0))
    if int(ends[-1] if len(ends) else 0) != len(ids):
        yield f"mask_ids has {len(ids)} ids, mask_lengths says {ends[-1] if len(ends) else 0}"
        return
    for place, (token, length, end) in enumerate(zip(sampled, lengths, ends, strict=True)):
        if length >= 0 and token not in ids[end - length : end]:
            yield f"the sampled token {place} ({token}) is not in its own sampling mask"
            return
