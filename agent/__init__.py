"""Runs conversations: engines, the loop, tools' dispatch, batches and the command line."""

from agent.packages import check_imports

check_imports()
