"""A sandbox whose backend fails for a share of the programs, on purpose.

To see what a trainer makes of failing infrastructure. The same program of the same conversation
fails at each retry.
"""

from __future__ import annotations

import hashlib
from typing import Any

from tools.base import BackendError, ToolConfigError, ToolResponse
from tools.sandbox import SandboxFusionTool


class FlakySandboxTool(SandboxFusionTool):
    """config: `failure_share`, from 0 to 1, beside `SandboxConfig`'s keys."""

    config_keys = SandboxFusionTool.config_keys | {"failure_share"}

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        share = config.get("failure_share", 0.0)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ToolConfigError(f"config.failure_share must be a number 0 to 1, got {share!r}")
        self._failure_share = float(share)
        own = {key: value for key, value in config.items() if key != "failure_share"}
        super().__init__(own, tool_schema)

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        if self._fails(instance_id, str(parameters.get("code", ""))):
            raise BackendError("the sandbox is not reachable (failure_share)")
        return await super().execute(instance_id, parameters, **kwargs)

    def _fails(self, instance_id: str, code: str) -> bool:
        digest = hashlib.sha256(f"{instance_id}\0{code}".encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32 < self._failure_share
