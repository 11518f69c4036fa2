"""A model of another family on the real CPU engine: Qwen3's architecture and tokenizer, XML calls.

No package has weights of such a model, so they are random: what it samples is noise, and all that
depends on the template, the format and the engine is real.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from conversations.open_run import open_run
from tests.bench.gpu.model import tiny_model
from tests.command import ENGINE, turntrace
from tests.helpers import npm_models

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CONFIG = """
model_path: {model}
rollout:
  name: sglang
  prompt_length: 512
  response_length: 96
  multi_turn: {{enable: true, tool_config_path: gsm8k, max_assistant_turns: 3}}
  turntrace: {{max_tokens: 32}}
"""
TASKS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with the chat template of Qwen3.5, as TRL ships it."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    template = Path(spec.submodule_search_locations[0], "chat_templates", "qwen3_5_nothink.jinja")
    folder = tiny_model(tmp_path_factory.mktemp("family") / "model", npm_models("qwen3"))
    (folder / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_it_runs_and_verifies_with_the_format_that_its_template_proves(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.format(model=model))
    rows = [json.dumps({"prompt": f"What is 6 times {number}?"}) for number in range(TASKS)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(rows) + "\n")
    options = ("tasks.jsonl", "--config", "config.yaml", "--out", "run")
    ran = turntrace("run", *options, cwd=tmp_path, timeout=600, imports=ENGINE)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    run = open_run(tmp_path / "run")
    assert run.manifest["call_format"]["name"] == "qwen3_coder"
    assert run.manifest["call_format"]["proven"] is True
    assert len(run) == TASKS
    for record in run:
        assert sum(record.response_mask) == sum(turn.end - turn.start for turn in record.turns) > 0
    verified = turntrace("verify", "run", cwd=tmp_path, timeout=600)
    assert verified.returncode == 0, verified.stdout + verified.stderr
