"""The run folder: one process writes it, any number read it."""
