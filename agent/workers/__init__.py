"""Several processes, one run, on Ray.

`pool.py` is the run's side, `actor.py` the worker's, `wire.py` what goes between them. Only
`cluster.py` and `pool.py` import ray, and only when they are used.
"""
