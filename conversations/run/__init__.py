"""The run folder: written by one, read by many."""
