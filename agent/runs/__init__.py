"""What all runs share: parts made from a config, the loop thread, run.json, progress."""
