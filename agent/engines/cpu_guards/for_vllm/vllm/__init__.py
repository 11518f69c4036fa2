"""Stands in for the three modules of vLLM that SGLang imports on a CPU without AMX."""
