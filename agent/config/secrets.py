"""Hides what no file and no message may show.

That is: keys, tokens, passwords, and the user and password of an address. Invariant: every value
that leaves the process as part of a config, a command or a record has passed through here. A text
without a secret comes back unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

HIDDEN = "..."
_USERINFO = re.compile(r"(?<=://)[^/\s@?#]*(?:@[^/\s@?#]*)*@")
_NAMED = re.compile(r"(?P<name>[\w-]+)=(?P<value>[^\s&'\"#,}\]]+)")
_COMMENT = re.compile(
    r"(?P<before>(?:^|\s)#.*?(?P<name>[\w-]+)[\"']?\s*:\s*)(?P<value>[^\s#][^\n]*)"
)
_REFERENCE = re.compile(r"\$\{?\w+")
"""`${NAME}` names a variable that holds a secret: it stays."""
_PROPERTIES = re.compile(r"(?:[&!]\S*\s+)*")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_SECRETS = frozenset(
    {
        "token",
        "secret",
        "password",
        "passwd",
        "passphrase",
        "authorization",
        "credential",
        "credentials",
        "cookie",
        "apikey",
    }
)


def without_userinfo(text: str) -> str:
    """The text without `user:password@` in its addresses."""
    return _USERINFO.sub("", text)


def without_secrets(value: Any) -> Any:
    """A config's value without secrets, and without user and password in addresses."""
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items() if not is_secret(key)}
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return without_userinfo(value) if isinstance(value, str) else value


def hidden_in(word: str) -> str:
    """A word of the command line. In `key.path=value` dots stand in place of each secret."""
    key, equals, text = word.partition("=")
    if not equals:
        return without_userinfo(word)
    if key == "--set":
        return f"{key}={hidden_in(text)}"
    if is_secret(key):
        return f"{key}={HIDDEN}"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    hidden = _hidden(value)
    return (
        word
        if hidden == value
        else f"{key}={hidden if isinstance(hidden, str) else json.dumps(hidden, default=str)}"
    )


def hidden_in_yaml(text: str) -> str:
    """A YAML text with dots in place of each secret.

    Secrets are looked for in keys and headers, options, addresses and comments.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return HIDDEN
    pieces, at = [], 0
    for node, whole in sorted(
        set(_scalars(root, frozenset())),
        key=lambda scalar: (scalar[0].start_mark.index, not scalar[1]),
    ):
        start, end = node.start_mark.index, node.end_mark.index
        if start >= at:  # an alias has the position of its anchor
            pieces += [text[at:start], _hidden_scalar(text[start:end], whole=whole)]
            at = end
    return _COMMENT.sub(_hidden_comment, "".join([*pieces, text[at:]]))


def _scalars(
    node: yaml.Node | None, above: frozenset[int], *, whole: bool = False
) -> Iterator[tuple[yaml.ScalarNode, bool]]:
    """The scalars of a document, each with whether all of it is a secret."""
    if node is None or id(node) in above:
        return
    above |= {id(node)}
    if isinstance(node, yaml.ScalarNode):
        yield node, whole
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            is_scalar = isinstance(value, yaml.ScalarNode)
            yield from _scalars(
                value,
                above,
                whole=is_secret(key.value) and (is_scalar or isinstance(value, yaml.SequenceNode)),
            )
    elif isinstance(node, yaml.SequenceNode):
        option = ""
        for item in node.value:
            yield from _scalars(item, above, whole=whole or is_secret(option))
            option = (
                item.value
                if isinstance(item, yaml.ScalarNode) and re.fullmatch(r"--?[\w-]+", item.value)
                else ""
            )


def _hidden_scalar(text: str, *, whole: bool) -> str:
    """A scalar with its secret hidden. Its anchor and the line break after a block stay."""
    if not whole or _REFERENCE.search(text):
        return _hidden_text(text)
    if not text.strip("'\" "):
        return text
    properties = _PROPERTIES.match(text)
    anchor = properties[0] if properties else ""
    line_break = "\n" if text.endswith("\n") else ""
    return f'{anchor}"{HIDDEN}"{line_break}'


def _hidden_comment(match: re.Match[str]) -> str:
    is_kept = not is_secret(match["name"]) or _REFERENCE.search(match["value"])
    return match["before"] + (_hidden_text(match["value"]) if is_kept else HIDDEN)


def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: HIDDEN if is_secret(key) and item is not None else _hidden(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_hidden(item) for item in value]
    return _hidden_text(value) if isinstance(value, str) else value


def _hidden_text(text: str) -> str:
    """A text with the secrets of its addresses and of `name=value` hidden."""
    return _NAMED.sub(_hidden_value, _USERINFO.sub(f"{HIDDEN}@", text))


def _hidden_value(match: re.Match[str]) -> str:
    is_kept = not is_secret(match["name"]) or _REFERENCE.match(match["value"])
    return match[0] if is_kept else f"{match['name']}={HIDDEN}"


def is_secret(name: object) -> bool:
    """Whether a key, header, option or variable of this name holds a secret.

    `api_key`, `X-Auth-Token` and `tavilyApiKey` do.
    """
    words = [word.lower() for word in _WORD.findall(name)] if isinstance(name, str) else []
    return bool(words) and (words[-1] in _SECRETS or (words[-1] == "key" and len(words) > 1))
