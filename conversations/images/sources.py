"""Where an image comes from, as a message, a task's row or a tool's arguments say it.

Invariant: a source is only looked at here, never fetched from the network. A message holds the
reference `sha256:HEX` once its image is read; before, the number of its source.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from conversations.errors import ImageError
from conversations.images.reading import ImageLimits, Picture, picture_of, read_picture
from conversations.run.hash_store import content_hash

REFERENCE = re.compile(r"sha256:([0-9a-f]{64})")
_DATA_URL = re.compile(r"data:(image/[\w.+-]+)?((?:;[\w=.+-]+)*),", re.IGNORECASE)
_SHOWN = 60


@dataclass(frozen=True, slots=True, eq=False)
class ImageSource:
    """One of: the `path` of a file, `data` (its bytes), a data `url`, a PIL `image`, `sha256` of an
    image in the run's own store.
    """

    path: Path | None = None
    data: bytes | None = None
    url: str | None = None
    image: Any = None
    sha256: str | None = None

    def key(self) -> object:
        """Equal for sources of the same image, cheaply; None if that cannot be told."""
        if self.data is not None:
            return content_hash(self.data)
        if self.url is not None:
            return content_hash(self.url.encode(errors="surrogatepass"))
        return self.sha256

    def read(self, limits: ImageLimits) -> Picture:
        """The picture, of any source but `sha256`. Raises ImageError. Blocks: call it in a
        thread.
        """
        if self.image is not None:
            return picture_of(self.image, limits)
        if self.path is not None:
            return read_picture(_file(self.path, limits), limits)
        if self.url is not None:
            return read_picture(_decoded(self.url, limits), limits)
        return read_picture(self.data or b"", limits)


def image_source(given: object, folder: Path | None = None) -> ImageSource:
    """The source of an image as rows and messages have it.

    A path (relative ones are in `folder`), `file://`, a data URL, `sha256:HEX`, `{"bytes": ...}` or
    `{"path": ...}` as Hugging Face's datasets write it, `{"url": ...}` as OpenAI does,
    `{"image": ...}` as verl does, bytes, a PIL image. Raises ImageError; nothing is read yet.
    """
    if isinstance(given, Mapping):
        return _of_mapping(given, folder)
    if isinstance(given, (bytes, bytearray)):
        return ImageSource(data=bytes(given))
    if isinstance(given, str):
        return _of_text(given, folder)
    if isinstance(given, Path):
        return ImageSource(path=given)
    if hasattr(given, "convert") and hasattr(given, "size"):
        return ImageSource(image=given)
    raise ImageError(
        f"an image is a path, a data URL, bytes or a PIL image, got {type(given).__name__}"
    )


def hash_of(reference: object) -> str:
    """The hash in a message's reference `sha256:HEX`. Raises ImageError if it is none."""
    match = REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
    if match is None:
        raise ImageError(f"{reference!r:.60} names no image: expected sha256:HEX")
    return match[1]


def _of_mapping(given: Mapping[str, Any], folder: Path | None) -> ImageSource:
    for key in ("bytes", "image", "url", "image_url", "path"):
        if given.get(key) is not None:
            return image_source(given[key], folder)
    keys = ", ".join(sorted(map(str, given))) or "none"
    raise ImageError(f"an image object needs one of bytes, path, image, url (its keys: {keys})")


def _of_text(text: str, folder: Path | None) -> ImageSource:
    if match := REFERENCE.fullmatch(text):
        return ImageSource(sha256=match[1])
    if text[:5].lower() == "data:":
        return ImageSource(url=text)
    try:
        parts = urlsplit(text) if "://" in text[:16] else None
    except ValueError as error:
        raise ImageError(f"{text[:_SHOWN]!r} is no address: {error}") from error
    if parts is not None and parts.scheme.lower() != "file":
        raise ImageError(f"images are not fetched: {text[:_SHOWN]!r}; give a file or a data URL")
    path = Path(unquote(parts.path) if parts is not None else text)
    if not text or "\0" in text:
        raise ImageError("an image's path is empty or holds a null byte")
    return ImageSource(path=path if path.is_absolute() or folder is None else folder / path)


def _file(path: Path, limits: ImageLimits) -> bytes:
    try:
        if not path.is_file():  # a named pipe would wait for its writer
            raise ImageError(f"{path}: no such image file")
        with path.open("rb") as file:
            return file.read(limits.bytes + 1)
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read: {error}") from error


def _decoded(url: str, limits: ImageLimits) -> bytes:
    match = _DATA_URL.match(url)
    if match is None or "base64" not in match[2].lower():
        raise ImageError(
            f"{url[:_SHOWN]!r} is not a data URL of an image, data:image/png;base64,..."
        )
    if (len(url) - match.end()) * 3 // 4 > limits.bytes + 2:
        raise ImageError(f"the image has more than {limits.bytes} bytes")
    try:
        return base64.b64decode("".join(url[match.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data URL is not base64: {error}") from error
