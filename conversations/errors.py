"""Exceptions of this package. Each message is one line: what, where, what to do.

ConversationsError
├── TemplateError      a chat template that cannot be used, and why
├── CallFormatError    a call format that does not exist, or that a model's template does not write
├── MessageError       a message that is not in the OpenAI chat schema
├── ImageError         an image that is none, is too large, or cannot be shown to the model
├── RecordError        a trajectory that is not a valid record of a schema that is read
├── RunFolderError     a run folder that cannot be opened, locked or resumed
├── ExportError        an export that was asked for and cannot be made
├── ImportFileError    a file that holds no trajectories that can be imported
└── MissingPackageError  a package that is not installed, and the extra that brings it
"""


class ConversationsError(Exception):
    """Root of what this package raises for a user's mistake."""


class TemplateError(ConversationsError):
    """The chat template cannot be rendered turn by turn, or at all."""


class CallFormatError(ConversationsError):
    """There is no call format of this name, or the model's chat template does not write it."""


class MessageError(ConversationsError):
    """A message is not in the OpenAI chat schema."""


class ImageError(ConversationsError):
    """An image cannot be had, is not one, is over a limit, or cannot be shown to the model."""


class RecordError(ConversationsError):
    """A trajectory is not a valid record."""


class RunFolderError(ConversationsError):
    """A run folder cannot be opened, locked or resumed."""


class ExportError(ConversationsError):
    """An export that was asked for cannot be made."""


class ImportFileError(ConversationsError):
    """A file holds no trajectories that can be imported."""


class MissingPackageError(ConversationsError):
    """A package that is needed here is not installed."""
