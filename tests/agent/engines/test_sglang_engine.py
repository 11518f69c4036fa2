"""What surrounds the engine and needs none to be checked: its arguments, its answers, its failures,
its import guards.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.config.config import load_config
from agent.engines.arguments import (
    CONTEXT_SLACK,
    cpu_has_bfloat16,
    environment,
    server_args,
    start_variables,
    with_default_dtype,
)
from agent.engines.cpu_guards import guard_paths
from agent.engines.processes import Children, collector_paused, explain
from agent.engines.sglang import check_prompt, check_sampling, read_answer
from agent.engines.sticky import Conversations, place_of
from agent.errors import EngineError, EngineStartError
from tests.helpers import ROOT

# ---------------------------------------------------------------------- answers


def answer(**changes: Any) -> dict[str, Any]:
    meta = {
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 9,
        "cached_tokens": 8,
        "queue_time": 0.5,
        "e2e_latency": 1.5,
        "weight_version": "default",
        "output_token_logprobs": [(-0.1234567890123456789, 5, None), (-2.5, 2, None)],
    }
    return {"output_ids": [5, 2], "meta_info": {**meta, **changes}}


def test_an_answer_is_handed_on_unrounded() -> None:
    generation = read_answer(answer())
    assert (generation.token_ids, generation.logprobs) == ([5, 2], [-0.1234567890123456789, -2.5])
    assert (generation.finish_reason, generation.prompt_tokens, generation.cached_tokens) == (
        "stop",
        9,
        8,
    )
    assert (generation.queue_s, generation.engine_s, generation.weight_version) == (
        0.5,
        1.5,
        "default",
    )


def test_a_request_aborted_in_the_queue_has_no_counts() -> None:
    generation = read_answer(
        {
            "output_ids": [],
            "meta_info": {"id": "x", "finish_reason": {"type": "abort"}, "completion_tokens": 0},
        }
    )
    assert (generation.token_ids, generation.finish_reason, generation.prompt_tokens) == (
        [],
        "abort",
        None,
    )


NOT_DATA: dict[str, dict[str, Any]] = {
    "NaN happened": {"finish_reason": {"type": "stop", "matched": "NaN happened"}},
    "NaN": {"output_token_logprobs": [(float("nan"), 5, None), (-2.5, 2, None)]},
    "infinite": {"output_token_logprobs": [(-float("inf"), 5, None), (-2.5, 2, None)]},
    "None": {"output_token_logprobs": [(None, 5, None), (-2.5, 2, None)]},
    "too few": {"output_token_logprobs": [(-0.1, 5, None)]},
    "too many": {"output_token_logprobs": [(-0.1, 5, None), (-0.1, 2, None), (-0.1, 2, None)]},
    "none at all": {"output_token_logprobs": None},
    "another order": {"output_token_logprobs": [(-2.5, 2, None), (-0.1, 5, None)]},
    "no pairs": {"output_token_logprobs": [-0.1, -2.5]},
    "still running": {"finish_reason": None},
}


@pytest.mark.parametrize("changes", NOT_DATA.values(), ids=NOT_DATA)
def test_what_does_not_add_up_is_an_engine_error(changes: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=r"^[^\n]+$"):
        read_answer(answer(**changes))


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"output_ids": [5, 2]},
        {**answer(), "output_ids": None},
        {**answer(), "output_ids": ["5", "2"]},
        {**answer(), "meta_info": None},
    ],
)
def test_a_broken_answer_is_an_engine_error(broken: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        read_answer(broken)


@pytest.mark.parametrize("ids", [[], [3, -1], [3, 10]])
def test_ids_that_would_kill_the_engine_are_refused(ids: list[int]) -> None:
    with pytest.raises(EngineError):
        check_prompt(ids, vocab_size=10)
    check_prompt([0, 9], vocab_size=10)


@pytest.mark.parametrize(
    "sampling",
    [{"stop": "x"}, {"stop": ["x"]}, {"stop_regex": "x"}, {"min_new_tokens": 1}, {"n": 2}],
)
def test_sampling_params_that_would_kill_the_engine_are_refused(sampling: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        check_sampling(sampling)
    check_sampling(
        {
            "stop": None,
            "stop_regex": [],
            "min_new_tokens": 0,
            "n": 1,
            "temperature": 0.0,
            "stop_token_ids": [2],
        }
    )


# ---------------------------------------------------------------------- arguments


def arguments(*overrides: str, cuda: bool = True) -> dict[str, Any]:
    config = load_config(None, [f"rollout.{override}" for override in overrides])
    return server_args(config.verl_rollout(), cuda=cuda)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("max_model_len=4000", "context_length", 4000 + CONTEXT_SLACK),
        ("data_parallel_size=2", "dp_size", 2),
        ("enforce_eager=true", "disable_cuda_graph", True),
        ("enforce_eager=false", "disable_cuda_graph", False),
        ("enable_prefix_caching=false", "disable_radix_cache", True),
        ("enable_prefix_caching=true", "disable_radix_cache", False),
        ("enable_chunked_prefill=false", "chunked_prefill_size", -1),
        ("max_num_batched_tokens=2048", "chunked_prefill_size", 2048),
        ("max_num_batched_tokens=2048", "max_prefill_tokens", 2048),
        ("free_cache_engine=false", "enable_memory_saver", False),
        ("disable_log_stats=false", "log_level", "info"),
        ("engine_kwargs.sglang.attention_backend=triton", "attention_backend", "triton"),
        ("engine_kwargs.sglang.context_length=99", "context_length", 99),
    ],
)
def test_keys_that_sglang_rollout_ignores_reach_sglang(
    override: str, name: str, value: Any
) -> None:
    assert arguments(override)[name] == value


def test_every_argument_is_one_of_sglangs() -> None:
    """Asked of SGLang itself, in a process of its own: importing it takes long and stays."""
    names = sorted({*arguments(), *arguments(cuda=False)})
    script = (
        "from sglang.srt.server_args import ServerArgs as Args\n"
        'known = getattr(Args, "__struct_fields__", None) or Args.__dataclass_fields__\n'
        f"print(sorted(set({names!r}) - set(known)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=_guarded(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_cpu_gets_its_own_backends_and_engine_kwargs_still_win() -> None:
    args = arguments("engine_kwargs.sglang.max_total_tokens=1234", cuda=False)
    assert (args["device"], args["attention_backend"], args["sampling_backend"]) == (
        "cpu",
        "torch_native",
        "pytorch",
    )
    assert args["max_total_tokens"] == 1234
    assert "device" not in arguments()


@pytest.mark.parametrize(
    ("slots", "length", "tokens"),
    [
        (16, 2048, 16 * (2048 + CONTEXT_SLACK)),
        (1024, 2048, 65536),
        (4, 80000, 80000 + CONTEXT_SLACK),
    ],
)
def test_the_cpus_kv_cache_holds_what_can_run_within_a_bound(
    slots: int, length: int, tokens: int
) -> None:
    assert (
        arguments(f"max_num_seqs={slots}", f"max_model_len={length}", cuda=False)[
            "max_total_tokens"
        ]
        == tokens
    )


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx2 avx512_bf16", "bfloat16"),
        ("fpu amx_bf16 amx_tile", "bfloat16"),
        ("fpu avx2 avx512f", "float32"),
    ],
)
def test_a_cpu_computes_in_what_it_is_fast_at(tmp_path: Path, flags: str, dtype: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert cpu_has_bfloat16(cpuinfo) is (dtype == "bfloat16")


def test_a_dtype_that_the_user_names_counts() -> None:
    assert with_default_dtype({"dtype": "float16"}, cuda=False)["dtype"] == "float16"
    assert with_default_dtype({"dtype": None}, cuda=True)["dtype"] == "bfloat16"
    assert with_default_dtype({}, cuda=False)["dtype"] in ("bfloat16", "float32")


def test_start_variables_give_way_to_the_users_and_are_gone_after_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    variables = start_variables(cuda=False)
    assert "OMP_WAIT_POLICY" not in variables
    with environment(variables):
        assert os.environ["TORCH_COMPILE_DISABLE"] == "1"
        assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "TORCH_COMPILE_DISABLE" not in os.environ
    assert "TORCH_COMPILE_DISABLE" not in start_variables(cuda=True)


# ---------------------------------------------------------------------- failures

OUT_OF_MEMORY = """[2026-01-01] Scheduler hit an exception: Traceback (most recent call last):
  File "model_runner.py", line 1, in load_model
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.10 GiB
"""
NVRTC = "ImportError: libnvrtc.so.12: cannot open shared object file: No such file or directory"
OTHER = """Traceback (most recent call last):
  File "x.py", line 1
ValueError: Model architectures ['Nonsense'] are not supported for now.
"""


@pytest.mark.parametrize(
    ("log", "exit_code", "expected"),
    [
        (OUT_OF_MEMORY, 1, "lower rollout.gpu_memory_utilization"),
        (NVRTC, 1, "pip install nvidia-cuda-nvrtc-cu12"),
        ("zmq.error.ZMQError: Address already in use (addr='tcp://127.0.0.1:1')", 1, "SGLANG_PORT"),
        (OTHER, 0, "ValueError: Model architectures ['Nonsense'] are not supported for now."),
        ("", -9, "the machine ran out of memory"),
        ("", 3, "exit code 3"),
    ],
)
def test_a_failure_is_explained_in_one_line(log: str, exit_code: int, expected: str) -> None:
    told = explain(log, exit_code)
    assert expected in told
    assert "\n" not in told


# ---------------------------------------------------------------------- child processes


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    (tmp_path / "log").write_text("MemoryError: of an earlier engine\n")
    started = Children(tmp_path / "log")
    yield started
    started.stop()


def test_a_child_that_dies_before_it_reports_is_told_in_its_own_words(children: Children) -> None:
    reader, writer = children.Pipe(duplex=False)
    children.Process(target=sys.exit, args=("ValueError: no such model",)).start()
    with pytest.raises(
        EngineStartError,
        match=r"^[^\n]*ValueError: no such model[^\n]*log: [^\n]+$",
    ):
        reader.recv()
    writer.close()


def test_a_childs_collector_rests_only_while_it_imports_its_arguments(children: Children) -> None:
    reader, writer = children.Pipe(duplex=False)
    children.Process(target=send_collector, args=(writer, IsCollecting())).start()
    while_unpickled, afterwards = reader.recv()
    assert (while_unpickled, afterwards) == (False, True)


class IsCollecting:
    """Unpickled it says whether the collector is on."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return gc.isenabled, ()


def send_collector(writer: Any, while_unpickled: bool) -> None:
    writer.send((while_unpickled, gc.isenabled()))


@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_is_as_it_was_after_imports(is_on: bool) -> None:
    gc.unfreeze()  # a run in this process may have frozen what was there
    try:
        (gc.enable if is_on else gc.disable)()
        with collector_paused():
            assert not gc.isenabled()
            kept = [[number] for number in range(100_000)]
        assert gc.isenabled() is is_on
        assert (len(kept), gc.get_count()[0] < 10_000, gc.get_freeze_count()) == (100_000, True, 0)
        gc.freeze()
        with collector_paused():
            pass
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()
        gc.enable()


async def test_what_waits_fails_when_a_child_ends_and_so_does_what_comes_later(
    children: Children,
) -> None:
    process = children.Process(target=time.sleep, args=(600,))
    process.start()
    waiting = [
        asyncio.create_task(children.answer(asyncio.create_task(asyncio.sleep(600))))
        for _ in range(3)
    ]
    answered = asyncio.create_task(
        children.answer(asyncio.create_task(asyncio.sleep(0, "an answer")))
    )
    assert await answered == "an answer"
    process.kill()
    failures = await asyncio.gather(
        *waiting, children.answer(asyncio.create_task(asyncio.sleep(600))), return_exceptions=True
    )
    assert {(type(failure), str(failure).partition(":")[0]) for failure in failures} == {
        (EngineError, "the engine ended")
    }


async def test_cancelling_the_wait_leaves_the_request_alone_and_closing_ends_it(
    children: Children,
) -> None:
    request = asyncio.create_task(asyncio.sleep(600))
    impatient, patient = (asyncio.create_task(children.answer(request)) for _ in range(2))
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    assert not request.done()
    children.end("it was closed")
    request.cancel()
    with pytest.raises(EngineError, match="closed"):
        await patient


async def test_the_death_of_a_childs_child_is_noticed(children: Children) -> None:
    """A data-parallel rank is one: its controller goes on without it."""
    lives_on = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    process = children.Process(target=exec, args=(lives_on,))
    process.start()
    rank = await asyncio.to_thread(grandchild, process.pid)
    children.watch_descendants()
    waiting = asyncio.create_task(children.answer(asyncio.create_task(asyncio.sleep(60))))
    await asyncio.sleep(0)
    rank.kill()
    with pytest.raises(EngineError, match="killed from outside"):
        await waiting


def test_a_conversation_stays_with_its_place_and_new_ones_go_to_the_emptiest() -> None:
    async def served(places: list[Conversations]) -> tuple[list[int], list[int]]:
        async def two_turns() -> tuple[int, int]:
            first = place_of(asyncio.current_task(), places)
            await asyncio.sleep(0)
            return first, place_of(asyncio.current_task(), places)

        turns = await asyncio.gather(*(two_turns() for _ in range(5)))
        return [one for one, _ in turns], [two for _, two in turns]

    first, second = asyncio.run(served([Conversations() for _ in range(3)]))
    assert first == second == [0, 1, 2, 0, 1]
    assert place_of(None, [Conversations()]) == 0


def grandchild(pid: int | None) -> psutil.Process:
    """The process that the shell in the child has started."""
    while True:
        for process in psutil.Process(pid).children(recursive=True):
            if process.name() == "sleep":
                return process
        time.sleep(0.05)


def test_stop_ends_children_and_theirs(children: Children) -> None:
    process = children.Process(target=os.system, args=("sleep 600; true",))
    process.start()
    theirs = grandchild(process.pid)
    children.stop()
    children.stop()
    psutil.wait_procs([theirs], timeout=10)
    assert not theirs.is_running() or theirs.status() == psutil.STATUS_ZOMBIE
    assert not process.is_alive()


# ---------------------------------------------------------------------- import guards


def test_sglang_imports_without_its_kernels_and_calling_one_says_why() -> None:
    script = """
        import sglang.srt.layers.rotary_embedding, sglang.srt.layers.quantization.utils
        from sglang.srt.layers import activation, layernorm
        import sgl_kernel, sgl_kernel.kvcacheio
        assert activation.SiluAndMul.__module__ == "sglang.srt.layers.activation"
        assert layernorm.RMSNorm.__module__ == "sglang.srt.layers.layernorm"
        try:
            sgl_kernel.kvcacheio.transfer_kv_per_layer()
        except NotImplementedError as error:
            print(error)
    """
    if not guard_paths():
        pytest.skip("the real packages are installed here")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=_guarded(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "has no build for this CPU" in done.stdout, done.stderr


def test_guards_never_shadow_an_installed_package(tmp_path: Path) -> None:
    for name in ("sgl_kernel", "vllm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("real = True\n")
    script = """
        import sys
        from agent.engines.cpu_guards import guard_paths, install
        install()
        import sgl_kernel, vllm
        guards = [path for path in sys.path if "cpu_guards" in path]
        others = [path for path in guard_paths() + guards if "torchvision" not in path]
        print(others, sgl_kernel.real, vllm.real)
    """
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[] True True", done.stderr


def _guarded() -> dict[str, str]:
    return {
        **os.environ,
        **start_variables(cuda=False),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *guard_paths()]),
    }
