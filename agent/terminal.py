"""Output for a terminal.

Untrusted text is made harmless, lines are printed as they are, and one line says how far work is.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

PLAIN_INTERVAL_S = 10.0
"""How often a line of progress is printed if the output is no terminal."""
LIVE_INTERVAL_S = 0.1
"""How often the line on a terminal is drawn at most."""

_ACTS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with control characters, direction marks and lone surrogates shown as signs.

    Newline and tab stay.
    """
    return _ACTS.sub(_sign, text)


def one_line(text: str) -> str:
    """`visible` text on one line: newline and tab become signs too."""
    return visible(text).replace("\n", "\u240a").replace("\t", "\u2409")


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"


def say(console: Console, text: str) -> None:
    """Prints text as it is: not wrapped, not coloured, brackets are no markup.

    If stdout is closed or its disk is full, output is dropped and the run continues.
    """
    with _dropped(console):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _dropped(console: Console) -> Iterator[None]:
    """Inside, output that cannot be written is dropped, and all that follows."""
    try:
        yield
    except SystemExit:  # rich's, if the reader has gone; it prints no more
        pass
    except OSError:
        drop_output(console.file)


def drop_output(stream: IO[str]) -> None:
    """Sends the stream to nowhere, what it has buffered as well.

    A stream without a file stays as it is.
    """
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class LiveLine:
    """One line that says how far work is; `line` makes it. Call `refresh` often.

    On a terminal the line is replaced in place. Elsewhere it is printed every `plain_s` seconds;
    None: never.
    """

    def __init__(
        self,
        console: Console,
        line: Callable[[], str],
        *,
        plain_s: float | None = PLAIN_INTERVAL_S,
    ) -> None:
        self._console = console
        self._line = line
        self._plain_s = plain_s
        self._drawn = -LIVE_INTERVAL_S if console.is_terminal else perf_counter()
        self._live: Live | None = None

    def refresh(self) -> None:
        """Shows the line, unless it was shown a moment ago."""
        now = perf_counter()
        interval_s = LIVE_INTERVAL_S if self._console.is_terminal else self._plain_s
        if interval_s is None or now - self._drawn < interval_s:
            return
        self._drawn = now
        if self._console.is_terminal:
            self._draw()
        else:
            say(self._console, self._line())

    def _draw(self) -> None:
        from rich.live import Live
        from rich.text import Text

        with _dropped(self._console):
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(Text(self._line(), overflow="ellipsis", no_wrap=True), refresh=True)

    def hide(self) -> None:
        """Takes the line away, until the next `refresh`."""
        if self._live is not None:
            with _dropped(self._console):
                self._live.stop()
            self._live = None

    def __enter__(self) -> LiveLine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.hide()
