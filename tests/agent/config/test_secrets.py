"""What a run folder keeps of a tools.yaml: all of it but the secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from agent.config.secrets import hidden_in_yaml, is_secret
from tests.helpers import ROOT

SECRETS = """\
# api_key: s3cret
tools:
  - mcp:
      url: https://me:s3cret@host/mcp?tavilyApiKey=s3cret&x=1
      headers: {Authorization: "Bearer s3cret", X-Api-Key: s3cret, Accept: text/plain}
      args: [--api-key, s3cret, --token=s3cret, -v, --port, "3"]
      env:
        HF_TOKEN: &token s3cret
        OTHER_TOKEN: *token
        MY_TOKEN: ${HF_TOKEN}
        PRIVATE_KEY: |
          s3cret
          s3cret
        NAME: max_tokens=12
    config: {max_tokens: 5, keys: [a], passwords: x,
      password: 's3cret', api_key: ""}  # token: s3cret
  - tool_schema: {properties: {token: {type: string, description: "the token: a word"}}}
"""


def test_no_secret_stays_and_nothing_else_goes() -> None:
    hidden = hidden_in_yaml(SECRETS)
    assert "s3cret" not in hidden
    server, entry = yaml.safe_load(hidden)["tools"][0].values()
    assert server == {
        "url": "https://...@host/mcp?tavilyApiKey=...&x=1",
        "headers": {"Authorization": "...", "X-Api-Key": "...", "Accept": "text/plain"},
        "args": ["--api-key", "...", "--token=...", "-v", "--port", "3"],
        "env": {
            "HF_TOKEN": "...",
            "OTHER_TOKEN": "...",
            "MY_TOKEN": "${HF_TOKEN}",
            "PRIVATE_KEY": "...",
            "NAME": "max_tokens=12",
        },
    }
    assert entry == {
        "max_tokens": 5,
        "keys": ["a"],
        "passwords": "x",
        "password": "...",
        "api_key": "",
    }
    assert hidden.splitlines()[-1] == SECRETS.splitlines()[-1]
    assert hidden_in_yaml(hidden) == hidden


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("tool_configs/*.yaml")), ids=lambda file: file.stem
)
def test_a_text_without_secrets_is_left_as_it_is(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert hidden_in_yaml(text) == text


def test_what_is_no_yaml_is_not_shown_at_all() -> None:
    assert hidden_in_yaml("api_key: [s3cret") == "..."


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "rollout.server.api_key",
        "X-Api-Key",
        "tavilyApiKey",
        "HF_TOKEN",
        "Authorization",
        "--token",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["key", "keyfile", "max_tokens", "stop_token_ids", "token2text", "tokenizer", "n", "", None, 3],
)
def test_names_of_no_secrets(name: object) -> None:
    assert not is_secret(name)
