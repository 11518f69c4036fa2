"""Tokens against messages: prompt and deltas rendered again, sampled turns decoded and parsed
again.

The record is rebuilt from its messages and sampled ids; ids and segments must come out the same.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from itertools import islice
from typing import Any

from conversations.checks.finding import Finding, differs, first_difference, quoted, show_difference
from conversations.checks.tokens import turn_at
from conversations.errors import ImageError, TemplateError
from conversations.messages import Message, assistant_message, image_parts
from conversations.rounds import Round, Rounds, given_length
from conversations.template import ChatTemplate, Delta, Piece
from conversations.tokens import TEMPLATE, TokenSequence
from conversations.trajectory import Trajectory, canonical_json


def text_findings(
    trajectory: Trajectory,
    parts: Rounds,
    template: ChatTemplate,
    *,
    trust_prompt: bool = False,
    trusted: int = 0,
) -> Iterator[Finding]:
    """Differences between tokens and messages. The turns must lie within the tokens, in order.

    `trust_prompt` takes the prompt as recorded: one with a date in it cannot be rendered again.
    `trusted` turns and all before their ends are taken so too: they are another sequence's.
    """
    before = parts.opening[-1] if parts.opening else None
    for k, each in enumerate(parts.rounds[: len(trajectory.turns)]):
        if k >= trusted:
            yield from _turn_findings(trajectory, k, each.message, before, template)
        before = each.replies[-1] if each.replies else each.message
    try:
        yield from _rebuilt_findings(trajectory, parts, template, trust_prompt, trusted)
    except (ImageError, TemplateError) as error:
        yield Finding(f"cannot be rendered again: {error}")


# ---------------------------------------------------------------------- one sampled turn


def _turn_findings(
    trajectory: Trajectory,
    k: int,
    message: Message,
    before: Message | None,
    template: ChatTemplate,
) -> Iterator[Finding]:
    """`raw` is the text of the sampled ids, content and calls are what parsing it gives."""
    turn, prompt = trajectory.turns[k], len(trajectory.prompt_ids)
    sampled = trajectory.response_ids[turn.start - prompt : turn.end - prompt]
    raw, decoded = message["raw"], template.raw(sampled)
    if raw != decoded:
        token = turn.start + _departure(sampled, raw, template)
        yield Finding(
            f"raw is not the text of the sampled tokens, {show_difference(raw, decoded)}", k, token
        )
    has_view = "reasoning_content" in message  # a record of turntrace/1 has thoughts in its content
    parsed = template.read(raw, trajectory.tools, after=before, split_thought=has_view)
    expected = assistant_message(
        raw, parsed, [f"call_{k}_{index}" for index in range(len(parsed.calls))]
    )
    if message != expected or canonical_json(message) != canonical_json(
        expected
    ):  # 1 == True == 1.0
        keys = sorted(
            key
            for key in {*message, *expected}
            if canonical_json(message.get(key)) != canonical_json(expected.get(key))
        )
        for key in keys:
            found, parsed_value = (
                value if isinstance(value, str) else canonical_json(value)
                for value in (message.get(key), expected.get(key))
            )
            difference = show_difference(found, parsed_value)
            yield Finding(f"{quoted(key)[1:-1]} is not what parsing raw gives, {difference}", k)


def _departure(ids: list[int], raw: str, template: ChatTemplate) -> int:
    """The first token whose text is not the one that stands in `raw` there."""

    def departs(count: int) -> bool:
        return not raw.startswith(template.decode(ids[:count]).rstrip("\ufffd"))

    return max(0, bisect.bisect_left(range(len(ids) + 1), True, key=departs) - 1) if ids else 0


# ---------------------------------------------------------------------- the whole of it


def _rebuilt_findings(
    trajectory: Trajectory,
    parts: Rounds,
    template: ChatTemplate,
    trust_prompt: bool,
    trusted: int,
) -> Iterator[Finding]:
    """The first token, or else the first segment, that the messages do not give."""
    ids = trajectory.prompt_ids + trajectory.response_ids
    if not ids:  # the prompt could not be rendered, or was never reached
        return
    prompt = (
        _recorded_prompt(trajectory, ids)
        if trust_prompt or trusted
        else _prompt(trajectory, parts.opening, template)
    )
    grids = iter([tuple(image["grid"]) for image in trajectory.images])
    if not (trust_prompt or trusted):
        prompt = _placed(prompt, parts.opening, template, grids)
    rebuilt = _rebuilt(trajectory, parts, template, ids, prompt, trusted, grids)
    if rebuilt.ids != ids:
        token = first_difference(ids, rebuilt.ids)
        found, expected = (
            template.decode(side[token : token + 8]) if token < len(side) else "the end"
            for side in (ids, rebuilt.ids)
        )
        one, two = (side[token] if token < len(side) else None for side in (ids, rebuilt.ids))
        what = (
            "the token is not the one that the messages render to, "
            f"found {quoted(one)} {quoted(found)}, expected {quoted(two)} {quoted(expected)}"
        )
        yield Finding(what, turn_at(trajectory, token), token)
        return
    segments, expected_segments = trajectory.segments, rebuilt.segments()
    if segments != expected_segments:
        place = first_difference(segments, expected_segments)
        found_one, expected_one = (
            side[place] if place < len(side) else ("", len(ids), 0)
            for side in (segments, expected_segments)
        )
        token = min(found_one[1], expected_one[1])
        what = differs(
            "the segment is not the one that the messages render to", found_one, expected_one
        )
        yield Finding(what, turn_at(trajectory, token), token)


def _rebuilt(
    trajectory: Trajectory,
    parts: Rounds,
    template: ChatTemplate,
    ids: list[int],
    prompt: list[Piece],
    trusted: int,
    grids: Iterator[Any],
) -> TokenSequence:
    """What the loop would have appended: the prompt, then sampled turns and rendered replies."""
    sequence = TokenSequence()
    for kind, piece in prompt:
        sequence.append(kind, piece)
    for k, (turn, each) in enumerate(zip(trajectory.turns, parts.rounds, strict=False)):
        sampled = ids[turn.start : turn.end]
        sequence.append_sampled(sampled, [0.0] * len(sampled))
        if k + 1 < trusted:
            pieces = _recorded(trajectory, ids, turn.end, trajectory.turns[k + 1].start)
        else:
            pieces = _answered(each, sampled, template, with_tools=bool(trajectory.tools))
            pieces = _placed(pieces, each.replies, template, grids)
        for kind, piece in pieces:
            sequence.append(kind, piece)
    return sequence


def _placed(
    pieces: list[Piece], messages: list[Message], template: ChatTemplate, grids: Iterator[Any]
) -> list[Piece]:
    """Rendered pieces of messages with their images, whose grids come next. Raises ImageError."""
    count = sum(1 for _ in image_parts(messages))
    return template.place(pieces, list(islice(grids, count)))[0]


def _prompt(trajectory: Trajectory, opening: list[Message], template: ChatTemplate) -> list[Piece]:
    """The opening, rendered: the task's messages, then what tools said at their creation."""
    given = given_length(opening, trajectory.tools, trajectory.segments, len(trajectory.prompt_ids))
    return template.prompt(opening[:given], trajectory.tools, opening[given:])


def _recorded_prompt(trajectory: Trajectory, ids: list[int]) -> list[Piece]:
    return _recorded(trajectory, ids, 0, len(trajectory.prompt_ids))


def _recorded(trajectory: Trajectory, ids: list[int], begin: int, stop: int) -> list[Piece]:
    """The segments between two tokens, as they stand in the record."""
    return [
        (kind, ids[start:end])
        for kind, start, end in trajectory.segments
        if start >= begin and end <= stop
    ]


def _answered(
    each: Round, sampled: list[int], template: ChatTemplate, *, with_tools: bool
) -> list[Piece]:
    """The end token that the turn may lack, and its replies."""
    if not each.replies:
        return []
    missing = template.missing_end(sampled[-1] if sampled else None, each.kind)
    return [
        *([(TEMPLATE, missing)] if missing else []),
        *_delta(each, template, with_tools).pieces,
    ]


def _delta(each: Round, template: ChatTemplate, with_tools: bool) -> Delta:
    if len({reply["role"] for reply in each.replies}) == 1:
        return template.delta(each.replies, each.kind, turn=each.message)
    return template.follow(each.replies, each.message, with_tools=with_tools)
