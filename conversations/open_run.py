"""The public path of a run folder's reader; see `conversations.run.open_run`."""

from conversations.run.open_run import Run, open_run

__all__ = ["Run", "open_run"]
