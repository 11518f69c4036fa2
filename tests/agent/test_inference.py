"""`InferenceEngine` and its session: what `generate` returns, from sync and async code."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.config.config import load_config
from agent.errors import ConfigError, TaskError
from agent.inference import InferenceEngine
from conversations.run.store import RunFolder
from conversations.template import ChatTemplate
from tests.helpers import ROOT, call, run_one, runtime, says, task
from tools.base import ToolConfigError
from tools.function import tool

QUESTIONS = ("Double 2.", "Double 21.")


@tool
def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: The number.
    """
    return 2 * number


@pytest.fixture(scope="module")
def recording(smollm2: ChatTemplate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that answers each question with one call; two samples of the second differ."""
    folder = tmp_path_factory.mktemp("recording")
    answers = {("0", 0): "It is 4.", ("1", 0): "It is 42.", ("1", 1): "42, I think."}

    async def record() -> None:
        with RunFolder.create(folder, {}) as store:
            for (task_id, sample), answer in answers.items():
                question = QUESTIONS[int(task_id)]
                number = int(question.split()[1].rstrip("."))
                engine = says(smollm2, call("double", number=number), answer)
                shared = runtime(smollm2, engine, [double])
                asked = task(f"{task_id}{sample}", messages=[{"role": "user", "content": question}])
                store.append(await run_one(shared, asked))

    asyncio.run(record())
    return folder


def config(recording: Path, *overrides: str) -> Any:
    return load_config(
        None,
        [
            "model_path=smollm2-base",
            "rollout.name=scripted",
            f"rollout.turntrace.recorded={recording}",
            *overrides,
        ],
    )


@pytest.fixture
def engine(recording: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine(config(recording), tools=[double]) as engine:
        yield engine


def test_lists_are_flat_and_prompt_major(engine: InferenceEngine) -> None:
    result = engine.generate(list(QUESTIONS), n=2)
    assert result.completions[:2] == ["It is 4.", "It is 4."]
    assert sorted(result.completions[2:]) == ["42, I think.", "It is 42."]
    assert [metadata["num_turns"] for metadata in result.metadata] == [2, 2, 2, 2]
    for ids, metadata in zip(result.token_ids, result.metadata, strict=True):
        assert ids == metadata["response_ids"]
        assert len(metadata["response_mask"]) == len(metadata["response_logprobs"]) == len(ids)
        assert [value is not None for value in metadata["response_logprobs"]] == [
            bool(bit) for bit in metadata["response_mask"]
        ]
        assert metadata["stop_reason"] == "stop"
        assert metadata["trajectory"].tool_calls[0].status == "ok"


@pytest.mark.parametrize(
    "prompts",
    [
        QUESTIONS[0],
        [QUESTIONS[0]],
        [{"role": "user", "content": QUESTIONS[0]}],
        [[{"role": "user", "content": QUESTIONS[0]}]],
    ],
    ids=["text", "texts", "messages", "list of messages"],
)
def test_a_prompt_is_a_text_or_messages_or_a_list_of_either(
    engine: InferenceEngine, prompts: Any
) -> None:
    assert engine.generate(prompts).completions == ["It is 4."]


def test_no_prompts_no_generations(engine: InferenceEngine) -> None:
    assert engine.generate([]).completions == []


async def test_async_callers_share_the_engine_with_their_own_loop_free(
    engine: InferenceEngine,
) -> None:
    one, two = await asyncio.gather(
        engine.generate_async(QUESTIONS[0]), engine.generate_async(list(QUESTIONS))
    )
    assert one.completions == ["It is 4."]
    assert two.completions[0] == "It is 4."


def test_one_turn_without_tools_where_multi_turn_is_off(
    recording: Path, smollm2: ChatTemplate, tmp_path: Path
) -> None:
    async def record() -> None:
        with RunFolder.create(tmp_path / "single", {}) as store:
            store.append(
                await run_one(
                    runtime(smollm2, says(smollm2, "Hi.")),
                    task("x", messages=[{"role": "user", "content": "Hello"}]),
                )
            )

    asyncio.run(record())
    with InferenceEngine(config(tmp_path / "single", "rollout.multi_turn.enable=false")) as engine:
        result = engine.generate("Hello")
    assert (result.completions, result.metadata[0]["num_turns"], result.metadata[0]["reward"]) == (
        ["Hi."],
        1,
        None,
    )


def test_tools_without_multi_turn_are_refused(recording: Path) -> None:
    with pytest.raises(ConfigError, match=r"multi_turn\.enable"):
        InferenceEngine(config(recording, "rollout.multi_turn.enable=false"), tools=[double])


def test_one_tool_is_given_in_a_list(recording: Path) -> None:
    with pytest.raises(ToolConfigError, match=r"write tools=\[\.\.\.\]"):
        InferenceEngine(config(recording), tools=double)  # type: ignore[arg-type]


def test_validate_uses_val_kwargs(recording: Path) -> None:
    overrides = (
        "rollout.temperature=0.7",
        "rollout.val_kwargs.n=2",
        "rollout.val_kwargs.temperature=0.3",
        "rollout.val_kwargs.do_sample=true",
    )
    with InferenceEngine(config(recording, *overrides), tools=[double]) as engine:
        plain, validated = (
            engine.generate(QUESTIONS[0]),
            engine.generate(QUESTIONS[0], validate=True),
        )
    assert [len(plain.completions), len(validated.completions)] == [1, 2]
    sampling = [
        result.metadata[0]["trajectory"].sampling["temperature"] for result in (plain, validated)
    ]
    assert sampling == [0.7, 0.3]


def test_options_hold_for_one_call(engine: InferenceEngine) -> None:
    given = (
        engine.generate(QUESTIONS[0], temperature=0.0, top_p=0.5, top_k=7)
        .metadata[0]["trajectory"]
        .sampling
    )
    after = engine.generate(QUESTIONS[0]).metadata[0]["trajectory"].sampling
    assert (given["temperature"], given["top_p"], given["top_k"]) == (0.0, 0.5, 7)
    assert (after["temperature"], after["top_p"], after["top_k"]) == (1.0, 1.0, -1)


def test_max_tokens_caps_a_turn(engine: InferenceEngine) -> None:
    result = engine.generate(QUESTIONS[0], max_tokens=3)
    assert (len(result.token_ids[0]), result.metadata[0]["stop_reason"]) == (3, "length")


@pytest.mark.parametrize(
    "option",
    [
        {"n": 0},
        {"n": -1},
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": "x"},
        {"top_p": 7.0},
        {"top_k": -2},
        {"top_k": 0},
        {"top_k": 2**31},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_by_name(
    engine: InferenceEngine, option: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        engine.generate(QUESTIONS[0], **option)


@pytest.mark.parametrize(
    "prompts",
    [
        3,
        {"role": "user", "content": "x"},
        [3],
        [[]],
        [{"role": "nobody", "content": "x"}],
        "",
        ["x", " \n"],
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused(engine: InferenceEngine, prompts: Any) -> None:
    with pytest.raises(TaskError, match="prompt"):
        engine.generate(prompts)


def test_a_failed_generation_is_data(engine: InferenceEngine) -> None:
    failed, fine = engine.generate(["Nobody recorded this.", QUESTIONS[0]]).metadata
    assert (failed["stop_reason"], failed["reward"]) == ("engine_error", None)
    assert fine["stop_reason"] == "stop"


def test_a_closed_engine_says_so(recording: Path) -> None:
    engine = InferenceEngine(config(recording), tools=[double])
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(QUESTIONS[0])


# ---------------------------------------------------------------------- Ctrl-C

_SLOW = """
import sys
from agent.config.config import load_config
from agent.runs.parts import prepare
from agent.runs.session import Session
from tools.function import FunctionTool, tool
from tools.toolset import ToolSet
import asyncio

@tool
def nothing() -> str:
    "Does nothing."
    return ""

async def start() -> None:
    print("starting", flush=True)
    await asyncio.sleep(600)

urls = f"rollout.server.urls=[{sys.argv[2]!r}]"
overrides = ["model_path=smollm2-base", "rollout.name=sglang_server", urls]
tools = ToolSet.from_tools([nothing])
if sys.argv[1] == "tools":
    tools["nothing"].tool.start = start
else:
    print("starting", flush=True)
Session(prepare(load_config(None, overrides), tools))
"""


@pytest.mark.parametrize("stage", ["tools", "connect"])
def test_ctrl_c_while_starting_ends_the_process(stage: str, tmp_path: Path) -> None:
    """A server that accepts and never answers, or a tool that never gets ready."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-c", _SLOW, stage, url],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        if stage == "connect":
            silent.settimeout(300)
            asked, _ = silent.accept()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=300)
        finally:
            process.kill()
        if stage == "connect":
            asked.close()
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0


def test_metadata_is_json_but_for_the_trajectory(engine: InferenceEngine) -> None:
    metadata = engine.generate(QUESTIONS[0]).metadata[0]
    trajectory = metadata.pop("trajectory")
    assert json.loads(json.dumps(metadata))["response_ids"] == trajectory.response_ids
