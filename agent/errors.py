"""Exceptions of this package. Each message is one line: what, where, what to do.

AgentError                 a user's mistake, or something the machine lacks; the command line
                           prints it without a traceback
├── ConfigError            config.yaml: an unknown key, a bad value, a combination that cannot work
├── TaskError              a task file or row that cannot be read
└── EngineStartError       an engine that could not be started

EngineError                one generation failed; its conversation ends with `engine_error`
EndConversation            a conversation ends here, for a reason that its engine or tools know
"""

from __future__ import annotations


class AgentError(Exception):
    """Root of what this package raises for a user to read."""


class ConfigError(AgentError):
    """A config file or key is wrong."""


class TaskError(AgentError):
    """A task file or row is wrong."""


class EngineStartError(AgentError):
    """An engine could not be started."""


class EngineError(Exception):
    """The engine failed to answer one generation, or answered something that is not data."""


class EndConversation(Exception):  # noqa: N818 - not a failure: the end, and why
    """Ends the conversation with this stop reason; `error` says more, for the record's `error`."""

    def __init__(self, reason: str, error: str | None) -> None:
        super().__init__(error or reason)
        self.reason = reason
        self.error = error
