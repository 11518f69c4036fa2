"""An image where it lies in a conversation's tokens, and what a record keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conversations.images.processor import Grid
from conversations.images.reading import Picture


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """`picture` is the tokens [start, end) of `prompt_ids + response_ids`; `grid` is its patches.

    The tokens are placeholders, all alike: the engine puts the picture's embeddings in their place.
    """

    picture: Picture
    grid: Grid
    start: int
    end: int

    def as_json(self) -> dict[str, Any]:
        """One of a record's `images`."""
        picture = self.picture
        return {
            "sha256": picture.sha256,
            "width": picture.width,
            "height": picture.height,
            "grid": list(self.grid),
            "start": self.start,
            "end": self.end,
        }


def spans_of(images: Sequence[PlacedImage]) -> list[tuple[int, int]]:
    """Where the images lie, in order."""
    return [(image.start, image.end) for image in images]
