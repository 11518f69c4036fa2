"""Search, code and an answer in one conversation, each tool real."""

from __future__ import annotations

from pathlib import Path

from conversations.run.open_run import open_run
from conversations.verify import verify_run
from tests.agent.three_tools import QUESTIONS, run


async def test_search_code_and_answer_together(tmp_path: Path) -> None:
    await run(tmp_path / "run")
    records = {record.task_id: record for record in open_run(tmp_path / "run")}
    assert len(records) == len(QUESTIONS)
    for index, question in enumerate(QUESTIONS):
        record = records[f"q{index}"]
        assert [(line.name, line.status) for line in record.tool_calls] == [
            ("search", "ok"),
            ("code_interpreter", "ok"),
            ("calculate_answer", "ok"),
        ]
        assert (record.reward, record.stop_reason, record.num_turns) == (1.0, "stop", 4)
        assert record.messages[-1]["content"] == f"It is {question.answer}."
    assert verify_run(tmp_path / "run").defects == 0
