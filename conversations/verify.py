"""Proves a run folder: every record, its group, and the run as a whole.

Each record is checked against its hash, itself, the saved tokenizer and template (`checks/`), one
by one, in several processes if asked for, each with its own range of the file. At the end come the
checks that need all records.

Invariant: anything in the folder ends in defects, not in an exception; nothing in it is run as
code, and nothing is written. What could not be checked is a defect or a note. No record can reveal
a number that fits as well as the true one, such as another plausible log-prob under a forged hash,
or a consistent change of tokens and messages.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversations.checks.clock import OutOfTime, time_limit
from conversations.checks.counts import Counts
from conversations.checks.facts import RunFacts, facts_of
from conversations.checks.finding import Defect, Finding, differs, printable
from conversations.checks.group import RunChecks
from conversations.checks.record import LineResult, check_line
from conversations.errors import ConversationsError, RunFolderError
from conversations.run.open_run import (
    TOKENIZER,
    recorded_reading,
    saved_template,
    template_kwargs,
)
from conversations.run.saved_tokenizer import class_and_message, is_failure
from conversations.run.store import RUN, SUPERSEDED, TRAJECTORIES, UNFINISHED, read_manifest
from conversations.template import ChatTemplate
from conversations.tokenizer import tokenizer_sha256

CHUNK = 4 << 20
"""Bytes of a file that are checked at a time."""
MAX_LINE = 1 << 29
"""Bytes of a line. A longer one was not written by turntrace and would fill the memory."""
TIME_LIMIT_S = 60.0
"""For one record, and for the chat template to load."""
MAX_FINDINGS = 40
"""Findings shown for one line."""


@dataclass(slots=True)
class Verdict:
    """The result of a verification.

    `counts` has trajectories, turns, tokens and so on; `notes` say what was not checked, and why.
    `digest` stands for all finished records in their order: whoever keeps it elsewhere can detect
    any later change.
    """

    path: Path
    defects: int = 0
    digest: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The verdict as one JSON object."""
        plain = {name: count for name, count in self.counts.items() if "." not in name}
        reasons = {
            name.partition(".")[2]: count for name, count in self.counts.items() if "." in name
        }
        counts = {**plain, "stop_reasons": reasons}
        found = {"ok": not self.defects, "defects": self.defects, "digest": self.digest}
        return {"run": str(self.path), **found, "counts": counts, "notes": self.notes}

    def __str__(self) -> str:
        counts = self.counts
        parts = [
            f"{counts['done']} trajectories",
            f"{counts['turns']} turns",
            f"{counts['tokens']} tokens",
            f"{counts['tool_calls']} tool calls",
        ]
        parts += [f"{counts[name]} {name}" for name in ("unfinished", "superseded") if counts[name]]
        found = (
            f"{self.defects} defect{'s' if self.defects != 1 else ''}"
            if self.defects
            else "no defects"
        )
        return f"{printable(str(self.path))}: {', '.join(parts)}: {found}"


def verify_run(
    path: str | Path,
    *,
    jobs: int = 1,
    on_defect: Callable[[Defect], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Checks a run folder. `on_defect` gets each defect as it is found, `on_progress` bytes done
    and total.

    With more than one job the process forks, so call it from a program without threads. Raises
    RunFolderError if there is no run.
    """
    folder = Path(path)
    if not (folder / RUN).exists() and not (folder / TRAJECTORIES).exists():
        raise RunFolderError(f"{folder} holds no run: there is no {RUN}")
    verification = _Verification(
        folder, jobs, on_defect or (lambda defect: None), on_progress or (lambda done, total: None)
    )
    verification.run()
    return verification.verdict


class _Verification:
    """One pass over a folder; `verdict` is complete when `run` has returned."""

    def __init__(
        self,
        folder: Path,
        jobs: int,
        on_defect: Callable[[Defect], None],
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.folder, self.jobs = folder, jobs
        self.verdict = Verdict(folder)
        self.checks = RunChecks()
        self._on_defect, self._on_progress = on_defect, on_progress

    def run(self) -> None:
        manifest = self._manifest()
        facts = dataclasses.replace(
            facts_of(manifest, self._template(manifest), self.folder), folder=self.folder
        )
        chunks = [
            chunk for name in (TRAJECTORIES, UNFINISHED, SUPERSEDED) for chunk in self._chunks(name)
        ]
        total, done, lines = sum(chunk.end - chunk.start for chunk in chunks), 0, Counter[str]()
        for chunk, results in self._results(chunks, facts):
            for number, result in enumerate(results, lines[chunk.name] + 1):
                self._take(chunk.name, number, result)
            lines[chunk.name] += len(results)
            done += chunk.end - chunk.start
            self._on_progress(done, total)
        counts = Counts.of(manifest)
        for defect in self.checks.defects(TRAJECTORIES, counts, facts):
            self._report(defect)
        self._check_digest(manifest)
        self.verdict.counts += self.checks.tally
        self.verdict.counts["unfinished"], self.verdict.counts["superseded"] = (
            lines[UNFINISHED],
            lines[SUPERSEDED],
        )
        self.verdict.notes += self._notes(counts, facts, lines[UNFINISHED])

    # ------------------------------------------------------------------ what the run is

    def _manifest(self) -> dict[str, Any]:
        try:
            return read_manifest(self.folder)
        except RunFolderError as error:
            self._report(Defect(RUN, 0, None, Finding(str(error))))
            return {}

    def _template(self, manifest: dict[str, Any]) -> ChatTemplate | None:
        """The saved chat template, or None and a defect if it cannot be used.

        An import may have no tokenizer: that is no defect.
        """
        if facts_of(manifest, None).imported is not None and not (self.folder / TOKENIZER).exists():
            return None
        try:
            with time_limit(TIME_LIMIT_S):
                return _load_template(self.folder / TOKENIZER, manifest)
        except OutOfTime:
            problem = f"the chat template does not come to an end within {TIME_LIMIT_S:g} s"
        except ConversationsError as error:
            problem = str(error)
        self._report(
            Defect(
                TOKENIZER,
                0,
                None,
                Finding(f"{problem}; tokens could not be checked against messages"),
            )
        )
        return None

    def _check_digest(self, manifest: dict[str, Any]) -> None:
        """Reports a defect if the finished records are not those at the run's close."""
        self.verdict.digest = self.checks.digest.hexdigest()
        said = (
            manifest.get("digest") if "counts" in manifest and not self.checks.unreadable else None
        )
        if said is not None and said != self.verdict.digest:
            what = differs(
                "the digest of all finished records", str(said)[:16], self.verdict.digest[:16]
            )
            self._report(
                Defect(
                    RUN,
                    0,
                    None,
                    Finding(
                        f"{what}: one was changed, added, removed or moved since the run closed"
                    ),
                )
            )

    def _notes(self, counts: Counts, facts: RunFacts, unfinished: int) -> Iterator[str]:
        if not counts.is_complete(self.checks.finished):
            yield counts.note(self.checks.finished, unfinished)
        if self.checks.partial:
            yield (
                f"{self.checks.partial} records of failures hold only the part that could be "
                "written: their text was not checked"
            )
        if self.checks.unproven:
            yield (
                f"{self.checks.unproven} imported records say that tokens and messages do not "
                "match: they were not compared"
            )
        if not facts.cuts:
            yield f"{RUN} does not say how tool responses are cut: cuts were not checked"
        if facts.imported is not None:
            unread = (
                ""
                if facts.template
                else "; there is no tokenizer: tokens were not checked against messages"
            )
            yield (
                f"the run was imported from {printable(facts.imported)}: "
                f"how conversations ended was not checked{unread}"
            )
        if facts.n is None:
            yield (
                f"{RUN} does not say how many samples a group has: "
                "groups were not checked for missing samples"
            )
        if facts.reads_clock:
            yield "the chat template reads the clock: prompts were taken as recorded"

    # ------------------------------------------------------------------ records

    def _take(self, name: str, line: int, result: LineResult) -> None:
        findings = result.findings
        if name != SUPERSEDED:
            findings = [
                *findings,
                *self.checks.add(name, line, result, finished=name == TRAJECTORIES),
            ]
        for finding in findings[:MAX_FINDINGS]:
            self._report(Defect(name, line, result.id, finding))
        if len(findings) > MAX_FINDINGS:
            self._report(
                Defect(
                    name, line, result.id, Finding(f"{len(findings) - MAX_FINDINGS} more defects")
                )
            )

    def _report(self, defect: Defect) -> None:
        self.verdict.defects += 1
        self._on_defect(defect)

    def _chunks(self, name: str) -> Iterator[Chunk]:
        file = self.folder / name
        if not file.exists():
            return
        if not file.is_file():
            self._report(Defect(name, 0, None, Finding("it is not a file")))
            return
        size = file.stat().st_size
        for start in range(0, size, CHUNK):
            yield Chunk(file, name, start, min(start + CHUNK, size))

    def _results(
        self, chunks: list[Chunk], facts: RunFacts
    ) -> Iterator[tuple[Chunk, list[LineResult]]]:
        """Yields each chunk with the results of its lines, in order."""
        jobs = min(self.jobs, len(chunks))
        if jobs <= 1:
            yield from ((chunk, check_chunk(chunk, facts)) for chunk in chunks)
            return
        waiting, under_way = deque(chunks), deque[tuple[Chunk, Future[list[LineResult]]]]()
        with ProcessPoolExecutor(
            jobs, multiprocessing.get_context("fork"), _start_worker, (facts,)
        ) as pool:
            try:
                while waiting or under_way:
                    while waiting and len(under_way) < 2 * jobs:
                        under_way.append((waiting[0], pool.submit(_work, waiting.popleft())))
                    chunk, future = under_way.popleft()
                    yield chunk, future.result()
            except BrokenProcessPool:
                what = (
                    f"the process that checked bytes {chunk.start} to {chunk.end} was killed; "
                    "what follows was not checked"
                )
                self._report(Defect(chunk.name, 0, None, Finding(what)))
            finally:
                pool.shutdown(cancel_futures=True)


_latest: dict[str, ChatTemplate] = {}
"""The template that was loaded last, by what it was made of: the next folder of a trainer's steps
has the same.
"""


def _load_template(folder: Path, manifest: dict[str, Any]) -> ChatTemplate:
    """The run's chat template. Raises ConversationsError, whatever is wrong with the folder."""
    try:
        reading, images = recorded_reading(manifest), manifest.get("image_processor")
        kwargs = json.dumps(template_kwargs(manifest))
        key = repr((tokenizer_sha256(folder), reading, images, kwargs))
        if key not in _latest:
            template = saved_template(folder, manifest, name=f"{TOKENIZER}/")
            _latest.clear()
            _latest[key] = template
        return _latest[key]
    except BaseException as error:  # a tokenizer that is not one may fail in any way
        if isinstance(error, ConversationsError) or not is_failure(error):
            raise
        raise RunFolderError(f"{folder} cannot be used: {class_and_message(error)}") from error


# ---------------------------------------------------------------------- one range of a file


@dataclass(frozen=True, slots=True)
class Chunk:
    """The lines of a file that begin at a byte in [start, end)."""

    file: Path
    name: str
    start: int
    end: int


_facts = RunFacts()
"""The facts of a worker process, set when it starts."""


def _start_worker(facts: RunFacts) -> None:
    global _facts
    _facts = facts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer


def _work(chunk: Chunk) -> list[LineResult]:
    return check_chunk(chunk, _facts)


def check_chunk(chunk: Chunk, facts: RunFacts) -> list[LineResult]:
    """The results of the lines of a range, in order."""
    results: list[LineResult] = []
    with suppress(FileNotFoundError), chunk.file.open("rb") as lines:
        position = max(chunk.start - 1, 0)
        lines.seek(position)
        if chunk.start:
            position += _skip_line(lines, b"")
        while position < chunk.end and (line := lines.readline(MAX_LINE)):
            position += len(line)
            if len(line) == MAX_LINE:
                position += _skip_line(lines, line)
            results.append(_checked(line, chunk.name, facts))
    return results


def _skip_line(lines: Any, line: bytes) -> int:
    """Reads to the end of a line; returns how many bytes that took."""
    skipped = 0
    while not line.endswith(b"\n") and (line := lines.readline(CHUNK)):
        skipped += len(line)
    return skipped


def _checked(line: bytes, name: str, facts: RunFacts) -> LineResult:
    if len(line) == MAX_LINE:
        return LineResult([Finding(f"the line is longer than {MAX_LINE} bytes")])
    if not line.endswith(b"\n"):
        return LineResult(
            [
                Finding(
                    "the line is torn: it has no newline; `turntrace run --resume` cuts it "
                    "and runs its conversation again"
                )
            ]
        )
    try:
        with time_limit(TIME_LIMIT_S):
            return check_line(line, facts, finished=name == TRAJECTORIES)
    except OutOfTime:
        return LineResult([Finding(f"the record could not be checked within {TIME_LIMIT_S:g} s")])
    except BaseException as error:
        if not is_failure(error):
            raise
        return LineResult(
            [Finding(f"the record could not be checked: {printable(class_and_message(error))}")]
        )
