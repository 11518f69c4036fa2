"""The public path of `AgentRollout`, and what a verl 0.6.1 trainer names as `external_lib`.

    actor_rollout_ref.model.external_lib: agent.rollout

A trainer's workers import that module before they look up their rollout class: importing this one
makes `AgentRollout` the class of verl's `sglang` rollout.
"""

from agent.engines import compat

compat.prepare_sglang()

from verl.workers.rollout.base import _ROLLOUT_REGISTRY  # noqa: E402

from agent.trainers.rollout import AgentRollout, refuse_async  # noqa: E402

__all__ = ["AgentRollout"]

_ROLLOUT_REGISTRY["sglang", "sync"] = f"{__name__}.{AgentRollout.__name__}"
_ROLLOUT_REGISTRY["sglang", "async"] = f"{__name__}.{refuse_async.__name__}"
