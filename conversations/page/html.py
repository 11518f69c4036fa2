"""The page around the data: a jinja2 template, one style sheet, one script, and the policy.

Invariant: the policy names script and style by their hashes, so nothing else runs, whatever a
record holds; trusted types make the browser refuse every way from text to markup. From disk the
page reaches nothing; served, only its own origin.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

SCRIPTS = (
    "dom.js",
    "data.js",
    "list.js",
    "images.js",
    "conversation.js",
    "tokens.js",
    "compare.js",
    "plots.js",
    "app.js",
)
GENERATOR = "turntrace"
"""The generator that a page names."""
_MARK = "<!-- blocks -->"


def shell(title: str, summary: bytes, pieces: bytes, *, version: str = "") -> tuple[str, str]:
    """The page before and after its blocks. A `version` makes it a served page."""
    data = {
        "summary": Markup(summary.decode()),
        "pieces": Markup(pieces.decode()),
        "blocks": Markup(_MARK),
    }
    page = _render(
        "page.html.j2",
        title=title,
        version=version,
        script=Markup(script()),
        policy=policy(served=bool(version)),
        **data,
    )
    head, _, tail = page.partition(_MARK)
    return head, tail


def listing(runs: Sequence[Mapping[str, Any]]) -> str:
    """A page that links to runs: `name`, `address` and, if known, `created`, `model`, `done`,
    `reward`.
    """
    return _render("runs.html.j2", runs=runs, policy=policy(served=True))


def steps_shell(*, served: bool, **values: Any) -> str:
    """The page of a folder of steps; see `conversations.page.steps`."""
    return _render("steps.html.j2", policy=policy(served=served), **values)


def waiting(name: str) -> str:
    """A page that says that a run is being read, and reloads after a second."""
    return _render("waiting.html.j2", name=name, policy=policy(served=True))


def policy(*, served: bool) -> str:
    """The Content-Security-Policy of a page."""
    rules = {
        "default-src": "'none'",
        "script-src": _hash(script()),
        "style-src": _hash(style()),
        "connect-src": "'self'" if served else "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


@functools.cache
def script() -> str:
    """All scripts as one, in a scope of its own."""
    return "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in SCRIPTS) + "})();"


@functools.cache
def style() -> str:
    """The style sheet."""
    return _asset("page.css")


def _render(template: str, **values: Any) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_asset(template)).render(
        style=Markup(style()), generator=GENERATOR, **values
    )


def _asset(name: str) -> str:
    return files("conversations.page").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
