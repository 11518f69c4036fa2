"""The branches of a record: each checked like a conversation, and the sums over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from conversations.branches import check_parents, first_turn, is_aside, path_of, sequences
from conversations.checks.facts import RunFacts
from conversations.checks.finding import Finding, differs
from conversations.checks.sequence import sequence_findings
from conversations.errors import RecordError
from conversations.rounds import split_rounds
from conversations.trajectory import Branch, Trajectory


def branch_findings(
    record: Trajectory, facts: RunFacts, *, with_text: bool = True
) -> Iterator[Finding]:
    """What is wrong with the branches. Turns and tokens are counted along a branch's path.

    Without `with_text`, messages and ledgers are not compared.
    """
    damaged = {n: what for n, one in enumerate(record.branches, 1) if (what := _damage(one))}
    for number, what in damaged.items():
        yield Finding(f"branch {number}: {what}")
    if damaged:
        return
    try:
        check_parents(record)
    except RecordError as error:
        yield Finding(str(error))
        return
    for number in range(1, len(record.branches) + 1):
        yield from _caller(record, number)
        yield from (
            replace(finding, what=f"branch {number}: {finding.what}")
            for finding in _findings(record, number, facts, with_text)
        )
    yield from _sums(record)


def _damage(branch: Branch) -> str:
    """Why a branch cannot be put behind its parent; empty if it can."""
    length = len(branch.response_ids)
    for name in ("response_mask", "response_logprobs"):
        if len(getattr(branch, name)) != length:
            found = len(getattr(branch, name))
            return differs(f"{name} has another length than response_ids", found, length)
    if not branch.turns:
        return "it has no turn"
    position, total = len(branch.prompt_ids), len(branch.prompt_ids) + length
    for turn in branch.turns:
        if not position <= turn.start < turn.end <= total:
            return "its turns do not lie within its tokens, in order"
        position = turn.end
    return ""


def _findings(
    record: Trajectory, number: int, facts: RunFacts, with_text: bool
) -> Iterator[Finding]:
    path, own = path_of(record, number), first_turn(record, number)
    begin = path.turns[own - 1].end if own else 0
    found = sequence_findings(
        path,
        split_rounds(path.messages),
        facts,
        with_text=with_text,
        trusted=own,
        is_compacted=True,
    )
    for finding in found:
        if not _is_parents(finding, own, begin):
            yield finding


def _is_parents(finding: Finding, own: int, begin: int) -> bool:
    """Whether a finding is about the parents' part: the turns below `own`, the tokens to `begin`.

    The messages after the last of those turns are the branch's.
    """
    if finding.token is not None:
        return finding.token < begin
    return finding.turn is not None and finding.turn < own - 1


def _caller(record: Trajectory, number: int) -> Iterator[Finding]:
    """The call that asked for a tool's own branch stands in the ledger."""
    branch = record.branches[number - 1]
    if not is_aside(branch):
        return
    call = branch.client["call"]
    wanted: object = branch.client.get("branch"), call, branch.client.get("tool")
    known: list[object] = [
        (place, line.call_id, line.name)
        for place, part in enumerate(sequences(record))
        for line in part.tool_calls
    ]
    if wanted not in known:
        yield Finding(f"branch {number}: no call {str(call)[:40]!r} asked for it")


def _sums(record: Trajectory) -> Iterator[Finding]:
    """Each sampled token has mask 1 in one sequence, and each turn stands in one."""
    parts = sequences(record)
    trained = sum(sum(part.response_mask) for part in parts)
    sampled = sum(turn.end - turn.start for part in parts for turn in part.turns)
    if trained != sampled:
        yield Finding(differs("the tokens with mask 1 in all sequences", trained, sampled))
    ids = Counter(
        turn.response_id for part in parts for turn in part.turns if turn.response_id is not None
    )
    for response_id, count in ids.items():
        if count > 1:
            yield Finding(differs(f"the turns served as {response_id[:40]}", count, 1))
