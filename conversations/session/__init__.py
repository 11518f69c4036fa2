"""The turns of one session of a foreign agent: where a request continues, and the branches."""

from conversations.session.tree import SessionTree
from conversations.session.turn import Place, Sampled, SessionTurn

__all__ = ["Place", "Sampled", "SessionTree", "SessionTurn"]
