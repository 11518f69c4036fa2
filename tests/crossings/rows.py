"""A desk and a model that do what each row says: what a worker imports of the workers' cells."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.config.config import Config
from agent.engines.engine import Engine, Generation, SamplingParams
from agent.runs.parts import load_template
from tests.crossings.world import Desk, Model
from tools.base import ToolResponse

DIES = "The engine dies."
"""In the question of a conversation whose engine dies."""
REFUSED = "the template refuses this"
"""In an answer that the template of these cells refuses."""


class RowsDesk(Desk):
    """A desk whose second step does what the row says. `note` is a file that it touches first."""

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        super().__init__(config, tool_schema)
        self.rows: dict[str, dict[str, Any]] = {}

    async def create(
        self, instance_id: str | None = None, **create_kwargs: Any
    ) -> tuple[str, ToolResponse]:
        assert instance_id is not None
        self.rows[instance_id] = create_kwargs
        return instance_id, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        row = self.rows[instance_id]
        if parameters["step"] == 1:
            behaviour, is_first = row["behaviour"], _first(Path(row["note"]))
            if behaviour == "kills" and is_first:
                os._exit(7)
            if behaviour == "refused":
                return ToolResponse(f"step 1 done: {REFUSED}"), 0.25, {}
            await self._misbehave(behaviour)
        return ToolResponse(f"step {parameters['step']} done"), 0.25, {}


class RowsModel(Model):
    """Says the script, or dies where the row's question says so."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str, **given: Any
    ) -> Generation:
        dies = DIES in self.template.decode(prompt_ids)
        model = Model(self.template, self.script, dies=dies)
        return await model.generate(prompt_ids, sampling, request_id=request_id, **given)


def _first(note: Path) -> bool:
    """Touches the file; True if it was not there."""
    was_there = note.exists()
    note.touch()
    return not was_there


def start_model(config: Config, log: Path | None) -> Engine:
    return RowsModel(load_template(config))
