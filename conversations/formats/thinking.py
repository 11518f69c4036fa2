"""Thoughts in a sampled turn: the one rule for all call formats.

A turn's thought is what stands in the format's tags (mostly `<think> ... </think>`) at its
beginning, or from its beginning if the generation prompt opened the tag; without a closing tag it
is the whole turn. It becomes
`reasoning`, and `content` is the rest, nothing stripped: both are views of `raw`. A format with
thoughts of its own form (gpt-oss' channels) takes them out itself.

Calls inside thoughts are thoughts: a model that considers a call has not made it. A run may choose
otherwise (`rollout.turntrace.calls_in_thoughts`); then the calls in a thought come first, in order.
"""

from __future__ import annotations

from conversations.formats.blocks import THINK, Thought
from conversations.formats.format import CallFormat, ParameterTypes
from conversations.messages import ParsedTurn


def without_thought(parsed: ParsedTurn, tags: Thought = THINK, *, in_think: bool) -> ParsedTurn:
    """The turn with its thought, which stands in `tags`, taken out of the content."""
    if parsed.reasoning is not None or not (in_think or parsed.content.startswith(tags.open)):
        return parsed
    thought, rest = _split(parsed.content, tags, in_think=in_think)
    return ParsedTurn(rest, parsed.calls, thought)


def with_calls_of_thought(
    form: CallFormat, raw: str, types: ParameterTypes, *, in_think: bool
) -> ParsedTurn:
    """The turn read so that the calls inside its thought are calls too."""
    if not in_think and not raw.startswith(form.thought.open):
        return form.parse(raw, types)
    thought, rest = _split(raw, form.thought, in_think=in_think)
    inside, outside = form.parse(thought, types), form.parse(rest, types)
    reasoning = inside.content + (outside.reasoning or "")
    return ParsedTurn(outside.content, inside.calls + outside.calls, reasoning)


def _split(text: str, tags: Thought, *, in_think: bool) -> tuple[str, str]:
    start = 0 if in_think and not text.startswith(tags.open) else len(tags.open)
    thought, _, rest = text[start:].partition(tags.close)
    return thought, rest
