"""What the model says to a coding agent in each case, in the embedded model's call format.

A plan reads the whole prompt, so it answers by what stands in the conversation: the tools that the
program offers, the turns so far, whether the program asks for a summary or a title. `Told` counts
what a plan must do a set number of times, whatever the program makes of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NOTE = "note.txt"
SUBTASK = "COUNT THE FILES in this folder."
DELEGATES = "I delegate."
SUMMARY = "SUMMARY OF THE WORK SO FAR: numbers were listed, and that is all that was to be done."
DONE = "All done.\n"
ODD = "ls -la && echo 'é <b>'"
SHELLS = ("Bash", "bash", "exec_command", "shell_command", "shell", "run_shell_command")
WRITERS = ("Write", "write", "write_file")
EDITORS = ("Edit", "edit", "edit_file")
AGENTS = ("Agent", "Task", "agent", "task", "spawn_agent")
ASKS_FOR_SUMMARY = re.compile(
    "CONTEXT CHECKPOINT|detailed summary of|<state_snapshot>|context summarization|anchored summary"
)
LISTED = "seq -f 'this is line %g of a long list of lines' {} {}"
LINES = 500
"""Lines of a long answer: 22 kB, under every program's own limit, and about 7,500 tokens."""


class NoAnswerError(Exception):
    """The engine gives no answer this time."""


@dataclass(slots=True)
class Told:
    """How often something happened in this run."""

    counts: dict[str, int] = field(default_factory=dict)

    def up_to(self, times: int, what: str) -> bool:
        """Whether it has happened fewer than `times` times; then it happens once more."""
        before = self.counts.get(what, 0)
        if before < times:
            self.counts[what] = before + 1
        return before < times


@dataclass(frozen=True, slots=True)
class Seen:
    """A prompt: its text, the tools' schemas by name, the assistant's turns, the last message."""

    text: str
    tools: dict[str, dict[str, Any]]
    turns: int
    last: str

    @classmethod
    def of(cls, text: str) -> Seen:
        """Reads the text of a prompt, as the embedded model's template writes it."""
        tools: dict[str, dict[str, Any]] = {}
        _, found, rest = text.partition("XML tags:\n<tools>\n")
        if found:
            for line in rest.partition("\n</tools>\n\nFor each function call")[0].splitlines():
                function = json.loads(line)["function"]
                tools[function["name"]] = function.get("parameters") or {}
        turns = text.count("<|im_start|>assistant\n") - 1
        last = text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        return cls(text, tools, turns, last)

    @property
    def folder(self) -> str:
        """The program's working folder, if the prompt names it."""
        found = re.search(r"/[^\s\"'<>`]*/turntrace-[^/\s]+/work", self.text)
        return f"{found[0]}/" if found else ""

    @property
    def asks_for_summary(self) -> bool:
        """Whether the program compacts its context."""
        if self.tools:
            return self.turns > 0 and bool(ASKS_FOR_SUMMARY.search(self.last))
        return bool(ASKS_FOR_SUMMARY.search(self.text))

    def first(self, names: tuple[str, ...]) -> str | None:
        """The first of `names` that is offered."""
        return next((name for name in names if name in self.tools), None)


Plan = Callable[[Seen, Told], str]


def call(name: str, arguments: str | dict[str, Any]) -> str:
    """A call as the model writes it; `arguments` may be JSON text, odd spacing and all."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'


def shell(seen: Seen, command: str, *, odd: bool = False) -> str:
    """A call of the program's shell; `odd`: spacing and escapes that no program writes."""
    name = seen.first(SHELLS)
    if name is None:
        return ""
    arguments = _filled(seen.tools[name], {"command": command, "cmd": command})
    if not odd:
        return call(name, arguments)
    inner = ",  ".join(f"{json.dumps(k)} : {json.dumps(v)}" for k, v in arguments.items())
    return call(name, f"{{{inner} }}")


def written(seen: Seen, text: str) -> str:
    """A call that writes `text` into the note."""
    name = seen.first(WRITERS)
    if name is None:
        return shell(seen, f"echo {text} > {NOTE}")
    path = seen.folder + NOTE
    values = {"file_path": path, "filePath": path, "path": path, "content": f"{text}\n"}
    return call(name, _filled(seen.tools[name], values))


def edited(seen: Seen, old: str, new: str) -> str:
    """A call that edits the note."""
    name = seen.first(EDITORS)
    if name is None:
        return shell(seen, f"sed -i s/{old}/{new}/ {NOTE}")
    path = seen.folder + NOTE
    values: dict[str, Any] = {"file_path": path, "filePath": path, "path": path}
    values |= dict.fromkeys(("old_string", "oldString", "oldText"), old)
    values |= dict.fromkeys(("new_string", "newString", "newText"), new)
    values["edits"] = [{"oldText": old, "newText": new}]
    return call(name, _filled(seen.tools[name], values))


def _filled(schema: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a schema: `values` where it has the key, something plain where it needs one."""
    properties = schema.get("properties") or {}
    found = {key: _as_list(properties[key], values[key]) for key in values if key in properties}
    for key in schema.get("required") or ():
        if key not in found:
            found[key] = _plain(properties.get(key) or {})
    return found


def _as_list(schema: dict[str, Any], value: Any) -> Any:
    is_list = schema.get("type") == "array" and isinstance(value, str)
    return ["bash", "-lc", value] if is_list else value


def _plain(schema: dict[str, Any]) -> Any:
    if schema.get("enum"):
        return schema["enum"][0]
    plain: dict[str, Any] = {"boolean": False, "integer": 1, "number": 1, "array": [], "object": {}}
    return plain.get(str(schema.get("type")), "as the task says")


# ---------------------------------------------------------------------- the cases


def clean(seen: Seen, told: Told) -> str:
    """Odd spacing and blanks, a file written and edited, two calls at once, a text."""
    steps = (
        lambda: f"\n\nI look first. {shell(seen, ODD, odd=True)}",
        lambda: written(seen, "one"),
        lambda: f"Now the edit.\n{edited(seen, 'one', 'two')}",
        lambda: f"{shell(seen, 'sleep 0.3; echo first')}\n{shell(seen, 'echo second')}",
        lambda: DONE,
    )
    return steps[min(seen.turns, len(steps) - 1)]()


def malformed(seen: Seen, told: Told) -> str:
    """A call whose arguments are not JSON, then one of a tool that does not exist."""
    if seen.turns == 0:
        return shell(seen, "echo step")
    if told.up_to(1, "malformed"):
        name = seen.first(SHELLS)
        return (
            f'Broken. <tool_call>\n{{"name": "{name}", "arguments": {{"command": "x"\n</tool_call>'
        )
    if told.up_to(1, "unknown"):
        return call("no_such_tool", {"x": 1})
    return DONE


def steps(seen: Seen, told: Told) -> str:
    """Three short calls, then a text."""
    return shell(seen, f"echo step {seen.turns}") if seen.turns < 3 else DONE


def down(seen: Seen, told: Told) -> str:
    """The engine gives no answer to the second turn, twice."""
    if seen.turns == 1 and told.up_to(2, "down"):
        raise NoAnswerError
    return steps(seen, told)


def long(seen: Seen, told: Told) -> str:
    """Long answers of a tool until the program has compacted its context, at most sixteen."""
    if SUMMARY in seen.text or not told.up_to(16, "long"):
        return DONE
    first = 1000 + seen.turns
    return f"More. {shell(seen, LISTED.format(first, first + LINES))}"


def delegating(seen: Seen, told: Told) -> str:
    """A sub-agent does a part of the work; afterwards the program goes on itself."""
    agent = seen.first(AGENTS)
    if SUBTASK in seen.text and DELEGATES not in seen.text:
        counts = f"I count. {shell(seen, 'ls | wc -l')}"
        return counts if told.up_to(1, "inside") else "There are 0 files."
    if agent is None:
        return steps(seen, told)
    if told.up_to(1, "delegated"):
        values = {"description": "count files", "prompt": SUBTASK, "message": SUBTASK}
        values |= {"subagent_type": _kind(seen, seen.tools[agent])}
        return f"{DELEGATES} {call(agent, _filled(seen.tools[agent], values))}"
    started = re.search(r'"agent_id": ?"([^"]+)"', seen.last)
    if started and "wait_agent" in seen.tools and told.up_to(1, "waited"):
        return call("wait_agent", {"targets": [started[1]], "timeout_ms": 20_000})
    return shell(seen, "echo back") if told.up_to(1, "back") else DONE


def _kind(seen: Seen, schema: dict[str, Any]) -> Any:
    kind = (schema.get("properties") or {}).get("subagent_type")
    if kind is None or "enum" in kind:
        return kind and kind["enum"][0]
    return "general-purpose" if "general-purpose" in seen.text else "general"


CASES: dict[str, Plan] = {
    "clean": clean,
    "malformed": malformed,
    "drop": steps,
    "503": down,
    "overflow": long,
    "sub-agent": delegating,
    "compaction": long,
}


def said(case: str, prompt: str, told: Told) -> str:
    """What the model says in a case. Raises NoAnswerError if it says nothing this time."""
    seen = Seen.of(prompt)
    if seen.asks_for_summary:
        told.up_to(1 << 30, "summary")
        return f"<summary>\n{SUMMARY}\n</summary>"
    if seen.first(SHELLS) is None and seen.first(AGENTS) is None:
        return "A short title"
    return CASES[case](seen, told)
