"""Fixtures that several test modules share. The helpers behind them are in `tests/helpers.py`."""

from __future__ import annotations

import gc
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from xdist.scheduler import LoadFileScheduling

from conversations.template import ChatTemplate
from tests.browser import chromium
from tests.helpers import hermes_template, qwen_template

# A background job inherits that these signals are ignored, and would pass that on to its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# A test process imports torch and the like: by Python's own setting they would be walked often.
gc.set_threshold(50_000, 10, 10)

# ------------------------------------------------------------ three files at a time (make test)

LANES = {
    "engine": (
        "tests/agent/gateway/test_gateway_engine.py",
        "tests/agent/replay/test_replay_engine.py",
        "tests/agent/test_rollout.py",
        "tests/agent/engines/test_other_sglangs.py",
        "tests/agent/engines/test_another_family.py",
        "tests/agent/engines/test_vision_engine.py",
        "tests/agent/engines/test_sglang_server.py",
        "tests/agent/engines/test_sglang_servers.py",
        "tests/agent/scoring/test_scoring_engine.py",
        "tests/conversations/test_verify_engine.py",
    ),
    "verl": (
        "tests/agent/trainers/test_trainer.py",
        "tests/agent/model/test_adapter.py",
        "tests/crossings/test_crossings.py",
        "tests/conversations/test_export_verl.py",
        "tests/conversations/test_export_trl.py",
        "tests/conversations/test_import.py",
        "tests/agent/recipe/test_train.py",
    ),
}
"""Files that one worker runs, one after the other. The first share an engine, so that few engines
run at once; the others import torch and verl, which takes ten seconds of CPU.
"""

SLOW_FILES = (
    "tests/agent/workers/test_workers.py",
    "tests/conversations/formats/test_whole_way.py",
    "tests/agent/loop/test_fidelity.py",
    "tests/agent/runs/test_chaos.py",
    "tests/agent/runs/test_kill.py",
    "tests/agent/replay/test_replay.py",
    "tests/tools/mcp/test_tool.py",
)
"""What takes longest of the rest, the slowest first."""

LANE_OF = {file: lane for lane, files in LANES.items() for file in files}
ORDER = {file: place for place, file in enumerate([*LANE_OF, *SLOW_FILES])}


class Lanes(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return LANE_OF.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes:
    return Lanes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is left with it alone."""
    items.sort(key=lambda item: ORDER.get(item.nodeid.split("::")[0], len(ORDER)))


# ---------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def smollm2() -> ChatTemplate:
    """SmolLM2's tokenizer with the hermes chat template: always there."""
    return hermes_template()


@pytest.fixture(scope="session")
def qwen2_5() -> ChatTemplate:
    return qwen_template("qwen2_5")


@pytest.fixture(scope="session")
def qwen3() -> ChatTemplate:
    return qwen_template("qwen3")


@pytest.fixture(params=["smollm2", "qwen2_5", "qwen3"])
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    """Each of the real templates in turn."""
    found: ChatTemplate = request.getfixturevalue(request.param)
    return found


ENGINE_CONTEXT, ENGINE_SLOTS = 1024, 4
"""Of the engine that the tests share: `max_model_len`, and how many requests run at a time."""


@pytest.fixture(scope="session")
def sglang_rollout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An AgentRollout with SmolLM2 on the real SGLang: one for all tests.

    Its engine serves one event loop, the session's.

    A test that uses it says `pytest.mark.asyncio(loop_scope="session")`.
    """
    from agent.engines.start import start
    from agent.model.base import base_model_dir

    config = {
        "prompt_length": ENGINE_CONTEXT // 2,
        "response_length": ENGINE_CONTEXT // 2,
        "max_num_seqs": ENGINE_SLOTS,
        "engine_kwargs": {"sglang": {"max_total_tokens": 8 * ENGINE_CONTEXT}},
    }
    rollout = start(
        config, base_model_dir(), log_path=tmp_path_factory.mktemp("engine") / "sglang.log"
    )
    yield rollout
    rollout.shutdown()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Any]:
    """A real headless Chromium: one for all tests, on the session's event loop."""
    async with chromium() as opened:
        yield opened
