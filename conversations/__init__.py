"""What a conversation is: messages, tokens, the chat template, the trajectory record, the run
folder.

Imports neither `agent` nor `tools`, no engine and no network. `conversations.open_run(path)` reads
a run.
"""

from conversations.open_run import Run, open_run

__all__ = ["Run", "open_run"]
