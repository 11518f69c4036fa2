"""One name, one thing: a public function or class is defined in one file only.

`python -m tests.test_names` prints the names that stand in several files.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import ROOT

PACKAGES = ("agent", "conversations", "tools")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

ALLOWED = {
    "main": "each is what a process of its own starts with",
}
"""Names that may stand in several files, and why."""


def defined_names(file: Path) -> Iterator[str]:
    """The public functions and classes that a file defines at its top level."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_"):
            yield node.name


def repeated_names() -> dict[str, list[str]]:
    """{name: files} of each name that more than one file defines."""
    files: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for name in set(defined_names(file)):
                files[name].append(str(file.relative_to(ROOT)))
    return {name: places for name, places in sorted(files.items()) if len(places) > 1}


def test_a_public_name_is_defined_in_one_file() -> None:
    repeated = repeated_names()
    assert {name: places for name, places in repeated.items() if name not in ALLOWED} == {}
    assert set(ALLOWED) <= set(repeated), "an allowed name is defined once: leave it out"


if __name__ == "__main__":
    for repeated_name, defined_in in repeated_names().items():
        if repeated_name not in ALLOWED:
            print(f"{repeated_name}  {'  '.join(defined_in)}")
