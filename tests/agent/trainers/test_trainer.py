"""AgentRollout in SGLangRollout's place: equal tensor for tensor where verl 0.6.1 is right, and
each place where it is not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.engines import cpu_guards
from agent.engines.arguments import start_variables
from agent.engines.processes import collector_paused
from agent.trainers import batches
from conversations.run.open_run import open_run
from conversations.template import ChatTemplate
from conversations.verify import verify_run
from tests.command import TRAINER, run_warm, turntrace
from tests.helpers import LOOK_SCHEMA, call, respelled

cpu_guards.install()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory, qwen2_5: ChatTemplate) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in start_variables(cuda=False).items():
            patch.setenv(name, value)
        with collector_paused():
            from tests.agent.trainer_peer import Peers, sglang_rollout

        patch.setattr(batches, "make_template", each_once(batches.make_template))
        # verl would pick `glm` for any vocabulary with `<tool_call>`, and find no call.
        patch.setattr(sglang_rollout, "get_tool_call_parser_type", lambda _: "qwen25")
        made = Peers(tmp_path_factory.mktemp("verl"), qwen2_5)
        yield made
        made.close()


def each_once(make: Any) -> Any:
    """`make_template`, which proves a template: half a second that rollouts of one config share."""
    made: dict[str, Any] = {}

    def make_or_share(config: Any, tokenizer: Any, images: Any = None) -> Any:
        rollout = config.rollout
        key = f"{id(tokenizer)} {id(images)} {rollout.multi_turn.format} {rollout.turntrace!r}"
        if key not in made:
            made[key] = make(config, tokenizer, images)
        return made[key]

    return make_or_share


def script(peers: Any, say: Any, **options: Any) -> Any:
    from tests.agent.trainer_peer import Script

    return Script(peers.template, say, **options)


def batch(peers: Any, *questions: str, **options: Any) -> Any:
    from tests.agent.trainer_peer import batch

    return batch(peers.template, questions, **options)


def echo(text: str) -> str:
    """One turn: the question again."""
    return "It is " + text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def three_looks(text: str) -> str:
    """Two turns with a call, one without."""
    done = text.count("<tool_response>") - text.count("Here are examples")
    return f"Found {done}." if done >= 2 else call("look", question=f"q{done}")


TENSORS = ("prompts", "responses", "response_mask", "input_ids", "attention_mask", "position_ids")


def assert_equal(ours: Any, verls: Any, names: Any = TENSORS) -> None:
    for name in names:
        one, other = ours.batch[name], verls.batch[name]
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device), name
        assert one.equal(other), name


# ---------------------------------------------------------------------- equal


def test_single_turn_batches_are_equal_tensor_for_tensor(peers: Any) -> None:
    given = batch(peers, "What is 6 times 7?", "And 2?", "And 漢字 🙂?")
    said = script(peers, echo)
    ours, verls = peers.run(peers.ours(said), given), peers.run(peers.verls(said), given)
    assert_equal(ours, verls)
    assert set(ours.batch.keys()) == set(verls.batch.keys())
    assert set(ours.non_tensor_batch) == set(verls.non_tensor_batch)
    assert ours.non_tensor_batch["messages"].tolist() == verls.non_tensor_batch["messages"].tolist()
    assert (
        ours.non_tensor_batch["reward_scores"].tolist()
        == verls.non_tensor_batch["reward_scores"].tolist()
    )
    assert [len(one) for one in ours.non_tensor_batch["request_id"]] == [36] * 3
    assert said.flushed == 2


def test_batches_without_multi_turn_are_verls_own(peers: Any) -> None:
    given = batch(peers, "What is 6 times 7?", "And 2?")
    said = script(peers, echo)
    single = {"multi_turn": {"enable": False}}
    ours, verls = (
        peers.run(peers.ours(said, **single), given),
        peers.run(peers.verls(said, **single), given),
    )
    assert_equal(ours, verls, verls.batch.keys())


def test_tool_turns_have_equal_ids_and_masks_but_for_the_newline_after_the_end_token(
    peers: Any,
) -> None:
    """verl gives that newline mask 1, though nobody sampled it."""
    given = batch(peers, "one", "two", tools=True)
    said = script(peers, three_looks)
    ours, verls = (
        peers.run(peers.ours(said, tools=True), given),
        peers.run(peers.verls(said, tools=True), given),
    )
    assert_equal(ours, verls, ["responses"])  # prompts: see the schemas below
    newline = peers.template.encode("\n")
    for row in range(2):
        ids = ours.batch["responses"][row].tolist()
        masks = (
            ours.batch["response_mask"][row].tolist(),
            verls.batch["response_mask"][row].tolist(),
        )
        differ = [
            index for index, (mine, theirs) in enumerate(zip(*masks, strict=True)) if mine != theirs
        ]
        assert [
            (ids[index - 1], ids[index], masks[0][index], masks[1][index]) for index in differ
        ] == [(peers.template.end_id, *newline, 0, 1)] * 2
    assert [message.role for message in ours.non_tensor_batch["messages"][0]["messages"]] == [
        message.role for message in verls.non_tensor_batch["messages"][0]["messages"]
    ]
    assert (
        ours.non_tensor_batch["reward_scores"].tolist()
        == [{"look": 2.0, "user_turn_rewards": []}] * 2
    )


def test_sampling_params_are_those_that_verl_sends(peers: Any) -> None:
    """In each mode, with overrides; budgets, stop ids and what only texts have aside."""
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"do_sample": False}, {}),
        ({"validate": True}, {}),
        ({"validate": True, "do_sample": False}, {}),
        ({}, {"temperature": 0.3}),
    ]
    for meta, overrides in cases:
        sent = []
        for make in (peers.ours, peers.verls):
            said = script(peers, echo)
            peers.run(
                make(said, temperature=0.7, top_p=0.9, top_k=40),
                batch(peers, "x", meta=meta),
                **overrides,
            )
            (_, sampling), *_ = said.seen
            aside = (
                "max_new_tokens",
                "stop_token_ids",
                "n",
                "skip_special_tokens",
                "spaces_between_special_tokens",
            )
            sent.append({key: value for key, value in sampling.items() if key not in aside})
        assert sent[0] == sent[1], meta


# ---------------------------------------------------------------------- where verl is wrong


def test_sampled_tokens_come_back_as_they_were_sampled(peers: Any) -> None:
    """verl renders a turn with calls anew: ids that do not survive decode and encode are others
    afterwards.
    """

    def odd(text: str) -> list[int]:
        return [
            *respelled(peers.template, three_looks(text), random.Random(3)),
            peers.template.end_id,
        ]

    given = batch(peers, "one", tools=True)
    said = script(peers, odd)
    ours = peers.run(peers.ours(said, tools=True), given)
    sampled = [token for ids, _ in said.seen for token in odd(peers.template.decode(ids))]
    mask = ours.batch["response_mask"][0].bool()
    assert ours.batch["responses"][0][mask].tolist() == sampled
    verls = peers.run(peers.verls(said, tools=True), given)
    assert verls.batch["responses"][0][verls.batch["response_mask"][0].bool()].tolist() != sampled


def test_logprobs_are_the_sampling_calls_one_a_token(peers: Any) -> None:
    """verl's come from a second call, whose shape fails, and keep one value a row."""
    given = batch(peers, "one", tools=True)
    said = script(peers, three_looks)
    ours = peers.run(peers.ours(said, tools=True, calculate_log_probs=True), given)
    mask = ours.batch["response_mask"][0].bool()
    logprobs = ours.batch["rollout_log_probs"]
    assert (logprobs.dtype, logprobs.shape) == (
        __import__("torch").float32,
        ours.batch["responses"].shape,
    )
    expected = [
        -0.5 - index / 8
        for ids, _ in list(said.seen)
        for index in range(len(said.sample(ids, {}).token_ids))
    ]
    assert logprobs[0][mask].tolist() == expected[: int(mask.sum())]
    assert logprobs[0][~mask].abs().sum() == 0
    with pytest.raises((ValueError, RuntimeError, IndexError, TypeError, AttributeError)):
        peers.run(
            peers.verls(script(peers, three_looks), tools=True, calculate_log_probs=True), given
        )


def once(turn: str) -> Any:
    """The turn, then a sentence."""
    return lambda text: "Sorry." if "</tool_response>" in text else turn


def test_a_broken_tool_does_not_end_the_batch(peers: Any) -> None:
    given = batch(peers, "one", "two", tools=True)
    said = once(call("look", question="break"))
    ours = peers.run(peers.ours(script(peers, said), tools=True), given)
    assert ours.non_tensor_batch["messages"][0]["messages"][2].content == "Error: look failed"
    with pytest.raises(RuntimeError, match="the tool is broken"):
        peers.run(peers.verls(script(peers, said), tools=True), given)


@pytest.mark.parametrize(
    ("turn", "answer"),
    [
        (call("nothing", question="x"), "no tool named 'nothing'"),
        ('<tool_call>\n{"name": "look"\n</tool_call>', "malformed tool call"),
    ],
)
def test_a_call_that_is_wrong_is_answered_where_verl_drops_it(
    peers: Any, turn: str, answer: str
) -> None:
    given = batch(peers, "one", tools=True)
    ours = peers.run(peers.ours(script(peers, once(turn)), tools=True), given)
    assert answer in ours.non_tensor_batch["messages"][0]["messages"][2].content
    verls = peers.run(peers.verls(script(peers, once(turn)), tools=True), given)
    assert len(verls.non_tensor_batch["messages"][0]["messages"]) == 2


ARGUMENTS = '{"question": "x"}'
ONE_OF_TWO = {
    "key parameters": (
        f'<tool_call>\n{{"name": "look", "parameters": {ARGUMENTS}}}\n</tool_call>',
        "verl",
    ),
    "list of calls": (
        f'<tool_call>\n[{{"name": "look", "arguments": {ARGUMENTS}}}]\n</tool_call>',
        "verl",
    ),
    "wrong type": (
        '<tool_call>\n{"name": "look", "arguments": {"question": 7}}\n</tool_call>',
        "verl",
    ),
    "in a thought": (f"<think>\n{call('look', question='x')}\n</think>\n\nSo be it.", "verl"),
    "no newline": (f'<tool_call>{{"name": "look", "arguments": {ARGUMENTS}}}</tool_call>', "ours"),
    "string arguments": (
        '<tool_call>\n{"name": "look", "arguments": "{\\"question\\": \\"x\\"}"}\n</tool_call>',
        "ours",
    ),
}
"""Calls that one of the two loops runs and the other does not: (the turn, who runs it)."""


@pytest.mark.parametrize(("turn", "who"), ONE_OF_TWO.values(), ids=ONE_OF_TWO)
def test_a_call_that_only_one_of_the_two_runs(peers: Any, turn: str, who: str) -> None:
    given = batch(peers, "one", tools=True)
    ran = {}
    for name, make in (("ours", peers.ours), ("verl", peers.verls)):
        done = peers.run(make(script(peers, once(turn)), tools=True), given)
        ran[name] = done.non_tensor_batch["reward_scores"][0]["look"] == 1.0
    assert [name for name, was_run in ran.items() if was_run] == [who]


CUT_OFF = '<tool_call>\n{"name": "look", "arguments": {"question": "x'


@pytest.mark.parametrize(
    "turn",
    [
        call("look", question="x"),
        f"Let me see. {call('nothing', question='x')}",
        '<tool_call>\n{"name": "look"\n</tool_call>',
        CUT_OFF,
    ],
    ids=["well-formed", "unknown", "malformed", "cut off"],
)
def test_messages_hold_the_raw_text_of_a_turn_with_calls(peers: Any, turn: str) -> None:
    """verl's hold that of a call which it does not run, and lose one which it does."""
    limit = {"response_length": len(peers.template.encode(turn))} if turn == CUT_OFF else {}
    done = peers.run(
        peers.ours(script(peers, once(turn)), tools=True, **limit), batch(peers, "one", tools=True)
    )
    said = done.non_tensor_batch["messages"][0]["messages"][1]
    assert (said.role, said.content) == ("assistant", turn)


@pytest.mark.parametrize(
    ("question", "limit", "shown"),
    [
        ("b", {"max_parallel_calls": 1}, "at most 1 tool calls"),
        ("long", {"max_tool_response_length": 100}, "characters cut]"),
    ],
)
def test_limits_in_the_config_are_kept_where_verl_passes_over_them(
    peers: Any, question: str, limit: dict[str, int], shown: str
) -> None:
    """Both are in verl's config, with low defaults, and only its agent loop keeps them."""
    given = batch(peers, "one", tools=True)
    said = script(peers, once(call("look", question="a") + "\n" + call("look", question=question)))
    turns = {"multi_turn": {"max_parallel_calls": 16, **limit}}
    ours, verls = (
        peers.run(make(said, tools=True, **turns), given) for make in (peers.ours, peers.verls)
    )
    answers = [one.non_tensor_batch["messages"][0]["messages"][3].content for one in (ours, verls)]
    assert shown in answers[0]
    assert shown not in answers[1]


def test_prompts_show_the_schema_as_written(peers: Any) -> None:
    """verl's pydantic schema adds what nobody wrote."""
    given = batch(peers, "one", tools=True)
    ours, verls = (
        peers.template.decode(
            peers.run(make(script(peers, echo), tools=True), given).batch["prompts"][0].tolist()
        )
        for make in (peers.ours, peers.verls)
    )
    assert json.dumps(LOOK_SCHEMA) in ours
    assert '"enum": null' not in ours
    assert '"enum": null' in verls


def test_infrastructure_failure_is_not_trained_on(
    peers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from agent.errors import EngineError

    def say(text: str) -> str | Exception:
        return EngineError("gone") if "one<|im_end|>" in text else "Fine."

    ours = peers.run(peers.ours(script(peers, say)), batch(peers, "one", "two"))
    assert ours.batch["response_mask"].sum(-1).tolist() == [
        0,
        len(peers.template.encode("Fine.")) + 1,
    ]
    assert "1 of 2 conversations are not trained on; the first: gone" in caplog.text


def test_a_prompt_over_the_budget_leaves_all_ranks_rows_equally_long(
    peers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """verl's are as long as the longest prompt: another rank's rows cannot be put together with
    them.
    """
    rows = [batch(peers, "long " * 300), batch(peers, "short")]
    ours, verls = (
        [peers.run(make(script(peers, echo)), row) for row in rows]
        for make in (peers.ours, peers.verls)
    )
    both = type(ours[0]).concat(ours)
    assert both.batch["prompts"].shape == (2, 256)
    assert both.batch["prompts"][0].tolist() == rows[0].batch["input_ids"][0][-256:].tolist()
    assert both.batch["response_mask"].bool().any(-1).tolist() == [False, True]
    assert "more than rollout.prompt_length" in caplog.text
    with pytest.raises(RuntimeError):
        type(verls[0]).concat(verls)


# ---------------------------------------------------------------------- interactions, over-
# sampling, what is kept


def interactions(folder: Path) -> dict[str, str]:
    path = folder / "interactions.yaml"
    path.write_text(
        "interaction:\n  - {name: gsm8k, class_name: "
        "verl.interactions.gsm8k_interaction.Gsm8kInteraction, config: {}}\n"
    )
    return {"interaction_config_path": str(path)}


def test_interactions_are_verls_but_for_the_newline_before_a_user_turn(
    peers: Any, tmp_path: Path
) -> None:
    """verl leaves out the newline that the template puts after an end token."""

    def say(text: str) -> str:
        return "#### 42" if "incorrect" in text else "#### 41"

    kwargs = {"interaction_kwargs": [{"name": "gsm8k", "ground_truth": "42", "query": "?"}] * 2}
    given = batch(peers, "6 times 7", "7 times 6", **kwargs)
    turns = {"multi_turn": {**interactions(tmp_path), "max_user_turns": 3}}
    ours, verls = (
        peers.run(make(script(peers, say), **turns), given) for make in (peers.ours, peers.verls)
    )
    assert (
        ours.non_tensor_batch["reward_scores"].tolist()
        == verls.non_tensor_batch["reward_scores"].tolist()
    )
    assert ours.non_tensor_batch["messages"].tolist() == verls.non_tensor_batch["messages"].tolist()
    texts = []
    for done in (ours, verls):
        filled = done.batch["attention_mask"][0][256:].bool()
        texts.append(peers.template.decode(done.batch["responses"][0][filled].tolist()))
    assert (
        texts[0].replace("<|im_end|>\n<|im_start|>user", "<|im_end|><|im_start|>user") == texts[1]
    )
    assert texts[0] != texts[1]


def test_a_row_that_chooses_an_interaction_which_does_not_exist_is_refused_by_its_place(
    peers: Any, tmp_path: Path
) -> None:
    """verl fails in the midst of the batch; a mask of 0 would hide a wrong name in a whole data
    set.
    """
    from agent.errors import TaskError

    kwargs = [{"name": "gsm8k", "ground_truth": "42"}, {"name": "gsm9k"}]
    said = script(peers, echo)
    rollout = peers.ours(said, multi_turn=interactions(tmp_path))
    with pytest.raises(TaskError, match=r"^row 1 [^\n]*'gsm9k'"):
        peers.run(rollout, batch(peers, "one", "two", interaction_kwargs=kwargs))
    assert said.seen == []


def test_rows_that_lose_their_user_are_counted(
    peers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    given = batch(peers, "one", "two", interaction_kwargs=[{"name": "gsm8k"}, {}])
    peers.run(peers.ours(script(peers, echo)), given)
    assert "1 of 2 rows have interaction_kwargs" in caplog.text


def test_over_sampling_cuts_off_the_slow_and_pads_as_verl_does(peers: Any) -> None:
    given = batch(peers, "one", "two", "slow", "four")
    slow = {"slow": lambda text: 60.0 if "slow" in text else 0.0}
    said = script(peers, echo, **slow)
    ours = peers.run(peers.ours(said, over_sample_rate=0.25), given)
    verls = peers.run(peers.verls(script(peers, echo, **slow), over_sample_rate=0.25), given)
    assert said.engine.aborted == 1
    assert_equal(ours, verls, [name for name in TENSORS if name != "position_ids"])
    assert ours.batch["attention_mask"][2].sum() == 0
    assert ours.batch["response_mask"].bool().any(-1).tolist() == [True, True, False, True]
    assert (
        ours.non_tensor_batch["reward_scores"][2]
        == verls.non_tensor_batch["reward_scores"][2]
        == {}
    )


def test_over_sampling_waits_for_one_at_least(peers: Any) -> None:
    """A rank's share of a batch may be a single row."""
    given = batch(peers, "one")
    ours, verls = (
        peers.run(make(script(peers, echo), over_sample_rate=0.5), given)
        for make in (peers.ours, peers.verls)
    )
    assert_equal(ours, verls)
    assert ours.batch["response_mask"].any()


def test_over_sampling_has_enough_of_what_can_be_trained_on(peers: Any) -> None:
    """A row that fails ends first: it would take the place of one that only takes its time."""
    from agent.errors import EngineError

    def say(text: str) -> str | Exception:
        return EngineError("gone") if "fails<|im_end|>" in text else "Fine."

    said = script(
        peers,
        say,
        slow=lambda text: {True: 60.0}.get("slow" in text, 0.2 if "late" in text else 0.0),
    )
    ours = peers.run(
        peers.ours(said, over_sample_rate=0.5), batch(peers, "fails", "one", "late", "slow")
    )
    assert ours.batch["response_mask"].bool().any(-1).tolist() == [False, True, True, False]


def test_a_row_cut_off_before_its_reward_was_known_is_padding(peers: Any) -> None:
    """It had stopped by itself; what is trained on has a reward."""
    kwargs = [{"look": {}}, {"look": {"calc_reward_kwargs": {"wait_s": 60.0}}}]
    given = batch(peers, "one", "two", tools_kwargs=kwargs)
    ours, verls = (
        peers.run(make(script(peers, echo), tools=True, over_sample_rate=0.5), given)
        for make in (peers.ours, peers.verls)
    )
    assert_equal(ours, verls, ["responses", "response_mask"])
    assert ours.batch["attention_mask"].any(-1).tolist() == [True, False]
    assert (
        ours.non_tensor_batch["reward_scores"].tolist()
        == verls.non_tensor_batch["reward_scores"].tolist()
    )


def test_a_batch_is_over_when_the_engine_is_idle(peers: Any) -> None:
    """A trainer releases its memory next; verl does not look whether the cache was emptied."""
    said = script(peers, echo)
    said.busy = 2
    peers.run(peers.ours(said), batch(peers, "one"))
    assert said.flushed == 3


def test_validation_waits_for_everybody(peers: Any) -> None:
    given = batch(peers, "one", "slow", meta={"validate": True})
    said = script(peers, echo, slow=lambda text: 0.3 if "slow" in text else 0.0)
    ours = peers.run(peers.ours(said, over_sample_rate=0.5), given)
    assert ours.batch["response_mask"].bool().any(-1).tolist() == [True, True]


def test_each_batch_is_kept_where_the_config_says_so(peers: Any, tmp_path: Path) -> None:
    kwargs = {"turntrace": {"save_to": str(tmp_path / "kept")}, "sglang": {"api_key": "a secret"}}
    rollout = peers.ours(script(peers, three_looks), tools=True, engine_kwargs=kwargs)
    done = peers.run(
        rollout, batch(peers, "one", "one", "two", tools=True, meta={"global_steps": 7})
    )
    peers.run(rollout, batch(peers, "one", tools=True, meta={"global_steps": 7}))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "train-7-rank-0",
        "train-7-rank-0-1",
    ]
    run = open_run(tmp_path / "kept" / "train-7-rank-0")
    assert "a secret" not in (run.path / "run.json").read_text()
    records = list(run)
    assert sorted(record.sample for record in records) == [0, 0, 1]
    assert len({record.task_id for record in records}) == 2
    assert {(record.data_source, record.ground_truth) for record in records} == {(None, None)}
    assert (
        records[0].response_ids
        == done.batch["responses"][0][: len(records[0].response_ids)].tolist()
    )
    defects: list[Any] = []
    verify_run(run.path, on_defect=defects.append)
    assert defects == []
    replayed = turntrace("replay", run.path, "--out", tmp_path / "again")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr


def test_rows_as_pandas_reads_them(peers: Any, tmp_path: Path) -> None:
    """numpy's arrays and numbers, in them as well; the record is the one of the same rows in
    Python's types.
    """
    import numpy as np

    said = {"role": "user", "content": np.array([{"type": "text", "text": "one"}], dtype=object)}
    kwargs = {
        "look": {
            "create_kwargs": {"seed": np.int64(3), "hints": np.array(["a", None], dtype=object)},
            "execute_kwargs": None,
        }
    }
    plain = {"look": {"create_kwargs": {"seed": 3, "hints": ["a", None]}}}
    for name, prompt, row in (
        ("numpy", np.array([said], dtype=object), kwargs),
        ("plain", [{"role": "user", "content": "one"}], plain),
    ):
        rollout = peers.ours(
            script(peers, three_looks),
            tools=True,
            engine_kwargs={"turntrace": {"save_to": str(tmp_path / name)}},
        )
        peers.run(rollout, batch(peers, "one", raw_prompt=[prompt], tools_kwargs=[row]))
    one, other = (
        next(iter(open_run(next((tmp_path / name).iterdir())))) for name in ("numpy", "plain")
    )
    assert (one.stop_reason, one.response_ids, one.extra) == (
        other.stop_reason,
        other.response_ids,
        other.extra,
    )


@pytest.mark.parametrize(
    "prompt", [None, [], [7], [{"role": "user", "content": [{"type": "image"}]}]]
)
def test_a_row_that_is_no_task_is_named(peers: Any, prompt: Any) -> None:
    from agent.errors import TaskError

    with pytest.raises(TaskError, match=r"^row 1 [^\n]+$"):
        peers.run(
            peers.ours(script(peers, echo)),
            batch(peers, "one", "two", raw_prompt=[[{"role": "user", "content": "one"}], prompt]),
        )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"engine_kwargs": {"turntrace": {"save_too": "x"}}},
            r"engine_kwargs\.turntrace\.save_too: .*the keys are .*save_to",
        ),
        (
            {"multi_turn": {"format": "qwen3_coder"}},
            r"multi_turn\.format: qwen3_coder is not proven .*its format is hermes",
        ),
        (
            {"multi_turn": {"use_inference_chat_template": True}},
            r"multi_turn\.use_inference_chat_template: ",
        ),
    ],
)
def test_a_config_that_cannot_take_effect_is_refused(
    peers: Any, config: dict[str, Any], said: str
) -> None:
    from agent.errors import ConfigError
    from conversations.errors import CallFormatError

    rollout = peers.ours(script(peers, echo), tools=True, **config)
    with pytest.raises((ConfigError, CallFormatError), match=rf"^rollout\.{said}[^\n]*$"):
        peers.run(rollout, batch(peers, "one"))


def test_async_mode_is_refused_where_it_would_run_verls_own_loop() -> None:
    from verl.workers.rollout import get_rollout_class

    from agent.errors import ConfigError
    from agent.rollout import AgentRollout

    assert get_rollout_class("sglang", "sync") is AgentRollout
    with pytest.raises(ConfigError, match=r"rollout\.mode: .*sync"):
        get_rollout_class("sglang", "async")(config=None, model_config=None, device_mesh=None)


def test_an_unknown_processor_of_images_is_refused(peers: Any) -> None:
    from transformers import ProcessorMixin

    from agent.errors import ConfigError

    rollout = peers.ours(script(peers, echo))
    rollout.processing_class = ProcessorMixin.__new__(ProcessorMixin)
    with pytest.raises(ConfigError, match="supported of"):
        peers.run(rollout, batch(peers, "one"))


# ---------------------------------------------------------------------- a trainer's steps on the
# real engine


@pytest.mark.engine
def test_two_steps_of_a_trainer(tmp_path: Path) -> None:
    """verl's data loading, rewards and advantages around the real engine and tools; a process of
    its own, as a worker is.
    """
    done = run_warm("tests.agent.trainer_smoke", tmp_path, timeout=600, imports=TRAINER)
    told = [line for line in done.stdout.splitlines() if line.startswith("SMOKE ")]
    assert told, done.stderr[-2000:]
    steps = json.loads(told[0].removeprefix("SMOKE "))["steps"]
    assert [step["rows"] for step in steps] == [2, 2]
    for step in steps:
        assert step["sampled_tokens"] > 100
        assert step["advantages_off_mask"] == step["logprobs_off_mask"] == 0
        assert step["logprobs_finite"]
        assert set(step["rewards"]) <= {0.0, 1.0}
    # `test_adapter.py` solves most of these problems greedily.
    assert any(1.0 in step["rewards"] for step in steps)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "train-1-rank-0",
        "train-2-rank-0",
    ]
    for step in (1, 2):  # of the first and the second sync
        folder = tmp_path / "kept" / f"train-{step}-rank-0"
        assert verify_run(folder).defects == 0
        assert {turn.weight_version for record in open_run(folder) for turn in record.turns} == {
            str(step)
        }


def test_tensor_parallel_ranks_return_the_same_and_fail_together(tmp_path: Path) -> None:
    done = run_warm("tests.agent.tp_ranks", tmp_path, timeout=300, imports=TRAINER)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["responses"] == second["responses"]
    assert first["mask"] == second["mask"] > 0
    assert first["error"].startswith("TaskError: ")
    assert "raw_prompt" in first["error"]
    assert second["error"].startswith("AgentError: ")
    assert first["error"] in second["error"]
