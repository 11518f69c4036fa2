"""The size of the code, as README and CONTRIBUTING state it: `python -m tests.counts`.

Lines are physical lines; a function's are those from its `def` to its last one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from tests.helpers import ROOT
from tests.test_names import ALLOWED, PACKAGES, repeated_names

LONG = 100
"""Columns; a longer line counts as long."""


def python_files(folders: Iterable[str]) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def function_lengths(file: Path) -> list[int]:
    """Lines of each function and method in a file."""
    return [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def counts(folders: Sequence[str]) -> dict[str, str]:
    """{what: figure} of the Python files under some top folders."""
    files = python_files(folders)
    lines = [file.read_text(encoding="utf-8").splitlines() for file in files]
    of_files = [len(each) for each in lines]
    of_functions = [length for file in files for length in function_lengths(file)]
    long = sum(len(line) > LONG for each in lines for line in each)
    return {
        "files": f"{len(files):,}",
        "lines": f"{sum(of_files):,}",
        "lines of a file": f"median {median(of_files):.0f}, max {max(of_files):,}",
        "lines of a function": f"median {median(of_functions):.0f}, max {max(of_functions)}",
        f"lines over {LONG} columns": f"{long} ({long / sum(of_files):.2%})",
    }


if __name__ == "__main__":
    product, of_tests = counts(PACKAGES), counts(["tests"])
    for what, figure in product.items():
        print(f"{what:<24}{figure:<24}tests: {of_tests[what]}")
    repeated = sorted(set(repeated_names()) - set(ALLOWED))
    print(f"public names twice      {len(repeated)} {' '.join(repeated)}".rstrip())
