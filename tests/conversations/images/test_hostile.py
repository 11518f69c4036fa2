"""200 images that were made to do harm, and what is not an image at all: each is named in one line,
none hangs, and memory stays below a bound.
"""

from __future__ import annotations

import io
import random
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from conversations.errors import ImageError
from conversations.images.reading import ImageLimits, read_picture
from conversations.images.sources import image_source
from tests.vision import drawn, png_bytes, png_chunk

LIMITS = ImageLimits(pixels=1 << 20, bytes=1 << 20)
GROWTH_KIB = 128 << 10
"""What reading all of them may add to the largest memory that the process ever had."""


def header(width: int, height: int, *, depth: int = 8, color: int = 2) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", body)


def bomb(width: int, height: int) -> bytes:
    """A small file that says it is huge; its pixels are zeros, which compress a thousandfold."""
    rows = zlib.compress(b"\0" * min(1 << 24, (width * 3 + 1) * height), 9)
    return header(width, height) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def text_bomb(kind: bytes) -> bytes:
    """A text chunk that grows to 64 MiB."""
    body = b"Comment\0\0" + zlib.compress(b"a" * (64 << 20), 9)
    whole = png_bytes(Image.new("RGB", (30, 30)))
    return whole[:33] + png_chunk(kind, body) + whole[33:]


def encoded(kind: str, size: tuple[int, int] = (60, 40), **options: Any) -> bytes:
    out = io.BytesIO()
    image = Image.new(options.pop("mode", "RGB"), size, options.pop("color", None) or 7)
    image.save(out, kind, **options)
    return out.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (40, 40), (i * 40, 0, 0)) for i in range(3)]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


def refused(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """(what is wrong with it, its bytes)."""
    for size in ((30_000, 30_000), (1 << 30, 4), (65_535, 65_535), (2_000, 2_000), (30_000, 200)):
        yield "bomb", bomb(*size)
    for size in ((1, 1), (1, 900), (900, 1), (3, 3), (2, 50), (50, 3)):
        yield "tiny", png_bytes(Image.new("RGB", size))
    for size in ((3000, 4), (4, 3000), (30_000, 30)):
        yield "long", png_bytes(Image.new("RGB", size))
    for kind in ("GIF", "WEBP", "PNG"):
        yield "animated", animated(kind)
    whole = png_bytes(drawn(rng, (300, 200)))
    for _ in range(60):
        yield "truncated", whole[: rng.randrange(len(whole) - 12)]
    photo = encoded("JPEG", (300, 200))
    for _ in range(30):
        yield "truncated", photo[: rng.randrange(len(photo) // 2)]
    for _ in range(30):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[rng.randrange(40, len(damaged) - 20)] ^= 1 << rng.randrange(8)
        yield "damaged", bytes(damaged)
    frame = encoded("GIF")[:-1]
    for end in (b"!", b","):
        yield "damaged", frame + end
    yield "too large", whole + b"\0" * LIMITS.bytes
    yield "empty", b""
    for text in (
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"%PDF-1.7",
    ):
        yield "other", text
    for kind in ("TIFF", "ICO", "PPM", "TGA", "SGI", "EPS", "PDF", "JPEG2000", "ICNS"):
        yield "other", encoded(kind)
    for _ in range(40):
        yield "noise", rng.randbytes(rng.randrange(1, 4000))
    for magic in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP"):
        for _ in range(3):
            yield "noise", magic + rng.randbytes(rng.randrange(200))


def accepted(rng: random.Random) -> Iterator[tuple[str, bytes, tuple[int, int]]]:
    """Odd, but images: (what, bytes, the size that comes out)."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        size = (40, 60) if orientation >= 5 else (60, 40)
        yield f"turned {orientation}", encoded("JPEG", exif=exif), size
    yield "EXIF that is none", encoded("JPEG", exif=b"Exif\0\0" + rng.randbytes(300)), (60, 40)
    for mode in ("L", "LA", "P", "RGBA", "1", "I;16"):
        yield f"mode {mode}", encoded("PNG", mode=mode), (60, 40)
    yield "CMYK", encoded("JPEG", mode="CMYK"), (60, 40)
    yield "ICC profile that is none", encoded("PNG", icc_profile=rng.randbytes(500)), (60, 40)
    for kind in ("GIF", "WEBP", "BMP", "JPEG"):
        yield kind, encoded(kind), (60, 40)


def named(read: Callable[[], Any]) -> str:
    """The one line that refuses it, empty if it was read."""
    try:
        read()
    except ImageError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) < 400
        return text
    return ""


def test_two_hundred_hostile_images_are_named_in_bounded_memory() -> None:
    rng = random.Random(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cases = list(refused(rng))
    read = [(what, named(lambda data=data: read_picture(data, LIMITS))) for what, data in cases]
    assert len(cases) >= 200
    # Damage in a PNG's pixels may leave it readable: what is read is then an image.
    assert [what for what, text in read if not text and what not in ("damaged", "truncated")] == []
    assert sum(not text for _, text in read) < 20
    for kind in (b"zTXt", b"iCCP"):
        named(lambda kind=kind: read_picture(text_bomb(kind), LIMITS))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < GROWTH_KIB


@pytest.mark.parametrize("case", list(accepted(random.Random(2))), ids=lambda case: case[0])
def test_odd_images_come_out_as_plain_rgb(case: tuple[str, bytes, tuple[int, int]]) -> None:
    _, data, size = case
    picture = read_picture(data, LIMITS)
    image = picture.image()
    assert (
        (image.mode, image.size) == ("RGB", size) == (image.mode, (picture.width, picture.height))
    )
    assert not image.info
    assert read_picture(picture.png, LIMITS).sha256 == picture.sha256


def test_what_is_transparent_is_on_white() -> None:
    image = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    assert read_picture(png_bytes(image), LIMITS).image().getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize(
    "given",
    [
        "http://169.254.169.254/latest/meta-data", "https://x.test/a.png", "ftp://x.test/a.png",
        "data:image/png;base64,@@@", "data:text/html;base64,AAAA", "data:image/png,raw", "", "a\0b",
        {"path": None}, {}, 7, None, [1], "/nonexistent/a.png", "/dev/zero", "/tmp", "file:///etc",
        "http://[", "data:image/png;base64,\ud800",
    ],
)  # fmt: skip
def test_sources_that_are_refused(given: object) -> None:
    assert named(lambda: image_source(given).read(LIMITS))


def test_a_data_url_is_measured_before_it_is_decoded() -> None:
    text = named(lambda: image_source("data:image/png;base64," + "A" * (2 << 20)).read(LIMITS))
    assert "bytes" in text
