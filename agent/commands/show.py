"""`turntrace show`: one trajectory in the terminal.

Invariant: what a record holds is printed as text; control characters are shown as signs. If the
output is no terminal, it is plain text without colours and line breaks of our own.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.errors import AgentError
from agent.terminal import one_line, visible
from conversations.branches import branch_tree, path_record
from conversations.errors import RecordError
from conversations.messages import content_text

if TYPE_CHECKING:
    from rich.console import Console

from conversations.run.open_run import Run

Record = dict[str, Any]

CUT = 2000
"""Characters of each text that are shown without --full."""
AUTHORS = {
    "prompt": "bright_black",
    "sampled": "bold blue",
    "tool": "green",
    "user": "yellow",
    "template": "magenta",
}
ROLES = {"assistant": "bold blue", "tool": "green", "user": "yellow"}
STATUS = {
    "ok": "green",
    "external": "green",
    "backend_error": "magenta",
    "timeout": "magenta",
    "cancelled": "magenta",
}


def show(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    trajectory: Annotated[
        str, typer.Argument(metavar="ID", help="A trajectory's id: TASK-SAMPLE.")
    ],
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Show the tokens as well, by author.")
    ] = False,
    branch: Annotated[
        int | None,
        typer.Option(min=0, help="Show this branch of a session, from its root; 0 is the trunk."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help=f"Show whole texts, not only {CUT} characters of each.")
    ] = False,
) -> None:
    """Show one trajectory: its messages, calls and rewards, and who wrote its tokens."""
    from rich.console import Console

    from conversations.run.open_run import open_run

    opened = open_run(run)
    record = opened.record(trajectory, check=False)
    if branch is not None and branch > len(record["branches"]):
        raise AgentError(
            f"trajectory {trajectory} has no branch {branch}: it has {len(record['branches'])}"
        )
    screen = Screen(Console(highlight=False, soft_wrap=True), full=full)
    try:
        screen.head(record)
        if record["branches"]:
            screen.branches(record, branch or 0)
        if branch:
            record = path_record(record, branch)
        screen.messages(record)
        screen.authors(record)
        if tokens:
            screen.tokens(opened, record)
    except (LookupError, TypeError, ValueError, AttributeError, RecordError) as error:
        raise AgentError(
            f"trajectory {trajectory} is damaged: {type(error).__name__}: {error}; "
            "turntrace verify says where"
        ) from error


class Screen:
    """Prints parts of a record. `full` leaves texts whole."""

    def __init__(self, console: Console, *, full: bool) -> None:
        self._console = console
        self._full = full

    def head(self, record: Record) -> None:
        """Its reward, stop reason and so on, and its warnings."""
        self._line(("", one_line(str(record["id"])), "bold"))
        facts = {
            "reward": _number(record["reward"]),
            "stop reason": record["stop_reason"],
            "turns": record["num_turns"],
            "time": f"{record['wall_s']:.2f} s",
            "ground truth": _json(record["ground_truth"]),
            "parent": _json(record["parent"]),
        }
        for name, value in facts.items():
            self._line((f"{name:<14}", one_line(str(value))[:200], ""))
        if record["infra_error"]:
            self._line(
                ("", "failed because of infrastructure: no reward, left out of exports", "magenta")
            )
        if not _matches_its_hash(record):
            self._line(
                (
                    "",
                    "does not match its hash: it was changed after it was written; "
                    "turntrace verify says more",
                    "red",
                )
            )
        warnings = (f"{warning['kind']}: {warning['text']}" for warning in record["warnings"])
        for text in filter(None, (record["error"], *warnings)):
            self._line(("", one_line(str(text)), "yellow"))

    def messages(self, record: Record) -> None:
        """The messages, each call with its answer."""
        from conversations.rounds import is_sampled

        calls = {call["call_id"]: call for call in record["tool_calls"]}
        turn = 0
        for message in record["messages"]:
            answered = calls.get(message.get("tool_call_id", ""))
            if answered and answered["response"] == message.get("content"):
                continue  # it is shown with its call
            sampled = is_sampled(message)
            self._title(
                message["role"],
                _turn(record, turn)
                if sampled
                else "given"
                if message["role"] == "assistant"
                else "",
            )
            self._thinking(str(message.get("reasoning_content") or ""))
            self._text(content_text(message.get("content")))
            for call in record["tool_calls"] if sampled else ():
                if call["turn"] == turn:
                    self._call(call)
            turn += sampled

    def branches(self, record: Record, shown: int) -> None:
        """The tree of a session's sequences; `shown` is the number of the one that follows."""
        self._title("sequences", "")
        for one in branch_tree(record):
            mark = ">" if one.number == shown else " "
            self._line(
                (f"{mark} {'  ' * one.depth}{one.number:<3} ", one.reason or "trunk", "yellow"),
                (" ", one_line(one.summary), ""),
            )

    def authors(self, record: Record) -> None:
        """How many tokens each author wrote."""
        totals: Counter[str] = Counter()
        for kind, start, end in record["segments"]:
            totals[kind] += end - start
        self._title("tokens", "")
        for kind, total in totals.items():
            style = AUTHORS.get(kind, "")
            self._line(
                (f"{one_line(str(kind)):<10}", f"{total:>7}", style),
                (f"{100 * total / max(1, totals.total()):>7.1f}%", "", ""),
            )

    def tokens(self, run: Run, record: Record) -> None:
        """The text of the tokens, segment by segment."""
        from conversations.page.pieces import pieces
        from conversations.run.open_run import TOKENIZER

        ids = record["prompt_ids"] + record["response_ids"]
        table = pieces(run.path / TOKENIZER / "tokenizer.json", set(ids))
        texts = dict(zip(table["ids"], table["pieces"], strict=True))
        for kind, start, end in record["segments"]:
            self._title(str(kind), f"{start} to {end}, {end - start} tokens", AUTHORS.get(kind, ""))
            self._print(
                visible("".join(_texts(ids[start:end], texts))).replace("\n", "\u21b5\n"),
                AUTHORS.get(kind, ""),
            )

    def _call(self, call: Record) -> None:
        style = STATUS.get(call["status"], "red")
        self._line(
            ("  ", one_line(str(call["name"])), "bold"),
            (" ", str(call["status"]), style),
            (f"  {_took(call)}", "", ""),
        )
        self._text(_arguments(call["arguments"]), indent="    ")
        self._text(str(call["response"] or "").removesuffix("\n"), indent="  > ")
        if call["error"]:
            self._text(str(call["error"]), indent="  ! ")

    def _title(self, name: str, more: str, style: str | None = None) -> None:
        chosen = ROLES.get(name, "bold") if style is None else style
        self._line(("\n", one_line(name), chosen), (f"  {one_line(more)}" if more else "", "", ""))

    def _thinking(self, text: str) -> None:
        """What the model thought: its length, and the text with --full."""
        if text and self._full:
            self._text(text, indent="  ~ ")
        elif text:
            self._print(f"  ~ thinking: {len(text)} characters; --full shows them", "bright_black")

    def _text(self, text: str, indent: str = "") -> None:
        if not text:
            return
        rest = len(text) - CUT
        shown = visible(text if self._full or rest <= 0 else text[:CUT])
        self._print("\n".join(indent + line for line in shown.split("\n")))
        if not self._full and rest > 0:
            self._print(f"{indent}... {rest} more characters; --full shows them", "bright_black")

    def _line(self, *parts: tuple[str, str, str]) -> None:
        """Parts of (plain text, text, its style) on one line."""
        from rich.text import Text

        self._console.print(
            Text.assemble(
                *(piece for before, text, style in parts for piece in (before, (text, style)))
            )
        )

    def _print(self, text: str, style: str = "") -> None:
        from rich.text import Text

        self._console.print(Text(text, style))


def _matches_its_hash(record: Record) -> bool:
    from conversations.trajectory import record_hash

    try:
        return bool(record["sha256"] == record_hash(record))
    except (ValueError, RecursionError):
        return False


def _turn(record: Record, turn: int) -> str:
    if turn >= len(record["turns"]):
        return ""
    sampled = record["turns"][turn]
    took = "" if sampled["engine_s"] is None else f", {sampled['engine_s']:.2f} s"
    length, before = sampled["end"] - sampled["start"], sampled["prompt_tokens"]
    resumed = [
        f", resumed at token {token}{_weights(version)}"
        for token, version in sampled.get("resumed") or ()
    ]
    return (
        f"turn {turn + 1}: {length} tokens after {before}{took}, {sampled['finish_reason']}"
        f"{''.join(resumed)}"
    )


def _weights(version: str | None) -> str:
    return "" if version is None else f" (weights {version})"


def _took(call: Record) -> str:
    """Times, attempts, how much of the answer was cut, and the step reward."""
    attempts = call["attempts"]
    not_run = "run by the agent program" if call["status"] == "external" else "not run"
    parts = [f"ran {call['run_s']:.3f} s" if attempts else not_run]
    if call["queue_s"] >= 0.0005:
        parts.insert(0, f"queued {call['queue_s']:.3f} s")
    if len(attempts) > 1:
        parts.append(f"{len(attempts)} attempts")
    if attempts and attempts[-1].get("tokens_cut"):
        parts.append(f"{attempts[-1]['tokens_cut']} tokens cut")
    if call["reward"] is not None:
        parts.append(f"step reward {call['reward']:g}")
    return ", ".join(parts)


def _arguments(value: Any) -> str:
    """Texts as they are, other arguments as JSON, a malformed call as it was written."""
    if not isinstance(value, dict):
        return str(value)
    texts = {key: part if isinstance(part, str) else _json(part) for key, part in value.items()}
    return "\n".join(
        f"{key}:\n{text}" if "\n" in text else f"{key}: {text}" for key, text in texts.items()
    )


def _texts(ids: list[int], texts: dict[int, str | list[int]]) -> Iterator[str]:
    """The text of a run of tokens. A character that several tokens make up is put together."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        piece = texts.get(token)
        if piece is None:
            yield f"{decoder.decode(b'', True)}\u27e8{token}\u27e9"
        else:
            yield decoder.decode(
                piece.encode("utf-8", "replace") if isinstance(piece, str) else bytes(piece)
            )
    yield decoder.decode(b"", True)


def _json(value: Any) -> str:
    return (
        "-"
        if value is None
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
