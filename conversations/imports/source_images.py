"""The images of a foreign document: data URLs, and files of a folder that the user named for it.

Invariant: a document makes nobody read another file. A path is taken below that folder alone, links
resolved; without a folder every path is refused, and URLs always are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conversations.errors import ImageError, ImportFileError
from conversations.images.processor import ImageProcessor
from conversations.images.reading import ImageLimits, Picture
from conversations.images.sources import ImageSource
from conversations.messages import image_parts


class SourceImages:
    """Reads the images of one document. `pictures` are those read so far, in order."""

    def __init__(self, folder: Path | None, limits: ImageLimits | None = None) -> None:
        self._folder = folder
        self._limits = limits or ImageLimits()
        self.pictures: list[Picture] = []

    def take(self, source: dict[str, Any]) -> str:
        """The reference of an ATIF image source. Raises ImportFileError."""
        path = str(source["path"])
        try:
            if len(self.pictures) >= self._limits.count:
                raise ImageError(f"it has more than {self._limits.count} images")
            picture = self._source(path).read(self._limits)
        except ImageError as error:
            raise ImportFileError(f"image {path[:60]!r}: {error}") from error
        self.pictures.append(picture)
        return picture.reference

    def _source(self, path: str) -> ImageSource:
        if path[:5].lower() == "data:":
            return ImageSource(url=path)
        if self._folder is None or "://" in path[:16]:
            raise ImageError(
                "only data URLs are read, and with --images FOLDER files below that folder"
            )
        try:
            root, file = self._folder.resolve(), (self._folder / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise ImageError(f"no such file: {error}") from error
        if not file.is_relative_to(root):
            raise ImageError(f"it lies outside {self._folder}")
        return ImageSource(path=file)


def placed_images(
    ids: list[int],
    messages: list[dict[str, Any]],
    pictures: list[Picture],
    processor: ImageProcessor,
) -> list[dict[str, Any]]:
    """A record's `images`: the runs of placeholders in `ids` are those of the messages, in order.

    Raises ImageError, with the reason, if they are not.
    """
    known = {picture.reference: picture for picture in pictures}
    shown = [known[part["image"]] for part in image_parts(messages)]
    runs = _runs(ids, processor.placeholder_id)
    if len(runs) != len(shown):
        raise ImageError(f"{len(shown)} images for {len(runs)} runs of their token")
    images = []
    for picture, (start, end) in zip(shown, runs, strict=True):
        grid = processor.grid(picture.width, picture.height)
        if processor.tokens(grid) != end - start:
            wanted = processor.tokens(grid)
            raise ImageError(f"an image of {wanted} tokens stands for {end - start}")
        images.append(
            {
                "sha256": picture.sha256,
                "width": picture.width,
                "height": picture.height,
                "grid": list(grid),
                "start": start,
                "end": end,
            }
        )
    return images


def _runs(ids: list[int], token: int) -> list[tuple[int, int]]:
    """Where the token stands, as [start, end) of each run."""
    runs: list[tuple[int, int]] = []
    for place, found in enumerate(ids):
        if found == token:
            if runs and runs[-1][1] == place:
                runs[-1] = runs[-1][0], place + 1
            else:
                runs.append((place, place + 1))
    return runs
