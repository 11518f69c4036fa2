"""Runs recorded trajectories again, each with the first place where it differs from the record.

Model and tools are recorded or live.

What differs is a pure function of two records (`compare.py`). The new records are as honest as any
others: nothing in them was sampled or answered by anyone but whom they name.
"""
