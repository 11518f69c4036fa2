"""An unknown key's nearest right one: a key in the wrong place first, then a misspelling, then what is allowed there."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from agent.config.schema import known_paths

_STOP = (
    "stop strings and stop ids are not taken: without a tokenizer in the engine stop strings crash its scheduler, "
    "and a turn ends at the chat template's own end token"
)
_TRAINER_BLOCKS = (
    "actor_rollout_ref",
    "data",
    "trainer",
    "algorithm",
    "critic",
    "reward_model",
    "defaults",
    "hydra",
)


def hint(path: str) -> str:
    """What to do about the unknown dotted `path`, as the end of a sentence."""
    parent, _, name = path.rpartition(".")
    if path.startswith("rollout.engine_kwargs.sglang."):
        return _spelling(name, sglang_arguments() or (), prefix="rollout.engine_kwargs.sglang.")
    if name.startswith("stop"):
        return _STOP
    if not parent and name in _TRAINER_BLOCKS:
        return "a block of verl's trainer config; here `model_path:` and `rollout:` (its actor_rollout_ref.rollout) are all there is"
    misplaced = _misplaced(path, name)
    if misplaced:
        return f"write it at {misplaced}"
    return _spelling(name, _children(parent), prefix=f"{parent}." if parent else "")


def _misplaced(path: str, name: str) -> str | None:
    """The known path that means this key written flat: `n`, `multi_turn_enable`, or a dotted name as one key."""
    flat = path.replace(".", "_")
    for known in sorted(known_paths(), key=lambda known: known.count(".")):
        same_key = known.rpartition(".")[2] == name
        written_flat = known.count(".") and flat.endswith(
            known.removeprefix("rollout.").replace(".", "_")
        )
        if same_key or (written_flat and "." in known.removeprefix("rollout.")):
            return known
    return None


def _children(parent: str) -> list[str]:
    prefix = f"{parent}." if parent else ""
    return [
        path.removeprefix(prefix)
        for path in known_paths()
        if path.startswith(prefix) and "." not in path.removeprefix(prefix)
    ]


def _spelling(name: str, siblings: Iterable[str], *, prefix: str) -> str:
    allowed = list(siblings)
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    by_leaf = {path.rpartition(".")[2]: path for path in reversed(known_paths())}
    elsewhere = difflib.get_close_matches(name, by_leaf, n=1, cutoff=0.8)
    if elsewhere:
        return f"did you mean {by_leaf[elsewhere[0]]}?"
    shown = (
        ", ".join(allowed)
        if len(allowed) <= 20
        else "verl's RolloutConfig keys, turntrace and server"
    )
    return f"allowed there: {shown}" if shown else "nothing by that name exists"


@cache
def sglang_arguments() -> frozenset[str] | None:
    """Field names of the installed SGLang's `ServerArgs`, read from its source: importing it takes seconds.

    None where SGLang is not installed.
    """
    spec = importlib.util.find_spec("sglang")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    sources = [
        source for folder in folders if (source := Path(folder, "srt", "server_args.py")).is_file()
    ]
    if not sources:
        return None
    tree = ast.parse(sources[0].read_text(encoding="utf-8"))
    body = next(
        (
            node.body
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name == "ServerArgs"
        ),
        [],
    )
    return frozenset(
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
