"""The chat template of a model, proven at load."""

from conversations.template.chat import ChatTemplate
from conversations.template.deltas import Delta
from conversations.template.reading import Reading
from conversations.tokens import Piece

__all__ = ["ChatTemplate", "Delta", "Piece", "Reading"]
