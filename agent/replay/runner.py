"""`turntrace replay`: read the parent, check, open the new run, start, run, compare, sum up.

Invariant: exit code 0 means that every trajectory asked for is on disk and identical to its parent
(for a fork: that its tools came into the state that they were in).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from agent.config.config import Config
from agent.engines.scripted import recorded
from agent.errors import AgentError
from agent.loop.batch import Progress, run_conversations
from agent.loop.calls import ConversationTools
from agent.loop.conversation import Conversation, Counterparts
from agent.loop.runtime import Runtime
from agent.loop.tasks import recorded_task
from agent.loop.users import SimulatedUser
from agent.replay.compare import Scope
from agent.replay.outcome import (
    FAILED,
    IDENTICAL,
    REPLAY,
    ComparingStore,
    Line,
    Tally,
    earlier_lines,
    outcome,
)
from agent.replay.playback import played_back
from agent.replay.report import as_json, show_report
from agent.replay.request import Choice, ReplayRequest, choose_trajectories, kept_turns
from agent.replay.restored import replayed
from agent.replay.session import SessionReplay, converse_again
from agent.replay.tools import LiveTools, RecordedTools, stand_ins
from agent.replay.trust import live_interactions, live_tools, replay_config
from agent.replay.user import AskedAgainUser, RecordedUser, has_user
from agent.runs.ending import (
    DONE,
    INCOMPLETE,
    INTERRUPTED,
    TERMINATED,
    exit_code,
    sigterm_as_interrupt,
)
from agent.runs.manifest import (
    command_line,
    fresh_seed,
    model_entry,
    parent_entry,
    processor_entry,
    save_tokenizer,
    source,
    versions,
)
from agent.runs.parts import Parts, load_template, make_dispatcher, prepare
from agent.runs.progress import Display, counts, say, starting_line
from agent.runs.session import Session
from conversations.branches import is_aside
from conversations.run.open_run import TOKENIZER, Run, open_run
from conversations.run.saved_tokenizer import load_tokenizer
from conversations.run.store import RUN, UNFINISHED, RunFolder, image_store
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory, canonical_json
from tools.toolset import ToolSet

DIVERGED = 3
"""Exit code if a trajectory differs from its parent; the others are those of `turntrace run`."""


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """A replay whose options, records and config were checked."""

    request: ReplayRequest
    run: Run
    choice: Choice
    parts: Parts

    @property
    def config(self) -> Config:
        return self.parts.config

    @property
    def tools(self) -> ToolSet | None:
        return self.parts.tools

    @property
    def template(self) -> ChatTemplate:
        return self.parts.template

    @property
    def is_of_sessions(self) -> bool:
        """Whether the run was recorded by a gateway."""
        return self.run.manifest.get("gateway") is True

    @property
    def total(self) -> int:
        return len(self.choice.ids) * self.request.n

    @property
    def scope(self) -> Scope:
        """What counts as a difference."""
        return Scope(self.request.live_model, self.request.live_tools, self.template.decode)

    def keys(self) -> set[tuple[str, int]]:
        """The (task, sample) pairs of the new run."""
        n = self.request.n
        pairs = [
            (task, int(sample))
            for task, _, sample in (name.rpartition("-") for name in self.choice.ids)
        ]
        return {(task, sample * n + branch) for task, sample in pairs for branch in range(n)}


def replay_run(request: ReplayRequest, console: Console) -> tuple[int, dict[str, Any]]:
    """Replays a run into a new folder; returns the exit code and the report.

    Raises the packages' own errors for a user's mistake.
    """
    plan = make_plan(request)
    for note in (*plan.choice.notes, *_notes(plan)):
        say(console, f"note: {note}")
    tally, progress = Tally(), Progress(total=plan.total)
    with _open_store(plan) as folder:
        if request.resume:
            _count_earlier(plan, folder, tally, progress)
        code = (
            DONE
            if plan.keys() <= folder.done
            else _run_missing(plan, folder, tally, progress, console)
        )
        folder.close(counts(progress))
    if code in (INTERRUPTED, TERMINATED):
        say(
            console,
            f"interrupted: {progress.done} of {plan.total} trajectories are in {request.out}; "
            f"resume with: {request.resume_command}",
        )
    else:
        show_report(tally, request, console)
        code = _verdict(plan, tally, console)
    return code, as_json(tally, request)


def _count_earlier(plan: ReplayPlan, folder: RunFolder, tally: Tally, progress: Progress) -> None:
    """Counts what the new run already has."""
    run = open_run(plan.request.out)
    ids = [f"{task}-{sample}" for task, sample in sorted(folder.done & plan.keys())]

    def compared(name: str) -> Line:
        record = run[name]
        return outcome(plan.run[(record.parent or {})["id"]], record, plan.scope, None)

    for line in earlier_lines(plan.request.out, ids, compared):
        tally.add(line)
    for name in ids:
        progress.count(run[name])


def make_plan(request: ReplayRequest) -> ReplayPlan:
    """Checks everything that needs no engine and no tool."""
    request.check()
    run = open_run(request.run)
    _check_session(run, request)
    choice = choose_trajectories(run, request)
    config = replay_config(run, request)
    if request.resume and request.live_model:
        config = fresh_seed(config, request.out)
    tools = live_tools(run, request, config) if request.live_tools else None
    interactions = live_interactions(request, config)
    template = load_template(config) if request.live_model else run.template()
    if request.from_turn is not None:
        _check_same_tokenizer(run, template)
    parts = prepare(config, tools, interactions, template=template)
    if parts.images:
        parts.images.look_in(image_store(run.path))
    return ReplayPlan(request, run, choice, parts)


def _check_session(run: Run, request: ReplayRequest) -> None:
    if run.manifest.get("gateway") is True and (
        request.live_tools or request.from_turn is not None
    ):
        raise AgentError(
            f"{run.path} holds sessions of agent programs, which ran their tools themselves: "
            "replay them with --tools recorded and without --from-turn"
        )


def _notes(plan: ReplayPlan) -> Iterator[str]:
    """What the user should know before anything starts."""
    request, unfinished = plan.request, plan.run.path / UNFINISHED
    if unfinished.exists() and (count := _lines_in(unfinished)):
        yield f"{count} unfinished conversations of {plan.run.path} are not replayed"
    if request.live_model:
        yield from plan.config.notices()
        if not request.live_tools and any(map(is_aside, plan.run[plan.choice.ids[0]].branches)):
            yield (
                "tools asked the model: their recorded answers stand, and today's model is not "
                "asked again, so the new records lack those branches"
            )
    if plan.tools and (not request.live_model or request.from_turn is not None):
        for tool in plan.run[plan.choice.ids[0]].tools:
            name = tool["function"]["name"]
            if name not in plan.tools:
                yield f"there is no tool {name} now: its calls cannot be answered as they were"
            elif canonical_json(plan.tools[name].schema) != canonical_json(tool):
                yield (
                    f"the schema of {name} is not the recorded one, which the model saw; "
                    "calls are checked against today's"
                )


def _lines_in(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _check_same_tokenizer(run: Run, template: ChatTemplate) -> None:
    own = load_tokenizer(run.path / TOKENIZER).backend_tokenizer
    theirs = template.tokenizer.backend_tokenizer
    if own is not theirs and own.get_vocab(with_added_tokens=True) != theirs.get_vocab(
        with_added_tokens=True
    ):
        raise AgentError(
            f"the model's tokenizer is not that of {run.path}: "
            f"a fork keeps the parent's tokens, which mean nothing to {template.name}"
        )


# ---------------------------------------------------------------------- the new run


def _open_store(plan: ReplayPlan) -> RunFolder:
    request = plan.request
    if request.resume:
        return RunFolder.resume(request.out, _manifest(plan), force=request.force)
    return RunFolder.create(request.out, _manifest(plan))


def _manifest(plan: ReplayPlan) -> dict[str, Any]:
    request, config, earlier = plan.request, plan.config, plan.run.manifest
    samples = earlier.get("n")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(request.argv),
        "config": config.resolved(),
        "tools": source(plan.tools) if request.live_tools else earlier.get("tools"),
        "interactions": source(plan.parts.interactions) or earlier.get("interactions"),
        "model": model_entry(config) if request.live_model else earlier.get("model"),
        "call_format": _call_format(plan),
        "image_processor": processor_entry(plan.template),
        "tasks": earlier.get("tasks"),
        "limit": None,
        "n": samples * request.n if plan.choice.is_all and isinstance(samples, int) else None,
        "validate": bool(earlier.get("validate")),
        "seed": config.seed if request.live_model and config.rollout.name == "sglang" else None,
        "versions": versions(),
        "parent": parent_entry(plan.run.path),
        **({"gateway": True} if plan.is_of_sessions else {}),
        "replay": {
            "model": request.model,
            "tools": request.tools,
            "from_turn": request.from_turn,
            "n": request.n,
        },
    }


def _call_format(plan: ReplayPlan) -> Any:
    """The parent's call format, or the one of the model that samples now."""
    if not plan.request.live_model:
        return plan.run.manifest.get("call_format")
    return plan.template.format_entry() if plan.parts.tools else None


def _run_missing(
    plan: ReplayPlan, folder: RunFolder, tally: Tally, progress: Progress, console: Console
) -> int:
    request = plan.request
    try:
        with (
            sigterm_as_interrupt(),
            _started(plan, console) as session,
            Display(progress, console, session.engine) as display,
        ):
            session.run(
                _conversations(plan, session, folder, tally, progress), poll=display.refresh
            )
    except KeyboardInterrupt as interrupt:
        return exit_code(interrupt)
    except BaseException:
        if not request.resume and progress.done == 0:
            (request.out / RUN).unlink(missing_ok=True)  # nothing was run: the folder holds no run
        raise
    return DONE


def _started(plan: ReplayPlan, console: Console) -> Session:
    """The session: with the config's engine, or with none if the model is recorded."""
    request = plan.request
    save_tokenizer(request.out, plan.template.tokenizer)
    if not request.live_model:
        return Session(plan.parts, start=lambda: recorded([]))
    log, validate = request.out / "engine.log", bool(plan.run.manifest.get("validate"))
    say(console, starting_line(plan.config, log))
    return Session(plan.parts, validate=validate, log_path=log)


async def _conversations(
    plan: ReplayPlan, session: Session, folder: RunFolder, tally: Tally, progress: Progress
) -> None:
    request = plan.request
    with (request.out / REPLAY).open("a" if request.resume else "w", encoding="utf-8") as lines:
        store = ComparingStore(folder, plan.scope, lines, tally.add)
        await run_conversations(
            store.watched(_replays(plan, session, folder)),
            max_concurrent=plan.config.rollout.max_num_seqs,
            store=store,
            progress=progress,
            converse=converse_again,
        )


def _replays(
    plan: ReplayPlan, session: Session, folder: RunFolder
) -> Iterator[tuple[Trajectory, Conversation]]:
    """What is missing: each record with its replay, made when there is room for it."""
    n = plan.request.n
    for name in plan.choice.ids:
        task_id, _, sample = name.rpartition("-")
        for number in range(int(sample) * n, int(sample) * n + n):
            if (task_id, number) not in folder.done:
                record = plan.run[name]
                yield record, _conversation(plan, record, number, session.runtime)


def _conversation(
    plan: ReplayPlan, record: Trajectory, sample: int, runtime: Runtime
) -> Conversation:
    """One replay of `record`, with the model and the tools that were asked for."""
    request = plan.request
    kept = kept_turns(record, request.from_turn)
    if not request.live_model:
        runtime = played_back(runtime, record, kept or 0)
    if plan.is_of_sessions:
        session = SessionReplay(record, sample, runtime)
        session.parent = {"run": plan.run.path.resolve().name, "id": record.id, "turn": None}
        return session
    counterparts = Counterparts(
        _tools(plan, record, kept, runtime), _user(plan, record, kept, runtime)
    )
    parent = {"run": plan.run.path.resolve().name, "id": record.id, "turn": kept}
    return replayed(record, sample, runtime, counterparts, kept=kept, parent=parent)


def _tools(
    plan: ReplayPlan, record: Trajectory, kept: int | None, runtime: Runtime
) -> ConversationTools | None:
    live_model = plan.request.live_model
    if not plan.request.live_tools:
        recorded_answers = make_dispatcher(plan.config, stand_ins(record), plan.template)
        return RecordedTools(record, recorded_answers, live_model=live_model, kept=kept or 0)
    if runtime.dispatcher is None:
        return None
    return LiveTools(
        runtime.dispatcher,
        recorded_task(record),
        record,
        turns=kept,
        recorded_prompt=not live_model or kept is not None,
        observer=runtime.observer,
    )


def _user(
    plan: ReplayPlan, record: Trajectory, kept: int | None, runtime: Runtime
) -> SimulatedUser | None:
    if runtime.interactions is None:
        if not has_user(record):
            return None
        return RecordedUser(record, live_model=plan.request.live_model, kept=kept or 0)
    return AskedAgainUser.of(recorded_task(record), record, kept or 0, runtime)


def _verdict(plan: ReplayPlan, tally: Tally, console: Console) -> int:
    done = sum(tally.outcomes.values())
    if tally.outcomes[FAILED] or done < plan.total:
        problem = (
            f"{tally.outcomes[FAILED]} trajectories failed because of infrastructure, "
            f"{plan.total - done} are missing"
        )
        say(console, f"{problem}; run them again with: {plan.request.resume_command}")
        return INCOMPLETE
    if plan.request.from_turn is not None:
        return DIVERGED if tally.rebuilt_otherwise else DONE
    return DONE if tally.outcomes[IDENTICAL] == done else DIVERGED
