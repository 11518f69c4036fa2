"""Geometry problems with generated diagrams: drawn by code, answers known by construction.

Right triangles, rectangles and circles with some of their lengths written beside them. The same
seed draws the same pictures.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from agent.loop.tasks import Row
from conversations.extras import pillow
from conversations.images.reading import ImageLimits, picture_of

WIDTH, HEIGHT = 364, 280
"""Pixels, multiples of 28: the picture is shown to Qwen's models as it is, 130 tokens."""
MARGIN = 50
TRIPLES = ((3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29))


@dataclass(frozen=True, slots=True)
class Diagram:
    """A drawn problem. `answer` is a whole number or LaTeX."""

    image: Any
    question: str
    answer: str


def diagram_rows(size: int, seed: int) -> Iterator[Row]:
    """`size` tasks in verl's geo3k form: `images`, `<image>` in the prompt, an answer to grade."""
    for index in range(size):
        rng = random.Random(f"{seed}:{index}")
        found = rng.choice(KINDS)(rng)
        url = picture_of(found.image, ImageLimits()).data_url()
        question = f"<image>{found.question} Submit the answer with calc_geo3k_reward."
        yield {
            "data_source": "turntrace/diagrams",
            "prompt": [{"role": "user", "content": question}],
            "images": [url],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": found.answer},
            "extra_info": {"index": index, "split": "test", "seed": seed},
        }


def triangle(rng: random.Random) -> Diagram:
    """A right triangle with two sides named; the third is x."""
    times = rng.choice((1, 2, 3))
    short, long, slope = (side * times for side in rng.choice(TRIPLES))
    names = [str(short), str(long), str(slope)]
    hidden = rng.randrange(3)
    answer, names[hidden] = names[hidden], "x"
    image, draw = _blank()
    left, right, bottom = MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN
    top = bottom - max(60, round((right - left) * short / long * 0.6))
    draw.polygon([(left, bottom), (right, bottom), (right, top)], outline="black", width=3)
    draw.rectangle([right - 12, bottom - 12, right, bottom], outline="black", width=2)
    _write(draw, ((left + right) // 2, bottom + 8), names[1])
    _write(draw, (right + 8, (top + bottom) // 2), names[0])
    _write(draw, ((left + right) // 2 - 24, (top + bottom) // 2 - 32), names[2])
    return Diagram(image, "Find x.", answer)


def rectangle(rng: random.Random) -> Diagram:
    """A rectangle with both sides named; its area or perimeter is asked for."""
    wide, high = rng.randrange(5, 30), rng.randrange(3, 20)
    image, draw = _blank()
    left, top, right, bottom = MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN
    draw.rectangle([left, top, right, bottom], outline="black", width=3)
    _write(draw, ((left + right) // 2, bottom + 8), str(wide))
    _write(draw, (right + 8, (top + bottom) // 2), str(high))
    if rng.random() < 0.5:
        return Diagram(image, "What is the area of the rectangle?", str(wide * high))
    return Diagram(image, "What is the perimeter of the rectangle?", str(2 * (wide + high)))


def circle(rng: random.Random) -> Diagram:
    """A circle with its radius named; its area is a multiple of pi."""
    radius = rng.randrange(2, 15)
    image, draw = _blank()
    x, y, size = WIDTH // 2, HEIGHT // 2, HEIGHT // 2 - MARGIN // 2
    draw.ellipse([x - size, y - size, x + size, y + size], outline="black", width=3)
    draw.line([x, y, x + size, y], fill="black", width=3)
    _write(draw, (x + size // 2, y - 28), str(radius))
    answer = f"{radius**2}\\pi"
    return Diagram(image, "What is the area of the circle? Leave \\pi in the answer.", answer)


KINDS: tuple[Callable[[random.Random], Diagram], ...] = (triangle, rectangle, circle)


def _blank() -> tuple[Any, Any]:
    from PIL import ImageDraw

    image = pillow().new("RGB", (WIDTH, HEIGHT), "white")
    return image, ImageDraw.Draw(image)


def _write(draw: Any, place: tuple[int, int], text: str) -> None:
    draw.text(place, text, fill="black", font_size=20)
