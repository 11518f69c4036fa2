"""Trains the embedded model with verl 0.9.1's own GRPO trainer, through turntrace's agent loop.

`python -m agent.recipe.grpo train DATA --out DIR` starts the trainer on one GPU;
`python -m agent.recipe.grpo report DIR` writes the table and the curve from what it left.
"""
