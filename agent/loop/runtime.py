"""What all conversations of a run share: engine, chat template, tools, users, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.engines.engine import Engine
from agent.engines.evidence import EvidenceRequest
from agent.loop.calls import Dispatcher
from agent.loop.compaction import ContextSettings
from agent.loop.images import ImageReader
from agent.loop.observer import Observer
from agent.loop.users import Interactions
from conversations.errors import ImageError
from conversations.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """Budgets and limits of one conversation: token counts, unless the name has another unit.

    `sampling` are the engine's sampling params without `max_new_tokens` and `stop_token_ids`, which
    the loop sets. None means no limit; without `context` nothing is compacted. `evidence` is asked
    of the engine beside tokens and log-probs.
    """

    prompt_length: int
    response_length: int
    max_model_len: int
    max_tokens: int | None = None
    max_turns: int | None = None
    max_user_turns: int | None = None
    max_consecutive_invalid_calls: int | None = 8
    deadline_s: float | None = None
    context: ContextSettings | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    evidence: EvidenceRequest | None = None


@dataclass(frozen=True, slots=True)
class Runtime:
    """The parts themselves. `dispatcher` is None without tools, `interactions` without users,
    `images` if the model sees none.
    """

    engine: Engine
    template: ChatTemplate
    settings: LoopSettings
    dispatcher: Dispatcher | None = None
    observer: Observer | None = None
    interactions: Interactions | None = None
    images: ImageReader | None = None

    def image_reader(self) -> ImageReader:
        """What reads images for the model. Raises ImageError if it, or its engine, takes none."""
        if self.images is None:
            raise ImageError(f"{self.template.name} sees no images, but was given some")
        if problem := getattr(self.engine, "image_problem", lambda: "")():
            raise ImageError(problem)
        return self.images
