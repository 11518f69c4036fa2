"""What run.json says about all trajectories of a run: its chat template and the limits of its
config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conversations.run.hash_store import HashStore
from conversations.run.store import image_store
from conversations.template import ChatTemplate
from conversations.truncate import SIDES

MAX_STARTS = 16
"""Earlier starts that a record is checked against, the latest ones."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """The facts of a run. A fact that run.json does not state is None.

    `images` are the files of the run's images.
    `ids` is the number of token ids of the tokenizer, `n` the size of a group. `cuts` are the
    (tokens, side) that a tool's answer may be cut to, the run's own first; `cuts_in_code` means
    that functions are among the tools, whose decorators may set others. `users` means that
    simulated users take turns. `imported` is the format that the run was imported from: its records
    may lack something. `is_replay` means that its records have parents. `is_gateway`:
    agent programs decided when their sessions ended, and why. `earlier` are the facts of
    the run's earlier starts, if a resume was forced with another config. `folder` is the run's:
    records name files in it. The others are the loop's
    limits, in tokens unless the name says otherwise.
    """

    template: ChatTemplate | None = None
    images: HashStore | None = None
    ids: int | None = None
    n: int | None = None
    prompt_length: int | None = None
    response_length: int | None = None
    max_model_len: int | None = None
    max_tokens: int | None = None
    max_turns: int | None = None
    max_invalid_calls: int | None = None
    cuts: tuple[tuple[int, str], ...] = ()
    cuts_in_code: bool = False
    users: bool = False
    imported: str | None = None
    is_replay: bool | None = None
    is_gateway: bool = False
    earlier: tuple[RunFacts, ...] = ()
    folder: Path | None = None

    @property
    def reads_clock(self) -> bool:
        """Whether the template writes today's date: such a prompt cannot be rendered again another
        day.
        """
        return self.template is not None and "strftime_now" in str(
            self.template.tokenizer.chat_template
        )

    def loosened(self) -> RunFacts:
        """Facts for a record that ran under several starts: without limits, with all their cuts."""
        cuts = [cut for facts in (self, *self.earlier) for cut in facts.cuts]
        return dataclasses.replace(
            self,
            prompt_length=None,
            response_length=None,
            max_model_len=None,
            max_tokens=None,
            max_turns=None,
            max_invalid_calls=None,
            cuts=tuple(dict.fromkeys(cuts)),
            cuts_in_code=any(facts.cuts_in_code for facts in (self, *self.earlier)),
            users=any(facts.users for facts in (self, *self.earlier)),
            earlier=(),
        )


def facts_of(
    manifest: dict[str, Any], template: ChatTemplate | None, folder: Path | None = None
) -> RunFacts:
    """The facts of a run.json of any content, of the run in `folder`."""
    facts = _facts_of(manifest, template)
    images = None if folder is None else image_store(folder)
    facts = dataclasses.replace(facts, images=images)
    starts = manifest.get("earlier_starts")
    if not isinstance(starts, list):
        return facts
    manifests = [{**manifest, **start} for start in starts[-MAX_STARTS:] if isinstance(start, dict)]
    earlier = tuple(
        dataclasses.replace(_facts_of(one, template), images=images) for one in manifests
    )
    return dataclasses.replace(facts, earlier=earlier)


def _facts_of(manifest: dict[str, Any], template: ChatTemplate | None) -> RunFacts:
    rollout = _at(manifest, "config", "rollout")
    multi_turn, ours = _at(rollout, "multi_turn"), _at(rollout, "turntrace")
    max_model_len, entries = _count(rollout, "max_model_len"), _entries(manifest.get("tools"))
    return RunFacts(
        template=template,
        ids=template.vocabulary_size if template is not None else None,
        n=_count(manifest, "n"),
        prompt_length=_count(rollout, "prompt_length"),
        response_length=_count(rollout, "response_length"),
        max_model_len=max_model_len,
        max_tokens=_count(ours, "max_tokens"),
        max_turns=_max_turns(multi_turn, max_model_len),
        max_invalid_calls=_count(ours, "max_consecutive_invalid_calls"),
        cuts=tuple(_cuts(multi_turn, entries)),
        cuts_in_code=any(
            "function" in entry for entry in entries
        ),  # @tool(max_response_tokens=...)
        imported=str(_at(manifest, "imported").get("from")) if _at(manifest, "imported") else None,
        users=multi_turn.get("interaction_config_path") is not None,
        is_gateway=manifest.get("gateway") is True,
        is_replay=manifest["parent"] is not None
        if "parent" in manifest and "imported" not in manifest
        else None,
    )


def _max_turns(multi_turn: dict[str, Any], max_model_len: int | None) -> int | None:
    """The limit of turns that the config sets: 1 without `enable`, a third of the context by
    default.
    """
    if multi_turn.get("enable") is False:
        return 1
    third = None if max_model_len is None or not multi_turn else max(1, max_model_len // 3)
    return _count(multi_turn, "max_assistant_turns") or third


def _cuts(multi_turn: dict[str, Any], entries: list[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """The run's own cut, then those of tools in tools.yaml. None if the run's is not known."""
    tokens, side = (
        _count(multi_turn, "max_tool_response_length"),
        multi_turn.get("tool_response_truncate_side"),
    )
    if tokens is None or side not in SIDES:
        return
    yield tokens, side
    for entry in entries:
        config = _at(entry, "config")
        own, own_side = _count(config, "max_response_tokens") or tokens, config.get("response_side")
        yield own, own_side if own_side in SIDES else side


def _entries(tools: object) -> list[dict[str, Any]]:
    """The entries of a tools.yaml."""
    try:
        document = yaml.safe_load(tools) if isinstance(tools, str) else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    entries = document.get("tools") if isinstance(document, dict) else document
    return (
        [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    )


def _at(value: dict[str, Any], *keys: str) -> dict[str, Any]:
    for key in keys:
        found = value.get(key)
        value = found if isinstance(found, dict) else {}
    return value


def _count(values: dict[str, Any], key: str) -> int | None:
    value = values.get(key)
    return value if type(value) is int and value > 0 else None
