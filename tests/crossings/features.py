"""The features that a fault is crossed with: each runs a world's conversation its own way, into
`world.out`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from starlette.responses import JSONResponse, PlainTextResponse, Response

from agent.engines.engine import Generation
from agent.engines.evidence import Evidence, EvidenceRequest
from agent.engines.servers import SGLangServerEngine
from agent.loop.batch import run_conversations, run_tasks
from agent.loop.compaction import REQUEST, ContextSettings
from agent.loop.conversation import Counterparts
from agent.loop.runtime import Runtime
from agent.loop.tasks import recorded_task
from agent.loop.tracing import Tracing
from agent.replay.continuation import continuing
from agent.replay.request import ReplayRequest
from agent.replay.restored import replayed as fork_of
from agent.replay.runner import replay_run
from agent.replay.tools import LiveTools
from agent.replay.user import AskedAgainUser
from agent.runs.manifest import parent_entry
from agent.trainers.client import VerlClientEngine
from conversations.branches import is_aside
from conversations.open_run import open_run
from conversations.run.store import RunFolder, image_store
from tests import virtual_time
from tests.agent.native_api import Server, serving
from tests.crossings.world import (
    DIES_AT,
    DOUBT,
    OPINION,
    OPINIONS,
    QUESTION,
    SLOW,
    Desk,
    Fault,
    Model,
    User,
    World,
)
from tests.helpers import logprobs, save_tokenizer_of
from tests.vision import vision_template

COMPACT_AT = 240
"""Tokens; more than a prompt with a summary, less than one with the first answer."""


def open_store(world: World, parent: dict[str, Any] | None = None) -> RunFolder:
    store = RunFolder.create(world.out, {**world.manifest(), "parent": parent})
    save_tokenizer_of(world.template, world.out / "tokenizer")
    return store


async def run_in(world: World, runtime: Runtime, store: RunFolder, **options: Any) -> None:
    """`run_tasks`, cancelled while the tool hangs if that is the fault."""
    running = asyncio.ensure_future(run_tasks(world.tasks(), runtime, store=store, **options))
    if world.fault.cancels:
        await Desk.last.hanging.wait()
        running.cancel()
    await asyncio.wait((running,))
    if not world.fault.cancels:
        running.result()


def in_virtual_time(run: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[World], None]:
    def feature(world: World) -> None:
        virtual_time.run(run(world))

    return feature


def in_real_time(run: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[World], None]:
    """For what waits for threads or sockets, which virtual time does not know."""

    def feature(world: World) -> None:
        async def whole() -> None:
            await run(world)
            if world.with_user:
                User.last.let_go.set()  # asyncio.run waits for every task

        asyncio.run(whole())

    return feature


@in_virtual_time
async def plain(world: World) -> None:
    with open_store(world) as store:
        await run_in(world, world.runtime(world.model()), store)
        store.close({})


@in_virtual_time
async def second_run(world: World) -> None:
    """The second run of one runtime, as in a kept session; the first met the fault, too."""
    runtime = world.runtime(world.model())
    first = replace(world, folder=world.folder / "first")
    first.folder.mkdir()
    first.write_files()
    for one in (first, world):
        Desk.last.hanging.clear()
        with open_store(one) as store:
            if runtime.images:
                runtime.images.look_in(store.image_store())
            await run_in(one, runtime, store)
            store.close({})


class Summariser(Model):
    """The model of a compacted conversation: its summaries say how many turns came before."""

    def turn(self, prompt_ids: Sequence[int]) -> tuple[int, list[int]]:
        text = self.template.decode(prompt_ids)
        known = re.search(r"([0-9]+) turns so far", text)
        before = int(known[1]) if known else 0
        number = before + text.count("<|im_start|>assistant\n") - 1
        if REQUEST in text:
            said = f"{number} turns so far."
            return -1, [*self.template.encode(said), self.template.end_id]
        return number, [*self.template.encode(self.script.turns[number]), self.template.end_id]


@in_virtual_time
async def compacted(world: World) -> None:
    """Every answer reaches the limit: a sequence for each turn with a call."""
    model = world.model()
    summariser = Summariser(world.template, dies=model.dies, waits_at=model.waits_at)
    runtime = world.runtime(summariser)
    context = ContextSettings(compact_at=COMPACT_AT)
    with open_store(world) as store:
        await run_in(
            world, replace(runtime, settings=replace(runtime.settings, context=context)), store
        )
        store.close({})


class Adviser(Model):
    """The model of a conversation whose tool asks it, too."""

    def turn(self, prompt_ids: Sequence[int]) -> tuple[int, list[int]]:
        text = self.template.decode(prompt_ids)
        if OPINION not in text:
            return super().turn(prompt_ids)
        said = OPINIONS[DOUBT in text]
        return -1, [*self.template.encode(said), self.template.end_id]


def with_asking_tool(world: World) -> None:
    """The tool of the world asks the model."""
    text = world.tools_path.read_text()
    world.tools_path.write_text(text.replace("world.Desk", "world.AskingDesk"))


@in_virtual_time
async def asked_by_tool(world: World) -> None:
    """Each call has a sub-conversation of two turns, whatever its tool does then."""
    with_asking_tool(world)
    model = Adviser(world.template, world.script, dies=world.fault.dies)
    with open_store(world) as store:
        await run_in(world, world.runtime(model), store)
        store.close({})
    for record in open_run(world.out):
        asides = [branch for branch in record.branches if is_aside(branch)]
        assert [branch.client["call"] for branch in asides] == ["call_0_0", "call_1_0"]
        assert [len(branch.turns) for branch in asides] == [2, 2]


class Witness(Model):
    """Tells the two likeliest tokens of each place to whoever asks."""

    async def generate(self, *args: Any, **given: Any) -> Generation:
        made = await super().generate(*args, **given)
        asked, ids = given["evidence"], np.array(made.token_ids, np.int32)
        assert asked.top_logprobs == 2
        values = np.array(made.logprobs, np.float32)
        return replace(
            made,
            evidence=Evidence(
                top_ids=np.stack([ids, ids + 1], axis=1),
                top_logprobs=np.stack([values, values - 1], axis=1),
            ),
        )


@in_real_time
async def with_evidence(world: World) -> None:
    """Top-k log-probs beside the run; `verify` checks them."""
    given = world.model()
    model = Witness(world.template, world.script, dies=given.dies)
    runtime = world.runtime(model)
    settings = replace(runtime.settings, evidence=EvidenceRequest(top_logprobs=2))
    with open_store(world) as store:
        await run_in(world, replace(runtime, settings=settings), store)
        store.close({})
    assert len(list(world.out.glob("evidence/*.safetensors"))) == 1


@in_real_time
async def with_images(world: World) -> None:
    """A model that sees: an image in the task, one in each answer of the tool."""
    seeing = replace(world, template=vision_template("qwen2_5_vl", "hermes"))
    seeing.write_files()
    model = seeing.model()
    with open_store(seeing) as store:
        await run_in(seeing, seeing.runtime(model), store)
        store.close({})
    assert [len(given["images"]) for given in model.given[:2]] == [1, 2]
    assert len(list(world.out.glob("images/*.png"))) == 1  # all are the same one


@in_virtual_time
async def traced(world: World) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    tracing = Tracing(provider)
    with open_store(world) as store:
        await run_in(world, replace(world.runtime(world.model()), observer=tracing), store)
        store.close({})
    tracing.close()
    kinds = [span.name.split()[0] for span in spans.get_finished_spans()]
    assert kinds.count("invoke_agent") == 1


async def _go_on(world: World) -> None:
    """Resumes the run, the interrupted conversations from their last token."""
    with RunFolder.resume(world.out, world.manifest()) as store:
        runtime = world.runtime(world.model())
        if runtime.images:
            runtime.images.look_in(store.image_store())  # as a resumed run does
        make = continuing(runtime, store.unfinished)
        await run_in(world, runtime, store, make=make)
        store.close({})


@in_virtual_time
async def resumed(world: World) -> None:
    """Cut off while the second turn is sampled, then continued."""
    with open_store(world) as store:
        model = Model(world.template, world.script, waits_at=1)
        begun = asyncio.ensure_future(run_tasks(world.tasks(), world.runtime(model), store=store))
        await model.waiting.wait()
        begun.cancel()
        await asyncio.wait((begun,))
        store.close({})
    await _go_on(world)


@in_virtual_time
async def stopped_after(world: World) -> None:
    """Cut off by a time limit while the second turn's tool hangs, then continued."""
    hanging = replace(world, fault=replace(world.fault, tool="hangs"))
    with open_store(world) as store:
        hanging.write_files()
        runtime = hanging.runtime(world.model())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await run_tasks(world.tasks(), runtime, store=store)
        store.close({})
    world.write_files()
    await _go_on(world)


@in_virtual_time
async def over_sampled(world: World) -> None:
    """Two conversations of which one is enough; the slow one is cut off, or ends by itself after a
    failure.
    """
    model = world.model()
    runtime = world.runtime(model)
    with open_store(world) as store:
        tasks = world.tasks(QUESTION, SLOW)
        running = asyncio.ensure_future(
            run_tasks(tasks, runtime, store=store, target=1, on_done=lambda _: model.let_go.set())
        )
        if world.fault.cancels:
            await Desk.last.hanging.wait()
            running.cancel()
        await asyncio.wait((running,))
        store.close({})


# ---------------------------------------------------------------------- servers


def server_of(world: World, *, breaks_at: int | None) -> Server:
    """SGLang's API over the script; at turn `breaks_at` it is gone for good."""
    model = Model(world.template, world.script)

    async def answer(server: Server, body: dict[str, Any]) -> Response:
        number, ids = model.turn(body["input_ids"])
        if number == breaks_at:
            server.up = False
            return PlainTextResponse("gone", 503)
        triples = [[value, token, None] for value, token in zip(logprobs(ids), ids, strict=True)]
        meta = {
            "id": body["rid"],
            "finish_reason": {"type": "stop"},
            "prompt_tokens": len(body["input_ids"]),
            "cached_tokens": 0,
            "output_token_logprobs": triples,
        }
        return JSONResponse({"output_ids": ids, "meta_info": meta})

    return Server(answer)


@contextlib.asynccontextmanager
async def two_servers(world: World) -> AsyncIterator[SGLangServerEngine]:
    """The first server goes away at the second turn; the second one later, if the engine dies."""
    first = server_of(world, breaks_at=1)
    second = server_of(world, breaks_at=DIES_AT if world.fault.dies else None)
    async with serving(first), serving(second):
        engine = SGLangServerEngine([first.url, second.url], attempts=3, wait_s=2.0)
        try:
            yield engine
        finally:
            await engine.close()


@in_real_time
async def failed_over(world: World) -> None:
    if world.fault.deadline_s:  # on a busy machine servers, unlike virtual time, take a while
        world = replace(world, fault=replace(world.fault, deadline_s=8.0))
    async with two_servers(world) as engine:
        with open_store(world) as store:
            await run_in(world, world.runtime(engine), store)
            store.close({})


# ---------------------------------------------------------------------- trainers


class VerlClient:
    """verl 0.8's and 0.9's `LLMServerClient`, over the script."""

    def __init__(self, model: Model) -> None:
        self.model = model

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling_params: dict[str, Any]
    ) -> Any:
        made = await self.model.generate(prompt_ids, sampling_params, request_id=request_id)
        return SimpleNamespace(
            token_ids=made.token_ids,
            log_probs=made.logprobs,
            stop_reason="completed",
            num_preempted=None,
            extra_fields={"global_steps": 3},
        )


@in_virtual_time
async def verl_agent_loop(world: World) -> None:
    """A conversation of verl's agent loop: its servers' client as the engine."""
    engine = VerlClientEngine(VerlClient(world.model()), {"name": "verl"})
    with open_store(world) as store:
        await run_in(world, world.runtime(engine), store)
        store.close({})


def verl_batch(world: World) -> None:
    """A batch of a verl 0.6.1 trainer, saved as a run folder."""
    from verl.workers.config import RolloutConfig
    from verl.workers.config.rollout import MultiTurnConfig

    from agent.trainers.batches import TrainerBatches

    deadline = {"conversation_deadline_s": world.fault.deadline_s} if world.fault.deadline_s else {}
    multi_turn = {
        "enable": True,
        "format": "auto",
        "tool_config_path": str(world.tools_path),
        "max_tool_response_length": 256,
    }
    if world.with_user:
        multi_turn["interaction_config_path"] = str(world.users_path)
    config = RolloutConfig(
        name="sglang",
        prompt_length=4096,
        response_length=4096,
        max_model_len=8192,
        multi_turn=MultiTurnConfig(**multi_turn),
        engine_kwargs={"turntrace": {"save_to": str(world.folder / "steps"), **deadline}},
    )
    batches = TrainerBatches(world.model(), world.template.tokenizer, config, {}, "smollm2-base")
    columns = {"raw_prompt": np.array([[{"role": "user", "content": QUESTION}]], dtype=object)}
    if world.with_user:
        columns["interaction_kwargs"] = np.array([{"name": "user"}], dtype=object)
    prompts = SimpleNamespace(meta_info={"global_steps": 1}, non_tensor_batch=columns)

    async def run() -> None:
        running = asyncio.ensure_future(batches.run(prompts, {}))
        if world.fault.cancels:
            await Desk.last.hanging.wait()
            running.cancel()
        await asyncio.wait((running,))
        if not world.fault.cancels:
            running.result()

    virtual_time.run(run())
    (world.folder / "steps" / "train-1-rank-0").rename(world.out)


# ---------------------------------------------------------------------- replay


def replayed(world: World, **request: Any) -> None:
    """A run with the fault, replayed; the replay is what is looked at."""
    parent = replace(world, folder=world.folder / "parent")
    parent.folder.mkdir()
    parent.write_files()
    plain(parent)
    asked = ReplayRequest(parent.out, world.out, **request)
    code, report = replay_run(asked, Console(file=io.StringIO()))
    assert (code, report["outcomes"]["identical"]) == (0, 1), report


def replayed_recorded(world: World) -> None:
    replayed(world)


def replayed_live(world: World) -> None:
    replayed(world, tools="live", tools_config=str(world.tools_path), trust_tools=True)


def forked(world: World) -> None:
    """A clean run's conversation with its first turn kept, then sampled by a live model."""
    parent = replace(world, fault=Fault("nothing"), folder=world.folder / "parent")
    parent.folder.mkdir()
    parent.write_files()
    plain(parent)
    [record] = open_run(parent.out)

    async def run() -> None:
        runtime, task = world.runtime(world.model()), recorded_task(record)
        assert runtime.dispatcher
        if runtime.images:
            runtime.images.look_in(image_store(parent.out))
        counterparts = Counterparts(
            LiveTools(runtime.dispatcher, task, record, turns=1, recorded_prompt=True),
            AskedAgainUser.of(task, record, 1, runtime),
        )
        origin = {"run": parent.out.name, "id": record.id, "turn": 1}
        fork = fork_of(record, 0, runtime, counterparts, kept=1, parent=origin)
        with open_store(world, parent_entry(parent.out)) as store:
            running = asyncio.ensure_future(run_conversations([fork], store=store))
            if world.fault.cancels:
                await Desk.last.hanging.wait()
                running.cancel()
            await asyncio.wait((running,))
            if not world.fault.cancels:
                running.result()
            store.close({})

    virtual_time.run(run())


FEATURES: dict[str, Callable[[World], None]] = {
    "plain": plain,
    "second run": second_run,
    "branches": compacted,
    "tool asks": asked_by_tool,
    "evidence": with_evidence,
    "images": with_images,
    "tracing": traced,
    "resume": resumed,
    "stop after": stopped_after,
    "over-sampling": over_sampled,
    "fail-over": failed_over,
    "verl batch": verl_batch,
    "verl agent loop": verl_agent_loop,
    "recorded replay": replayed_recorded,
    "live replay": replayed_live,
    "fork": forked,
}

IMPOSSIBLE = {
    ("over-sampling", "deadline"): "both conversations come to their deadline at once",
    ("verl batch", "template refuses"): "the batch makes its own template",
    ("recorded replay", "template refuses"): "a replay loads the run's own tokenizer",
    ("live replay", "template refuses"): "a replay loads the run's own tokenizer",
    ("recorded replay", "cancelled"): "there is no finished record to replay",
    ("live replay", "cancelled"): "there is no finished record to replay",
    ("live replay", "deadline"): "a replay has no deadline, and the tool would hang for ever",
}
"""Cells that cannot be, and why."""
