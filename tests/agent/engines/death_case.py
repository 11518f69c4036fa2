"""The last test of `test_other_sglangs.py` in another version's environment: it kills the engine
that the tests before it shared. The default version's `test_rollout.py` has a script for that.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil
import pytest

from agent.engines.sglang import SGLangEngine
from agent.errors import EngineError
from tests.agent.test_rollout import endless, engine, load_is, prompt, sample, until

__all__ = ["engine"]

pytestmark = pytest.mark.engine


@pytest.mark.asyncio(loop_scope="session")
async def test_who_waits_for_a_dead_engine_is_told(
    engine: SGLangEngine,
    sglang_rollout: Any,
) -> None:
    running = endless(engine)
    await until(load_is(sglang_rollout, requests=1, waiting=0))
    children = psutil.Process().children()
    scheduler = next(one for one in children if "resource_tracker" not in " ".join(one.cmdline()))
    os.kill(scheduler.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="killed from outside"):
        await running
    with pytest.raises(EngineError, match="killed from outside"):
        await sample(engine, prompt())
