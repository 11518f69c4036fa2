"""Scoring: a run's sampled tokens, scored again by an engine and compared with the record."""
