"""The public path of simulated users; see `agent.loop.users`."""

from agent.loop.users import Interactions, SimulatedUser, load_interactions

__all__ = ["Interactions", "SimulatedUser", "load_interactions"]
