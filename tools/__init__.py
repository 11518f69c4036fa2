"""What a model can call: the tool contract, the shipped tools and their embedded backends.

Imports neither `agent` nor `conversations`.
"""
