"""What no file and no message may show: keys of servers, and the user and password of an address.

Invariant: every value that leaves the process as part of a config, a command or a record has passed through here.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

HIDDEN = "..."
_USERINFO = re.compile(r"(?<=://)[^/\s@?#]*(?:@[^/\s@?#]*)*@")


def without_userinfo(text: str) -> str:
    """The text with `user:password@` taken out of every address in it."""
    return _USERINFO.sub("", text)


def without_secrets(value: Any) -> Any:
    """A config's value with every `*api_key` and every address's user and password taken out."""
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items() if not _is_secret(key)}
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return without_userinfo(value) if isinstance(value, str) else value


def hidden_in(word: str) -> str:
    """A word of the command line; in one like `key.path=value` secrets are replaced by dots, so that it says where one was."""
    key, equals, text = word.partition("=")
    if not equals:
        return without_userinfo(word)
    if key == "--set":
        return f"{key}={hidden_in(text)}"
    if _is_secret(key):
        return f"{key}={HIDDEN}"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    hidden = _hidden(value)
    return word if hidden == value else f"{key}={hidden if isinstance(hidden, str) else json.dumps(hidden, default=str)}"


def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: HIDDEN if _is_secret(key) and item is not None else _hidden(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hidden(item) for item in value]
    return _USERINFO.sub(f"{HIDDEN}@", value) if isinstance(value, str) else value


def _is_secret(key: object) -> bool:
    return isinstance(key, str) and key.endswith("api_key")
