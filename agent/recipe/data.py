"""Training conversations as token ids, with the loss on what the model itself must say.

A conversation is rendered exactly as the runtime renders it: the prompt's ids, then for each turn
the ids of its text and the end token (loss), then the delta with the tool's response (no loss). A
faulty first call carries no loss; the turn after it does. What is held out is decided by content,
not by chance: GSM8K rows by the hash of their question, generated problems by their seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from agent.errors import TaskError
from agent.recipe import faults, symbolic
from agent.recipe.gsm8k import from_gsm8k, with_other_numbers
from agent.recipe.programs import SCRIPT_NAME, Problem, number_text, run_arithmetic
from agent.recipe.setups import ToolSetup, draw, shipped_setup
from conversations.messages import tool_message
from conversations.template import ChatTemplate

HELD_OUT_PERMILLE = 25
"""Share of GSM8K rows that are never trained on: 170 of its 7,473."""

MAX_TOKENS = 1024
HELD_OUT_SEED = 900_000
"""Generated problems that the training's own held-out loss is taken on."""


@dataclass(frozen=True, slots=True)
class Mix:
    """How many conversations of each kind: copies of each GSM8K row (as it is, and with other
    numbers), generated problems.
    """

    gsm8k_copies: int
    renumbered_copies: int
    generated: int
    gsm8k_rows: int | None = None
    fault_share: float = 0.15
    shipped_share: float = 0.5
    held_out: int = 192
    """Of GSM8K's rows and of generated problems, for the held-out loss."""


SMALL = Mix(
    gsm8k_copies=1,
    renumbered_copies=0,
    generated=900,
    gsm8k_rows=400,
    fault_share=0.12,
    shipped_share=0.9,
    held_out=24,
)
FULL = Mix(gsm8k_copies=4, renumbered_copies=8, generated=30_000)
START = replace(SMALL, gsm8k_rows=0, generated=4_000, shipped_share=1.0)
"""Enough for the protocol and some of the programs: what training by rewards starts from."""
MIXES = {"small": SMALL, "full": FULL, "start": START}


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation.

    `ids` [T], `loss` [T] 1 for the tokens that are trained on, and the source.
    """

    ids: list[int]
    loss: list[int]
    kind: str
    answer: str
    held_out: bool


# ------------------------------------------------------------------ problems


def held_out(question: str) -> bool:
    """True for the GSM8K rows that are never trained on."""
    digest = hashlib.sha256(question.strip().encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PERMILLE


def read_gsm8k(path: Path) -> list[dict[str, str]]:
    """The rows of a JSONL file in GSM8K's format (`question`, `answer`).

    Raises TaskError naming the line that is not.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"{path} cannot be read: {error}; it is to be GSM8K's train.jsonl"
        ) from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines also splits within texts
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append({"question": str(row["question"]), "answer": str(row["answer"])})
        except (ValueError, KeyError, TypeError) as error:
            raise TaskError(
                f"{path}:{number} is no GSM8K row, expected {{question, answer}}: {error}"
            ) from error
    return rows


def training_problems(rows: Sequence[dict[str, str]], mix: Mix, rng: Random) -> Iterator[Problem]:
    """The problems to train on, a row's variants side by side (the file packs better)."""
    kept = [
        problem
        for row in rows
        if not held_out(row["question"]) and (problem := from_gsm8k(row["question"], row["answer"]))
    ]
    for problem in (
        kept if mix.gsm8k_rows is None else rng.sample(kept, min(mix.gsm8k_rows, len(kept)))
    ):
        yield from [problem] * mix.gsm8k_copies
        yield from (
            other
            for _ in range(mix.renumbered_copies)
            if (other := with_other_numbers(problem, rng))
        )
    yield from symbolic.problems(mix.generated)


def held_out_problems(rows: Sequence[dict[str, str]], count: int) -> Iterator[Problem]:
    """Problems for the held-out loss: up to `count` GSM8K rows of those kept back, and as many
    generated ones of held-out seeds.
    """
    kept = (
        problem
        for row in rows
        if held_out(row["question"]) and (problem := from_gsm8k(row["question"], row["answer"]))
    )
    yield from islice(kept, count)
    yield from symbolic.problems(count, HELD_OUT_SEED)


# ------------------------------------------------------------------ conversations


class ExampleRenderer:
    """Turns problems into examples with the runtime's own template."""

    def __init__(self, template: ChatTemplate, shipped: Sequence[dict[str, Any]]) -> None:
        self.template = template
        self.shipped = shipped

    def example(
        self, problem: Problem, rng: Random, *, mix: Mix, held_out: bool = False
    ) -> Example | None:
        """One conversation about the problem.

        None if it is longer than any other should wait for.
        """
        setup = draw(self.shipped, rng, mix.shipped_share)
        failing = _faults(problem, setup, rng, mix.fault_share)
        example = self._render(problem, setup, failing, rng, held_out)
        return example if len(example.ids) <= MAX_TOKENS else None

    def _render(
        self,
        problem: Problem,
        setup: ToolSetup,
        failing: Sequence[faults.Fault],
        rng: Random,
        held_out: bool,
    ) -> Example:
        ids = self._prompt(problem, setup, rng)
        loss = [0] * len(ids)
        for fault in failing:
            self._turn(ids, loss, fault.text, fault.response, learn=False)
        for text, response in _good_turns(problem, setup, rng):
            self._turn(ids, loss, text, response, learn=True)
        parts = [
            problem.source.split("+")[0],
            "shipped" if setup.shipped else "other",
            "fault" if failing else "plain",
        ]
        return Example(ids, loss, "/".join(parts), problem.answer, held_out)

    def _prompt(self, problem: Problem, setup: ToolSetup, rng: Random) -> list[int]:
        messages = [{"role": "user", "content": _asked(problem, setup, rng)}]
        if setup.system is not None:
            messages.insert(0, {"role": "system", "content": setup.system})
        return [token for _, ids in self.template.prompt(messages, setup.tools) for token in ids]

    def _turn(
        self, ids: list[int], loss: list[int], text: str, response: str | None, *, learn: bool
    ) -> None:
        turn = [*self.template.encode(text), self.template.end_id]
        ids += turn
        loss += [int(learn)] * len(turn)
        if response is not None:
            block = [
                token
                for _, part in self.template.delta(
                    [tool_message(response, call_id="call_0_0", name=None)]
                ).pieces
                for token in part
            ]
            ids += block
            loss += [0] * len(block)


def _faults(problem: Problem, setup: ToolSetup, rng: Random, share: float) -> list[faults.Fault]:
    if rng.random() >= share:
        return []
    count = 2 if rng.random() < 0.1 else 1
    found = [faults.failing_turn(setup, problem.code, rng) for _ in range(count)]
    path = SCRIPT_PATH if setup.shipped else rng.choice(_OTHER_PATHS)
    trim = not setup.shipped and rng.random() < 0.5
    return [
        faults.Fault(fault.text, _shown(fault.response, path, trim=trim))
        for fault in found
        if fault
    ]


def _shown(response: str, path: str, *, trim: bool) -> str:
    response = response.replace(f'File "{SCRIPT_NAME}"', f'File "{path}"')
    return response.rstrip("\n") if trim else response


SCRIPT_PATH = "/tmp/main.py"
"""Where the shipped sandbox keeps the program that tracebacks name."""

_OTHER_PATHS = (
    "main.py",
    "<string>",
    "/sandbox/main.py",
    "/work/main.py",
    "/tmp/tmp3k1x9w2a/main.py",
    "/code/script.py",
    "<stdin>",
)


def _good_turns(
    problem: Problem, setup: ToolSetup, rng: Random
) -> Iterator[tuple[str, str | None]]:
    """The protocol: run code, submit what it printed, say it.

    Each turn's text with the response it gets.
    """
    stdout = run_arithmetic(problem.code).stdout
    shown = stdout if setup.shipped or rng.random() < 0.5 else stdout.rstrip("\n")
    yield faults.call_text(setup.code_name, {setup.code_argument: problem.code}), shown
    answer = number_text(stdout) or stdout.strip()
    right = rng.random() < 0.8
    response = (
        f"Current parsed {answer=} reward={1.0 if right else 0.0}"
        if setup.graded
        else rng.choice(_RECEIPTS).format(answer)
    )
    yield faults.call_text(setup.answer_name, {setup.answer_argument: answer}), response
    # The tool's verdict is not the model's to decide: it has to say so where its answer was not
    # accepted.
    accepted = right or not setup.graded
    yield (
        f"The answer is {answer}."
        if accepted
        else f"My answer is {answer}, but it was not accepted as correct.",
        None,
    )


_RECEIPTS = (
    "Answer recorded: {}",
    "ok",
    "Submitted answer {!r}.",
    "received",
    '{{"status": "ok", "answer": "{}"}}',
    "Thank you.",
)
_FINISH = " Give the result as your final answer. Do not include units."


def _asked(problem: Problem, setup: ToolSetup, rng: Random) -> str:
    question = problem.question
    if problem.source == "gsm_symbolic" and rng.random() < 0.1:
        question = question.removesuffix(_FINISH)
    elif problem.source != "gsm_symbolic" and rng.random() < 0.2:
        question += _FINISH
    if rng.random() < 0.85:
        return question
    return rng.choice(_FRAMES).format(
        question=question, code=setup.code_name, answer=setup.answer_name
    )


_FRAMES = (
    "{question}\nUse the tools.",
    "{question} Let's think step by step and output the final answer after `####`.",
    "Solve this problem: {question}",
    "Question: {question}",
    "{question}\n\nCompute it with {code}, then call {answer}.",
    "Please help me with this.\n\n{question}",
)


# ------------------------------------------------------------------ the file


def build_examples(
    rows: Sequence[dict[str, str]], renderer: ExampleRenderer, mix: Mix, seed: int = 1
) -> Iterator[Example]:
    """All examples, the held-out ones last. The same rows, mix and seed give the same examples."""
    rng = Random(seed)
    for problem in training_problems(rows, mix, rng):
        if example := renderer.example(problem, rng, mix=mix):
            yield example
    for problem in held_out_problems(rows, mix.held_out):
        if example := renderer.example(problem, rng, mix=mix, held_out=True):
            yield example


def write_examples(examples: Iterable[Example], path: Path) -> int:
    """Writes the examples as one compressed `.npz`; returns their number.

    Ids are 16 bit if the vocabulary allows.
    """
    import numpy as np

    kept = list(examples)
    kinds = sorted({example.kind for example in kept})
    ids = np.fromiter((token for example in kept for token in example.ids), np.uint32)
    np.savez_compressed(
        path,
        ids=ids.astype(np.uint16) if ids.max() < 2**16 else ids,
        loss=np.fromiter((flag for example in kept for flag in example.loss), np.uint8),
        lengths=np.array([len(example.ids) for example in kept], np.int32),
        kind=np.array([kinds.index(example.kind) for example in kept], np.uint8),
        kinds=np.array(kinds),
        answer=np.array([example.answer for example in kept]),
        held_out=np.array([example.held_out for example in kept]),
    )
    return len(kept)


def template_of(model_dir: Path) -> ChatTemplate:
    """The chat template and tokenizer of a model directory."""
    from transformers import AutoTokenizer

    return ChatTemplate(AutoTokenizer.from_pretrained(model_dir))


__all__ = [
    "FULL",
    "MIXES",
    "SMALL",
    "START",
    "Example",
    "ExampleRenderer",
    "Mix",
    "build_examples",
    "held_out",
    "read_gsm8k",
    "shipped_setup",
    "template_of",
    "write_examples",
]
