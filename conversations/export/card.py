"""The dataset card, in Markdown: contents, origin, what is missing, the command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from conversations.export.export import Export
from conversations.export.filters import Filters
from conversations.export.text import VERDICTS

LICENSES = {
    "smollm2-tools": "Apache-2.0",
    "smollm2-base": "Apache-2.0",
    "openai/gsm8k": "MIT",
}
"""Licenses of models and data sources, by the names that runs use."""


def card(done: Export) -> str:
    """The card as text, ending in a newline."""
    parts = [
        f"# {done.rows} {plural(done.format.unit, done.rows)} for {done.format.consumer}",
        f"{done.kept.trajectories} of {done.whole.trajectories} trajectories of one turntrace run, "
        f"as `{done.format.name}`. To load: "
        f"`{done.format.usage}`.",
        "## Fields\n\n" + _table(("field", "what it holds"), done.format.fields.items()),
        "## What was left out\n\n" + _left_out(done),
        *([_checked(done)] if done.verdicts else []),
        "## Statistics\n\n" + _statistics(done),
        "## Where it comes from\n\n" + _origin(done),
        "## Files\n\n"
        + _table(
            ("file", "bytes", "SHA-256"),
            [(name, size, digest) for name, (digest, size) in done.files.items()],
        ),
        "## Make it again\n\n" + _again(done),
    ]
    return "\n\n".join(parts) + "\n"


def _left_out(done: Export) -> str:
    counts = [(reason, count) for reason, count in done.dropped.most_common()]
    counts += [
        (f"{reason} (no place in the format)", count)
        for reason, count in done.left_out.most_common()
    ]
    text = _table(("reason", "how many"), counts) if counts else "Nothing."
    asked = ", ".join(f"{name} = {value}" for name, value in filters_set(done.filters).items())
    notes = "".join(f"\n\nNote: {note}." for note in done.notes)
    return f"Filters: {asked or 'none'}.\n\n{text}{notes}"


def filters_set(filters: Filters) -> dict[str, Any]:
    """The filters that differ from their defaults."""
    plain = Filters()
    found = {field.name: getattr(filters, field.name) for field in fields(filters)}
    return {name: _shown(value) for name, value in found.items() if value != getattr(plain, name)}


def _shown(value: Any) -> Any:
    if isinstance(value, frozenset):
        return " ".join(sorted(value))
    return ":".join(map(str, value)) if isinstance(value, tuple) else value


def _checked(done: Export) -> str:
    rows = [
        (
            name,
            done.verdicts[name],
            f"`{first}`" if (first := done.differing.get(name)) else "",
            meaning,
        )
        for name, meaning in VERDICTS.items()
        if done.verdicts[name]
    ]
    return (
        "## Text or tokens\n\nThe format holds text. Each text was tokenised again as its consumer "
        "does, and compared with the ids and the mask of the record:\n\n"
        + _table(("finding", "how many", "the first", "meaning"), rows)
        + "\n\n"
        "trl-sft, dataproto, atif and parquet hold the ids and the mask themselves."
    )


def _statistics(done: Export) -> str:
    whole, kept = done.whole.table(), done.kept.table()
    rows = [(name.strip(), value, kept.get(name, "0")) for name, value in whole.items()]
    return (
        _table(("", "the whole run", "exported"), rows)
        + f"\n\nA sample passes with a reward of at least {done.filters.pass_reward:g}. pass@k "
        "is the unbiased estimator of Chen et al. 2021, averaged over groups with k samples; "
        "filters on trajectories bias the right column."
    )


def _origin(done: Export) -> str:
    manifest = done.manifest
    model, tasks = _part(manifest, "model"), _part(manifest, "tasks")
    sources = ", ".join(
        f"{name} ({count})" for name, count in done.kept.data_sources.most_common(8)
    )
    rows = [
        (
            "run made",
            f"{manifest.get('created', 'unknown')} by "
            f"`{_code(manifest.get('command', 'unknown'))}`",
        ),
        *[(f"SHA-256 of {name}", digest) for name, digest in done.run_files.items()],
        ("model", f"{model.get('path', 'unknown')} (SHA-256 {model.get('sha256') or 'unknown'})"),
        ("tasks", f"{tasks.get('file', 'unknown')} (SHA-256 {tasks.get('sha256') or 'unknown'})"),
        ("data sources", sources),
        ("license of the model", LICENSES.get(str(model.get("path")), "unknown")),
        ("license of the tasks", _licenses(list(done.kept.data_sources))),
        *(
            [("imported from", str(_part(manifest, "imported").get("from")))]
            if manifest.get("imported")
            else []
        ),
    ]
    return _table(("", ""), rows)


def _licenses(names: Sequence[str]) -> str:
    known = {name: LICENSES.get(name, "unknown") for name in names[:8]}
    return (
        ", ".join(f"{name}: {license}" for name, license in known.items())
        if set(known.values()) != {"unknown"}
        else "unknown"
    )


def _again(done: Export) -> str:
    versions = _part(done.manifest, "versions")
    command = f"```sh\n{done.command}\n```\n\n" if done.command else ""
    made = versions.get("turntrace", "unknown")
    return (
        f"{command}The run was made with turntrace {made}. "
        "The same run gives the same rows in the same order."
    )


def _part(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = manifest.get(name)
    return part if isinstance(part, Mapping) else {}


def plural(unit: str, count: int) -> str:
    """The unit's name for a number of rows."""
    many = {"trajectory": "trajectories", "batch": "batches"}.get(unit, unit + "s")
    return unit if count == 1 else many


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cells(line)) + " |" for line in lines)


def _cells(line: Sequence[Any]) -> Iterator[str]:
    for cell in line:
        yield " ".join(str(cell).split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return str(text).replace("`", "'")
