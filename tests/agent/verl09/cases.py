"""TurntraceAgentLoop in verl's own workers: equal to verl's loops where they are right, and each
place where they are not.

Run by `tests/agent/trainers/test_verl_agent_loop.py`, in an environment that has verl 0.8 or later.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
import verl
from ray.exceptions import RayTaskError
from verl.workers.rollout import llm_server
from verl.workers.rollout.replica import TokenOutput

from agent.config.config import load_config
from agent.engines.scripted import ScriptedEngine
from agent.errors import ConfigError
from agent.recipe.grpo.reward import compute_score, tools_score
from agent.runs.parts import make_dispatcher
from conversations.run.open_run import open_run
from conversations.run.store import read_manifest
from conversations.template import ChatTemplate
from conversations.verify import verify_run
from tests.agent.verl09.peer import PROMPT, RESPONSE, VERSION, LookTool, Peers, batch, logprobs
from tests.helpers import call, respelled, run_one, runtime, task, until
from tools.registry import load_tools


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory, smollm2: ChatTemplate) -> Peers:
    return Peers(tmp_path_factory.mktemp("verl"), smollm2)


@pytest.fixture(autouse=True)
def no_events() -> None:
    LookTool.events.clear()


def echo(text: str) -> str:
    return "It is " + text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def looks(*questions: str, rounds: int = 2) -> Any:
    """So many turns with a call for each question, then one without."""

    def say(text: str) -> str:
        done = text.count("<|im_start|>user\n<tool_response>")
        return (
            f"Found {done}."
            if done >= rounds
            else "\n".join(call("look", question=question) for question in questions)
        )

    return say


BOTH = ("turntrace", "tool_agent")


async def both(
    worker: Any, *questions: Any, agents: tuple[str, str] = BOTH, **options: Any
) -> list[Any]:
    """The same batch through turntrace's loop and through one of verl's own."""
    return [await run(worker, *questions, agent=agent, **options) for agent in agents]


async def run(worker: Any, *questions: Any, **options: Any) -> Any:
    return await worker.generate_sequences(batch(questions, **options))


def extras(done: Any, row: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = done.non_tensor_batch["extras"][row]["turntrace"]
    return found


def text(peers: Peers, done: Any, row: int = 0) -> str:
    filled = done.batch["attention_mask"][row][PROMPT:].bool()
    return peers.template.decode(done.batch["responses"][row][filled].tolist())


def only_step(kept: Path) -> Path:
    """The one run folder in a `save_to`."""
    (folder,) = kept.glob("step-*")
    return folder


def defects(folder: Path) -> list[Any]:
    found: list[Any] = []
    verify_run(folder, on_defect=found.append)
    return found


def assert_equal(ours: Any, verls: Any) -> None:
    assert set(ours.batch.keys()) == set(verls.batch.keys())
    for name in verls.batch.keys():  # noqa: SIM118 - a TensorDict iterates over its rows
        one, other = ours.batch[name], verls.batch[name]
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert one.equal(other), name


def assert_equal_turns(peers: Peers, ours: Any, verls: Any) -> None:
    """verl 0.8's own loop leaves out the newline that the template puts after an end token; 0.9's
    does not.
    """
    if VERSION >= (0, 9):
        return assert_equal(ours, verls)
    for row in range(len(ours)):
        assert text(peers, ours, row).replace("<|im_end|>\n", "<|im_end|>") == text(
            peers, verls, row
        ).replace("<|im_end|>\n", "<|im_end|>")
        assert text(peers, ours, row) != text(peers, verls, row)
    return None


# ---------------------------------------------------------------------- equal


def test_the_environment_is_that_verls_own() -> None:
    assert f"/verl-{verl.__version__}-" in str(verl.__file__)
    assert int(transformers.__version__.split(".")[0]) == (5 if VERSION >= (0, 9) else 4)
    assert {"sglang", "vllm"} & set(sys.modules) == set()


async def test_single_turns_are_verls_tensor_for_tensor(peers: Peers) -> None:
    questions = ("What is 6 times 7?", "And 2?", "And 漢字 🙂?")
    ours, verls = await both(
        peers.worker(peers.server(echo)), *questions, agents=("turntrace", "single_turn_agent")
    )
    assert_equal(ours, verls)
    assert "rollout_log_probs" in ours.batch
    assert (
        ours.non_tensor_batch["__num_turns__"].tolist()
        == verls.non_tensor_batch["__num_turns__"].tolist()
        == [2, 2, 2]
    )


@pytest.mark.parametrize("questions", [("a",), ("a", "b")])
async def test_tool_turns_are_verls_tensor_for_tensor(
    peers: Peers, questions: tuple[str, ...]
) -> None:
    """Where there is nothing to do better: calls that are right, answers that are short."""
    done = await both(peers.worker(peers.server(looks(*questions)), tools=True), "one", "two")
    assert_equal_turns(peers, *done)
    for name in (
        "__num_turns__",
        "tool_rewards",
        "turn_scores",
        *(("min_global_steps", "max_global_steps") if VERSION >= (0, 9) else ()),
    ):
        assert done[0].non_tensor_batch[name].tolist() == done[1].non_tensor_batch[name].tolist(), (
            name
        )
    assert done[0].non_tensor_batch["tool_rewards"][0] == [0.5] * 2 * len(questions)
    assert [metrics["num_preempted"] for metrics in done[0].meta_info["metrics"]] == [3, 3]


async def test_what_goes_back_is_what_was_sampled(peers: Peers) -> None:
    """Ids that do not survive decode and encode, mask and log-probs: as the servers gave them,
    whatever stands between.
    """

    def odd(text: str) -> list[int]:
        return [
            *respelled(peers.template, looks("a")(text), random.Random(3)),
            peers.template.end_id,
        ]

    server = peers.server(odd)
    done = await run(peers.worker(server, tools=True), "one")
    mask = done.batch["response_mask"][0].bool()
    turns = [odd(peers.template.decode(ids)) for ids, _ in server.seen]
    assert done.batch["responses"][0][mask].tolist() == [token for turn in turns for token in turn]
    assert done.batch["rollout_log_probs"][0][mask].tolist() == [
        value for turn in turns for value in logprobs(turn)
    ]
    assert done.batch["rollout_log_probs"][0][~mask].abs().sum() == 0
    for (before, _), (after, _), turn in zip(server.seen, server.seen[1:], turns, strict=False):
        assert after[: len(before) + len(turn)] == before + turn


async def test_a_row_is_what_turntrace_makes_of_it_without_a_trainer(peers: Peers) -> None:
    """Whatever is in it: two calls at once, one of which breaks its tool, one that is malformed."""
    turns = [looks("a", "break")(""), '<tool_call>\n{"name": "look"\n</tool_call>', "Done."]

    def say(text: str) -> str:
        return turns[text.count("<|im_start|>user\n<tool_response>")]

    done = await run(peers.worker(peers.server(say), tools=True), "one")
    dispatcher = make_dispatcher(load_config(None), load_tools(peers.tools()), peers.template)
    alone = dataclasses.replace(
        runtime(peers.template, ScriptedEngine(peers.server(say).sample)), dispatcher=dispatcher
    )
    record = await run_one(alone, task(messages=[{"role": "user", "content": "one"}]))
    assert [line.status for line in record.tool_calls] == ["ok", "tool_error", "malformed"]
    filled = done.batch["attention_mask"][0].bool()
    assert done.batch["input_ids"][0][filled].tolist() == record.prompt_ids + record.response_ids
    length = len(record.response_ids)
    assert done.batch["response_mask"][0].tolist() == record.response_mask + [0] * (
        RESPONSE - length
    )
    assert done.batch["rollout_log_probs"][0].tolist() == [
        value or 0.0 for value in record.response_logprobs
    ] + [0.0] * (RESPONSE - length)


async def test_the_servers_get_what_verl_would_send_and_the_turns_budget(peers: Peers) -> None:
    server = peers.server(echo)
    worker = peers.worker(server, temperature=0.7, top_p=0.9, top_k=40)
    for meta in ({}, {"validate": True}):
        server.seen.clear()
        await both(worker, "x", meta=meta)
        sent = [params for _, params in server.seen]
        assert sent[0].pop("max_tokens") == RESPONSE
        assert sent[0].pop("stop_token_ids") == peers.template.stop_token_ids
        assert sent[0] == sent[1]
    assert len(server.media) == 4
    assert not any(any(media.values()) for media in server.media), "a text has no media"


async def test_log_probs_are_asked_for_and_handed_on_where_the_trainer_wants_them(
    peers: Peers,
) -> None:
    server = peers.server(echo)
    done = await run(peers.worker(server, calculate_log_probs=False), "x")
    assert server.seen[0][1]["logprobs"] is True
    assert "rollout_log_probs" not in done.batch


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
async def test_a_turn_that_fills_the_budget_is_cut_and_its_calls_are_not_run(
    peers: Peers, backend: str
) -> None:
    server = peers.server(lambda text: call("look", question="x" * 900), backend=backend)
    done = await run(peers.worker(server, tools=True, response_length=64), "one")
    assert extras(done)["stop_reason"] == "length"
    assert done.batch["response_mask"][0].tolist() == [1] * 64
    assert ("release", "0") in LookTool.events


async def test_all_turns_of_a_conversation_go_to_one_server(peers: Peers) -> None:
    servers = [peers.server(looks("a", rounds=4)) for _ in range(3)]
    await run(peers.worker(servers, tools=True), *(f"question {index}" for index in range(6)))
    told = [
        {peers.template.decode(ids).partition("question ")[2][0] for ids, _ in server.seen}
        for server in servers
    ]
    assert sum(len(server.seen) for server in servers) == 6 * 5
    assert sorted(question for questions in told for question in questions) == list("012345")


async def test_two_workers_make_one_batch_though_a_row_of_one_failed(peers: Peers) -> None:
    def say(text: str) -> Any:
        return ValueError("gone") if "broken" in text else "Fine."

    workers = [peers.worker(peers.server(say)) for _ in range(2)]
    done = await peers.manager(workers).generate_sequences(
        batch(["broken", "broken", "three", "four"])
    )
    assert done.batch["response_mask"].sum(-1).tolist() == [
        0,
        0,
        *[len(peers.template.encode("Fine.")) + 1] * 2,
    ]
    assert [extras(done, row)["infra_error"] for row in range(4)] == [True, True, False, False]
    assert done.meta_info["timing"]["agent_loop/generate_sequences/max"] > 0


# ---------------------------------------------------------------------- where verl's own loop is
# otherwise


async def test_calls_past_the_limit_are_answered_where_verls_vanish(peers: Peers) -> None:
    worker = peers.worker(
        peers.server(looks("a", "b", rounds=1)), tools=True, multi_turn={"max_parallel_calls": 1}
    )
    ours, verls = await both(worker, "one")
    assert "about a" in text(peers, ours)
    assert "at most 1 tool calls are allowed in one turn" in text(peers, ours)
    assert text(peers, verls).count("<tool_response>") == 1


@pytest.mark.parametrize(
    ("turn", "answer"),
    [
        ('<tool_call>\n{"name": "look"\n</tool_call>', "malformed tool call"),
        (call("look", q=1), "invalid arguments for look: "),
    ],
)
async def test_a_call_that_is_wrong_is_answered_with_what_is_wrong(
    peers: Peers, turn: str, answer: str
) -> None:
    """verl drops the first and ends there; the second reaches the tool, which raises."""

    def say(text: str) -> str:
        return "Sorry." if "</tool_response>" in text else turn

    ours, verls = await both(peers.worker(peers.server(say), tools=True), "one")
    assert answer in text(peers, ours)
    assert text(peers, ours).endswith("Sorry.<|im_end|>")
    assert answer not in text(peers, verls)


async def test_what_a_tools_exception_says_is_not_the_models_to_know(peers: Peers) -> None:
    ours, verls = await both(
        peers.worker(peers.server(looks("break", "b", rounds=1)), tools=True), "x"
    )
    for done in (ours, verls):
        assert "about b" in text(peers, done)
    assert "Error: look failed" in text(peers, ours)
    assert "secret" not in text(peers, ours)
    assert "secret" in text(peers, verls)


async def test_long_answers_are_cut_by_tokens_where_verl_counts_characters(peers: Peers) -> None:
    worker = peers.worker(
        peers.server(looks("long", rounds=1)),
        tools=True,
        multi_turn={"max_tool_response_length": 100},
    )
    ours, verls = await both(worker, "x")
    assert 80 < text(peers, ours).count("word") <= 100
    assert text(peers, verls).count("word") == 20


async def test_a_tool_lives_as_long_as_its_conversation(peers: Peers) -> None:
    """verl makes an instance for each call: state, and a reward for the trajectory, are not to be
    had.
    """
    worker = peers.worker(peers.server(looks("a")), tools=True)
    done = await run(worker, "x", tools_kwargs=[{"look": {"create_kwargs": {"k": 1}}}])
    assert LookTool.events == [
        ("create", '{"k": 1}'),
        ("execute", "a"),
        ("execute", "a"),
        ("release", "2"),
    ]
    assert extras(done)["reward_parts"] == {"look": 2.0}
    LookTool.events.clear()
    await run(worker, "x", agent="tool_agent")
    assert [event for event, _ in LookTool.events] == ["create", "execute", "release"] * 2


async def test_a_prompt_over_the_budget_is_not_sampled_after(peers: Peers) -> None:
    """verl cuts its beginning off, the system prompt and the tools with it, and samples all the
    same.
    """
    server = peers.server(echo)
    ours, verls = await both(peers.worker(server), "fine", "long " * 900)
    assert len(server.seen) == 1 + 2
    assert ours.batch["response_mask"].bool().any(-1).tolist() == [True, False]
    assert extras(ours, 1)["stop_reason"] == "prompt_too_long"
    assert ours.batch["prompts"].equal(verls.batch["prompts"])


@pytest.mark.skipif(VERSION < (0, 9), reason="its trainer wants a row of each conversation")
async def test_under_verls_queue_a_failed_conversation_has_no_row(peers: Peers) -> None:
    """A row of mask 0 would still put its reward of 0 into the group's mean."""

    def say(text: str) -> Any:
        return ValueError("gone") if "broken" in text else "Fine."

    worker = peers.worker(peers.server(say))
    worker.config.transfer_queue.enable = True
    handed_over: list[Any] = []

    async def take(output: Any, validate: bool, **columns: Any) -> None:
        handed_over.append(output)

    worker._agent_loop_postprocess = take
    trajectory = {"step": 1, "sample_index": 0, "rollout_n": 0, "validate": False}
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True}
    for question in ("broken", "fine"):
        await worker._run_agent_loop(
            dict(sampling),
            trajectory,
            agent_name="turntrace",
            trace=False,
            raw_prompt=[{"role": "user", "content": question}],
        )
    assert handed_over[0] == []
    assert handed_over[1].response_mask == [1] * len(handed_over[1].response_ids)


async def test_a_server_that_fails_costs_one_row_where_verl_loses_the_batch(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    gone = RayTaskError(
        "generate", "a traceback\nof many\nlines", ValueError("gone")
    ).as_instanceof_cause()

    def say(text: str) -> Any:
        return gone if "two" in text and "</tool_response>" in text else looks("a", rounds=1)(text)

    worker = peers.worker(peers.server(say), tools=True)
    ours = await run(worker, "one", "two")
    assert ours.batch["response_mask"].bool().any(-1).tolist() == [True, False]
    assert ours.batch["attention_mask"][1][PROMPT:].any()
    assert (extras(ours, 1)["infra_error"], extras(ours, 1)["reward"]) == (True, None)
    assert extras(ours, 1)["error"] == "verl's server failed: ValueError: gone"
    assert "is not trained on: verl's server failed: ValueError: gone" in caplog.text
    assert len([event for event, _ in LookTool.events if event == "release"]) == 2
    with pytest.raises(ValueError, match="of many"):
        await run(worker, "one", "two", agent="tool_agent")


@pytest.mark.parametrize("ids", [[], [5416, 20022]])
async def test_what_the_trainer_aborts_is_unfinished_and_not_trained_on(
    peers: Peers, tmp_path: Path, ids: list[int]
) -> None:
    aborted = TokenOutput(
        token_ids=ids,
        log_probs=logprobs(ids) or None,
        stop_reason="aborted",
        extra_fields={"global_steps": 7},
    )
    options = {"save_to": str(tmp_path)}
    done = await run(peers.worker(peers.server(lambda text: aborted), options=options), "one")
    assert extras(done)["stop_reason"] == "cancelled"
    assert done.batch["response_mask"].sum() == 0
    assert done.batch["responses"][0][: len(ids)].tolist() == ids
    folder = only_step(tmp_path)
    assert list(open_run(folder)) == []
    assert [one.stop_reason for one in open_run(folder).unfinished()] == ["cancelled"]
    assert defects(folder) == []


@pytest.mark.skipif(VERSION < (0, 9), reason="verl 0.8 has this client elsewhere")
async def test_a_turn_that_is_resumed_under_new_weights_is_one_turn(
    peers: Peers, tmp_path: Path
) -> None:
    """By verl's client for asynchronous trainers: the conversation notices nothing but the weights'
    steps.
    """
    ids = [*peers.template.encode("It is forty-two."), peers.template.end_id]
    parts = [
        TokenOutput(
            token_ids=part,
            log_probs=logprobs(part),
            stop_reason=reason,
            extra_fields={"global_steps": step},
        )
        for part, reason, step in ((ids[:2], "aborted", 7), (ids[2:], "stop", 8))
    ]
    answers = iter(parts)
    server = peers.server(lambda text: next(answers))
    worker = peers.worker(server, options={"save_to": str(tmp_path / "kept")})
    worker.llm_client = llm_server.FullyAsyncLLMServerClient(
        worker.config, worker.llm_client._load_balancer
    )
    done = await run(worker, "one")
    mask = done.batch["response_mask"][0].bool()
    assert done.batch["responses"][0][mask].tolist() == ids
    assert (
        done.batch["rollout_log_probs"][0][mask].tolist() == parts[0].log_probs + parts[1].log_probs
    )
    assert server.seen[1][0] == server.seen[0][0] + ids[:2]
    assert [done.non_tensor_batch[f"{which}_global_steps"][0] for which in ("min", "max")] == [7, 8]
    (record,) = open_run(next((tmp_path / "kept").glob("step-8-*")))
    assert [turn.weight_version for turn in record.turns] == ["7-8"]
    assert extras(done)["stop_reason"] == "stop"


@pytest.mark.parametrize(
    "answer",
    [
        {"log_probs": None},
        {"log_probs": [-1.0]},
        {"log_probs": [-1.0, float("nan")]},
        {"token_ids": []},
    ],
)
async def test_an_answer_that_is_no_data_is_a_failure_of_the_server(
    peers: Peers, answer: dict[str, Any]
) -> None:
    output = TokenOutput(
        **{"token_ids": [5416, 20022], "log_probs": [-1.0, -1.0], "stop_reason": "stop", **answer}
    )
    done = await run(peers.worker(peers.server(lambda text: output)), "one")
    assert extras(done)["stop_reason"] == "engine_error"
    assert done.batch["response_mask"].sum() == 0


async def test_a_server_without_a_limit_is_cut_to_the_turns(peers: Peers) -> None:
    """TensorRT-LLM's reckons the limit itself."""
    ids = peers.template.encode("word " * 50)
    output = TokenOutput(token_ids=ids, log_probs=logprobs(ids))
    done = await run(
        peers.worker(peers.server(lambda text: output), options={"max_tokens": 8}), "one"
    )
    assert done.batch["response_mask"].sum() == 8
    assert extras(done)["stop_reason"] == "length"


# ---------------------------------------------------------------------- ends


async def test_a_deadline_ends_a_conversation_with_what_it_has(peers: Peers) -> None:
    done = await run(
        peers.worker(
            peers.server(looks("hang")), tools=True, options={"conversation_deadline_s": 0.3}
        ),
        "one",
    )
    assert extras(done)["stop_reason"] == "deadline"
    assert done.batch["response_mask"].sum() > 0
    assert LookTool.events[-1] == ("release", "1")


async def test_cancelling_the_worker_releases_its_tools(peers: Peers) -> None:
    running = asyncio.create_task(
        run(peers.worker(peers.server(looks("hang")), tools=True), "one", "two")
    )
    await until(lambda: LookTool.events.count(("execute", "hang")) == 2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: LookTool.events.count(("release", "1")) == 2)


async def test_rounds_are_counted_as_verl_counts_them(peers: Peers) -> None:
    for limit, turns in (
        ({"max_assistant_turns": 3}, 3),
        ({"max_user_turns": 3}, 4),
        ({"max_assistant_turns": 9, "max_user_turns": 1}, 2),
    ):
        server = peers.server(looks("a", rounds=99))
        done = await both(peers.worker(server, tools=True, multi_turn=limit), "one")
        assert [one.meta_info["metrics"][0]["num_preempted"] for one in done] == [turns, turns]


async def test_sglangs_server_is_left_the_token_that_it_keeps_free(peers: Peers) -> None:
    server = peers.server(lambda text: [peers.template.end_id - 2] * 900)
    done = await run(peers.worker(server, max_model_len=200), "one")
    assert done.batch["attention_mask"].sum() == 199


# ---------------------------------------------------------------------- tools, users, rewards


def search(query: str) -> Any:
    """Searches.

    Args:
        query: What for.
    """
    return {"hits": query} if query != "reward" else ("rewarded", 0.25)


def function_file(folder: Path, name: str) -> Path:
    """verl registers a name once in a process."""
    file = folder / f"{name}.py"
    file.write_text(
        "from tests.agent.verl09.cases import search\n"
        f"from verl.tools.function_tool import function_tool\nfunction_tool({name!r})(search)\n"
    )
    return file


@pytest.mark.parametrize(
    ("query", "answer", "rewards"),
    [("cats", '{"hits": "cats"}', [0.0]), ("reward", "rewarded", [0.25])],
)
async def test_function_tools_are_verls(
    peers: Peers, tmp_path: Path, query: str, answer: str, rewards: list[float]
) -> None:
    name = f"search_{query}"
    module = function_file(tmp_path, name)

    def say(text: str) -> str:
        return "Done." if "</tool_response>" in text else call(name, query=query)

    ours, verls = await both(
        peers.worker(peers.server(say), tools=True, multi_turn={"function_tool_path": str(module)}),
        "one",
    )
    assert_equal_turns(peers, ours, verls)
    assert answer in text(peers, ours)
    assert (
        ours.non_tensor_batch["tool_rewards"].tolist()
        == verls.non_tensor_batch["tool_rewards"].tolist()
        == [rewards]
    )


@pytest.mark.parametrize(("selected", "offered"), [(["look"], ["look"]), (None, ["look", "mul2"])])
async def test_tool_selection_chooses_and_tools_kwargs_do_not(
    peers: Peers, tmp_path: Path, selected: Any, offered: list[str]
) -> None:
    module = function_file(tmp_path, f"mul{len(offered)}")
    columns = {
        "extra_info": [{"tool_selection": selected, "index": 0}],
        "tools_kwargs": [{"look": {"create_kwargs": {"k": 1}}}],
    }
    server = peers.server(echo)
    await run(
        peers.worker(server, tools=True, multi_turn={"function_tool_path": str(module)}),
        "one",
        **columns,
    )
    prompt = peers.template.decode(server.seen[0][0])
    assert [
        name for name in ("look", f"mul{len(offered)}") if f'"name": "{name}"' in prompt
    ] == offered


async def test_a_tools_yaml_that_verl_cannot_read(peers: Peers) -> None:
    """Of turntrace's own forms, named in the entry: a shipped one."""

    def say(text: str) -> str:
        return "Done." if "</tool_response>" in text else call("calculate_answer", answer="42")

    worker = peers.worker(peers.server(say), options={"tool_config_path": "gsm8k"})
    done = await run(
        worker, "one", "two", reward_model=[{"ground_truth": truth} for truth in ("42", "41")]
    )
    assert [extras(done, row)["reward"] for row in range(2)] == [1.0, 0.0]
    assert "rm_scores" not in done.batch


async def test_the_tools_reward_is_the_score_where_the_entry_says_so(peers: Peers) -> None:
    def say(text: str) -> Any:
        return ValueError("gone") if "two" in text else looks("a")(text)

    done = await run(
        peers.worker(peers.server(say), tools=True, options={"reward_from_tools": True}),
        "one",
        "two",
    )
    scores, mask = done.batch["rm_scores"], done.batch["attention_mask"][:, PROMPT:]
    assert scores.sum(-1).tolist() == [2.0, 0.0]
    assert scores[0].nonzero().flatten().tolist() == [int(mask[0].sum()) - 1]
    assert done.batch["response_mask"].bool().any(-1).tolist() == [True, False]


@pytest.mark.skipif(VERSION < (0, 9), reason="the recipe's trainer is verl 0.9's")
@pytest.mark.parametrize("score", [compute_score, tools_score])
async def test_the_recipes_reward_asks_verls_reward_manager_how_a_conversation_ended(
    peers: Peers, score: Any
) -> None:
    """The answer is right in each; only one of the conversations is ended by the model."""

    def say(text: str) -> str:
        question = next(name for name in ("ends", "is cut off", "goes on") if name in text)
        if "</tool_response>" not in text or question == "goes on":
            return call("calculate_answer", answer="42")
        return "Done." if question == "ends" else "Done. " * RESPONSE

    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

    options = {"tool_config_path": "gsm8k"}
    worker = peers.worker(peers.server(say), options=options, multi_turn={"max_assistant_turns": 3})
    manager = NaiveRewardManager(worker.config, worker.tokenizer, score)
    handle = SimpleNamespace(compute_score=SimpleNamespace(remote=manager.run_single))
    worker.reward_loop_worker_handles = [handle]
    done = await run(
        worker,
        "ends",
        "is cut off",
        "goes on",
        reward_model=[{"ground_truth": "42"}] * 3,
        data_source=["gsm8k"] * 3,
        extra_info=[{} for _ in range(3)],
    )
    assert [extras(done, row)["stop_reason"] for row in range(3)] == ["stop", "length", "max_turns"]
    assert [extras(done, row)["reward"] for row in range(3)] == [1.0, 1.0, 1.0]
    assert done.batch["rm_scores"].sum(-1).tolist() == [1.0, 0.0, 0.0]


class Teacher:
    """A user who asks again until the answer is 42."""

    def __init__(self, config: dict[str, Any]) -> None:
        pass

    async def start_interaction(self, instance_id: str, **kwargs: Any) -> str:
        return instance_id

    async def generate_response(
        self, instance_id: str, messages: list[dict[str, Any]], **kwargs: Any
    ) -> Any:
        right = "42" in messages[-1]["content"]
        return right, "Wrong." if not right else "Right.", float(right), {}

    async def finalize_interaction(self, instance_id: str) -> None:
        pass


async def test_interactions_answer_turns_and_give_turn_scores(peers: Peers, tmp_path: Path) -> None:
    path = tmp_path / "interactions.yaml"
    path.write_text(
        json.dumps(
            {
                "interaction": [
                    {"name": "teacher", "class_name": f"{__name__}.Teacher", "config": {}}
                ]
            }
        )
    )
    worker = peers.worker(
        peers.server(lambda text: "42" if "Wrong." in text else "41"),
        options={"interaction_config_path": str(path), "save_to": str(tmp_path / "kept")},
    )
    done = await run(worker, "one", interaction_kwargs=[{"name": "teacher"}])
    assert (
        text(peers, done)
        == "41<|im_end|>\n<|im_start|>user\nWrong.<|im_end|>\n<|im_start|>assistant\n42<|im_end|>"
    )
    assert done.non_tensor_batch["turn_scores"].tolist() == [[0.0, 1.0]]
    assert done.non_tensor_batch["__num_turns__"].tolist() == [4]
    assert defects(next((tmp_path / "kept").glob("step-*"))) == []


# ---------------------------------------------------------------------- records, options, refusals


async def test_records_are_kept_by_the_weights_step(peers: Peers, tmp_path: Path) -> None:
    for step in (7, 8):
        worker = peers.worker(
            peers.server(looks("a"), step=step),
            tools=True,
            options={"save_to": str(tmp_path / "kept")},
        )
        done = await run(
            worker,
            "one",
            "one",
            "two",
            reward_model=[{"ground_truth": "42"}] * 3,
            data_source=["sums"] * 3,
        )
    folders = sorted((tmp_path / "kept").iterdir())
    assert [folder.name.split("-")[1] for folder in folders] == ["7", "8"]
    records = list(open_run(folders[1]))
    assert sorted(record.sample for record in records) == [0, 0, 1]
    assert {(record.data_source, record.ground_truth) for record in records} == {("sums", "42")}
    assert {turn.weight_version for record in records for turn in record.turns} == {"8"}
    assert (
        records[0].response_ids
        == done.batch["responses"][0][: len(records[0].response_ids)].tolist()
    )
    for folder in folders:
        assert defects(folder) == []
        config = load_config(None, recorded=read_manifest(folder)["config"])  # as a replay reads it
        assert (config.rollout.response_length, config.rollout.multi_turn.max_parallel_calls) == (
            RESPONSE,
            16,
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"save_too": "x"}, "agent loop turntrace.save_too: .*the keys are .*save_to"),
        ({"max_tokens": 0}, "max_tokens: .*greater than 0"),
    ],
)
async def test_options_are_checked(peers: Peers, options: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said) as caught:
        await run(peers.worker(peers.server(echo), options=options), "one")
    assert isinstance(caught.value.__cause__ or caught.value, ConfigError)


async def test_images_cost_one_row_of_a_model_that_sees_none(peers: Peers) -> None:
    picture = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]
    done = await run(peers.worker(peers.server(echo)), picture, "two")
    assert "sees no images" in extras(done)["error"]
    assert done.batch["response_mask"].bool().any(-1).tolist() == [False, True]


async def test_routing_replay_is_refused(peers: Peers) -> None:
    with pytest.raises(Exception, match="enable_rollout_routing_replay"):
        await run(peers.worker(peers.server(echo), enable_rollout_routing_replay=True), "one")


@pytest.mark.skipif(VERSION < (0, 9), reason="verl 0.8 has no v1 trainer")
async def test_the_v1_trainers_worker_puts_each_sample_into_its_queue(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are not padded: one dict a sample, the score on the last token.

    The queue alone is not verl's.
    """
    from verl.trainer.ppo.v1 import agent_loop_tq

    queue = Queue()
    monkeypatch.setattr(agent_loop_tq, "tq", queue)
    said = iter(["Fine.", ValueError("gone"), "Good."])
    worker = peers.worker(
        peers.server(lambda text: next(said)), options={"reward_from_tools": True}, n=3
    )
    worker.__class__ = agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class
    raw_prompt = np.array([{"role": "user", "content": "one"}], dtype=object)
    prompt = {
        "uid": "u",
        "raw_prompt": raw_prompt,
        "agent_name": "turntrace",
        "index": 0,
        "global_steps": 3,
    }
    trajectory = {"step": 3, "sample_index": 0, "rollout_n": 0, "validate": False}
    await worker._run_prompt(prompt, {"temperature": 1.0, "logprobs": True}, trajectory)
    assert queue.tags["u"] == {"status": "finished"}
    assert sorted(queue.fields) == ["u_0_0", "u_1_0", "u_2_0"]
    sampled = {key: int(fields["response_mask"].sum()) for key, fields in queue.fields.items()}
    assert sampled == {
        "u_0_0": len(peers.template.encode("Fine.")) + 1,
        "u_1_0": 0,
        "u_2_0": len(peers.template.encode("Good.")) + 1,
    }
    for key, fields in queue.fields.items():
        lengths = {
            name: fields[name].shape
            for name in ("responses", "response_mask", "rollout_log_probs", "rm_scores")
        }
        assert len(set(lengths.values())) == 1, lengths
        assert queue.tags[key]["min_global_steps"] == (7 if sampled[key] else None)


class Queue:
    """TransferQueue's two calls, kept in memory."""

    def __init__(self) -> None:
        self.tags: dict[str, Any] = {}
        self.fields: dict[str, Any] = {}

    async def async_kv_put(self, *, key: str, partition_id: str, tag: Any) -> None:
        self.tags[key] = tag

    async def async_kv_batch_put(
        self, *, keys: list[str], fields: Any, tags: list[Any], partition_id: str
    ) -> None:
        for index, key in enumerate(keys):
            self.fields[key], self.tags[key] = fields[index], tags[index]


async def test_calls_in_another_form_are_refused(peers: Peers) -> None:
    with pytest.raises(Exception, match=r"multi_turn\.format: qwen3_coder"):
        await run(
            peers.worker(peers.server(echo), tools=True, multi_turn={"format": "qwen3_coder"}),
            "one",
        )


async def test_messages_that_the_template_refuses_cost_one_row(peers: Peers) -> None:
    worker = peers.worker(peers.server(echo))
    worker.tokenizer.chat_template = (
        "{% if 'refuse' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
        + worker.tokenizer.chat_template
    )
    done = await run(worker, "refuse", "two")
    assert "refuses the messages" in extras(done)["error"]
    assert done.batch["response_mask"].bool().any(-1).tolist() == [False, True]
