"""config.yaml: what its keys mean, which of them work here, and what must not be shown of them."""

from agent.config.config import Config, load_config

__all__ = ["Config", "load_config"]
