"""How the shipped adapter was made, and how to make another: `python -m agent.recipe --help`.

data       GSM8K-format rows and generated problems become conversations, as token ids with a loss
mask train      LoRA on those ids; needs torch and transformers alone, so it runs on any machine
evaluate   whole conversations through the runtime: valid calls, protocol, recovery, right answers
"""
