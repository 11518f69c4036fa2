"""A conversation's evidence, turn by turn, and what its record says of it.

Invariant: each sampled token has one place in it, whether the engine gave evidence or not. Turns
that a resume or a fork brought back come first, with empty places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agent.engines.evidence import Evidence, EvidenceRequest
from conversations.evidence import KINDS, honoured, packed
from conversations.run.hash_store import content_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, slots=True)
class _Packing:
    """The evidence of `sampled` tokens in `turns` turns, packed, and what the record says of it."""

    turns: int
    sampled: int
    data: bytes | None
    sha256: str | None
    honoured: dict[str, int]


_Turn = tuple[int, Evidence | None]
"""How many tokens were sampled, and their evidence."""


class EvidenceLog:
    """What was asked for, and what came. `request` is that of the next turn.

    What was packed last is kept, so that the record and its file cost one packing.
    """

    def __init__(self, asked: EvidenceRequest) -> None:
        self.request = asked
        self._turns: list[_Turn] = []
        self._last: _Packing | None = None

    def append(self, tokens: int, evidence: Evidence | None) -> None:
        """Adds the places of `tokens` that were sampled, with their evidence."""
        self._turns.append((tokens, evidence))
        if evidence is not None and evidence.experts is not None:
            known = self.request.routed_from + len(evidence.experts)
            self.request = dataclasses.replace(self.request, routed_from=known)

    def file(self, sampled: int) -> bytes | None:
        """The content of the evidence file of `sampled` tokens; None if nothing came."""
        return self._packing(sampled).data

    def note(self, sampled: int) -> dict[str, Any]:
        """What the record says; `conversations.evidence` explains it."""
        asked = {kind: value for kind in KINDS if (value := getattr(self.request, kind))}
        packing = self._packing(sampled)
        return {
            "sha256": packing.sha256,
            "asked": asked,
            "sent": self.request.flags(),
            "honoured": {**dict.fromkeys(asked, 0), **packing.honoured},
        }

    def _packing(self, sampled: int) -> _Packing:
        last, turns = self._last, len(self._turns)
        if last is None or (last.turns, last.sampled) != (turns, sampled):
            arrays = self._arrays(sampled)
            data = packed(arrays) if arrays else None
            sha256 = None if data is None else content_hash(data)
            self._last = last = _Packing(turns, sampled, data, sha256, honoured(arrays))
        return last

    def _arrays(self, sampled: int) -> dict[str, NDArray[Any]]:
        brought_back = sampled - sum(tokens for tokens, _ in self._turns)
        turns = [(brought_back, None), *self._turns]
        found: dict[str, NDArray[Any]] = {}
        given = [evidence for _, evidence in turns if evidence is not None]
        if any(evidence.top_ids is not None for evidence in given):
            found |= self._top(turns)
        if any(evidence.masks is not None for evidence in given):
            found |= _masks(turns)
        experts = [evidence.experts for evidence in given if evidence.experts is not None]
        if experts and len({rows.shape[1] for rows in experts}) == 1:
            import numpy as np

            found["routed_experts"] = np.concatenate(experts)
        return found

    def _top(self, turns: Sequence[_Turn]) -> dict[str, NDArray[Any]]:
        import numpy as np

        ids, logprobs = [], []
        for tokens, evidence in turns:
            if evidence is not None and evidence.top_ids is not None:
                ids.append(evidence.top_ids)
                logprobs.append(evidence.top_logprobs)
            else:
                ids.append(np.full((tokens, self.request.top_logprobs), -1, np.int32))
                logprobs.append(np.full((tokens, self.request.top_logprobs), np.nan, np.float32))
        return {"top_ids": np.concatenate(ids), "top_logprobs": np.concatenate(logprobs)}


def _masks(turns: Sequence[_Turn]) -> dict[str, NDArray[Any]]:
    import numpy as np

    lengths: list[int] = []
    ids: list[int] = []
    for tokens, evidence in turns:
        masks = evidence.masks if evidence is not None else None
        lengths += [-1] * tokens if masks is None else [len(mask) for mask in masks]
        ids += [token for mask in masks or () for token in mask]
    return {"mask_lengths": np.array(lengths, np.int32), "mask_ids": np.array(ids, np.int32)}
