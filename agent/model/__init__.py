"""The embedded model.

SmolLM2-135M-Instruct from the package index, the hermes chat template, and a tool-calling adapter.
"""
