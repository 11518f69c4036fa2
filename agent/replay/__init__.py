"""A recorded run again: model recorded or live, tools recorded or live, and the first place where a trajectory goes another way.

What is the same and what is not is a pure function of two records (`compare.py`); the new run's records are as honest as
any other run's: nothing in them was sampled or answered elsewhere than they say.
"""
