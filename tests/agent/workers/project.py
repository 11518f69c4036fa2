"""A user's folder for runs with workers: tasks, a tool of theirs, recorded turns to play.

The tool does what the files beside it say, and notes the process that it runs in: any process of
any worker reads them, however it was started.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.loop.batch import run_tasks
from agent.loop.calls import Dispatcher
from agent.loop.runtime import LoopSettings, Runtime
from agent.loop.tasks import read_tasks
from conversations.run.store import RunFolder
from tests.helpers import call, hermes_template
from tools.function import tool
from tools.toolset import ToolSet

CONFIG = """
model_path: smollm2-base
rollout:
  name: scripted
  prompt_length: 1024
  response_length: 512
  max_num_seqs: 16
  multi_turn: {enable: true, tool_config_path: tools.yaml}
  turntrace: {recorded: recorded}
"""
TOOL = '''
import asyncio, os, pathlib

HERE = pathlib.Path(__file__).parent

async def look(question: str) -> str:
    """Looks something up."""
    (HERE / "pids" / str(os.getpid())).touch()
    if "deadly" in question:
        await asyncio.sleep(0.01)
        os._exit(7)
    nap = HERE / "nap_s"
    if nap.exists() and question[-2:] not in (" 0", " 1", " 2", " 3"):
        await asyncio.sleep(float(nap.read_text()))
    return "found"
'''


def write_project(folder: Path, questions: Sequence[str], *, turns: int = 2) -> Path:
    """The folder, filled. Each conversation looks `turns - 1` times, then says a sentence."""
    (folder / "pids").mkdir(parents=True)
    rows = [{"id": f"t{index}", "prompt": f"q:{text}"} for index, text in enumerate(questions)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "look_in_workers.py").write_text(TOOL)
    (folder / "tools.yaml").write_text("tools:\n  - function: look_in_workers:look\n")
    (folder / "config.yaml").write_text(CONFIG)
    asyncio.run(_record(folder, turns))
    return folder


async def _record(folder: Path, turns: int) -> None:
    template = hermes_template()

    def respond(prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        text = template.decode(prompt_ids)
        question = text.partition("<|im_start|>user\nq:")[2].partition("<|im_end|>")[0]
        is_last = text.count("<|im_start|>assistant") == turns
        said = "It was found." if is_last else call("look", question=question)
        ids = [*template.encode(said), template.end_id]
        return Generation(ids, [-0.5] * len(ids), "stop")

    @tool
    def look(question: str) -> str:
        """Looks something up."""
        return "found"

    dispatcher = Dispatcher(
        ToolSet.from_tools([look]), max_parallel_calls=1, shorten=lambda text: None
    )
    runtime = Runtime(ScriptedEngine(respond), template, LoopSettings(1024, 512, 1536), dispatcher)
    with RunFolder.create(folder / "recorded", {}) as store:
        await run_tasks(read_tasks(folder / "tasks.jsonl"), runtime, store=store)
