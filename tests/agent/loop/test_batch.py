"""Many conversations at once: admission, groups, isolation, and what an interrupted run keeps."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from agent.engines.engine import EndedGeneration, Generation, SamplingParams
from agent.errors import EngineError
from agent.loop.batch import Progress, run_tasks
from agent.loop.calls import Dispatcher
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from conversations.errors import RunFolderError, TemplateError
from conversations.run.open_run import open_run
from conversations.run.store import (
    RUN,
    SUPERSEDED,
    TRAJECTORIES,
    UNFINISHED,
    RunFolder,
    read_trajectories,
)
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from conversations.verify import verify_run
from tests.helpers import TOOL_ERRORS, Toy, call, logprobs, runtime, says, settings, task, until
from tools.toolset import ToolSet


class Actors:
    """An engine that does in each conversation what its question says: `script: turn | turn | ...`.

    A turn such as `!hang` is a command. The k-th generation of a conversation is its k-th turn,
    whatever other conversations do meanwhile.
    """

    def __init__(self, template: ChatTemplate, delay_s: float = 0.0) -> None:
        self.template = template
        self.delay_s = delay_s
        self.live = self.peak = self.hanging = 0
        self._starts = template.encode("<|im_start|>assistant\n")

    def describe(self) -> dict[str, Any]:
        return {"name": "actors"}

    async def generate(
        self, prompt_ids: Any, sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        text = self.template.decode(prompt_ids)
        turns = text.split("script: ")[1].split("<|im_end|>")[0].split(" | ")
        turn = turns[min(text.count("<|im_start|>assistant"), len(turns)) - 1]
        self.live += 1
        self.peak = max(self.peak, self.live)
        try:
            await asyncio.sleep(self.delay_s)
            return await self._do(turn)
        finally:
            self.live -= 1

    async def _do(self, turn: str) -> Generation:
        if turn == "!error":
            raise EngineError("out of memory")
        if turn == "!bug":
            raise KeyError("secret")
        if turn == "!hang":
            self.hanging += 1
            await asyncio.Event().wait()
        ids = [*self.template.encode(turn), self.template.end_id]
        if turn == "!nan":
            return Generation(ids, [float("nan")] * len(ids), "stop")
        if turn == "!cut":
            return Generation(ids[:-1], logprobs(ids[:-1]), "length")
        return Generation(ids, logprobs(ids), "stop")

    async def abort(self, request_id: str) -> None: ...

    async def close(self) -> None: ...


def acts(name: str, *turns: str, **fields: Any) -> Task:
    return Task(name, [{"role": "user", "content": f"script: {' | '.join(turns)}"}], **fields)


def shared(engine: Actors, *toys: Toy, **fields: Any) -> Runtime:
    dispatcher = (
        Dispatcher(ToolSet.from_tools(toys), max_parallel_calls=4, shorten=lambda text: None)
        if toys
        else None
    )
    return Runtime(engine, engine.template, settings(**fields), dispatcher)


async def collect(tasks: list[Task], runtime: Runtime, **options: Any) -> dict[str, Trajectory]:
    found: dict[str, Trajectory] = {}
    await run_tasks(
        tasks, runtime, on_done=lambda record: found.update({record.id: record}), **options
    )
    return found


def comparable(record: Trajectory) -> dict[str, Any]:
    """The record without its clocks and instance ids."""
    fields = dataclasses.asdict(Trajectory.from_line(record.to_line()))
    for key in ("started_at", "wall_s"):
        fields.pop(key)
    for line in fields["tool_calls"]:
        line.update(
            queue_s=0, run_s=0, attempts=[attempt["status"] for attempt in line["attempts"]]
        )
    return fields


# ---------------------------------------------------------------------- admission and groups


async def test_every_task_and_sample_once(smollm2: ChatTemplate, tmp_path: Path) -> None:
    engine = Actors(smollm2)
    with RunFolder.create(tmp_path, {}) as store:
        progress = await run_tasks(
            [acts(f"t{number}", "42") for number in range(10)], shared(engine), n=3, store=store
        )
    assert sorted(record.id for record in read_trajectories(tmp_path)) == sorted(
        f"t{task}-{sample}" for task in range(10) for sample in range(3)
    )
    assert (progress.done, progress.running, progress.skipped, progress.turns) == (30, 0, 0, 30)
    assert progress.stop_reasons == {"stop": 30}


async def test_at_most_so_many_at_once_and_tasks_are_read_as_they_are_admitted(
    smollm2: ChatTemplate,
) -> None:
    engine = Actors(smollm2, delay_s=0.005)
    read = 0
    ahead = 0

    def tasks() -> Iterator[Task]:
        nonlocal read, ahead
        for number in range(40):
            read += 1
            ahead = max(ahead, read - progress.done)
            yield acts(f"t{number}", "42")

    progress = Progress()
    await run_tasks(tasks(), shared(engine), max_concurrent=7, progress=progress)
    assert engine.peak == 7
    assert ahead <= 8
    assert progress.done == 40


async def test_progress_counts(smollm2: ChatTemplate) -> None:
    engine = Actors(smollm2)
    toy = Toy(calc_reward="reward")
    tasks = [
        acts("good", call("toy", do="say"), "42"),
        acts(
            "bad",
            call("toy", do="bug") + call("nobody") + "<tool_call>{</tool_call>" + call("toy"),
            "42",
        ),
        acts("broken", call("toy", do="say"), "!error"),
    ]
    progress = await run_tasks(tasks, shared(engine, toy))
    assert (
        progress.done,
        progress.turns,
        progress.tool_calls,
        progress.tool_errors,
        progress.invalid_calls,
    ) == (3, 5, 6, 4, 3)
    assert (progress.infra_errors, progress.rewards, progress.mean_reward) == (1, 2, 1.0)
    assert progress.sampled_tokens > 0
    assert Progress().mean_reward is None


# ---------------------------------------------------------------------- isolation


GOOD = {
    f"good{number}": (
        call("toy", do="reward", text=f"0.{number}") + call("other", do="say", text="é🙂"),
        f"So it is {number}.",
    )
    for number in range(20)
}
BAD: dict[str, tuple[str, ...]] = {
    **{
        f"tool_{do}": (call("toy", do=do) + call("other", do="say"), "42")
        for do in (*TOOL_ERRORS, "backend", "mutate", "surrogate", "control", "long")
    },
    "tool_hang": (call("hanger", do="hang") + call("other", do="say"), "42"),
    "tool_stubborn": (call("hanger", do="stubborn"), "42"),
    "unknown": (call("nobody"), "42"),
    "invalid": (call("toy", do=1), "42"),
    "malformed": ("<tool_call>{oops", "42"),
    "stubborn_model": (call("nobody"),) * 12,
    "too_many": (call("toy", do="say") * 6, "42"),
    "engine_error": (call("toy", do="say"), "!error"),
    "engine_bug": ("!bug",),
    "engine_nan": (call("toy", do="say"), "!nan"),
    "engine_hang": (call("toy", do="say"), "!hang"),
    "cut": ("!cut",),
    "endless": (call("toy", do="say"),) * 40,
    "long_prompt": ("42 " * 3000,),
}
EXPECTED = {
    "stubborn_model": "invalid_tool_calls",
    "engine_error": "engine_error",
    "engine_bug": "engine_error",
    "engine_nan": "engine_error",
    "engine_hang": "deadline",
    "cut": "length",
    "endless": "max_turns",
    "long_prompt": "prompt_too_long",
}


async def test_one_conversations_failure_never_touches_another(
    smollm2: ChatTemplate, tmp_path: Path
) -> None:
    """50 conversations, many with a failure: the good records are those of a run without any."""
    limits: dict[str, Any] = {"max_turns": 20, "deadline_s": 6.0}
    alone = await collect(
        [acts(name, *turns) for name, turns in GOOD.items()],
        shared(Actors(smollm2), *toys(), **limits),
    )

    mixed = [acts(name, *turns) for name, turns in {**GOOD, **BAD}.items()]
    mixed = mixed[::2] + mixed[1::2]
    hanger, *others = toys()
    with RunFolder.create(tmp_path, {}) as store:
        await run_tasks(
            mixed,
            shared(Actors(smollm2), hanger, *others, **limits),
            max_concurrent=50,
            store=store,
        )
    hanger.stuck.set()
    together = {record.id: record for record in read_trajectories(tmp_path)}

    assert set(together) == {f"{name}-0" for name in (*GOOD, *BAD)}
    for name in GOOD:
        assert comparable(together[f"{name}-0"]) == comparable(alone[f"{name}-0"])
    for name in BAD:
        record = together[f"{name}-0"]
        assert record.stop_reason == EXPECTED.get(name, "stop"), name
        infra = name == "tool_backend" or EXPECTED.get(name) == "engine_error"
        assert record.infra_error == infra, name
        if infra:
            assert record.reward is None
    for toy in (hanger, *others):
        created = {instance for step, instance in toy.log if step == "create"}
        assert len(created) == len(mixed)
        assert all(toy.count("release", instance) == 1 for instance in created)
    assert together["tool_hang-0"].tool_calls[0].status == "timeout"
    assert together["tool_stubborn-0"].tool_calls[0].status == "timeout"


def toys() -> list[Toy]:
    return [Toy("hanger", timeout_s=0.1), Toy(calc_reward="reward"), Toy("other")]


async def test_a_record_without_a_json_form_is_that_conversations_failure_alone(
    smollm2: ChatTemplate, tmp_path: Path
) -> None:
    tasks = [
        acts("good", "42"),
        acts("odd", "42", extra={"day": date(2026, 1, 1)}, ground_truth="7"),
        acts("last", "42"),
    ]
    with RunFolder.create(tmp_path, {}) as store:
        progress = await run_tasks(tasks, shared(Actors(smollm2)), max_concurrent=1, store=store)
    good, odd, last = read_trajectories(tmp_path)
    assert [good.stop_reason, odd.stop_reason, last.stop_reason] == ["stop", "engine_error", "stop"]
    assert (odd.infra_error, odd.reward, odd.extra, odd.ground_truth) == (True, None, None, "7")
    assert odd.error is not None
    assert "JSON serializable" in odd.error
    assert odd.response_ids == good.response_ids
    assert len(odd.messages) == 2
    assert (progress.done, progress.infra_errors, progress.lost) == (3, 1, [])


async def test_a_record_that_cannot_be_written_at_all_is_counted_as_lost(
    smollm2: ChatTemplate, tmp_path: Path
) -> None:
    tasks = [acts("good", "42"), acts(date(2026, 1, 1), "42"), acts("last", "42")]  # type: ignore[arg-type]
    with RunFolder.create(tmp_path, {}) as store:
        progress = await run_tasks(tasks, shared(Actors(smollm2)), max_concurrent=1, store=store)
    assert [record.task_id for record in read_trajectories(tmp_path)] == ["good", "last"]
    [reason] = progress.lost
    assert reason.startswith("trajectory 2026-01-01-0 cannot be written as JSON")
    assert progress.done == 2


async def test_a_tool_that_cannot_be_created_in_one_conversation(smollm2: ChatTemplate) -> None:
    toy = Toy(calc_reward="reward")
    broken = acts(
        "broken",
        call("toy", do="say"),
        "42",
        tools_kwargs={"toy": {"create_kwargs": {"do": "bug"}}},
    )
    found = await collect(
        [acts("good", call("toy", do="say"), "42"), broken], shared(Actors(smollm2), toy)
    )
    assert (found["good-0"].reward, found["good-0"].infra_error) == (1.0, False)
    assert (found["broken-0"].reward, found["broken-0"].infra_error) == (None, True)
    assert found["broken-0"].tool_calls[0].status == "backend_error"


# ---------------------------------------------------------------------- cut off


async def test_cancelling_keeps_what_is_finished_and_marks_what_is_not(
    smollm2: ChatTemplate, tmp_path: Path
) -> None:
    engine, toy = Actors(smollm2), Toy(calc_reward="reward")
    quick = [acts(f"quick{number}", call("toy", do="say"), "42") for number in range(5)]
    slow = [acts(f"slow{number}", call("toy", do="say"), "!hang") for number in range(4)]
    slow.append(acts("in_a_tool", call("toy", do="say") + call("toy", do="hang")))
    waiting = [acts("waiting", "42")]
    runtime = shared(engine, toy)
    with RunFolder.create(tmp_path, {}) as store:
        running = asyncio.create_task(
            run_tasks([*quick, *slow, *waiting], runtime, max_concurrent=5, store=store)
        )
        await until(lambda: engine.hanging == 4 and toy.hanging.is_set())
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    finished = {record.id for record in read_trajectories(tmp_path)}
    unfinished = {record.id: record for record in read_trajectories(tmp_path / UNFINISHED)}
    assert finished == {f"quick{number}-0" for number in range(5)}
    assert set(unfinished) == {*(f"slow{number}-0" for number in range(4)), "in_a_tool-0"}
    assert {record.stop_reason for record in unfinished.values()} == {"cancelled"}
    assert {record.reward for record in unfinished.values()} == {None}
    assert unfinished["slow0-0"].num_turns == 1
    assert [line.status for line in unfinished["in_a_tool-0"].tool_calls] == ["ok", "cancelled"]
    assert toy.count("create") == toy.count("release") == 10

    again = [acts(task.id, "42") for task in slow]
    with RunFolder.resume(tmp_path, {}) as store:
        progress = await run_tasks([*quick, *again, *waiting], runtime, store=store)
    assert (progress.done, progress.skipped) == (6, 5)
    assert sorted(record.task_id for record in read_trajectories(tmp_path)) == sorted(
        task.id for task in [*quick, *slow, *waiting]
    )
    assert {record.id for record in read_trajectories(tmp_path / SUPERSEDED)} == set(unfinished)
    assert (tmp_path / UNFINISHED).read_bytes() == b""


async def test_cancelling_while_tools_are_released_releases_them_all(
    smollm2: ChatTemplate, tmp_path: Path
) -> None:
    class Slow(Toy):
        async def release(self, instance_id: str, **kwargs: Any) -> None:
            self.hanging.set()
            await asyncio.sleep(0.05)
            await super().release(instance_id)

    slow, other = Slow(), Toy("other")
    with RunFolder.create(tmp_path, {}) as store:
        running = asyncio.create_task(
            run_tasks([acts("t", "42")], shared(Actors(smollm2), other, slow), store=store)
        )
        await slow.hanging.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert slow.count("released") == other.count("released") == 1
    records = (
        [*read_trajectories(tmp_path / UNFINISHED)] if (tmp_path / UNFINISHED).exists() else []
    )
    records += [*read_trajectories(tmp_path)] if (tmp_path / TRAJECTORIES).exists() else []
    assert [record.task_id for record in records] == ["t"]


async def test_an_error_of_the_store_ends_the_run_in_one_line(
    smollm2: ChatTemplate, tmp_path: Path
) -> None:
    """If the disk is full, the run stops, tools are released, and what ran can be run again."""
    toy = Toy()
    store = RunFolder.create(tmp_path, {})
    (tmp_path / TRAJECTORIES).symlink_to("/dev/full")
    tasks = [acts("first", "42"), acts("hangs", call("toy", do="say"), "!hang")]
    with pytest.raises(RunFolderError, match=r"No space .*--resume"):
        await asyncio.wait_for(run_tasks(tasks, shared(Actors(smollm2), toy), store=store), 30)
    store.close()
    assert [record.task_id for record in read_trajectories(tmp_path / UNFINISHED)] == ["hangs"]
    assert toy.count("create") == toy.count("release") == 2


async def test_tasks_that_cannot_be_read_end_the_run_and_keep_what_is_done(
    smollm2: ChatTemplate, tmp_path: Path
) -> None:
    def tasks() -> Iterator[Task]:
        yield acts("good", "42")
        yield acts("hangs", "!hang")
        yield acts("after", "42")
        raise ValueError("line 4 is not a task")

    with RunFolder.create(tmp_path, {}) as store, pytest.raises(ValueError, match="line 4"):
        await run_tasks(tasks(), shared(Actors(smollm2)), max_concurrent=2, store=store)
    assert {record.task_id for record in read_trajectories(tmp_path)} >= {"good"}
    assert [record.task_id for record in read_trajectories(tmp_path / UNFINISHED)][:1] == ["hangs"]


async def test_infra_errors_are_retried_by_a_resumed_run(
    smollm2: ChatTemplate, tmp_path: Path
) -> None:
    with RunFolder.create(tmp_path, {}) as store:
        await run_tasks(
            [acts("a", "42"), acts("b", "!error")], shared(Actors(smollm2)), store=store
        )
    with RunFolder.resume(tmp_path, {}) as store:
        progress = await run_tasks(
            [acts("a", "42"), acts("b", "42")], shared(Actors(smollm2)), store=store
        )
    assert (progress.done, progress.skipped) == (1, 1)
    assert {record.id: record.stop_reason for record in read_trajectories(tmp_path)} == {
        "a-0": "stop",
        "b-0": "stop",
    }
    assert [record.stop_reason for record in read_trajectories(tmp_path / SUPERSEDED)] == [
        "engine_error"
    ]


# ---------------------------------------------------------------------- over-sampling


async def test_the_slow_rest_is_cut_off_and_kept(smollm2: ChatTemplate, tmp_path: Path) -> None:
    engine, toy = Actors(smollm2), Toy()
    slow = call("toy", do="say", text="looked"), "!hang"
    tasks = [
        *(acts(f"slow{number}", *slow) for number in range(2)),
        *(acts(f"t{number}", "42") for number in range(8)),
    ]
    with RunFolder.create(tmp_path, {}) as store:
        progress = await run_tasks(tasks, shared(engine, toy), store=store, target=8)
        store.close({})
    assert (progress.done, progress.running, engine.live) == (8, 0, 0)
    assert {record.task_id for record in read_trajectories(tmp_path)} == {
        f"t{number}" for number in range(8)
    }
    cut_off = [
        Trajectory.from_line(line) for line in (tmp_path / UNFINISHED).read_text().splitlines()
    ]
    assert {
        (record.task_id, record.stop_reason, record.num_turns, record.reward) for record in cut_off
    } == {
        ("slow0", "cancelled", 1, None),
        ("slow1", "cancelled", 1, None),
    }
    assert all(
        "over_sampled" in [warning.kind for warning in record.warnings] for record in cut_off
    )
    assert toy.count("create") == toy.count("released") == 10


async def test_what_has_not_begun_is_not_begun_once_there_is_enough(
    smollm2: ChatTemplate, tmp_path: Path
) -> None:
    tasks = [acts(f"t{number}", "42") for number in range(9)]
    with RunFolder.create(tmp_path, {}) as store:
        progress = await run_tasks(
            tasks, shared(Actors(smollm2)), max_concurrent=1, store=store, target=4
        )
    assert progress.done == 4
    assert not (tmp_path / UNFINISHED).exists()


async def test_a_resumed_run_counts_what_it_has(smollm2: ChatTemplate, tmp_path: Path) -> None:
    tasks = [acts(f"t{number}", "42") for number in range(9)]
    progress = Progress()
    for target in (3, 7, 7):
        make = RunFolder.resume if (tmp_path / RUN).exists() else RunFolder.create
        with make(tmp_path, {}) as store:
            await run_tasks(
                tasks,
                shared(Actors(smollm2)),
                max_concurrent=1,
                store=store,
                target=target,
                progress=progress,
            )
            store.close({})
    assert len(list(read_trajectories(tmp_path))) == 7


async def test_what_the_engines_owner_aborts_is_unfinished_and_verifies(
    smollm2: ChatTemplate, tmp_path: Path
) -> None:
    ids = smollm2.encode("half a")
    cut = Generation(ids, logprobs(ids), "abort")
    engine = says(smollm2, EndedGeneration("cancelled", "the trainer aborted it", cut))
    with RunFolder.create(tmp_path, {"config": {}, "n": 1, "parent": None}) as store:
        smollm2.tokenizer.save_pretrained(tmp_path / "tokenizer")
        progress = await run_tasks([task("t")], runtime(smollm2, engine), store=store)
        store.close({"asked": 1, "done": progress.done})
    assert progress.done == 0
    [record] = open_run(tmp_path).unfinished()
    assert (record.stop_reason, record.num_turns) == ("cancelled", 1)
    defects: list[str] = []
    verify_run(tmp_path, on_defect=lambda defect: defects.append(str(defect)))
    assert defects == []


async def test_a_task_that_the_template_refuses_is_not_run_again(
    smollm2: ChatTemplate, tmp_path: Path
) -> None:
    """It is no failure of infrastructure: a resumed run leaves it as it is."""

    class Refusing(ChatTemplate):
        def prompt(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
            if "no" in messages[0]["content"]:
                raise TemplateError("the chat template refuses the messages")
            return super().prompt(messages, *args, **kwargs)

    template = Refusing(smollm2.tokenizer)
    no = {"role": "user", "content": "no"}
    tasks = [task("fine"), task("refused", messages=[no]), task("last")]
    with RunFolder.create(tmp_path, {"config": {}, "n": 1, "parent": None}) as store:
        template.tokenizer.save_pretrained(tmp_path / "tokenizer")
        engine = says(template, "42", "43")
        progress = await run_tasks(tasks, runtime(template, engine), store=store, target=2)
        store.close({"asked": 3, "done": progress.done})
    assert (progress.failed, progress.infra_errors) == (1, 0)
    records = {record.task_id: record for record in read_trajectories(tmp_path)}
    refused = records["refused"]
    assert (refused.stop_reason, refused.infra_error, refused.reward) == (
        "engine_error",
        False,
        None,
    )
    with RunFolder.resume(tmp_path, {"config": {}, "n": 1, "parent": None}) as store:
        assert ("refused", 0) in store.done
    defects: list[str] = []
    verify_run(tmp_path, on_defect=lambda defect: defects.append(str(defect)))
    assert defects == []
