"""The peak of a command is its own."""

from __future__ import annotations

import pytest

from tests.bench.process import measured


def test_the_peak_is_not_that_of_who_measures() -> None:
    large = bytes(400 << 20).replace(b"\0", b"\1")
    _, peak_mib = measured(["--help"])
    assert 5 < peak_mib < 300 < len(large) / 2**20


def test_a_command_that_fails_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match=r"/nowhere .*2"):
        measured(["stats", "/nowhere"])
