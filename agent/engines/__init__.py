"""Engines: what turns token ids into token ids.

`engine.py` is the protocol, every other file one implementation.
"""
