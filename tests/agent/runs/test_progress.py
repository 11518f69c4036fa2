"""The live line, its plain form, and the table at the end."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agent.engines.engine import Generation
from agent.engines.scripted import ScriptedEngine
from agent.loop.batch import Progress
from agent.loop.conversation import Conversation
from agent.loop.tasks import Task
from agent.runs.progress import Display, counts, say, shortfall, summary
from conversations.trajectory import Turn
from tests.helpers import ROOT, hermes_template, runtime, says


def conversation(turns: int = 0) -> Conversation:
    """One that is being run, with turns of seven tokens."""
    template = hermes_template()
    begun = Conversation(Task("t", []), 0, runtime(template, says(template)))
    begun.turns = [Turn(10 * index, 10 * index + 7, "stop", 10 * index) for index in range(turns)]
    return begun


def some_progress() -> Progress:
    live = {conversation() for _ in range(3)}
    progress = Progress(
        total=8,
        done=4,
        live=live,
        turns=10,
        sampled_tokens=500,
        tool_calls=8,
        tool_errors=2,
        invalid_calls=1,
    )
    progress.rewards, progress.reward_sum, progress.infra_errors = 4, 3.0, 1
    progress.stop_reasons.update({"stop": 3, "length": 1})
    return progress


def test_the_line_counts_and_rates_start_at_what_was_there_before() -> None:
    progress = some_progress()
    display = Display(progress, Console(file=io.StringIO()))
    assert display.line().startswith("4/8 done  3 running  waiting for the first turn")
    progress.turns += 2
    progress.sampled_tokens += 60
    for part in ("4/8 done", "3 running", "2 turns", "60 tokens", "2 tool", "reward 0.750"):
        assert part in display.line()


class _Counting(ScriptedEngine):
    """An engine in the middle of its turns, with the counts that it reports one after the other."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__(lambda prompt_ids, sampling: Generation([], [], "stop"))
        self._counts = counts

    def tokens_in_flight(self) -> int:
        return self._counts.pop(0)


def test_tokens_count_before_their_turn_is_complete() -> None:
    engine = _Counting([0, 350])
    display = Display(some_progress(), Console(file=io.StringIO()), engine)
    assert "waiting for the first tokens" in display.line()
    assert "0 turns (0.0/s)  350 tokens" in display.line()


def test_turns_of_running_conversations_count_as_they_are_taken() -> None:
    progress = some_progress()
    display = Display(progress, Console(file=io.StringIO()))
    progress.live.add(conversation(turns=2))
    assert (progress.turns_so_far, progress.sampled_tokens_so_far) == (12, 514)
    assert "4 running  2 turns" in display.line()
    assert "14 tokens" in display.line()


def test_the_line_can_be_drawn_while_conversations_come_and_go_on_the_loops_thread() -> None:
    progress, ended = Progress(total=9), threading.Event()
    pool = [conversation(turns=1) for _ in range(200)]

    def come_and_go() -> None:
        while not ended.is_set():
            progress.live.update(pool)
            for one in pool:
                progress.live.discard(one)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        display = Display(progress, Console(file=io.StringIO()))
        for _ in range(2000):
            display.line()
    finally:
        ended.set()
        thread.join()


def test_without_a_terminal_nothing_is_drawn_between_intervals() -> None:
    out = io.StringIO()
    with Display(some_progress(), Console(file=out)) as display:
        for _ in range(5):
            display.refresh()
    assert out.getvalue() == ""


def test_on_a_terminal_the_line_is_shown_at_once() -> None:
    out = io.StringIO()
    with Display(some_progress(), Console(file=out, force_terminal=True, width=200)) as display:
        display.refresh()
    assert "4/8 done" in out.getvalue()


def test_the_table_has_every_stop_reason_and_the_valid_share() -> None:
    text = summary(some_progress(), Path("runs/demo"), 12.34)
    for row in (
        "conversations          4 of 8",
        "  stop                 3",
        "tool calls             8, 87.5% valid",
        "wall time              12.3 s",
    ):
        assert row in text.splitlines()


def test_a_run_without_calls_or_rewards_has_no_shares() -> None:
    text = summary(Progress(total=0), Path("runs/demo"), 0.0)
    assert "tool calls             0, - valid" in text
    assert "mean reward            - over 0" in text


def test_counts_are_json_values() -> None:
    assert counts(some_progress()) == {
        "asked": 8,
        "done": 4,
        "infra_errors": 1,
        "stop_reasons": {"stop": 3, "length": 1},
        "turns": 10,
        "sampled_tokens": 500,
        "tool_calls": 8,
        "tool_errors": 2,
        "invalid_calls": 1,
        "mean_reward": 0.75,
    }


def test_paths_with_brackets_and_long_lines_are_printed_as_they_are() -> None:
    out = io.StringIO()
    say(Console(file=out, width=20), "runs/[bold]x[/bold] " + "y" * 50)
    assert out.getvalue() == "runs/[bold]x[/bold] " + "y" * 50 + "\n"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"total": 3, "done": 3}, ""),
        (
            {"total": 3, "done": 3, "infra_errors": 2},
            "2 .* failed .*infrastructure",
        ),
        ({"total": 3, "done": 1}, "2 .* missing"),
        ({"total": 3, "done": 2, "lost": ["no JSON"]}, r"1 .* missing \(no JSON\)"),
        (
            {"total": 3, "done": 2, "infra_errors": 1},
            "1 .* failed .*infrastructure.* and 1 .* missing",
        ),
    ],
)
def test_a_run_that_is_not_whole_says_what_it_lacks(fields: dict[str, Any], says: str) -> None:
    assert re.match(f"{says}", shortfall(Progress(**fields)))
    assert bool(shortfall(Progress(**fields))) == bool(says)


PIPED = """
import sys
from rich.console import Console
from agent.runs.progress import say

console = Console()
for number in range(3):
    say(console, f"line {number}" + "." * 100_000)
print("the run went on", file=sys.stderr)
"""


def test_a_run_goes_on_when_the_reader_of_its_lines_goes_away() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PIPED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout
        assert process.stdout.read(6) == "line 0"
        process.stdout.close()
        assert process.stderr
        assert process.stderr.read() == "the run went on\n"
        assert process.wait(60) == 0
