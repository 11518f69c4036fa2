"""Rules: a program's memory is bounded, by a kernel's group or by a watch; no group is left."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tools.servers.sandbox.memory import Groups, watch, working_groups

HOLDS_100_MIB = [
    sys.executable,
    "-c",
    "import time; x = bytearray(b'x') * (100 << 20); print('held', flush=True); time.sleep(60)",
]


@pytest.fixture
def process() -> subprocess.Popen[bytes]:
    """A shell whose child holds 100 MiB."""
    command = ["/bin/sh", "-c", '"$@"; :', "sh", *HOLDS_100_MIB]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


async def watched(process: subprocess.Popen[bytes], limit_mib: int) -> bool:
    """Whether the watch found the limit exceeded within a second."""
    assert process.stdout is not None
    process.stdout.readline()
    exceeded = asyncio.Event()
    watching = asyncio.create_task(watch(lambda: process.pid, limit_mib, exceeded.set))
    try:
        async with asyncio.timeout(1 if limit_mib > 100 else 30):
            await exceeded.wait()
    except TimeoutError:
        return False
    finally:
        watching.cancel()
        for member in (*psutil.Process(process.pid).children(), psutil.Process(process.pid)):
            member.kill()
        process.communicate()
    return True


async def test_the_watch_sees_what_descendants_hold(process: subprocess.Popen[bytes]) -> None:
    assert await watched(process, 50)


async def test_the_watch_leaves_who_keeps_to_the_limit(process: subprocess.Popen[bytes]) -> None:
    assert not await watched(process, 200)


async def test_a_process_that_is_gone_exceeds_nothing() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await watch(lambda: 2**22 + 1, 1, lambda: pytest.fail("there is nothing to exceed"))


async def test_where_no_group_can_be_made_there_is_none(tmp_path: Path) -> None:
    async with Groups(None).group(64) as group:
        assert (group.join_fd, group.kills()) == (None, 0)
    with pytest.raises(FileNotFoundError):
        async with Groups(tmp_path / "nowhere").group(64):
            pass


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/sys/fs/cgroup", os.W_OK),
    reason="needs a writable cgroup tree",
)
async def test_a_group_is_entered_bounded_used_again_and_removed() -> None:
    groups = await working_groups({})
    assert groups.parent is not None
    folders = set()
    for limit_mib, ends in ((64, (-9, b"", 1)), (512, (0, b"held\n", 0)), (64, (-9, b"", 1))):
        async with groups.group(limit_mib) as group:
            assert group.events is not None
            folders.add(group.events.parent)
            command = [*HOLDS_100_MIB[:2], HOLDS_100_MIB[2].replace("sleep(60)", "sleep(0)")]
            ended = await asyncio.to_thread(
                subprocess.run, command, preexec_fn=group.join, capture_output=True
            )
            assert (ended.returncode, ended.stdout, group.kills()) == ends
    (folder,) = folders
    assert folder.exists()
    await groups.close()
    assert not folder.exists()


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/sys/fs/cgroup", os.W_OK),
    reason="needs a writable cgroup tree",
)
async def test_what_a_killed_server_left_is_removed_and_what_lives_stays() -> None:
    groups = await working_groups({})
    assert groups.parent is not None
    left, alive = (groups.parent / f"turntrace-sandbox-{pid}-7" for pid in (2**22 + 1, os.getpid()))
    for folder in (left, alive):
        folder.mkdir()
    try:
        await (await working_groups({})).close()
        assert (left.exists(), alive.exists()) == (False, True)
    finally:
        alive.rmdir()
        await groups.close()
