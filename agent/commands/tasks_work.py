"""The work of `turntrace tasks`: rows in verl's dataset schema.

Invariant: the same arguments write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from agent.errors import TaskError
from agent.loop.tasks import Row
from conversations.run.whole_file import write_whole


def write_gsm_symbolic(path: str | Path, size: int, seed: int) -> int:
    """Writes `size` problems of reasoning-gym's gsm_symbolic; returns how many."""
    from reasoning_gym import create_dataset

    problems = create_dataset("gsm_symbolic", size=size, seed=seed)
    rows = (
        _row(
            "reasoning_gym/gsm_symbolic",
            problem["question"],
            whole_number(problem["answer"]),
            index,
            split="test",
            seed=seed,
        )
        for index, problem in enumerate(problems)
    )
    return write_rows(path, rows)


def write_gsm8k(source: str | Path, path: str | Path) -> int:
    """Converts GSM8K's own JSONL (question, and an answer ending in `#### 42`).

    Returns the number of rows. Raises TaskError.
    """
    return write_rows(path, _gsm8k_rows(Path(source)))


def _gsm8k_rows(source: Path) -> Iterator[Row]:
    try:
        with source.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _gsm8k_row(line, number - 1, source)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{source}: cannot be read: {error}") from error


def _gsm8k_row(line: str, index: int, source: Path) -> Row:
    try:
        row = json.loads(line)
        question, answer = row["question"], row["answer"]
        _, mark, final = answer.rpartition("####")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TaskError(
            f"{source}:{index + 1}: not a GSM8K row with the texts question and answer"
        ) from error
    if not mark or not isinstance(question, str):
        raise TaskError(f"{source}:{index + 1}: the answer does not end in `#### NUMBER`")
    return _row(
        "openai/gsm8k",
        question,
        final.strip().replace(",", ""),
        index,
        split=source.stem,
        answer=answer,
    )


def _row(data_source: str, question: str, ground_truth: str, index: int, **info: Any) -> Row:
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"index": index, **info},
    }


def whole_number(answer: str) -> str:
    """`42.0` as `42`; any other answer as it is."""
    head, _, tail = answer.partition(".")
    return head if tail and not tail.strip("0") and head.lstrip("-").isdigit() else answer


def write_rows(path: str | Path, rows: Iterable[Row]) -> int:
    """Writes rows as JSONL, whole or not at all; returns how many. Raises TaskError."""
    file, lines = Path(path), _Lines(rows)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lines)
    except OSError as error:
        raise TaskError(
            f"{file} cannot be written: {error.strerror}; choose another --out"
        ) from error
    return lines.count


class _Lines:
    """Rows as lines of JSON, counted."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = rows
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        for row in self._rows:
            yield json.dumps(row, ensure_ascii=False).encode() + b"\n"
            self.count += 1
