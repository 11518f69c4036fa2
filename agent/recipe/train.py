"""Trains the adapter on a file of token ids: one pass of shuffled, length-bucketed batches, loss on
the model's own tokens.

Needs torch, transformers, safetensors and numpy: it runs on a bare GPU machine. Batches are
right-padded: attention is causal, so no token ever sees the padding and no attention mask is
needed. Where many prompts begin alike, a batch takes such conversations together and computes their
common beginning once; the gradient is the same, and with the tools' schemas in every prompt that is
half of the work on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from agent.engines.arguments import default_dtype
from agent.recipe.lora import adapter_state, add_lora, load_adapter, save_adapter

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_BUCKET = 4096
"""Conversations sorted by length together: large enough for tight batches, small enough to stay
shuffled.
"""
_ALIKE_TOKENS, _ALIKE_ROWS = 128, 16
"""Conversations begin alike when so many tokens are the same, and only a group of so many is worth
batches of its own.
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train. A batch is at most `batch_tokens` tokens, padding included; the run ends after
    `epochs` or `max_seconds`.

    `share_prompts`: a batch's common beginning is computed once.
    """

    lr: float
    batch_tokens: int
    epochs: float
    max_seconds: float
    r: int = 9
    alpha: float = 18.0
    warmup: float = 0.03
    clip: float = 1.0
    seed: int = 1
    share_prompts: bool = False


SMALL = Settings(lr=4e-3, batch_tokens=4_800, epochs=1.0, max_seconds=700, share_prompts=True)
FULL = Settings(lr=6e-3, batch_tokens=32_768, epochs=0.82, max_seconds=3600)
"""`FULL` made the adapter that ships; 0.82 of a pass is what an H100 does in 310 s."""
START = Settings(lr=4e-3, batch_tokens=16_384, epochs=1.0, max_seconds=3600)
"""For the conversations of `data.START`."""
SETTINGS = {"small": SMALL, "full": FULL, "start": START}


@dataclass(frozen=True, slots=True)
class TokenFile:
    """The data file in memory. Conversation `i` is `ids[starts[i] : starts[i + 1]]`."""

    ids: np.ndarray[Any, Any]
    loss: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]
    kinds: list[str]
    answers: list[str]
    held_out: np.ndarray[Any, Any]

    @classmethod
    def read(cls, path: Path) -> TokenFile:
        """Reads what `data.write_examples` wrote."""
        with np.load(path) as file:
            names = [str(name) for name in file["kinds"]]
            kinds = [names[index] for index in file["kind"]]
            starts = np.concatenate([[0], np.cumsum(file["lengths"], dtype=np.int64)])
            return cls(
                file["ids"],
                file["loss"],
                starts,
                kinds,
                [str(answer) for answer in file["answer"]],
                file["held_out"],
            )

    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each conversation."""
        lengths: np.ndarray[Any, Any] = np.diff(self.starts)
        return lengths

    def groups(self) -> np.ndarray[Any, Any]:
        """A number for each conversation: the same, above 0, for those of a large group that begins
        alike.
        """
        starts = [self.ids[start : start + _ALIKE_TOKENS].tobytes() for start in self.starts[:-1]]
        _, group, count = np.unique(starts, return_inverse=True, return_counts=True)
        groups: np.ndarray[Any, Any] = np.where(count[group] >= _ALIKE_ROWS, group + 1, 0)
        return groups

    def batch(self, rows: np.ndarray[Any, Any], device: str, *, share: bool = False) -> Batch:
        """The rows, right-padded to the longest; `share` counts their common beginning once."""
        lengths = self.lengths()[rows]
        ids = np.zeros((len(rows), int(lengths.max())), np.int64)
        learned = np.zeros(ids.shape, bool)
        for at, (start, length) in enumerate(zip(self.starts[rows], lengths, strict=True)):
            ids[at, :length] = self.ids[start : start + length]
            learned[at, :length] = self.loss[start : start + length]
        shared = _common(ids, learned) if share and len(rows) > 1 else 0
        return Batch(_to(ids, device), _to(np.flatnonzero(learned[:, shared:]), device), shared)


def _common(ids: np.ndarray[Any, Any], learned: np.ndarray[Any, Any]) -> int:
    """Columns that are the same in every row, ending before the token that predicts the first one
    with loss.
    """
    same = (ids == ids[0]).all(axis=0)
    first_difference = len(same) if same.all() else int(np.argmin(same))
    return min(first_difference, int(np.argmax(learned.any(axis=0))) - 1)


@dataclass(frozen=True, slots=True)
class Batch:
    """`ids` [rows, longest], of which the first `shared` columns are the same in every row.

    `learned` [n] are the places of the tokens with loss, in the other columns read as one row.
    """

    ids: Tensor
    learned: Tensor
    shared: int = 0


def _to(array: np.ndarray[Any, Any], device: str) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor


def batches_of_like_length(
    lengths: np.ndarray[Any, Any],
    rows: np.ndarray[Any, Any],
    batch_tokens: int,
    rng: np.random.Generator,
    groups: np.ndarray[Any, Any] | None = None,
) -> Iterator[np.ndarray[Any, Any]]:
    """The rows once each, in random order, in batches of one group, of like length, of at most
    `batch_tokens` padded tokens.
    """
    rows = rng.permutation(rows)
    cut: list[np.ndarray[Any, Any]] = []
    for start in range(0, len(rows), _BUCKET):
        bucket = rows[start : start + _BUCKET]
        for group in (
            [bucket]
            if groups is None
            else [bucket[groups[bucket] == name] for name in np.unique(groups[bucket])]
        ):
            cut += _cut(group[np.argsort(lengths[group], kind="stable")], lengths, batch_tokens)
    return (cut[index] for index in rng.permutation(len(cut)))


def _cut(
    rows: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], batch_tokens: int
) -> Iterator[np.ndarray[Any, Any]]:
    """Rows in order of length, in batches."""
    while len(rows):
        fits = np.arange(1, len(rows) + 1) * lengths[rows] <= batch_tokens
        count = max(1, int(fits.sum()))
        yield rows[:count]
        rows = rows[count:]


def loss_sum(model: Any, batch: Batch) -> Tensor:
    """Summed cross-entropy over the tokens with loss.

    Logits are made for those alone, and nothing waits for the GPU.
    """
    ids = batch.ids[:, batch.shared :]
    seen = _keys_and_values(model, batch) if batch.shared else None
    hidden = model.model(
        input_ids=ids, past_key_values=seen, use_cache=seen is not None
    ).last_hidden_state.flatten(0, 1)
    logits = model.lm_head(
        hidden[batch.learned - 1]
    )  # what is not shared starts with prompt: its first token has no loss
    return functional.cross_entropy(logits.float(), ids.flatten()[batch.learned], reduction="sum")


def _keys_and_values(model: Any, batch: Batch) -> Any:
    """What attention keeps of the shared beginning, once computed and then repeated for each row,
    gradient included.
    """
    seen = model.model(input_ids=batch.ids[:1, : batch.shared], use_cache=True).past_key_values
    seen.batch_repeat_interleave(len(batch.ids))
    return seen


def learning_rate(settings: Settings, progress: float) -> float:
    """Linear warm-up, then a cosine down to a twentieth; `progress` runs from 0 to 1."""
    if progress < settings.warmup:
        return settings.lr * progress / settings.warmup
    rest = (progress - settings.warmup) / (1 - settings.warmup)
    return settings.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, rest))))


@torch.no_grad()  # type: ignore[untyped-decorator]
def held_out_loss(
    model: nn.Module, tokens: TokenFile, batch_tokens: int, device: str
) -> dict[str, float]:
    """Mean loss per trained token of the held-out conversations, by kind and over `all`."""
    rows = np.flatnonzero(tokens.held_out)
    sums: dict[str, list[float]] = {}
    for kind in sorted({tokens.kinds[row] for row in rows}):
        of_kind = np.array([row for row in rows if tokens.kinds[row] == kind])
        for part in batches_of_like_length(
            tokens.lengths(), of_kind, batch_tokens, np.random.default_rng(0)
        ):
            batch = tokens.batch(part, device)
            total, count = loss_sum(model, batch).item(), batch.learned.numel()
            for name in (kind, "all"):
                entry = sums.setdefault(name, [0.0, 0.0])
                entry[0], entry[1] = entry[0] + total, entry[1] + count
    return {name: total / max(1.0, count) for name, (total, count) in sums.items()}


@dataclass(slots=True)
class TrainingProgress:
    """Where a run stands; given to `report` after every step."""

    step: int
    share: float
    loss: float
    lr: float
    tokens_per_s: float
    elapsed_s: float


def fit(
    model: nn.Module,
    tokens: TokenFile,
    settings: Settings,
    device: str,
    report: Callable[[TrainingProgress], None],
) -> bool:
    """Trains the LoRA parameters of `model` in place; returns whether it came to its end.

    KeyboardInterrupt ends it early, and well.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0)
    rows = np.flatnonzero(~tokens.held_out)
    planned = settings.epochs * float(tokens.lengths()[rows].sum())
    started, seen, average = time.monotonic(), 0, float("nan")
    try:
        for step, part in enumerate(_epochs(tokens, rows, settings)):
            share = max(seen / planned, (time.monotonic() - started) / settings.max_seconds)
            if share >= 1:
                return True
            lr = learning_rate(settings, share)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = _step(
                model,
                tokens.batch(part, device, share=settings.share_prompts),
                optimizer,
                parameters,
                settings.clip,
            )
            seen += int(tokens.lengths()[part].sum())
            if step % 10 == 0 or device == "cpu":  # reading the loss waits for the GPU
                value = loss.item()
                average = value if math.isnan(average) else 0.9 * average + 0.1 * value
                elapsed = time.monotonic() - started
                report(TrainingProgress(step, share, average, lr, seen / elapsed, elapsed))
    except KeyboardInterrupt:
        return False
    return True


def _epochs(
    tokens: TokenFile, rows: np.ndarray[Any, Any], settings: Settings
) -> Iterator[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(settings.seed)
    groups = tokens.groups() if settings.share_prompts else None
    while True:
        yield from batches_of_like_length(
            tokens.lengths(), rows, settings.batch_tokens, rng, groups
        )


def _step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    clip: float,
) -> Tensor:
    loss = loss_sum(model, batch) / batch.learned.numel()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def load_base(model_dir: Path, device: str) -> Any:
    """The base model, ready for `add_lora`: in bf16, or float32 on a CPU that is slow at that."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, default_dtype(cuda=device == "cuda"))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).train()


def default_device() -> str:
    """`cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def train_adapter(
    base: Path,
    tokens: TokenFile,
    settings: Settings,
    target: Path,
    report: Callable[[TrainingProgress], None],
) -> dict[str, Any]:
    """Trains an adapter and writes it to `target`.

    Returns the settings, the held-out losses, the seconds it took, and whether Ctrl-C ended it.
    """
    device = default_device()
    torch.manual_seed(settings.seed)
    model = load_base(base, device)
    add_lora(model, settings.r, settings.alpha)
    started = time.monotonic()
    is_whole = fit(model, tokens, settings, device, report)
    seconds = time.monotonic() - started
    save_adapter(adapter_state(model), settings.r, settings.alpha, BASE_NAME, target)
    losses = held_out_loss(model.eval(), tokens, settings.batch_tokens, device)
    if device == "cuda":  # an engine may start next on this GPU
        del model
        torch.cuda.empty_cache()
    return {
        "settings": asdict(settings),
        "held_out_loss": losses,
        "seconds": round(seconds, 1),
        "interrupted": not is_whole,
        "device": device,
    }


__all__ = [
    "BASE_NAME",
    "FULL",
    "SETTINGS",
    "SMALL",
    "START",
    "Settings",
    "TokenFile",
    "TrainingProgress",
    "fit",
    "held_out_loss",
    "load_adapter",
    "load_base",
    "train_adapter",
]
