"""The loop inside a verl trainer: whole batches (0.6.1), one conversation at a time (0.8, 0.9)."""
