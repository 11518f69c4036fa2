"""What a conversation is: messages, tokens, the chat template, the trajectory record and the run folder.

Imports neither `agent` nor `tools`; knows no engine and no network.
"""
