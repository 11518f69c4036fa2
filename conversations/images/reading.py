"""Bytes to a `Picture`: the only place that decodes images that others made.

Invariant: the limits are checked before a pixel is decoded, by the size of the data and by what the
image's header says, so memory is bounded; nothing but an ImageError leaves. A picture is RGB, 8
bits, turned as its EXIF says, without transparency (on white, as verl has it) and without metadata:
engine, trainer and reader see the same pixels. Decoding takes milliseconds: call it in a thread.
"""

from __future__ import annotations

import base64
import functools
import io
import warnings
from dataclasses import dataclass, field
from typing import Any

from conversations.errors import ImageError
from conversations.extras import pillow
from conversations.run.hash_store import content_hash

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Pillow knows some forty more, one of which runs a program (EPS)."""
MIN_SIDE = 4
"""Pixels. The processors of transformers take a height of 1 or 3 for the color channels."""
MAX_ASPECT = 200
"""Longer side over shorter one, `smart_resize`'s own limit in transformers' Qwen2-VL."""
PNG_LEVEL = 1
"""zlib's fastest: a photo takes a third of the time of level 6, and 5% more bytes."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What is let in. `count` is for one conversation, the others for one image.

    `bytes` is the size of the data as given, `pixels` is width times height.
    """

    count: int = 64
    pixels: int = 4096 * 4096
    bytes: int = 20 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image as a run keeps it. `png` is the file, `sha256` its hash; sizes are in pixels."""

    sha256: str
    width: int
    height: int
    png: bytes = field(repr=False)

    @property
    def reference(self) -> str:
        """What stands for it in a message."""
        return f"sha256:{self.sha256}"

    def image(self) -> Any:
        """A `PIL.Image` in RGB, loaded."""
        image = pillow().open(io.BytesIO(self.png), formats=("PNG",))
        image.load()
        return image

    def data_url(self) -> str:
        """The file as OpenAI's `image_url` takes it."""
        return png_url(self.png)


def png_url(png: bytes) -> str:
    """A PNG file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def read_picture(data: bytes, limits: ImageLimits) -> Picture:
    """The picture in a file's bytes. Raises ImageError."""
    if not data:
        raise ImageError("the image is empty")
    if len(data) > limits.bytes:
        raise ImageError(f"the image has {len(data)} bytes, more than {limits.bytes}")
    image = _opened(data)
    _check_size(image.size, limits)
    if _guarded(lambda: getattr(image, "is_animated", False)):
        raise ImageError("the image is animated; give one frame of it")
    return _picture(_guarded(lambda: _flat(image)))


def picture_of(image: Any, limits: ImageLimits) -> Picture:
    """The picture of a `PIL.Image`, which a tool made or a task's row held. Raises ImageError."""
    if not isinstance(image, pillow().Image):
        raise ImageError(f"expected a PIL image, got {type(image).__name__}")
    _check_size(image.size, limits)
    return _picture(_guarded(lambda: _flat(image)))


def stored_picture(png: bytes, sha256: str, limits: ImageLimits) -> Picture:
    """The picture of a file from a run's store, whose hash was checked. Raises ImageError.

    It is not decoded: what it holds is decoded with the same care when it is used.
    """
    image = _opened(png)
    _check_size(image.size, limits)
    if image.format != "PNG" or image.mode != "RGB" or getattr(image, "is_animated", False):
        raise ImageError(f"{sha256[:16]} is not an image that turntrace wrote")
    return Picture(sha256, image.width, image.height, png)


def _opened(data: bytes) -> Any:
    """The image with its header read, no pixel yet."""
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked here, more strictly
            return pillow().open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"it is no image; readable are {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise ImageError(f"the image cannot be read: {_one_line(error)}") from error


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    shown = f"the image is {width}x{height} pixels"
    if min(size) < MIN_SIDE:
        raise ImageError(f"{shown}; each side needs at least {MIN_SIDE}")
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(f"{shown}; one side may be {MAX_ASPECT} times the other at most")
    if width * height > limits.pixels:
        raise ImageError(f"{shown}, more than {limits.pixels}")


def _guarded(decode: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return decode()
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"the image is damaged: {_one_line(error)}") from error


def _flat(image: Any) -> Any:
    """RGB as seen: turned by its EXIF orientation, on white where it is transparent."""
    from PIL import ImageOps

    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be read says nothing
        image = image.copy()
    if image.mode == "P" or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        seen = image.convert("RGBA")
        white = pillow().new("RGB", seen.size, (255, 255, 255))
        white.paste(seen, mask=seen.getchannel("A"))
        return white
    return image.convert("RGB")


def _picture(image: Any) -> Picture:
    plain = pillow().frombytes("RGB", image.size, image.tobytes())  # without its metadata
    out = io.BytesIO()
    plain.save(out, "PNG", compress_level=PNG_LEVEL)
    png = out.getvalue()
    return Picture(content_hash(png), image.width, image.height, png)


def _one_line(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:200] or type(error).__name__}"


@functools.cache
def has_pillow() -> bool:
    """Whether images can be read at all."""
    import importlib.util

    return importlib.util.find_spec("PIL") is not None
