"""verl 0.9's client of its SGLang server, with weights that go through files in memory.

SGLang's own way hands over a GPU's memory.
"""

from __future__ import annotations

import torch.multiprocessing
from sglang.srt.utils import patch_torch
from verl.workers.rollout.sglang_rollout.sglang_rollout import ServerAdapter


class CpuServerAdapter(ServerAdapter):  # type: ignore[misc]
    """Nothing differs once this module is imported."""


torch.multiprocessing.set_sharing_strategy("file_system")
patch_torch.monkey_patch_torch_reductions = lambda: None
