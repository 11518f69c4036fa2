"""run.json's own parts: hashes that notice a change, a command without secrets."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from agent.config.config import load_config
from agent.runs.manifest import WHOLE_FILE, command_line, model_entry, model_hash, versions


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(b"head")
        file.truncate(WHOLE_FILE + 1)  # sparse: it takes no disk
    return folder


def test_every_file_of_a_model_counts(model: Path) -> None:
    before = model_hash(model)
    assert before == model_hash(model)
    (model / "config.json").write_text("{ }", encoding="utf-8")
    assert model_hash(model)["sha256"] != before["sha256"]


def test_a_file_too_long_to_read_counts_by_its_ends_and_is_named(model: Path) -> None:
    before = model_hash(model)
    assert before["hashed_in_part"] == ["model.safetensors"]
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert model_hash(model)["sha256"] != before["sha256"]


@pytest.mark.parametrize("name", ["sglang", "sglang_server"])
def test_where_a_server_has_the_weights_only_the_tokenizer_is_hashed(
    tmp_path: Path, name: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "merges.txt"):
        (model / file).write_text(file, encoding="utf-8")
    config = load_config(
        None, [f"model_path={model}", f"rollout.name={name}", "rollout.server.urls=[http://h]"]
    )

    def described() -> dict[str, Any]:
        found: dict[str, Any] = model_entry(config)
        return found

    before = described()
    (model / "model.safetensors").write_text("other weights", encoding="utf-8")
    weights_changed = described()
    (model / "merges.txt").write_text("other merges", encoding="utf-8")
    assert (before["sha256"] is None) == (name == "sglang_server")
    assert (weights_changed == before) == (name == "sglang_server")
    assert (
        weights_changed["tokenizer_sha256"]
        == before["tokenizer_sha256"]
        != described()["tokenizer_sha256"]
    )


@pytest.mark.parametrize(
    ("secret", "shown"),
    [
        ("rollout.server.api_key=s3cret", "rollout.server.api_key=..."),
        (
            "rollout.server={api_key: s3cret, urls: []}",
            'rollout.server={"api_key": "...", "urls": []}',
        ),
        (
            'rollout.server={"urls": ["http://h"], "api_key": "s3cret"}',
            'rollout.server={"urls": ["http://h"], "api_key": "..."}',
        ),
        ("rollout={server: {\n  api_key: s3cret}}", 'rollout={"server": {"api_key": "..."}}'),
        (
            "rollout.engine_kwargs.sglang={admin_api_key: s3cret}",
            'rollout.engine_kwargs.sglang={"admin_api_key": "..."}',
        ),
        (
            "rollout.server.urls=[http://me:s3cret@h:1/x]",
            'rollout.server.urls=["http://...@h:1/x"]',
        ),
        ("rollout.server.urls=[http://h:1/x@y]", "rollout.server.urls=[http://h:1/x@y]"),
        ("rollout.turntrace.recorded=a b", "rollout.turntrace.recorded=a b"),
        ("rollout.temperature=1.0", "rollout.temperature=1.0"),
    ],
)
def test_the_command_keeps_no_secret(secret: str, shown: str) -> None:
    command = command_line(["run", "my tasks.jsonl", "--set", secret])
    assert command.startswith("turntrace run 'my tasks.jsonl' --set ")
    assert shlex.split(command)[-1] == shown
    assert shlex.split(command_line([f"--set={secret}"]))[-1] == f"--set={shown}"


def test_a_package_that_is_missing_is_none() -> None:
    found = versions()
    assert found["python"]
    assert set(found) >= {"verl", "sglang", "torch", "transformers"}
