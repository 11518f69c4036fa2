"""The recipe's tools as classes that verl 0.9's own agent loop can load, for a run beside ours.

What a tool raises is verl's to handle.
"""

from __future__ import annotations

from typing import Any

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

from agent.recipe.grpo.flaky import FlakySandboxTool
from tools.base import BaseTool as OurTool
from tools.gsm8k import Gsm8kTool


class _Behind(BaseTool):  # type: ignore[misc]
    """One of turntrace's tools behind verl's base class."""

    kind: type[OurTool]

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema) -> None:
        super().__init__(config, tool_schema)
        own = {key: value for key, value in config.items() if key != "type"}
        self._tool = self.kind(own, tool_schema.model_dump(exclude_none=True))

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, Any]:
        created, _ = await self._tool.create(instance_id, **kwargs)
        return created, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[Any, float, dict[str, Any]]:
        response, reward, metrics = await self._tool.execute(instance_id, parameters)
        return ToolResponse(text=response.text), reward or 0.0, metrics

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        await self._tool.release(instance_id)


class VerlSandbox(_Behind):
    """`code_interpreter`, whose backend may fail for a share of the programs."""

    kind = FlakySandboxTool


class VerlAnswer(_Behind):
    """`calculate_answer`."""

    kind = Gsm8kTool
