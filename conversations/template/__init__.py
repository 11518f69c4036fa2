"""The chat template of a model, proven at load."""

from conversations.template.chat import ChatTemplate
from conversations.template.deltas import Delta, Piece
from conversations.template.reading import Reading

__all__ = ["ChatTemplate", "Delta", "Piece", "Reading"]
