"""Others' trajectories as a run folder: ATIF documents and verl's rollout dumps.

Invariant: no token id is invented. What a source carries is taken over, what it lacks is said in each record's `warnings`; a record
without ids has none (`prompt_ids` and `response_ids` are empty) and stands for its messages and reward alone.
"""
