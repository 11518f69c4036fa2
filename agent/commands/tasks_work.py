"""Task files made here: generated problems and GSM8K's, as rows in verl's dataset schema.

Invariant: the same arguments write the same bytes, so that a task file can be made again from its command.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from agent.errors import TaskError
from agent.loop.tasks import Row


def write_gsm_symbolic(path: str | Path, size: int, seed: int) -> int:
    """Writes `size` problems of reasoning-gym's gsm_symbolic drawn from `seed`; returns how many."""
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
    """Converts GSM8K's own JSONL (question; answer ending in `#### 42`); returns how many rows. Raises TaskError."""
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
    """Writes rows as JSONL, whole or not at all; returns how many. Raises TaskError where the file cannot be written."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as file:
            count = sum(1 for row in rows if file.write(json.dumps(row, ensure_ascii=False) + "\n"))
        draft.replace(target)
    except OSError as error:
        raise TaskError(
            f"{target}: cannot be written: {error.strerror}; choose another --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return count
