"""Rules: every shipped tool config works by its name, from anywhere; every line is explained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import tools
from tests.command import turntrace
from tools.registry import load_tools

ROOT = Path(tools.__file__).parents[1]
CONFIGS = sorted((ROOT / "tool_configs").glob("*.yaml"))

CALLS: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "gsm8k": [
        ("code_interpreter", {"code": "print(6 * 7)"}, "42"),
        ("calculate_answer", {"answer": "42"}, "reward=1.0"),
    ],
    "geo3k": [
        (
            "calc_geo3k_reward",
            {"answer": "\\frac{84}{2}"},
            "Current parsed answer='\\\\frac{84}{2}' reward=0.0",
        )
    ],
    "search": [("search", {"query_list": ["capital of France"]}, "Paris")],
    "sandbox": [("code_interpreter", {"code": "print(6 * 7)"}, "42")],
    "mcp": [
        ("convert", {"value": 3, "unit": "mi", "to": "km"}, "4.828032 km"),
        ("clock", {}, "+00:00"),
        ("write_note", {"text": "x"}, "Note 1 written."),
        ("read_notes", {}, "There are no notes."),
    ],
    "image_zoom": [
        ("image_zoom_in_tool", {"bbox_2d": [0, 0, 50, 50]}, "there is no image"),
    ],
    "all": [
        ("search", {"query_list": ["capital of France"]}, "Paris"),
        ("code_interpreter", {"code": "print(6 * 7)"}, "42"),
        ("calculate_answer", {"answer": "42"}, "reward=1.0"),
    ],
}


def test_each_is_called_here() -> None:
    assert {path.stem for path in CONFIGS} == set(CALLS)
    for name, calls in CALLS.items():
        assert {tool for tool, _, _ in calls} == set(load_tools(name))


@pytest.mark.parametrize(
    ("config", "tool", "arguments", "says"),
    [pytest.param(name, *call, id=f"{name}-{call[0]}") for name in CALLS for call in CALLS[name]],
)
def test_it_works_as_shipped(
    config: str, tool: str, arguments: dict[str, Any], says: str, tmp_path: Path
) -> None:
    ran = turntrace(
        "tools", "call", config, tool, json.dumps(arguments), "--ground-truth", "42", cwd=tmp_path
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "status       ok" in ran.stdout
    assert says in ran.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_outside_the_schemas_is_explained(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    everywhere = "\n".join(other.read_text(encoding="utf-8") for other in CONFIGS)
    for entry in yaml.safe_load(text)["tools"]:
        for key in [*entry.get("config", {}), *entry.get("mcp", {})]:
            assert re.search(rf"\b{key}:.*#", text), f"{path.name}: {key} has no comment"
        assert {"class_name", "mcp"} & set(entry)
        for key in {"class_name", "tool_schema"} & set(entry):
            assert re.search(rf"\b{key}:.*#", everywhere)
