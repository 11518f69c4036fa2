"""The map of the house, kept by walking every import: `conversations <- agent -> tools`, and
nothing heavy on the way in.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGES = ("agent", "conversations", "tools")
MAY_IMPORT = {
    "agent": {"agent", "conversations", "tools"},
    "conversations": {"conversations"},
    "tools": {"tools"},
}

HEAVY = {
    "torch", "ray", "sglang", "verl", "transformers", "tensordict", "datasets", "pandas", "numpy",
    "pyarrow", "safetensors", "gguf", "peft", "accelerate", "reasoning_gym", "sgl_kernel", "vllm",
    "triton",
}  # fmt: skip
MAY_BE_HEAVY = (
    "agent/rollout.py",
    "agent/verl_agent_loop.py",
    "agent/engines/rollout.py",
    "agent/trainers/agent_loop.py",
    "agent/trainers/rollout.py",
    "agent/recipe/",
    "agent/engines/cpu_guards/",
)
"""Files that exist for such an import; nobody imports them before it is needed."""

ENGINES_AND_NETWORK = {
    "sglang",
    "verl",
    "ray",
    "httpx",
    "requests",
    "aiohttp",
    "socket",
    "http",
    "urllib3",
}

CONTAINERS = {("conversations/export/dataproto.py", "verl", False)}
"""(file, module, at import): verl's `DataProto` is a container of tensors; only its own class
writes the file that it reads.
"""


@dataclass(frozen=True)
class Import:
    """One import: its place, what it names, and whether it runs when its module is imported."""

    file: str
    line: int
    module: str
    at_import: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def files() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def imports_of(file: Path) -> Iterator[Import]:
    name = str(file.relative_to(ROOT))
    yield from _walk(ast.parse(file.read_text(encoding="utf-8")), name, at_import=True)


def _walk(node: ast.AST, file: str, *, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(file, child.lineno, alias.name, at_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            package = ".".join(Path(file).parts[: -child.level]) if child.level else ""
            yield Import(
                file,
                child.lineno,
                ".".join(part for part in (package, child.module) if part),
                at_import,
            )
        elif isinstance(child, ast.Call) and _is_import_call(child):
            yield Import(file, child.lineno, str(child.args[0].value), at_import)  # type: ignore[attr-defined]
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _walk(child, file, at_import=at_import and not inside)


def _is_import_call(call: ast.Call) -> bool:
    called = (
        call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    )
    return (
        called in ("import_module", "__import__")
        and bool(call.args)
        and isinstance(call.args[0], ast.Constant)
    )


@functools.cache
def all_imports() -> list[Import]:
    return [found for file in files() for found in imports_of(file)]


def test_there_is_something_to_walk() -> None:
    assert {found.file.split("/")[0] for found in all_imports()} == set(PACKAGES)
    assert any(not found.at_import for found in all_imports())
    assert len(all_imports()) > 200


def test_arrows_point_one_way() -> None:
    wrong = [
        str(found)
        for found in all_imports()
        if found.top in PACKAGES and found.top not in MAY_IMPORT[found.file.split("/")[0]]
    ]
    assert wrong == []


def test_conversations_know_no_engine_and_no_network() -> None:
    inside = [
        found
        for found in all_imports()
        if found.file.startswith("conversations/") and found.top in ENGINES_AND_NETWORK
    ]
    assert [
        str(found)
        for found in inside
        if (found.file, found.module, found.at_import) not in CONTAINERS
    ] == []


ROOMS = (
    ("errors", "packages", "terminal"),
    ("model",),
    ("config",),
    ("engines",),
    ("loop",),
    ("runs",),
    ("replay", "scoring"),
    ("trainers", "gateway"),
    ("workers",),
    ("inference", "interactions", "rollout", "verl_agent_loop"),
    ("commands",),
    ("cli",),
    ("__main__", "entry", "recipe"),
)
"""The rooms of `agent/` from the lowest floor up: each may import its own floor and those below."""

FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def room_of(module: str) -> str:
    """The room of a module of `agent`: the folder or file beside `agent/__init__.py`."""
    return module.split(".")[1]


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def inside_agent() -> list[Import]:
    return [
        found
        for found in all_imports()
        if found.file.startswith("agent/")
        and found.file != "agent/__init__.py"
        and found.module.startswith("agent.")
    ]


def test_every_room_of_agent_has_a_floor() -> None:
    names = {path.stem for path in (ROOT / "agent").iterdir() if path.suffix == ".py"}
    names |= {path.parent.name for path in (ROOT / "agent").glob("*/*.py")}
    assert names - {"__init__"} == set(FLOOR)


def test_no_arrow_inside_agent_points_up() -> None:
    floors = [
        (found, FLOOR[room_of(module_of(found.file))], FLOOR[room_of(found.module)])
        for found in inside_agent()
    ]
    assert [str(found) for found, here, there in floors if there > here] == []


def test_rooms_on_one_floor_do_not_know_each_other() -> None:
    pairs = [
        (found, room_of(module_of(found.file)), room_of(found.module)) for found in inside_agent()
    ]
    beside = [
        str(found) for found, here, there in pairs if here != there and FLOOR[here] == FLOOR[there]
    ]
    assert beside == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    graph: dict[str, set[str]] = {module_of(str(file.relative_to(ROOT))): set() for file in files()}
    for found in all_imports():
        if found.module in graph and found.file.startswith(f"{package}/"):
            graph[module_of(found.file)].add(found.module)
    assert list(TopologicalSorter(graph).static_order())


def test_nothing_imports_the_recipe() -> None:
    users = {found.file for found in all_imports() if found.module.startswith("agent.recipe")}
    assert {file for file in users if not file.startswith("agent/recipe/")} == set()


def test_packages_import_no_tests() -> None:
    assert [str(found) for found in all_imports() if found.top == "tests"] == []


def test_heavy_modules_are_imported_where_they_are_needed() -> None:
    wrong = [
        str(found)
        for found in all_imports()
        if found.at_import and found.top in HEAVY and not found.file.startswith(MAY_BE_HEAVY)
    ]
    assert wrong == []


def test_one_file_starts_an_engine() -> None:
    users = {
        found.file
        for found in all_imports()
        if found.module == "verl.workers.rollout.sglang_rollout"
    }
    assert users == {"agent/engines/rollout.py"}


def test_who_imports_that_file_does_so_when_it_is_needed() -> None:
    heavy = tuple(file.removesuffix(".py").rstrip("/").replace("/", ".") for file in MAY_BE_HEAVY)
    outside = [found for found in all_imports() if not found.file.startswith(MAY_BE_HEAVY)]
    assert [
        str(found) for found in outside if found.at_import and found.module.startswith(heavy)
    ] == []


LIGHT = [
    str(file.relative_to(ROOT))
    for file in files()
    if not str(file.relative_to(ROOT)).startswith(MAY_BE_HEAVY) and file.stem != "__main__"
]

PROBE = """
import json, os, sys
before = dict(os.environ)
modules = json.loads(sys.argv[1])
for module in modules:
    __import__(module)
heavy = sorted(set(json.loads(sys.argv[2])) & set(sys.modules))
print(json.dumps({"heavy": heavy, "environment": dict(os.environ) == before}))
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_loads_nothing_heavy_prints_nothing_and_changes_no_environment(
    package: str,
) -> None:
    """For real: what our imports import counts too."""
    modules = [
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in LIGHT
        if path.startswith(f"{package}/")
    ]
    command = [sys.executable, "-c", PROBE, json.dumps(modules), json.dumps(sorted(HEAVY))]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == {"heavy": [], "environment": True}
