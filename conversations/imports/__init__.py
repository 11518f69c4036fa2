"""Trajectories of other programs as a run folder: ATIF documents and verl's rollout dumps.

Invariant: no token id is invented. What a source has is kept, what it lacks is said in each
record's `warnings`. A record without ids (`prompt_ids` and `response_ids` are empty) holds messages
and a reward alone.
"""
