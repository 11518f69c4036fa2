"""A file written whole replaces files alone, and is there whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from conversations.run.whole_file import write_whole
from tests.command import turntrace


def test_a_file_is_replaced_and_its_size_returned(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    assert write_whole(file, [b"ne", b"w"], mark="m") == 3
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("file", b"new")]


def test_a_link_is_replaced_and_what_it_names_is_not_written(tmp_path: Path) -> None:
    kept, link = tmp_path / "kept", tmp_path / "link"
    kept.write_bytes(b"kept")
    link.symlink_to(kept)
    write_whole(link, [b"new"])
    assert (kept.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"kept", b"new", False)


@pytest.mark.parametrize("place", ["pipe", "link", "stdout", "", "/", "folder"])
def test_what_is_no_file_stays(tmp_path: Path, place: str) -> None:
    """As /dev/null must, which a rename by root would take from the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    (tmp_path / "folder").mkdir()
    before = [(one.name, one.lstat().st_ino) for one in sorted(tmp_path.iterdir())]
    with pytest.raises(OSError, match=r"directory|device"):
        write_whole(tmp_path / place if place else Path(), [b"x"])
    assert [(one.name, one.lstat().st_ino) for one in sorted(tmp_path.iterdir())] == before


@pytest.mark.parametrize("out", ["pipe", ""])
def test_a_command_says_so_in_one_line(tmp_path: Path, out: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = turntrace("tasks", "gsm_symbolic", "--size", "1", "--out", out, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert [line[:6] for line in done.stderr.splitlines()] == ["error:"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
