"""Runs coding agents of others, unmodified, against a gateway: `python -m
tests.agent.gateway.programs [NAME...]`.

Fetches each program from npm into a folder outside the repo, as the table in `fetched.py` says, and
runs it with `turntrace run --agent` in each case of `plans.py`. The engine is scripted and speaks
the embedded model's format over SGLang's HTTP API; the rest is what a user has. Prints one line a
case, and ends with 1 if one is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from starlette.responses import JSONResponse, Response

from conversations.branches import rows
from conversations.checks.finding import Defect
from conversations.open_run import open_run
from conversations.trajectory import Branch, Trajectory
from conversations.verify import verify_run
from tests.agent.gateway.programs.fetched import PROGRAMS, AgentProgram, fetch
from tests.agent.gateway.programs.plans import CASES, DONE, NOTE, NoAnswerError, Told, said
from tests.agent.native_api import Behaviour, Server, in_a_thread
from tests.helpers import ROOT, hermes_template, logprobs

HERE = Path(__file__).parent
TASK = "List the files of this folder, then do what is to be done."
TIMEOUT_S = 400
ROOM = 40_000
"""Tokens that fit after the program's first prompt where its context is to overflow, and those of
the window that it is told where it is to compact its context itself.
"""


@dataclass(slots=True)
class Outcome:
    """How one case of one program went. `problems` is empty if it went as it must.

    `refused` counts the requests that were refused.
    """

    problems: list[str]
    record: Trajectory | None
    told: Told
    exit_code: int | None = None
    refused: int = 0

    @property
    def branches(self) -> str:
        """Branches by reason."""
        if self.record is None:
            return ""
        found = Counter(branch.reason for branch in self.record.branches)
        return ", ".join(f"{reason} {count}" for reason, count in sorted(found.items()))

    @property
    def turns(self) -> int:
        """Turns of all branches."""
        return sum(len(one.turns) for one in _sequences(self.record)) if self.record else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PROGRAMS))
    parser.add_argument("--case", action="append", choices=CASES, help="Repeatable.")
    parser.add_argument("--into", type=Path, default=_cache(), help="Where programs are kept.")
    parser.add_argument("--out", type=Path, help="Where run folders are kept.")
    given = parser.parse_args()
    if unknown := set(given.names) - set(PROGRAMS):
        parser.error(f"no such program: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        cases = given.case or list(CASES)
        good = [_all_cases(name, cases, given.into, out) for name in given.names or PROGRAMS]
    sys.exit(not all(good))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turntrace-programs"


def _all_cases(name: str, cases: list[str], into: Path, out: Path) -> bool:
    program = PROGRAMS[name]
    folder = fetch(program, into)
    first_prompt = 0
    is_good = True
    for case in cases:
        if case in program.without:
            print(f"{_head(program, case)} the program has none", flush=True)
            continue
        if case in ("overflow", "compaction") and not first_prompt:
            first_prompt = _first_prompt(_run(program, folder, "503", out / name / "measured", 0))
        started = perf_counter()
        outcome = _run(program, folder, case, out / name / case, first_prompt)
        if case == "clean":
            first_prompt = _first_prompt(outcome)
        _print(program, case, outcome, perf_counter() - started)
        is_good = is_good and not outcome.problems
    return is_good


def _first_prompt(outcome: Outcome) -> int:
    if outcome.record is None:
        raise SystemExit(f"no record to measure the first prompt with: {outcome.problems}")
    return len(outcome.record.prompt_ids)


def _print(program: AgentProgram, case: str, outcome: Outcome, wall_s: float) -> None:
    verdict = "NOT as it must be" if outcome.problems else "as it must be"
    counts = f"exit {outcome.exit_code}, {outcome.turns} turns, {outcome.refused} refused"
    line = f"{_head(program, case)} {verdict}: {counts}, branches: {outcome.branches or 'none'}"
    print(f"{line} ({wall_s:.0f} s)", flush=True)
    for problem in outcome.problems:
        print(f"    {problem}", flush=True)


def _head(program: AgentProgram, case: str) -> str:
    return f"{program.name:9} {program.version:9} {case:11}"


# ---------------------------------------------------------------------- one run


def _run(program: AgentProgram, folder: Path, case: str, out: Path, first_prompt: int) -> Outcome:
    out.parent.mkdir(parents=True, exist_ok=True)
    told = Told()
    server = Server(_speaking(case, told))
    with in_a_thread(server):
        done = _turntrace(program, folder, case, out, server.url, first_prompt)
    (out.parent / f"{case}.log").write_text(done.stdout + done.stderr)
    problems = []
    if done.returncode:
        problems.append(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-600:]}")
    record = _record(out, problems)
    outcome = Outcome(problems, record, told)
    if record:
        outcome.exit_code = (record.extra or {}).get("session", {}).get("exit_code")
        warned = [one.text for one in record.warnings if one.kind == "refused_requests"]
        outcome.refused = int(warned[0].split()[0]) if warned else 0
        problems += _wrong(program, case, outcome, record)
    return outcome


def _speaking(case: str, told: Told) -> Behaviour:
    template = hermes_template()

    async def answer(server: Server, body: dict[str, Any]) -> Response:
        prompt = template.decode(body["input_ids"])
        try:
            text = said(case, prompt, told)
        except NoAnswerError:
            return JSONResponse({"error": "the engine is down"}, 400)  # no use to ask it again
        ids = [*template.encode(text), template.end_id]
        values = [[value, token, None] for value, token in zip(logprobs(ids), ids, strict=True)]
        meta = {
            "id": body["rid"],
            "finish_reason": {"type": "stop"},
            "prompt_tokens": len(body["input_ids"]),
            "output_token_logprobs": values,
        }
        return JSONResponse({"output_ids": ids, "meta_info": meta})

    return answer


def _turntrace(
    program: AgentProgram, folder: Path, case: str, out: Path, url: str, first_prompt: int
) -> subprocess.CompletedProcess[str]:
    tasks = out.parent / "tasks.jsonl"
    tasks.write_text(json.dumps({"id": case, "prompt": TASK}) + "\n")
    length = first_prompt + ROOM if case == "overflow" else 400_000
    settings = {
        "name": "sglang_server",
        "server.urls": [url],
        "prompt_length": 1,
        "max_model_len": length,
        "response_length": length - 1,
        "multi_turn.max_assistant_turns": 100,
        "turntrace.conversation_deadline_s": TIMEOUT_S,
    }
    least = max(first_prompt + ROOM, program.least_window)
    window = least if case == "compaction" else 400_000
    command = f"{HERE / program.name}.sh {{prompt}}"
    if case == "drop":
        command = f"{sys.executable} {HERE / 'relay.py'} {command}"
    turntrace = [sys.executable, "-c", "from agent.entry import main; main()"]
    given = [f"--set=rollout.{key}={json.dumps(value)}" for key, value in settings.items()]
    return subprocess.run(
        [*turntrace, "run", tasks, "--out", out, "--agent", command, *given],
        env={
            **os.environ,
            "PATH": f"{folder / 'node_modules' / '.bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CONTEXT_WINDOW": str(window),
            "NO_COLOR": "1",
            "DO_NOT_TRACK": "1",
        },
        cwd=out.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S + 60,
    )


# ---------------------------------------------------------------------- what must be


def _record(out: Path, problems: list[str]) -> Trajectory | None:
    defects: list[Defect] = []
    try:
        verify_run(out, on_defect=defects.append)
        records = list(open_run(out))
    except Exception as error:
        problems.append(f"no run folder: {error}")
        return None
    problems += [f"verify: {defect}" for defect in defects]
    if len(records) != 1:
        problems.append(f"{len(records)} records instead of one")
    return records[0] if records else None


def _wrong(program: AgentProgram, case: str, outcome: Outcome, record: Trajectory) -> list[str]:
    """What is not as it must be, in words."""
    sampled = sum(turn.end - turn.start for one in _sequences(record) for turn in one.turns)
    in_rows = sum(sum(row.trajectory.response_mask) for row in rows(record))
    reasons = Counter(branch.reason for branch in record.branches)
    must: dict[str, bool] = {
        f"rows hold {in_rows} of {sampled} sampled tokens": in_rows == sampled,
        f"stop reason {record.stop_reason}": record.stop_reason == "stop",
        f"infra_error: {record.error}": not record.infra_error,
    }
    checks: dict[str, Callable[[], dict[str, bool]]] = {
        "clean": lambda: {
            f"the note is not what was written: {_note(outcome)!r}": _note(outcome) == "two\n",
            "an unchanged history branched": not set(reasons) - {"new"},
        },
        "malformed": lambda: {"no malformed turn": outcome.told.counts.get("malformed") == 1},
        "503": lambda: {"the engine was never down": outcome.told.counts.get("down", 0) > 0},
        "overflow": lambda: {"no request was refused": outcome.refused > 0},
        "sub-agent": lambda: {
            "no sub-agent turn": "inside" in outcome.told.counts,
            "no branch of its own": bool(reasons["new"] or reasons["tools"]),
        },
        "compaction": lambda: {"no summary was asked for": "summary" in outcome.told.counts},
    }
    must |= checks.get(case, dict)()
    if case not in program.ends_at:
        code = outcome.exit_code
        must[f"the program ended with exit code {code}"] = code == 0
        texts = json.dumps([one.messages[-1:] for one in _sequences(record)])
        must["the program did not come to its last turn"] = DONE.strip() in texts
    return [words for words, holds in must.items() if not holds]


def _sequences(record: Trajectory) -> list[Trajectory | Branch]:
    return [record, *record.branches]


def _note(outcome: Outcome) -> str | None:
    assert outcome.record
    file = Path(outcome.record.extra["session"]["folder"]) / "files" / NOTE
    return file.read_text() if file.is_file() else None


if __name__ == "__main__":
    main()
