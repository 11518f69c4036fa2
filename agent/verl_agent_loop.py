"""The public path of `TurntraceAgentLoop`, which a verl 0.8 or 0.9 trainer names as `_target_`."""

from agent.trainers.agent_loop import TurntraceAgentLoop

__all__ = ["TurntraceAgentLoop"]
