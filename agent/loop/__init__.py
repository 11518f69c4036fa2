"""One conversation, and many: the loop, its state, a turn's calls, limits, simulated users."""
