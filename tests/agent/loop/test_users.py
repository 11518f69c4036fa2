"""Simulated users: verl's own class, what ends a conversation, what a broken one leaves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from agent.errors import ConfigError, TaskError
from agent.loop.boundary import GRACE_S
from agent.loop.conversation import Conversation
from agent.loop.tasks import Task
from agent.loop.users import Interactions, LoadedInteraction, load_interactions
from conversations.template import ChatTemplate
from conversations.tokens import USER
from conversations.trajectory import Trajectory
from tests import virtual_time
from tests.helpers import NotAnException, Toy, call, run_one, runtime, says, task


class Patient:
    """Says "again" until a turn holds 42; `breaks` says where to fail."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.breaks = config.get("breaks")
        self.log: list[tuple[str, Any]] = []

    async def start_interaction(self, instance_id: str, **kwargs: Any) -> str:
        self.log.append(("start", kwargs))
        await self._may_break("start")
        return instance_id

    async def generate_response(
        self, instance_id: str, messages: list[dict[str, Any]], **kwargs: Any
    ) -> tuple[bool, Any, Any, dict[str, Any]]:
        self.log.append(("asked", messages))
        await self._may_break("generate")
        if self.breaks == "text":
            return False, 42, 0.0, {}
        if self.breaks == "reward":
            return False, "again", float("nan"), {}
        right = "42" in messages[-1]["content"]
        return right, "right" if right else f"again, {kwargs['who']}", float(right), {}

    async def finalize_interaction(self, instance_id: str, **kwargs: Any) -> None:
        self.log.append(("finalize", instance_id))
        await self._may_break("finalize")

    async def _may_break(self, step: str) -> None:
        if self.breaks == step:
            raise RuntimeError(f"broken {step}")
        if self.breaks == f"{step} hangs":
            await asyncio.Event().wait()
        if self.breaks == f"{step} of its own":
            raise TimeoutError("a server was slow")


PATIENT = "tests.agent.loop.test_users.Patient"


def patient(breaks: str | None = None, timeout_s: float = 5.0) -> tuple[Interactions, Patient]:
    made = Patient({"breaks": breaks})
    return Interactions([LoadedInteraction("patient", made, timeout_s)], ""), made


def asks(**kwargs: Any) -> Task:
    return task("t", interaction_kwargs={"name": "patient", "who": "Ann", **kwargs})


async def talk(
    template: ChatTemplate,
    interactions: Interactions,
    *turns: str,
    the_task: Task | None = None,
    **settings: Any,
) -> Trajectory:
    shared = runtime(template, says(template, *turns), [Toy()], **settings)
    return await run_one(dataclasses.replace(shared, interactions=interactions), the_task or asks())


async def test_a_user_answers_until_it_is_content(template: ChatTemplate) -> None:
    interactions, user = patient()
    record = await talk(
        template, interactions, "It is 41.", call("toy", do="say", text="no"), "Hm.", "It is 42."
    )
    assert [message["role"] for message in record.messages] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    assert [message["content"] for message in record.messages if message["role"] == "user"][1:] == [
        "again, Ann"
    ] * 2
    assert (record.stop_reason, record.reward, record.reward_parts["user_turn_rewards"]) == (
        "stop",
        1.0,
        [0.0, 0.0, 1.0],
    )
    ids = record.prompt_ids + record.response_ids
    blocks = [
        template.decode(ids[start:end]) for kind, start, end in record.segments if kind == USER
    ]
    assert len(blocks) == 2
    assert all("again, Ann" in block for block in blocks)
    assert [step for step, _ in user.log] == ["start", "asked", "asked", "asked", "finalize"]
    assert user.log[2][1][-2:] == [
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "Hm."},
    ]


async def test_the_mask_is_1_on_sampled_tokens_alone(template: ChatTemplate) -> None:
    record = await talk(template, patient()[0], "It is 41.", "It is 42.")
    shift = len(record.prompt_ids)
    sampled = {index - shift for turn in record.turns for index in range(turn.start, turn.end)}
    assert [index for index, mask in enumerate(record.response_mask) if mask] == sorted(sampled)


async def test_rows_that_name_no_interaction_get_no_answer(smollm2: ChatTemplate) -> None:
    interactions, user = patient()
    record = await talk(smollm2, interactions, "It is 41.", the_task=task("t"))
    assert (record.num_turns, record.stop_reason, user.log) == (1, "stop", [])


@pytest.mark.parametrize(
    ("limits", "turns"),
    [({"max_user_turns": 2}, 3), ({"max_user_turns": 0}, 1), ({"max_turns": 2}, 2)],
)
async def test_limits_on_turns(smollm2: ChatTemplate, limits: dict[str, int], turns: int) -> None:
    record = await talk(smollm2, patient()[0], *["It is 41."] * 9, **limits)
    assert (record.num_turns, record.stop_reason) == (turns, "stop")
    assert record.messages[-1]["role"] == "assistant"


async def test_a_user_turn_that_does_not_fit_is_not_appended(smollm2: ChatTemplate) -> None:
    record = await talk(
        smollm2, patient()[0], "It is 41.", the_task=asks(who="long " * 500), response_length=100
    )
    assert (record.stop_reason, record.num_turns, record.messages[-1]["role"]) == (
        "length",
        1,
        "assistant",
    )
    assert all(kind != USER for kind, _, _ in record.segments)


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        ("start", "start_interaction failed: RuntimeError: broken start"),
        ("generate", "generate_response failed: RuntimeError: broken generate"),
        ("generate hangs", "generate_response took more than 0.1 s"),
        ("generate of its own", "generate_response failed: TimeoutError: a server was slow"),
        ("text", "expected the user's words as a string, got int"),
        ("reward", "expected a finite number as reward, got nan"),
    ],
)
async def test_a_broken_user_is_infrastructure_never_a_reward(
    smollm2: ChatTemplate, breaks: str, said: str
) -> None:
    interactions, user = patient(breaks, timeout_s=0.1)
    record = await talk(smollm2, interactions, "It is 41.")
    assert (record.infra_error, record.reward, record.stop_reason) == (True, None, "stop")
    assert record.error is not None
    assert said in record.error
    assert user.log[-1][0] == "finalize"


async def test_cancelling_finalizes_the_user(smollm2: ChatTemplate) -> None:
    interactions, user = patient("generate hangs", timeout_s=60)
    running = asyncio.create_task(talk(smollm2, interactions, "It is 41."))
    while len(user.log) < 2:  # noqa: ASYNC110 - asked
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert user.log[-1][0] == "finalize"


async def test_cancelling_waits_for_a_user_who_is_being_finalized(smollm2: ChatTemplate) -> None:
    interactions, user = patient()
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def finalize(instance_id: str) -> None:
        begun.set()
        await may_end.wait()
        user.log.append(("finalized", instance_id))

    setattr(user, "finalize_interaction", finalize)  # noqa: B010 - its class has another shape
    running = asyncio.create_task(talk(smollm2, interactions, "It is 42."))
    await begun.wait()
    running.cancel()
    await asyncio.sleep(0)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert user.log[-1][0] == "finalized"


async def test_a_user_who_cannot_be_finalized_is_a_warning(smollm2: ChatTemplate) -> None:
    interactions, _ = patient("finalize")
    record = await talk(smollm2, interactions, "It is 42.")
    assert (record.infra_error, record.reward) == (False, 1.0)
    assert (
        "interaction patient: finalize_interaction failed: RuntimeError: broken finalize"
        in record.warnings[0].text
    )


@pytest.mark.parametrize("step", ["start_interaction", "generate_response", "finalize_interaction"])
async def test_a_class_that_does_not_take_what_it_is_given_costs_one_conversation(
    smollm2: ChatTemplate, step: str
) -> None:
    """What raises is the call itself, before there is anything to await."""
    interactions, user = patient()

    async def refuses(one: Any, two: Any, three: Any) -> None: ...

    setattr(user, step, refuses)
    record = await talk(smollm2, interactions, "It is 42.")
    assert record.stop_reason == "stop"
    texts = [record.error or "", *(warning.text for warning in record.warnings)]
    assert any(f"{step} failed: TypeError" in text for text in texts)


# ---------------------------------------------------------------------- the boundary around users


class Awkward(Patient):
    """Does in `generate_response` what `does` says; `late` is set once it may end."""

    def __init__(self, does: str) -> None:
        super().__init__({})
        self.does = does
        self.late = asyncio.Event()

    async def generate_response(
        self, instance_id: str, messages: list[dict[str, Any]], **kwargs: Any
    ) -> tuple[bool, Any, Any, dict[str, Any]]:
        if self.does == "exits":
            raise SystemExit(3)
        if self.does == "panics":
            raise NotAnException("inside")
        while self.does == "deaf" and not self.late.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.late.wait()
        return True, "", {"large": 1e39, "largest": 1e308}.get(self.does, 7.0), {}


def awkward(does: str, timeout_s: float = 5.0) -> tuple[Interactions, Awkward]:
    made = Awkward(does)
    return Interactions([LoadedInteraction("patient", made, timeout_s)], ""), made


@pytest.mark.parametrize("does", ["exits", "panics", "large", "largest"])
async def test_what_no_user_may_do_costs_its_conversation_alone(
    smollm2: ChatTemplate, does: str
) -> None:
    record = await talk(smollm2, awkward(does)[0], "It is 41.")
    assert (record.stop_reason, record.infra_error, record.reward) == ("stop", True, None)
    assert "generate_response" in str(record.error)


@pytest.mark.parametrize(
    ("limits", "timeout_s", "stop_reason", "ends_s"),
    [({}, 3.0, "stop", 3.0 + GRACE_S), ({"deadline_s": 2.0}, 60.0, "deadline", 2.0 + GRACE_S)],
)
def test_a_user_that_swallows_cancellation_is_abandoned(
    smollm2: ChatTemplate,
    limits: dict[str, float],
    timeout_s: float,
    stop_reason: str,
    ends_s: float,
) -> None:
    async def run() -> tuple[Trajectory, float]:
        interactions, user = awkward("deaf", timeout_s)
        record = await talk(smollm2, interactions, "It is 41.", **limits)
        ended = asyncio.get_running_loop().time()
        user.late.set()  # what it answers now comes too late
        await asyncio.sleep(1)
        return record, ended

    record, ended = virtual_time.run(run())
    assert (record.stop_reason, ended) == (stop_reason, pytest.approx(ends_s))
    assert (record.reward, record.reward_parts) == (None, {})


async def test_a_row_that_loses_its_user_says_so(smollm2: ChatTemplate) -> None:
    record = await run_one(runtime(smollm2, says(smollm2, "It is 41.")), asks())
    assert [warning.kind for warning in record.warnings] == ["no_interactions"]
    assert (record.stop_reason, record.num_turns) == ("stop", 1)


async def test_a_row_that_chooses_an_unknown_user_is_refused_before_anything_runs(
    smollm2: ChatTemplate,
) -> None:
    shared = runtime(smollm2, says(smollm2, "It is 41."))
    shared = dataclasses.replace(shared, interactions=patient()[0])
    with pytest.raises(TaskError, match="nobody"):
        Conversation(asks(name="nobody"), 0, shared)


# ---------------------------------------------------------------------- the YAML


def write(folder: Path, text: str) -> Path:
    path = folder / "interactions.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.slow
async def test_verls_own_interaction(smollm2: ChatTemplate, tmp_path: Path) -> None:
    pytest.importorskip("verl.interactions.gsm8k_interaction")
    name = "verl.interactions.gsm8k_interaction.Gsm8kInteraction"
    yaml = f"interaction:\n  - {{name: gsm8k, class_name: {name}, config: {{}}}}\n"
    interactions = load_interactions(write(tmp_path, yaml))
    the_task = task("t", interaction_kwargs={"ground_truth": "42", "query": "6 * 7"})
    record = await talk(smollm2, interactions, "#### 41", "#### 42", the_task=the_task)
    assert (
        record.messages[2]["content"]
        == "Your response is incorrect! You need to reflect on your answer and try again."
    )
    assert (record.num_turns, record.reward_parts["user_turn_rewards"]) == (2, [0.0, 1.0])
    assert interactions["gsm8k"].interaction._instance_dict == {}  # type: ignore[attr-defined]


def test_names_come_from_the_class_as_in_verl(tmp_path: Path) -> None:
    entry = f"interaction:\n  - class_name: {PATIENT}\n    config: {{timeout_s: 3}}\n"
    (loaded,) = load_interactions(write(tmp_path, entry)).values()
    assert (loaded.name, loaded.timeout_s) == ("patient", 3.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("interaction: [", "cannot be read"),
        ("tools: []", "interaction: Field required"),
        ("interaction:\n  - {name: x}", "interaction.0.class_name: Field required"),
        (
            "interaction:\n  - {class_name: nowhere.Thing}",
            "interaction.0: there is no module 'nowhere'",
        ),
        (
            "interaction:\n  - {class_name: pathlib.PurePath, config: {}}",
            "interaction.0: pathlib.PurePath cannot be",
        ),
        (
            "interaction:\n  - {class_name: tests.helpers.Unprintable, config: {}}",
            "interaction.0: tests.helpers.Unprintable cannot be",
        ),
        (
            f"interaction:\n  - {{class_name: {PATIENT}, config: {{timeout_s: 0}}}}",
            "interaction.0.config.timeout_s",
        ),
        (
            "interaction:\n" + f"  - {{class_name: {PATIENT}}}\n" * 2,
            "its own name",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as raised:
        load_interactions(write(tmp_path, text))
    assert said in str(raised.value)


def test_a_row_that_names_an_unknown_one(tmp_path: Path) -> None:
    interactions, _ = patient()
    with pytest.raises(TaskError, match=r"interaction_kwargs.*'patent'.*'patient'"):
        interactions.chosen({"name": "patent"})
