"""The gateway: an endpoint for agent programs written elsewhere, recorded token for token.

`chat`, `anthropic` and `responses` read requests and write answers; they know no tokens.
`conversations.session` knows no HTTP. `session.py` is the only file that knows both.
"""

from agent.gateway.gateway import Gateway, ProgramSession

__all__ = ["Gateway", "ProgramSession"]
