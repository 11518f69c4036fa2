"""Output for a terminal: a line of progress, and text that acts on nothing."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from agent import terminal
from agent.terminal import LiveLine, one_line, visible


class Lines:
    """Makes a new line each time it is asked."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> str:
        self.made += 1
        return f"line {self.made}"


def console(*, is_terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=is_terminal, width=80), out


def test_a_terminal_shows_the_line_at_once_and_not_again_a_moment_later() -> None:
    screen, out = console(is_terminal=True)
    lines = Lines()
    with LiveLine(screen, lines) as live:
        live.refresh()
        assert "line 1" in out.getvalue()
        for _ in range(50):
            live.refresh()
    assert lines.made < 50
    assert out.getvalue().endswith("\x1b[2K")  # it is gone afterwards


def test_a_hidden_line_comes_back_with_the_next_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LIVE_INTERVAL_S", 0.0)
    screen, out = console(is_terminal=True)
    with LiveLine(screen, Lines(), plain_s=None) as live:
        live.refresh()
        live.hide()
        assert out.getvalue().endswith("\x1b[2K")
        live.refresh()
        assert "line 2" in out.getvalue()


@pytest.mark.parametrize(
    ("plain_s", "shown"), [(0.0, "line 1\nline 2\n"), (3600.0, ""), (None, "")]
)
def test_without_a_terminal_a_line_is_printed_now_and_then(
    plain_s: float | None, shown: str
) -> None:
    screen, out = console(is_terminal=False)
    with LiveLine(screen, Lines(), plain_s=plain_s) as live:
        live.refresh()
        live.refresh()
    assert out.getvalue() == shown


def test_a_line_of_untrusted_text_acts_on_nothing() -> None:
    text = "a\x1b[2Jb\u202ec\r\n\td\ud800"
    assert visible(text) == "a\u241b[2Jb\u27e8U+202E\u27e9c\u240d\n\td\u27e8U+D800\u27e9"
    assert one_line(text) == "a\u241b[2Jb\u27e8U+202E\u27e9c\u240d\u240a\u2409d\u27e8U+D800\u27e9"
