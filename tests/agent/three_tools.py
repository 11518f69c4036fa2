"""Search, code and an answer together, on real questions over the real corpus: `python -m
tests.agent.three_tools FOLDER`.

The embedded model is too small to search, so its turns are scripted: each reads what the tools
really answered, and writes the next call from that. Tools, sandbox, index, template and record are
the real ones.
"""

from __future__ import annotations

import asyncio
import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.loop.batch import run_tasks
from agent.loop.calls import Dispatcher
from agent.loop.runtime import LoopSettings, Runtime
from agent.loop.tasks import Task
from conversations.run.store import RunFolder
from conversations.template import ChatTemplate
from conversations.truncate import cut_to_tokens
from tests.helpers import call, hermes_template
from tools.registry import load_tools


@dataclass(frozen=True)
class Question:
    """`found` picks two years out of what the search answers."""

    text: str
    query: str
    found: str
    answer: str


QUESTIONS = (
    Question(
        "How many years lie between Marie Curie's two Nobel Prizes?",
        "Marie Curie Nobel Prizes",
        r"shared the (\d{4}) Nobel.*won the (\d{4}) Nobel",
        "8",
    ),
    Question(
        "How many years did the Berlin Wall encircle West Berlin?",
        "Berlin Wall",
        r"encircled West Berlin from (\d{4}) to (\d{4})",
        "28",
    ),
    Question(
        "How many years after Luna 2 did Apollo 11 land on the Moon?",
        "Apollo 11 Moon landing",
        r"first human-made object.*? in (\d{4}).*Apollo 11 in (\d{4})",
        "10",
    ),
)


def said(text: str) -> str:
    """The model's next turn after the conversation so far."""
    question = next(question for question in QUESTIONS if question.text in text)
    responses = re.findall(
        r"<\|im_start\|>user\n<tool_response>\n(.*?)\n</tool_response>", text, re.DOTALL
    )
    if not responses:
        return call("search", query_list=[question.query])
    if len(responses) == 1:
        years = re.search(question.found, responses[0], re.DOTALL)
        return call(
            "code_interpreter",
            code=f"print({years[2]} - {years[1]})" if years else "print('not found')",
        )
    if len(responses) == 2:
        return call("calculate_answer", answer=responses[1].strip())
    return f"It is {responses[1].strip()}."


def model(template: ChatTemplate) -> ScriptedEngine:
    """The scripted turns as an engine."""

    def respond(prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        ids = [*template.encode(said(template.decode(prompt_ids))), template.end_id]
        return Generation(ids, [-0.125] * len(ids), "stop")

    return ScriptedEngine(respond)


async def run(folder: Path) -> None:
    """Runs the questions into a run folder."""
    template, tools = hermes_template(), load_tools("all")
    cut = functools.partial(cut_to_tokens, template=template, limit=1024, side="middle")
    dispatcher = Dispatcher(tools, max_parallel_calls=4, shorten=cut)
    runtime = Runtime(model(template), template, LoopSettings(2048, 4096, 6144), dispatcher)
    tasks = [
        Task(f"q{index}", [{"role": "user", "content": one.text}], ground_truth=one.answer)
        for index, one in enumerate(QUESTIONS)
    ]
    await tools.start()
    try:
        with RunFolder.create(folder, {"tools": tools.source_text, "n": 1}) as store:
            template.tokenizer.save_pretrained(folder / "tokenizer")
            await run_tasks(tasks, runtime, store=store)
    finally:
        await tools.close()


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
    print(
        f"{len(QUESTIONS)} conversations in {sys.argv[1]}; look at one with: "
        f"turntrace show {sys.argv[1]} q0-0"
    )
