"""Which tokens are the body of a tool's answer: what a tool said, without the scaffold around it.

The scaffold is what the template writes around any answer (`<tool_response>`, role and end tokens).
It is found by rendering other texts in the answers' place, never by what the answer looks like.
"""

from __future__ import annotations

from collections.abc import Sequence

from conversations.errors import TemplateError
from conversations.messages import Message
from conversations.rounds import is_sampled
from conversations.template import ChatTemplate
from conversations.tokens import TOOL
from conversations.trajectory import Trajectory

_MARK = "\u2406{}\u2406"
"""Stands in an answer's place. No answer of ours holds it: see `_scaffold`."""


def observation_mask(one: Trajectory, template: ChatTemplate) -> list[int] | None:
    """1 for each token of `prompt_ids + response_ids` that holds text of a tool answer's body.

    A token that spans a body's edge holds some of it and counts.
    Answers to sampled calls count; what the task or a tool's creation put into the prompt does not.
    None if the scaffold cannot be told from the answers.
    """
    ids = one.prompt_ids + one.response_ids
    mask = [0] * len(ids)
    blocks = [
        (start, end)
        for kind, start, end in one.segments
        if kind == TOOL and start >= len(one.prompt_ids)
    ]
    rounds = list(_answered_turns(one.messages))
    if len(blocks) > len(rounds):
        return None
    for (start, end), (turn, answers) in zip(blocks, rounds, strict=False):
        places = _body_tokens(ids[start:end], turn, answers, template)
        if places is None:
            return None
        for place in places:
            mask[start + place] = 1
    return mask


def _answered_turns(messages: Sequence[Message]) -> list[tuple[Message, list[Message]]]:
    """Each sampled message that tools answered, with their messages."""
    found: list[tuple[Message, list[Message]]] = []
    turn: Message | None = None
    for message in messages:
        if message["role"] == "assistant":
            turn = message if is_sampled(message) else None
        elif message["role"] == TOOL and turn is not None:
            if not found or found[-1][0] is not turn:
                found.append((turn, []))
            found[-1][1].append(message)
    return found


def _body_tokens(
    block: list[int], turn: Message, answers: list[Message], template: ChatTemplate
) -> list[int] | None:
    """The places in a block of the tokens that hold text of a body."""
    scaffold = _scaffold(turn, answers, template)
    text = template.decode(block)
    if scaffold is None or not text.startswith(scaffold[0]):
        return None
    spans: list[tuple[int, int]] = []
    place = len(scaffold[0])
    for answer, after in zip(answers, scaffold[1:], strict=True):
        end = _end_of_body(
            text, place, str(answer["content"]), after, is_last=answer is answers[-1]
        )
        if end is None:
            return None
        spans.append((place, end))
        place = end + len(after)
    if place != len(text):
        return None
    return [
        place
        for place, (start, end) in enumerate(_offsets(block, text, template))
        if any(start < high and end > low for low, high in spans)
    ]


def _end_of_body(text: str, place: int, body: str, after: str, *, is_last: bool) -> int | None:
    """Where a body ends that starts at `place`: as it was said, or as the template trims it."""
    if is_last:
        return len(text) - len(after) if text.endswith(after) else None
    for said in (body, body.strip()):
        if text.startswith(said + after, place):
            return place + len(said)
    return None


def _scaffold(turn: Message, answers: list[Message], template: ChatTemplate) -> list[str] | None:
    """The texts before, between and after the answers; one more than there are answers."""
    marks = [_MARK.format(number) for number in range(len(answers))]
    marked = [{**answer, "content": mark} for answer, mark in zip(answers, marks, strict=True)]
    try:
        pieces = template.delta(marked, TOOL, turn=turn).pieces
    except TemplateError:
        return None
    text = "".join(template.decode(ids) for kind, ids in pieces if kind == TOOL)
    parts: list[str] = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _offsets(block: list[int], text: str, template: ChatTemplate) -> list[tuple[int, int]]:
    """(start, end) characters of each token of a block in its text."""
    encoded = template.encoding(text)
    if encoded.ids == block:
        return list(encoded.offsets)
    ends = [len(template.decode(block[: count + 1])) for count in range(len(block))]
    return list(zip([0, *ends[:-1]], ends, strict=True))
