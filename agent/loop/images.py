"""The images of a run: read once, in a thread, counted in tokens.

Invariant: nothing is decoded, encoded or hashed on the event loop. The images of a task, of its
tools' creation and of their answers go through one `ImageReader` with one set of limits.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from conversations.errors import ImageError, RunFolderError
from conversations.images.placing import PlacedImage
from conversations.images.processor import ImageProcessor
from conversations.images.reading import ImageLimits, Picture, has_pillow, stored_picture
from conversations.images.sources import ImageSource, image_source
from conversations.run.hash_store import HashStore

REMEMBERED_BYTES = 64 << 20
"""Of PNG files that were read before: the samples of a task share theirs."""
NO_PILLOW = "images need pillow, which is not installed: pip install 'turntrace[images]'"


class ImageReader:
    """Reads images for a model whose image processor is `processor`.

    `stores` are looked in for images that are named by their hash. Any thread may use it.
    """

    def __init__(
        self,
        processor: ImageProcessor,
        limits: ImageLimits | None = None,
        stores: Sequence[HashStore] = (),
    ) -> None:
        self.processor = processor
        self.limits = limits or ImageLimits()
        self._stores = list(stores)
        self._remembered: OrderedDict[object, Picture] = OrderedDict()
        self._bytes = 0
        self._guard = threading.Lock()

    def look_in(self, store: HashStore) -> None:
        """Finds the images of this store, too."""
        self._stores.append(store)

    async def read(self, sources: Sequence[ImageSource], *, before: int = 0) -> list[Picture]:
        """The pictures, in order; the conversation holds `before` already. Raises ImageError."""
        if not sources:
            return []
        if not has_pillow():
            raise ImageError(NO_PILLOW)
        self.check_count(before + len(sources))
        return await asyncio.to_thread(lambda: [self._picture(source) for source in sources])

    def check_count(self, count: int) -> None:
        """Raises ImageError if a conversation may not hold so many images."""
        if count > self.limits.count:
            raise ImageError(
                f"{count} images, more than the {self.limits.count} that a conversation may hold "
                "(rollout.turntrace.images.count)"
            )

    async def placed(self, images: Sequence[Mapping[str, Any]]) -> list[PlacedImage]:
        """A record's images with their pictures, for an engine. Raises ImageError."""
        sources = [ImageSource(sha256=image["sha256"]) for image in images]
        return [
            PlacedImage(picture, tuple(image["grid"]), image["start"], image["end"])
            for picture, image in zip(await self.read(sources), images, strict=True)
        ]

    def _picture(self, source: ImageSource) -> Picture:
        key = source.key()
        with self._guard:
            if key is not None and key in self._remembered:
                self._remembered.move_to_end(key)
                return self._remembered[key]
        picture = self._stored(source.sha256) if source.sha256 else source.read(self.limits)
        self.processor.grid(picture.width, picture.height)  # the model can take its size
        self._remember(source.sha256 or key or picture.sha256, picture)
        return picture

    def _stored(self, sha256: str) -> Picture:
        problem = "this run holds no images"
        for store in self._stores:
            try:
                data = store.read(sha256, most=4 * self.limits.pixels)
                return stored_picture(data, sha256, self.limits)
            except RunFolderError as error:
                problem = str(error)
        raise ImageError(f"the image {sha256[:16]} cannot be had: {problem}")

    def _remember(self, key: object, picture: Picture) -> None:
        with self._guard:
            if key in self._remembered:
                return
            self._remembered[key] = picture
            self._bytes += len(picture.png)
            while self._bytes > REMEMBERED_BYTES:
                self._bytes -= len(self._remembered.popitem(last=False)[1].png)


def tool_images(response: Any) -> list[ImageSource]:
    """The images of a tool's response: PIL images, bytes, data URLs. Raises ImageError.

    A path is refused: a tool must not make this process read a file.
    """
    images = getattr(response, "image", None)
    if not images:
        return []
    if not isinstance(images, (list, tuple)):
        raise ImageError(f"`image` must be a list, got {type(images).__name__}")
    sources = [image_source(image) for image in images]
    if any(source.path is not None or source.sha256 is not None for source in sources):
        raise ImageError("a tool answers with the image itself, not with a path or a hash")
    return sources


def given_image(kwargs: Mapping[str, Any], tool: str) -> ImageSource | None:
    """The image that a row gives to a tool's creation; None if it gives none. Raises ImageError."""
    if (given := kwargs.get("image")) is None:
        return None
    try:
        return image_source(given)
    except ImageError as error:
        raise ImageError(f"tool {tool}: {error}") from error
