"""Runs conversations: engines, the loop, tools' dispatch, batches and the command line."""

from agent.entry import check_packages

check_packages()
