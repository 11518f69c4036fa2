"""AgentRollout on the real SGLang engine, started once for all of these tests: ids in, ids out,
nothing lost on the way.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.engines import cpu_attention
from agent.engines.engine import Generation, Interrupted
from agent.engines.evidence import EvidenceRequest
from agent.engines.sglang import SGLangEngine
from agent.engines.start import start
from agent.errors import ConfigError, EngineError, EngineStartError
from agent.model.base import base_model_dir
from tests.conftest import ENGINE_CONTEXT, ENGINE_SLOTS
from tests.helpers import ROOT, tokenizer_at

pytestmark = pytest.mark.engine
on_session_loop = pytest.mark.asyncio(loop_scope="session")

END = 2
"""`<|im_end|>` in SmolLM2's vocabulary."""
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
ODD_IDS = [27, 14172, 13429, 29, 198, 198, 90, 5416, 20022, 220, 1350]
"""Ids that no text encodes to: a decode and encode on the way would change them."""


@pytest.fixture(scope="session")
def engine(sglang_rollout: Any) -> SGLangEngine:
    found: SGLangEngine = sglang_rollout.engine()
    return found


def prompt(messages: list[dict[str, Any]] = FRANCE) -> list[int]:
    ids: list[int] = tokenizer_at(base_model_dir()).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return ids


async def sample(
    engine: SGLangEngine, ids: list[int], request_id: str | None = None, **sampling: Any
) -> Generation:
    return await engine.generate(
        ids,
        {"temperature": 0.0, "max_new_tokens": 16, **sampling},
        request_id=request_id or uuid.uuid4().hex,
    )


def endless(
    engine: SGLangEngine, request_id: str | None = None, seed: int = 0
) -> asyncio.Task[Generation]:
    """A generation that lasts for as long as a test needs it."""
    ids = [1, 9690, 198, 1000 + seed]
    return asyncio.create_task(
        sample(engine, ids, request_id, max_new_tokens=ENGINE_CONTEXT - 16, ignore_eos=True)
    )


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():  # noqa: ASYNC110 - it is another process that changes
            await asyncio.sleep(0.05)


def load_is(rollout: Any, *, requests: int, waiting: int) -> Callable[[], Awaitable[bool]]:
    """SGLang's own figures: requests in all, and those of them that wait."""

    async def reached() -> bool:
        manager = rollout._engine.tokenizer_manager
        load = (
            await (manager.get_load() if hasattr(manager, "get_load") else manager.get_loads())
        )[0]
        in_all = getattr(load, "num_reqs", None)  # before SGLang 0.5.12
        if in_all is None:
            in_all = load.num_running_reqs + load.num_waiting_reqs
        return (in_all, load.num_waiting_reqs) == (requests, waiting)

    return reached


def idle(rollout: Any) -> Callable[[], Awaitable[bool]]:
    """SGLang runs nothing, and its side in this process remembers nothing."""
    nothing = load_is(rollout, requests=0, waiting=0)

    async def reached() -> bool:
        return await nothing() and not rollout._engine.tokenizer_manager.rid_to_state

    return reached


async def empty_cache(rollout: Any) -> None:
    from agent.engines.rollout import until_idle

    await until_idle(rollout._engine)


# ---------------------------------------------------------------------- what comes back


@on_session_loop
async def test_ids_go_in_as_they_are_and_the_callers_list_stays_its_own(
    engine: SGLangEngine,
) -> None:
    ids = prompt() + ODD_IDS
    before = ids.copy()
    running = asyncio.create_task(sample(engine, ids))
    await asyncio.sleep(0)
    ids.append(7)  # a conversation's sequence is live
    assert (await running).prompt_tokens == len(before)


@on_session_loop
async def test_the_likeliest_tokens_come_back_with_the_sampled_one(engine: SGLangEngine) -> None:
    asked = EvidenceRequest(top_logprobs=3)
    sampling = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    generation = await engine.generate(
        prompt(), sampling, request_id=uuid.uuid4().hex, evidence=asked
    )
    evidence = generation.evidence
    assert evidence is not None
    assert evidence.top_ids[:, 0].tolist() == generation.token_ids
    assert evidence.top_logprobs[:, 0].tolist() == generation.logprobs
    assert evidence.top_ids.shape == (8, 3)


@pytest.mark.parametrize(("temperature", "another"), [(1.0, 0.5), (0.5, 1.0)])
@on_session_loop
async def test_logprobs_are_those_of_the_temperature_scaled_distribution(
    engine: SGLangEngine, temperature: float, another: float
) -> None:
    """Checked against transformers' own forward pass over the same ids, in float32."""
    generation = await sample(
        engine, [504], temperature=temperature, max_new_tokens=48, ignore_eos=True
    )
    logits = reference_logits([504], generation.token_ids)
    assert len(generation.logprobs) == len(generation.token_ids) == 48
    assert mean_error(generation, logits / temperature) < 0.15  # seen: 0.01 to 0.05
    assert mean_error(generation, logits / another) > 0.15  # seen: 0.4 and more


def reference_logits(ids: list[int], sampled: list[int]) -> Any:
    """[len(sampled), vocabulary]: the logits of each sampled token, before the temperature."""
    import torch

    with torch.no_grad():
        return reference_model()(torch.tensor([ids + sampled])).logits[0, len(ids) - 1 : -1]


@functools.cache
def reference_model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_model_dir(), dtype=torch.float32)


def mean_error(generation: Generation, logits: Any) -> float:
    rows = logits.log_softmax(dim=-1)
    pairs = zip(rows, generation.token_ids, generation.logprobs, strict=True)
    return statistics.fmean(abs(float(row[token]) - logprob) for row, token, logprob in pairs)


@on_session_loop
async def test_the_end_token_is_sampled_like_any_other(engine: SGLangEngine) -> None:
    generation = await sample(engine, prompt(), stop_token_ids=[END])
    assert generation.finish_reason == "stop"
    assert generation.token_ids[-1] == END
    assert len(generation.logprobs) == len(generation.token_ids)


@on_session_loop
async def test_an_exact_fit_ends_with_the_end_token(engine: SGLangEngine) -> None:
    """Its reason is length in SGLang 0.5.5, stop in 0.5.23: the loop looks at the token."""
    whole = await sample(engine, prompt(), stop_token_ids=[END])
    fit = await sample(engine, prompt(), stop_token_ids=[END], max_new_tokens=len(whole.token_ids))
    assert fit.token_ids == whole.token_ids
    assert fit.finish_reason in ("length", "stop")


@on_session_loop
async def test_all_of_max_model_len_can_be_used(engine: SGLangEngine) -> None:
    ids = (prompt() * ENGINE_CONTEXT)[: ENGINE_CONTEXT - 5]
    generation = await sample(engine, ids, max_new_tokens=5, ignore_eos=True)
    assert (len(generation.token_ids), generation.finish_reason) == (5, "length")


@on_session_loop
async def test_the_next_turn_finds_the_whole_last_one_in_the_cache(
    engine: SGLangEngine, sglang_rollout: Any
) -> None:
    await empty_cache(sglang_rollout)  # another test may have sampled further
    first = await sample(engine, prompt(), stop_token_ids=[END])
    sequence = prompt() + first.token_ids
    second = await sample(engine, [*sequence, 198, 1, 4093, 198])
    assert second.prompt_tokens == len(sequence) + 4
    assert second.cached_tokens == len(sequence) - 1  # the end token's own entry was never computed


@on_session_loop
async def test_an_answer_says_what_it_cost(sglang_rollout: Any, engine: SGLangEngine) -> None:
    generation = await sample(engine, prompt())
    syncs = sglang_rollout._engine.weight_syncs  # other tests of the shared engine have synced
    assert generation.weight_version == (str(syncs) if syncs else "default")
    assert generation.engine_s is not None
    # SGLang from 0.5.9 on reports the time in the queue only with enable_metrics.
    assert 0 <= (generation.queue_s or 0.0) <= generation.engine_s
    assert engine.describe()["device"] in ("cpu", "cuda")
    assert "/" not in engine.describe()["model"]  # a name, not a path of this machine
    json.dumps(engine.describe())


SAMPLE_TO = "TURNTRACE_TEST_SAMPLE_TO"
"""Variable that names a file for `greedy_sample`: `engines/test_other_sglangs.py` compares it."""


async def greedy_sample(rollout: Any, count: int = 32) -> dict[str, Any]:
    """Ids and log-probs of two greedy turns, the second after the first, and SGLang's version.

    The cache is emptied first: a prompt that is computed in two parts is rounded otherwise.
    """
    engine = rollout.engine()
    await empty_cache(rollout)
    first = await sample(engine, prompt(), max_new_tokens=count, ignore_eos=True)
    second = await sample(
        engine, [*prompt(), *first.token_ids, *ODD_IDS], max_new_tokens=count, ignore_eos=True
    )
    return {
        "sglang": engine.describe()["sglang"],
        "ids": [first.token_ids, second.token_ids],
        "logprobs": [first.logprobs, second.logprobs],
    }


@on_session_loop
async def test_a_greedy_sample_for_another_version(sglang_rollout: Any) -> None:
    path = os.environ.get(SAMPLE_TO)
    count = 32 if path else 4  # so many are compared
    sampled = await greedy_sample(sglang_rollout, count)
    assert [len(ids) for ids in sampled["ids"]] == [count, count]
    if path:
        await asyncio.to_thread(Path(path).write_text, json.dumps(sampled))


@pytest.mark.parametrize("heads", [9, 3])
def test_decoding_gives_what_sglangs_own_attention_gives(sglang_rollout: Any, heads: int) -> None:
    """SGLang's own backend over a cache with gaps, before and after its attention is replaced."""
    import torch
    from sglang.srt.layers.attention import torch_native_backend as backend

    generator = torch.Generator().manual_seed(heads)
    keys, values = (torch.randn(256, 3, 64, generator=generator).bfloat16() for _ in range(2))
    queries = torch.randn(4, heads, 64, generator=generator).bfloat16()
    places = torch.stack([torch.randperm(256, generator=generator)[:128] for _ in range(4)])
    rows, lengths = torch.tensor([2, 0, 3, 1]), torch.tensor([128, 1, 17, 64])

    def decoded() -> Any:
        found = torch.empty_like(queries)
        decode = backend.TorchNativeAttnBackend._run_sdpa_forward_decode
        cache = (keys, values, places, rows, lengths)
        decode(None, queries, found, *cache, scaling=0.125, enable_gqa=heads != 3)
        return found

    given = backend.scaled_dot_product_attention
    before = decoded()
    try:
        cpu_attention.use_grouped_attention()
        assert backend.scaled_dot_product_attention is cpu_attention.grouped_attention
        assert torch.allclose(decoded().float(), before.float(), atol=1e-3, rtol=1e-2)
        for options in ({"is_causal": True}, {"attn_mask": torch.ones(5, 64).tril() > 0}):
            wide = torch.randn(1, 9, 5, 64, generator=generator)
            narrow = torch.randn(1, 3, 64, 64, generator=generator)
            both = [
                attend(wide, narrow, narrow, enable_gqa=True, **options)
                for attend in (given, cpu_attention.grouped_attention)
            ]
            assert torch.equal(*both)
    finally:
        backend.scaled_dot_product_attention = given


# ---------------------------------------------------------------------- stopping


@on_session_loop
async def test_tokens_count_while_their_turn_is_sampled(engine: SGLangEngine) -> None:
    request_id = uuid.uuid4().hex
    running = endless(engine, request_id, seed=7)

    async def some_arrived() -> bool:
        return engine.tokens_in_flight() > 0

    await until(some_arrived)
    await engine.abort(request_id)
    assert len((await running).token_ids) > 0
    assert engine.tokens_in_flight() == 0


@on_session_loop
async def test_abort_of_a_running_request_returns_what_it_has(
    engine: SGLangEngine, sglang_rollout: Any
) -> None:
    request_id = uuid.uuid4().hex
    running = endless(engine, request_id)
    await until(load_is(sglang_rollout, requests=1, waiting=0))
    await asyncio.sleep(0.5)
    await engine.abort(request_id)
    generation = await running
    assert generation.finish_reason == "abort"
    assert 0 < len(generation.token_ids) == len(generation.logprobs) < ENGINE_CONTEXT - 16
    await until(idle(sglang_rollout))


@on_session_loop
async def test_abort_stops_one_request_running_or_queued_and_no_other(
    engine: SGLangEngine, sglang_rollout: Any
) -> None:
    ids = [uuid.uuid4().hex for _ in range(ENGINE_SLOTS + 2)]
    tasks = [endless(engine, request_id, seed) for seed, request_id in enumerate(ids)]
    await until(load_is(sglang_rollout, requests=ENGINE_SLOTS + 2, waiting=2))
    await engine.abort(ids[-1])
    queued = await tasks[-1]
    assert (queued.finish_reason, queued.token_ids, queued.logprobs) == ("abort", [], [])
    assert not any(task.done() for task in tasks[:-1])
    await engine.abort(ids[-1])  # nobody knows it any more
    for request_id in ids[:-1]:
        await engine.abort(request_id)
    assert {generation.finish_reason for generation in await asyncio.gather(*tasks)} == {"abort"}
    await until(idle(sglang_rollout))


@on_session_loop
async def test_a_cancelled_request_is_stopped_in_the_engine_too(
    engine: SGLangEngine, sglang_rollout: Any
) -> None:
    tasks = [endless(engine, seed=seed) for seed in range(ENGINE_SLOTS + 1)]
    await until(load_is(sglang_rollout, requests=ENGINE_SLOTS + 1, waiting=1))
    for task in tasks:
        task.cancel()
    told = []
    for task in tasks:
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        if isinstance(raised.value, Interrupted):
            told.append(raised.value.generation)
    assert len(told) >= ENGINE_SLOTS  # the one that waited had nothing to tell
    assert all(
        partial.finish_reason == "abort" and len(partial.token_ids) == len(partial.logprobs) > 0
        for partial in told
    )
    await until(idle(sglang_rollout))
    assert (await sample(engine, prompt(), stop_token_ids=[END])).finish_reason == "stop"


@on_session_loop
async def test_a_request_stopped_before_the_engine_had_it_never_reaches_it(
    engine: SGLangEngine, sglang_rollout: Any
) -> None:
    aborted, cancelled = uuid.uuid4().hex, uuid.uuid4().hex
    both = uuid.uuid4().hex
    tasks = [endless(engine, aborted), endless(engine, cancelled), endless(engine, both)]
    await asyncio.sleep(0)
    await engine.abort(aborted)
    tasks[1].cancel()
    await engine.abort(both)
    tasks[2].cancel()
    assert await tasks[0] == Generation([], [], "abort")
    for task in tasks[1:]:
        with pytest.raises(asyncio.CancelledError):
            await task
    await until(idle(sglang_rollout))


@on_session_loop
async def test_a_request_id_in_flight_is_refused(engine: SGLangEngine) -> None:
    request_id = uuid.uuid4().hex
    running = endless(engine, request_id)
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="already in flight"):
        await sample(engine, prompt(), request_id)
    await engine.abort(request_id)
    await running


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "bad",
    [
        {"stop": ["\n"]},
        {"stop_regex": "x"},
        {"min_new_tokens": 3},
        {"n": 2},
        {"nonsense": 1},
        {"top_p": 7.0},
    ],
)
@on_session_loop
async def test_bad_sampling_params_fail_one_request_and_leave_the_engine_up(
    engine: SGLangEngine, bad: dict[str, Any]
) -> None:
    with pytest.raises(EngineError, match=r"^[^\n]+$"):
        await sample(engine, prompt(), **bad)
    assert len((await sample(engine, prompt(), max_new_tokens=1)).token_ids) == 1


@pytest.mark.parametrize("ids", [[], [1] * (ENGINE_CONTEXT + 100), [49152 + 5]])
@on_session_loop
async def test_a_bad_prompt_fails_one_request_and_leaves_the_engine_up(
    engine: SGLangEngine, ids: list[int]
) -> None:
    with pytest.raises(EngineError, match=r"^[^\n]+$"):
        await sample(engine, ids)
    assert len((await sample(engine, prompt(), max_new_tokens=1)).token_ids) == 1


@on_session_loop
async def test_a_second_event_loop_is_refused(engine: SGLangEngine) -> None:
    await sample(engine, prompt())
    failures: list[BaseException] = []

    def elsewhere() -> None:
        try:
            asyncio.run(sample(engine, prompt()))
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert [str(error) for error in failures] == [
        "an SGLang engine serves one event loop, that of its first generate: use that one, or "
        "start another engine"
    ]


# ---------------------------------------------------------------------- weights


@on_session_loop
async def test_weights_are_synced_through_the_inherited_method(
    engine: SGLangEngine, sglang_rollout: Any
) -> None:
    from safetensors.torch import load_file

    norm = load_file(base_model_dir() / "model.safetensors")["model.norm.weight"]
    await empty_cache(sglang_rollout)
    before = await sample(engine, prompt())
    await sglang_rollout.update_weights(iter([("model.norm.weight", norm * 0)]))
    changed = await sample(engine, prompt())
    await sglang_rollout.update_weights(iter([("model.norm.weight", norm)]))
    after = await sample(engine, prompt())
    assert changed.logprobs == pytest.approx(
        [-10.8027] * 16, abs=1e-3
    )  # -log of the vocabulary's size: all tokens alike
    assert changed.cached_tokens == 0
    assert [int(one.weight_version or "") for one in (changed, after)] == [
        sglang_rollout._engine.weight_syncs - 1,
        sglang_rollout._engine.weight_syncs,
    ]
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)


@on_session_loop
async def test_new_weights_wait_for_what_the_scheduler_still_runs(
    engine: SGLangEngine, sglang_rollout: Any
) -> None:
    """A request can be over here before it is put away there; its scheduler would die of that."""
    from safetensors.torch import load_file

    norm = load_file(base_model_dir() / "model.safetensors")["model.norm.weight"]
    await empty_cache(sglang_rollout)
    before = await sample(engine, prompt())
    over = uuid.uuid4().hex
    task = endless(engine, over)
    await until(load_is(sglang_rollout, requests=1, waiting=0))
    engine._running[over].cancel()  # here alone: the scheduler is not told
    assert (await task).finish_reason == "abort"
    update = asyncio.create_task(sglang_rollout.update_weights(iter([("model.norm.weight", norm)])))
    await asyncio.sleep(0.5)
    assert not update.done()
    sglang_rollout._engine.tokenizer_manager.abort_request(abort_all=True)
    await update
    assert await idle(sglang_rollout)()
    after = await sample(engine, prompt())
    assert (after.token_ids, after.cached_tokens) == (before.token_ids, 0)


@on_session_loop
async def test_release_and_resume_are_harmless_where_nothing_can_be_released(
    engine: SGLangEngine, sglang_rollout: Any
) -> None:
    if engine.describe()["device"] == "cpu":
        await sglang_rollout.release()
        await sglang_rollout.resume(["weights", "kv_cache"])
    assert (await sample(engine, prompt(), stop_token_ids=[END])).finish_reason == "stop"


def test_it_is_verls_own_rollout_class(sglang_rollout: Any) -> None:
    from verl.workers.rollout.sglang_rollout.sglang_rollout import SGLangRollout

    assert isinstance(sglang_rollout, SGLangRollout)
    assert sglang_rollout.engine() is sglang_rollout.engine()


# ---------------------------------------------------------------------- starting and ending


def test_ports_are_free_and_those_that_sglang_derives_exist(sglang_rollout: Any) -> None:
    """SGLang 0.5.12 takes the port + 10000 for itself."""
    from agent.engines.rollout import PORTS, free_port

    assert sglang_rollout._engine.server_args.port in PORTS
    assert max(PORTS) + 10000 < 1 << 16
    with socket.socket() as taken, socket.socket() as other:
        taken.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in (taken, other)]
        other.close()
        assert free_port(ports) == ports[1]
        with pytest.raises(ConfigError, match="SGLANG_PORT"):
            free_port(ports[:1])


@pytest.mark.slow
def test_two_ranks_in_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """One process updates all of an engine's ranks, also before the first generation, and is told
    when one of them dies; no signal handler is taken, and a clean exit leaves nothing behind.
    """
    script = tmp_path / "ranks.py"
    script.write_text(f"LOG = {str(tmp_path / 'log')!r}\n{textwrap.dedent(RANKS)}")
    cores = sorted(os.sched_getaffinity(0))
    environment = {**_environment(), "SGLANG_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    done = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["uniform"] == pytest.approx(-10.8027, abs=1e-3)
    (before, changed, restored), versions = zip(*told["turns"], strict=True)
    assert versions == ("2", "3", "4")
    assert changed != before
    assert restored == before
    assert told["signals"] == [0, 0]
    assert "killed from outside" in told["running"]
    assert "killed from outside" in told["next"]
    assert "killed from outside" in told["weights"]
    assert told["processes"] == []
    assert "Traceback" not in done.stderr


RANKS = """
    import asyncio, json, os, pathlib, signal, uuid
    import psutil, torch
    from safetensors.torch import load_file
    from agent.engines.start import start
    from agent.errors import EngineError
    from agent.model.base import base_model_dir

    config = {"prompt_length": 64, "response_length": 448, "tensor_model_parallel_size": 2}
    rollout = start(config, base_model_dir(), log_path=pathlib.Path(LOG))
    engine = rollout.engine()
    weights = load_file(base_model_dir() / "model.safetensors")
    norm = {"model.norm.weight": weights["model.norm.weight"]}
    layer = {name: tensor for name, tensor in weights.items() if ".3." in name}

    def update(tensors, factor):
        return rollout.update_weights((name, it * factor) for name, it in tensors.items())

    async def generate(count, **sampling):
        return await engine.generate(
            [1, 9690, 198, 504],
            {"max_new_tokens": count, **sampling},
            request_id=uuid.uuid4().hex,
        )

    async def sampled():
        generation = await generate(12, temperature=0.0)
        return generation.token_ids, generation.weight_version

    def children():
        found = psutil.Process().children()
        return [one for one in found if "resource_tracker" not in " ".join(one.cmdline())]

    async def failure(request):
        try:
            await request
        except EngineError as error:
            return str(error)

    async def main():
        await update(norm, 0)
        told = {"uniform": (await generate(1)).logprobs[0]}
        await update(norm, 1)
        told["turns"] = [await sampled()]
        await update(layer, 0)
        told["turns"].append(await sampled())
        await update(layer, 1)
        told["turns"].append(await sampled())
        told["signals"] = [int(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGQUIT)]
        running = asyncio.create_task(failure(generate(400, ignore_eos=True)))
        await asyncio.sleep(0.5)
        os.kill(children()[0].pid, signal.SIGKILL)
        told["running"] = await running
        told["next"] = await failure(generate(1))
        told["weights"] = await failure(update(norm, 1))
        await engine.close()
        await engine.close()
        told["processes"] = [child.name() for child in children()]
        print(json.dumps(told))

    asyncio.run(main())
"""


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_an_engine_that_cannot_start_is_one_line_and_this_process_lives(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    starved = {
        "prompt_length": 64,
        "response_length": 64,
        "engine_kwargs": {"sglang": {"max_total_tokens": -1}},
    }
    with pytest.raises(EngineStartError, match=r"^[^\n]+$") as failure:
        start(starved, base_model_dir(), log_path=log)
    assert "gpu_memory_utilization leaves no room for the KV cache" in str(failure.value)
    assert str(log) in str(failure.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"prompt_length": 8000, "response_length": 8000},
            "verl refuses the rollout config: model context length should be greater",
        ),
        (
            {"prompt_length": 64, "response_length": 64, "max_model_len": 100},
            "verl refuses the rollout config: max_model_len should be",
        ),
        (
            {"prompt_length": 64, "response_length": 64, "max_model_len": 9000},
            "rollout.max_model_len: 9000 is more than the model's 8192",
        ),
    ],
)
def test_a_config_the_model_cannot_serve_is_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{message}[^\n]*$"):
        start(config, base_model_dir())


def test_a_misspelt_argument_of_sglang_is_named() -> None:
    config = {
        "prompt_length": 64,
        "response_length": 64,
        "engine_kwargs": {"sglang": {"attention_backnd": "x"}},
    }
    with pytest.raises(EngineStartError, match=r"^[^\n]*'attention_backnd'"):
        start(config, base_model_dir())
