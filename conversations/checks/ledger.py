"""The ledger against the messages: one line for each call, in order."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from conversations.checks.facts import RunFacts
from conversations.checks.finding import Finding, differs, first_difference, quoted, show_difference
from conversations.checks.images import unplaced_grids
from conversations.messages import Message, content_text, image_parts, tool_message
from conversations.rounds import Round, Rounds
from conversations.run.hash_store import HashStore
from conversations.template import ChatTemplate
from conversations.tokens import TOOL, USER
from conversations.trajectory import ToolCallRecord, Trajectory, canonical_json
from conversations.truncate import cut_to_tokens, is_cut_of

_NEVER_RUN = frozenset({"malformed", "unknown_tool", "invalid_arguments", "rejected"})
"""Statuses of calls that no tool saw."""


def ledger_findings(
    trajectory: Trajectory, parts: Rounds, facts: RunFacts, *, trusted: int = 0
) -> Iterator[Finding]:
    """Calls without a line, lines without a call, and differences of line, call and answer.

    How the first `trusted` turns were answered is not checked: that is another sequence's.
    """
    calls = [
        (k, call)
        for k, each in enumerate(parts.rounds)
        for call in each.message.get("tool_calls", [])
    ]
    found = [(line.turn, line.call_id) for line in trajectory.tool_calls]
    expected = [(k, str(call.get("id"))) for k, call in calls]
    if found != expected:
        index = first_difference(found, expected)
        (turn, one), (other, two) = (
            side[index] if index < len(side) else (None, None) for side in (found, expected)
        )
        what = differs(f"line {index} of the ledger is not for the call that was made", one, two)
        yield Finding(
            what if turn == other or None in (turn, other) else differs(what, turn, other),
            turn if other is None else other,
        )
        return
    offered = {tool["function"]["name"] for tool in trajectory.tools}
    says_offered = bool(offered) or facts.imported is None  # a source may not say what was offered
    for line, (k, call) in zip(trajectory.tool_calls, calls, strict=True):
        if k < trusted:
            continue
        yield from _at(line, _call_findings(line, call))
        if says_offered:
            yield from _at(line, _offer_findings(line, offered))
        yield from _at(line, _attempt_findings(line, replayed=trajectory.parent is not None))
        if not facts.is_gateway:
            yield from _at(line, _cut_findings(line, facts))
    reply_findings = _client_findings if facts.is_gateway else _reply_findings
    for k, each in list(enumerate(parts.rounds))[trusted:]:
        yield from reply_findings(
            k, each, [line for line in trajectory.tool_calls if line.turn == k]
        )


def _at(line: ToolCallRecord, findings: Iterator[str]) -> Iterator[Finding]:
    return (Finding(f"{line.call_id}: {what}", line.turn) for what in findings)


def _call_findings(line: ToolCallRecord, call: Message) -> Iterator[str]:
    function, malformed = call["function"], call.get("malformed") is True
    if line.name != function["name"]:
        yield differs("the ledger's name is not the call's", line.name, function["name"])
    written = line.arguments if isinstance(line.arguments, str) else canonical_json(line.arguments)
    meant = function["arguments"] if malformed else _canonical(function["arguments"])
    if written != meant or isinstance(line.arguments, str) != malformed:
        yield f"the ledger's arguments are not the call's, {show_difference(written, meant)}"
    if (line.status == "malformed") != malformed:
        yield differs(
            "the status",
            line.status,
            "malformed" if malformed else "that of a call that could be read",
        )


def _offer_findings(line: ToolCallRecord, offered: set[str]) -> Iterator[str]:
    """A call of a tool that was not offered is an unknown tool's, and no other is."""
    if line.status not in ("malformed", "rejected", "cancelled"):
        known = line.name in offered
        if known == (line.status == "unknown_tool"):
            yield differs(
                f"the status of a tool that was {'' if known else 'not '}offered",
                line.status,
                "another" if known else "unknown_tool",
            )


def _canonical(arguments: str) -> str:
    """The call's arguments as the ledger writes them; text that is no JSON stays as it is."""
    try:
        return canonical_json(json.loads(arguments))
    except (ValueError, RecursionError):
        return arguments


def _attempt_findings(line: ToolCallRecord, *, replayed: bool) -> Iterator[str]:
    """Differences between a line and its attempts: the sums of their times, the last status.

    A call that was never run has no attempts. A replay may answer a call from the record, without
    an attempt.
    """
    for name in ("queue_s", "run_s"):
        total = math.fsum(getattr(attempt, name) for attempt in line.attempts)
        if not math.isclose(getattr(line, name), total, rel_tol=1e-9, abs_tol=1e-9):
            yield differs(f"{name} is not the sum of its attempts'", getattr(line, name), total)
    if line.attempts and line.attempts[-1].status != line.status:
        yield differs("the status is not the last attempt's", line.status, line.attempts[-1].status)
    if line.attempts and line.status in _NEVER_RUN:
        yield differs(
            f"the number of attempts at a call that was {line.status}", len(line.attempts), 0
        )
    if not (line.attempts or replayed) and line.status in ("ok", "tool_error", "timeout"):
        yield differs(
            f"the number of attempts at a call that ended with {line.status}", 0, "at least 1"
        )


def _cut_findings(line: ToolCallRecord, facts: RunFacts) -> Iterator[str]:
    """A response is the whole text if it fits, else the cut that the config asks for."""
    if line.response is None:
        if line.full_response is not None:
            yield "there is a full_response, and no response"
        return
    whole = line.response if line.full_response is None else line.full_response
    size = line.attempts[-1].bytes if line.attempts else None
    if size is not None and size != len(whole.encode(errors="surrogatepass")):
        yield differs(
            "the tool's answer has another number of bytes than its last attempt says",
            len(whole.encode(errors="replace")),
            size,
        )
    if facts.template is None or not facts.cuts:
        return
    cuts = [
        cut_to_tokens(whole, tokens, side, facts.template)
        for tokens, side in dict.fromkeys(facts.cuts)
    ]
    allowed = [(None, 0) if cut is None else (cut.text, cut.tokens_cut) for cut in cuts]
    found = None if line.full_response is None else line.response
    tokens_cut = [tokens for text, tokens in allowed if text == found]
    if not tokens_cut and facts.cuts_in_code and (found is None or is_cut_of(found, whole)):
        return
    if not tokens_cut:
        expected = allowed[0][0] or "no cut at all"
        difference = show_difference(line.response, expected)
        yield f"the response is not the whole text or the cut that the config says, {difference}"
    elif line.attempts and line.attempts[-1].tokens_cut not in tokens_cut:
        yield differs("tokens_cut of the last attempt", line.attempts[-1].tokens_cut, tokens_cut[0])


def _reply_findings(k: int, each: Round, lines: list[ToolCallRecord]) -> Iterator[Finding]:
    """The messages that answer a turn are the responses of its lines, in order."""
    if not each.replies or each.kind == USER:
        return
    expected = [_message(line) for line in lines]
    replies = [reply for reply in each.replies if reply["role"] == TOOL]
    if len(expected) != len(replies):
        yield Finding(
            differs(
                "the number of tool messages is not that of the turn's calls",
                len(replies),
                len(expected),
            ),
            k,
        )
        return
    for line, found, wanted in zip(lines, replies, expected, strict=True):
        if found != wanted:
            key = next(
                key
                for key in ("tool_call_id", "name", "content", *found)
                if found.get(key) != wanted.get(key)
            )
            one, two = (
                value if isinstance(value, str) else quoted(value)
                for value in (found.get(key), wanted.get(key))
            )
            difference = show_difference(one, two)
            what = f"the tool message's {quoted(key)[1:-1]} is not the ledger's, {difference}"
            yield Finding(f"{line.call_id}: {what}", k)
        if line.response is None:
            yield Finding(f"{line.call_id}: it was answered, and the ledger has no response", k)


def _client_findings(k: int, each: Round, lines: list[ToolCallRecord]) -> Iterator[Finding]:
    """A line's response is what the client's tool message for it says; it may answer otherwise."""
    replies = {reply.get("tool_call_id"): reply for reply in each.replies if reply["role"] == TOOL}
    for line in lines:
        reply = replies.get(line.call_id)
        found = None if reply is None else content_text(reply["content"], "")
        if line.response != found:
            what = differs("the response is not the client's", line.response, found)
            yield Finding(f"{line.call_id}: {what}", k)
        shown = [str(part["image"]) for part in image_parts([reply] if reply else [])]
        if shown != [f"sha256:{sha256}" for sha256 in line.images]:
            what = differs("the images are not the client's", line.images, shown)
            yield Finding(f"{line.call_id}: {what}", k)


def response_tokens(
    lines: list[ToolCallRecord],
    turn: Message | None,
    template: ChatTemplate,
    images: HashStore | None = None,
) -> int:
    """The number of tokens that the responses of a turn's calls would add.

    `images` are the run's. Raises TemplateError if the template refuses them, ImageError if the
    images among them cannot be read.
    """
    count = len(template.delta([_message(line) for line in lines], turn=turn))
    hashes = [sha256 for line in lines for sha256 in line.images]
    if not hashes or (processor := template.images) is None:
        return count
    grids = unplaced_grids(hashes, processor, images)
    return count + sum(processor.tokens(grid) - 1 for grid in grids)


def _message(line: ToolCallRecord) -> Message:
    images = [f"sha256:{sha256}" for sha256 in line.images]
    return tool_message(line.response or "", call_id=line.call_id, name=line.name, images=images)
