"""The arguments that the installed SGLang takes."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path


@cache
def sglang_arguments() -> frozenset[str] | None:
    """Field names of the installed SGLang's `ServerArgs`; None if SGLang is not installed.

    They are read from its source, because importing it takes seconds.
    """
    spec = importlib.util.find_spec("sglang")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    sources = [
        source for folder in folders if (source := Path(folder, "srt", "server_args.py")).is_file()
    ]
    if not sources:
        return None
    order = sources[0].with_name("arg_groups") / "field_order.py"
    return _annotated(sources[0], "ServerArgs") | (_listed(order) if order.is_file() else set())


def _annotated(source: Path, class_name: str) -> frozenset[str]:
    """The annotated names in the body of a class."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    body = next((node.body for node in classes if node.name == class_name), [])
    return frozenset(
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )


def _listed(source: Path) -> set[str]:
    """The strings that a file lists: SGLang 0.5.23 puts `ServerArgs` together from such a list."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {text for text in texts if isinstance(text, str) and text.isidentifier()}
