"""A quick look at a model in training: what its first calls are worth on held-out conversations.

The model writes the first turn only; its program is run if it is plain arithmetic (`programs.run`),
so no sandbox and no engine is needed. The real measurement, whole conversations through the
runtime, is `evaluate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agent.recipe.faults import HERMES
from agent.recipe.programs import number_text, run_arithmetic
from agent.recipe.train import TokenFile
from conversations.formats.format import NO_TYPES
from conversations.messages import ToolCall


@dataclass(frozen=True, slots=True)
class FirstCalls:
    """Shares of held-out conversations whose first turn is one valid call, whose program ran, whose
    output is the answer.
    """

    count: int
    valid: float
    ran: float
    right: float


def first_calls(
    model: Any,
    tokenizer: Any,
    tokens: TokenFile,
    source: str,
    limit: int,
    *,
    temperature: float,
    max_new_tokens: int = 320,
) -> FirstCalls:
    """Generates the first turn of up to `limit` held-out fault-free conversations of `source` and
    looks at its call.
    """
    wanted = (f"{source}/shipped/plain", f"{source}/other/plain")
    rows = [row for row in np.flatnonzero(tokens.held_out) if tokens.kinds[row] in wanted][:limit]
    texts = _turns(
        model, tokenizer, [_prompt(tokens, row) for row in rows], temperature, max_new_tokens
    )
    grades = [_grade(text, tokens.answers[row]) for text, row in zip(texts, rows, strict=True)]
    shares = (
        [round(sum(column) / max(1, len(rows)), 4) for column in zip(*grades, strict=True)]
        if grades
        else [0.0, 0.0, 0.0]
    )
    return FirstCalls(len(rows), *shares)


def _prompt(tokens: TokenFile, row: int) -> list[int]:
    start, end = tokens.starts[row], tokens.starts[row + 1]
    first = int(np.argmax(tokens.loss[start:end]))
    return [int(token) for token in tokens.ids[start : start + first]]


@torch.no_grad()  # type: ignore[untyped-decorator]
def _turns(
    model: Any, tokenizer: Any, prompts: list[list[int]], temperature: float, max_new_tokens: int
) -> list[str]:
    longest = max((len(prompt) for prompt in prompts), default=0)
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for at, prompt in enumerate(prompts):  # on the left: generation goes on at the right
        ids[at, longest - len(prompt) :] = torch.tensor(prompt)
        mask[at, longest - len(prompt) :] = 1
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature > 0
        else {"do_sample": False}
    )
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return [str(tokenizer.decode(row[longest:], skip_special_tokens=True)) for row in out]


def _grade(text: str, answer: str) -> tuple[bool, bool, bool]:
    calls = HERMES.parse(text, NO_TYPES).calls
    call = calls[0] if len(calls) == 1 else None
    if not isinstance(call, ToolCall) or len(call.arguments) != 1:
        return False, False, False
    try:
        done = run_arithmetic(str(next(iter(call.arguments.values()))))
    except ValueError:
        return True, False, False
    return True, done.error is None, done.error is None and number_text(done.stdout) == answer
