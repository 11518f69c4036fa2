"""A run scored again by a model whose probabilities are known: a clean run passes exactly, and each
negative control is found.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.engines.scoring import Scores, read_scores, score_request
from agent.errors import EngineError
from agent.scoring.compare import Comparison, Spread
from agent.scoring.temperature import at_temperature
from agent.scoring.work import score_run
from conversations.errors import RunFolderError
from conversations.run.open_run import open_run
from conversations.run.scores import SavedScores, write_scores
from conversations.trajectory import Trajectory, Turn
from tests.agent.scoring.toy_model import ToyModel, changed, sampled_run, sampled_session

EXACT, FLOAT32 = 1e-9, 1e-6
"""Of the arithmetic here, and of log-probs as records keep them."""


def scored(run: Path, model: Any, lines: io.BytesIO | None = None) -> Comparison:
    comparison = Comparison(model.describe())
    asyncio.run(score_run(open_run(run), model, comparison, lines or io.BytesIO()))
    return comparison


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    folder = tmp_path_factory.mktemp("scored")
    return {
        temperature: sampled_run(folder / str(temperature), ToyModel(), temperature=temperature)
        for temperature in (0.0, 0.7, 1.0, 1.3)
    }


# ---------------------------------------------------------------------- the engine that sampled


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.3])
def test_the_model_that_sampled_gives_every_recorded_log_prob(
    runs: dict[float, Path], temperature: float
) -> None:
    comparison = scored(runs[temperature], ToyModel())
    tokens = sum(sum(record.response_mask) for record in open_run(runs[temperature]))
    assert (comparison.records, len(comparison.differences)) == (12, tokens)
    assert max(comparison.differences.sizes) < FLOAT32
    assert len(comparison.gaps) == (0 if temperature else tokens)
    assert (comparison.is_met, comparison.left_out, comparison.failed) == (True, {}, {})


def test_one_request_a_record_from_its_first_sampled_token(runs: dict[float, Path]) -> None:
    model = ToyModel()
    scored(runs[1.0], model)
    firsts = [record.turns[0].start for record in open_run(runs[1.0])]
    assert sorted(model.asked) == sorted(firsts)


# ---------------------------------------------------------------------- negative controls


def rewritten(record: Trajectory, token: int, model: ToyModel) -> Trajectory:
    """The record with one other token, the likeliest that it is not."""
    ids = list(record.response_ids)
    at = model.logprobs([*record.prompt_ids, *ids[:token]])
    ids[token] = min((one for one in at if one != ids[token]), key=lambda one: at[one])
    return dataclasses.replace(record, response_ids=ids)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_one_rewritten_token_under_a_right_hash_is_found_with_its_place(
    runs: dict[float, Path], tmp_path: Path, temperature: float
) -> None:
    def change(number: int, record: Trajectory) -> Trajectory:
        return rewritten(record, 2, ToyModel()) if number == 7 else record

    run = changed(tmp_path / "run", runs[temperature], change)
    record = list(open_run(run))[7]
    comparison = scored(run, ToyModel())
    worst = comparison.worst[0]
    assert not comparison.is_met
    assert (worst.id, worst.turn) == (record.id, 0)
    assert 0 <= worst.token - record.turns[0].start - 2 <= 4  # or one that it comes before
    if temperature == 0.0:
        assert not comparison.gaps.is_met


@pytest.mark.parametrize(("sampled", "said"), [(1.0, 0.7), (0.7, 1.0), (0.7, 0.8), (1.0, 0.0)])
def test_a_wrong_temperature_is_found(
    runs: dict[float, Path], tmp_path: Path, sampled: float, said: float
) -> None:
    def change(number: int, record: Trajectory) -> Trajectory:
        return dataclasses.replace(record, sampling={**record.sampling, "temperature": said})

    comparison = scored(changed(tmp_path / "run", runs[sampled], change), ToyModel())
    assert not comparison.is_met


def test_other_weights_are_found(runs: dict[float, Path]) -> None:
    comparison = scored(runs[1.0], ToyModel(seed=2))
    assert not comparison.is_met
    assert comparison.differences.share > 0.5


def test_a_changed_log_prob_is_found(runs: dict[float, Path], tmp_path: Path) -> None:
    def change(number: int, record: Trajectory) -> Trajectory:
        values = list(record.response_logprobs)
        if number == 3 and values[0] is not None:
            values[0] -= 2.5
        return dataclasses.replace(record, response_logprobs=values)

    comparison = scored(changed(tmp_path / "run", runs[1.0], change), ToyModel())
    assert not comparison.is_met
    assert comparison.worst[0].difference == pytest.approx(-2.5)


# ---------------------------------------------------------------------- branches


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sampled_session(tmp_path_factory.mktemp("session") / "run", ToyModel())


def test_each_branch_is_scored_behind_its_path(session: Path) -> None:
    (record,) = open_run(session)
    model, lines = ToyModel(), io.BytesIO()
    comparison = scored(session, model, lines)
    masks = [record.response_mask, *(branch.response_mask for branch in record.branches)]
    assert len(comparison.differences) == sum(map(sum, masks))
    assert (comparison.records, comparison.turns) == (1, 7)
    assert (comparison.is_met, comparison.left_out) == (True, {})
    assert max(comparison.differences.sizes) < FLOAT32
    assert len(model.asked) == 4
    line = json.loads(lines.getvalue())
    found = [line["differences"], *line["branches"]]
    assert [[value is not None for value in part] for part in found] == [
        [mask == 1 for mask in part] for part in masks
    ]


def test_a_rewritten_token_of_a_branch_is_found_with_its_place(
    session: Path, tmp_path: Path
) -> None:
    def change(number: int, record: Trajectory) -> Trajectory:
        branches = list(record.branches)
        ids = list(branches[0].response_ids)
        start = branches[0].response_mask.index(1)
        ids[start + 1] = next(one for one in ToyModel().vocabulary if one != ids[start + 1])
        branches[0] = dataclasses.replace(branches[0], response_ids=ids)
        return dataclasses.replace(record, branches=branches)

    comparison = scored(changed(tmp_path / "run", session, change), ToyModel())
    assert not comparison.is_met
    assert comparison.worst[0].branch == 1
    assert comparison.worst[0].turn == 0
    assert max(one.size for one in comparison.worst if one.branch != 1) < FLOAT32


def test_branches_that_do_not_fit_are_named(session: Path, tmp_path: Path) -> None:
    def change(number: int, record: Trajectory) -> Trajectory:
        parent = {"branch": 9, "turn": 1}
        branches = [dataclasses.replace(one, parent=parent) for one in record.branches]
        return dataclasses.replace(record, branches=branches)

    comparison = scored(changed(tmp_path / "run", session, change), ToyModel())
    assert list(comparison.failed) == ["t-0"]
    assert "branch" in comparison.failed["t-0"]


# ---------------------------------------------------------------------- what is left out


SAMPLING = {
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"3": 5.0},
    "json_schema": "{}",
    "temperature": float("1e400"),
}


@pytest.mark.parametrize("key", [key for key in SAMPLING if key != "temperature"])
def test_what_a_prefill_does_not_repeat_is_left_out_by_name(
    runs: dict[float, Path], tmp_path: Path, key: str
) -> None:
    def change(number: int, record: Trajectory) -> Trajectory:
        return dataclasses.replace(record, sampling={**record.sampling, key: SAMPLING[key]})

    comparison = scored(changed(tmp_path / "run", runs[1.0], change), ToyModel())
    assert list(comparison.left_out.items()) == [(f"sampled with {key}", 12)]
    assert (comparison.records, comparison.is_met) == (0, False)


IMAGE = {"sha256": "0" * 64, "width": 28, "height": 28, "grid": [1, 2, 2], "start": 1, "end": 2}


def with_turn(record: Trajectory, **fields: Any) -> Trajectory:
    turns = [dataclasses.replace(turn, **fields) for turn in record.turns]
    return dataclasses.replace(record, turns=turns)


def test_every_turn_that_is_left_out_is_counted_under_its_reason(
    runs: dict[float, Path], tmp_path: Path
) -> None:
    changes: dict[int, Any] = {
        0: lambda record: with_turn(record, resumed=[[3, "2"]]),
        1: lambda record: with_turn(record, weight_version="6"),
        2: lambda record: dataclasses.replace(record, engine={"name": "sglang", "model": "other"}),
        3: lambda record: dataclasses.replace(record, engine={"name": "scripted"}),
        4: lambda record: dataclasses.replace(record, parent={"run": "r", "id": "i", "turn": 1}),
        5: lambda record: dataclasses.replace(
            record, response_logprobs=[None] * len(record.response_logprobs)
        ),
        6: lambda record: with_turn(record, start=-4),
        7: lambda record: dataclasses.replace(record, sampling={"temperature": "hot"}),
        8: lambda record: dataclasses.replace(record, prompt_ids=[10**6, *record.prompt_ids[1:]]),
        9: lambda record: dataclasses.replace(record, images=[dict(IMAGE)]),
    }

    def change(number: int, record: Trajectory) -> Trajectory:
        return changes.get(number, lambda same: same)(record)  # type: ignore[no-any-return]

    comparison = scored(changed(tmp_path / "run", runs[1.0], change), ToyModel(version="5"))
    assert comparison.left_out == {
        "resumed, perhaps under other weights": 1,
        "sampled by the weights 6": 1,
        "sampled by the model other": 1,
        "sampled by the engine scripted": 1,
        "of the run that was forked": 1,
        "without log-probs": 1,
        "damaged": 2,
        "with ids the tokenizer lacks": 1,
        "of a record with images": 1,
    }
    assert (comparison.records, comparison.is_met) == (2, True)


@pytest.mark.parametrize(
    "path", ["/models/toy", "org/toy", "/hub/models--org--toy/snapshots/0f3ab8c"]
)
def test_a_server_may_score_what_the_same_model_sampled_in_process(
    runs: dict[float, Path], path: str
) -> None:
    server = ToyModel()
    server.described = {"name": "sglang_server", "model_path": path, "url": "http://x"}
    assert scored(runs[1.0], server).records == 12


@pytest.mark.parametrize(
    "damage",
    [
        {"turns": [Turn(5, 9, "stop", 5), Turn("a", None, "stop", 1)]},  # type: ignore[arg-type]
        {"response_logprobs": []},
        {"response_logprobs": "text"},
        {"response_ids": []},
        {"prompt_ids": []},
        {"sampling": []},
        {"engine": "x"},
        {"parent": ["odd"]},
        {"branches": [3]},
    ],
    ids=lambda damage: str(next(iter(damage))),
)
def test_a_damaged_record_is_left_out_and_harms_no_other(
    runs: dict[float, Path], tmp_path: Path, damage: dict[str, Any]
) -> None:
    def change(number: int, record: Trajectory) -> Trajectory:
        return dataclasses.replace(record, **damage) if number == 2 else record

    comparison = scored(changed(tmp_path / "run", runs[1.0], change), ToyModel())
    assert comparison.records == 11
    assert sum(comparison.left_out.values()) + len(comparison.failed) >= 1
    assert not comparison.differences.over


class Failing(ToyModel):
    """Refuses the fifth request."""

    requests = 0

    async def score(self, ids: Sequence[int], first: int, *, likeliest: int) -> Scores:
        self.requests += 1
        if self.requests == 5:
            raise EngineError("too long")
        return await super().score(ids, first, likeliest=likeliest)


def test_a_record_that_the_engine_refuses_is_counted_and_is_no_success(
    runs: dict[float, Path],
) -> None:
    comparison = scored(runs[1.0], Failing())
    assert list(comparison.failed.values()) == ["too long"]
    assert (comparison.records, comparison.is_met) == (11, False)


ANSWER = {
    "input_token_logprobs": [[None, 7, None], [-0.5, 8, None], [-2.0, 9, None]],
    "input_top_logprobs": [None, [[-0.5, 8, None], [-1.0, 3, None]], [[-0.1, 4], [-2.0, 9]]],
}
NO_ANSWERS: dict[str, dict[str, Any]] = {
    "nothing": {"input_token_logprobs": [], "input_top_logprobs": []},
    "null": {"input_token_logprobs": None},
    "no likeliest": {"input_top_logprobs": None},
    "too few": {"input_token_logprobs": ANSWER["input_token_logprobs"][:2]},
    "other ids": {
        "input_token_logprobs": [[None, 7, None], [-0.5, 8, None], [-2.0, 5, None]],
    },
    "not a number": {"input_token_logprobs": [[None, 7, None], [None, 8, None], [-2.0, 9, None]]},
    "NaN": {"input_token_logprobs": [[None, 7], [math.nan, 8], [-2.0, 9]]},
    "NaN likeliest": {"input_top_logprobs": [None, [[math.nan, 8], [-1, 3]], [[-0.1, 4], [-2, 9]]]},
    "fewer likeliest": {"input_top_logprobs": [None, [[-0.5, 8]], [[-0.1, 4], [-2.0, 9]]]},
}


def test_an_answer_is_read_from_the_first_token_on() -> None:
    scores = read_scores({"meta_info": ANSWER}, [6, 7, 8, 9], 2, 2)
    assert scores == Scores([-0.5, -2.0], [[-0.5, -1.0], [-0.1, -2.0]])
    assert score_request([6, 7, 8, 9], 2, 2)["logprob_start_len"] == 1


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_an_answer_that_is_not_data_is_refused(name: str) -> None:
    with pytest.raises(EngineError):
        read_scores({"meta_info": {**ANSWER, **NO_ANSWERS[name]}}, [6, 7, 8, 9], 2, 2)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("temperature", [0.05, 0.5, 0.9, 1.0, 1.1, 2.0])
@pytest.mark.parametrize("known", [1, 8, 400])
def test_the_interval_holds_the_true_log_prob(temperature: float, known: int) -> None:
    rng = random.Random(known)
    for _ in range(50):
        logits = [rng.gauss(0, 3) for _ in range(400)]
        total = math.log(sum(map(math.exp, logits)))
        at_one = sorted((logit - total for logit in logits), reverse=True)
        scaled = math.log(sum(math.exp(value / temperature) for value in at_one))
        token = rng.choice(at_one)
        low, high = at_temperature(token, at_one[:known], temperature)
        assert low - EXACT <= token / temperature - scaled <= high + EXACT
        if known == 400 and temperature <= 1.0:
            assert high - low < 1e-6


def test_quantiles_are_values_that_occur() -> None:
    spread = Spread(0.1)
    spread.add([-0.5, *[0.001] * 98, 0.2])
    assert spread.quantiles() == {"p50": 0.001, "p90": 0.001, "p99": 0.2, "max": 0.5}
    assert (spread.over, spread.share, spread.is_met) == (2, 0.02, False)
    assert Spread(0.1).quantiles() == dict.fromkeys(("p50", "p90", "p99", "max"))


# ---------------------------------------------------------------------- the file beside the run


def test_the_file_has_each_difference_and_changes_no_record(
    runs: dict[float, Path], tmp_path: Path
) -> None:
    run = changed(tmp_path / "run", runs[1.0], lambda number, record: record)
    before = (run / "trajectories.jsonl").read_bytes()
    lines = io.BytesIO()
    comparison = scored(run, ToyModel(seed=3), lines)
    lines.seek(0)
    write_scores(run, comparison.as_json(), lines)
    assert (run / "trajectories.jsonl").read_bytes() == before
    assert json.loads((run / "scores.jsonl").read_text().splitlines()[0])["records"] == 12
    saved, model = SavedScores(run), ToyModel(seed=3)
    for record in open_run(run).records():
        ids, found = record["prompt_ids"] + record["response_ids"], saved.differences(record)
        assert found is not None
        for place, value in enumerate(found):
            position = len(record["prompt_ids"]) + place
            at = model.logprobs(ids[:position]).get(ids[position])
            if record["response_mask"][place] and at is not None:
                expected = record["response_logprobs"][place] - at
                assert value == pytest.approx(expected, abs=2 * FLOAT32)
            else:
                assert value is None or not record["response_mask"][place]
        assert saved.differences({**record, "sha256": "another"}) is None


@pytest.mark.parametrize(
    "differences", ["[1]", '"x"', "[NaN]", '["<img>"]', "{}", "null", "[true]", "[1e999]"]
)
def test_a_line_that_is_no_such_line_counts_as_absent(tmp_path: Path, differences: str) -> None:
    record = {"id": "a", "sha256": "b", "response_ids": [1]}
    line = f'{{"id": "a", "sha256": "b", "differences": {differences}}}\n'
    (tmp_path / "scores.jsonl").write_text(f"not JSON\n[]\n{line}")
    expected = [1] if differences == "[1]" else None
    assert SavedScores(tmp_path).differences(record) == expected


def test_a_link_in_a_run_from_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "scores.jsonl.new").symlink_to(tmp_path / "mine")
    with pytest.raises(RunFolderError, match="link"):
        write_scores(tmp_path, {}, [])
    assert (tmp_path / "mine").read_text() == "kept"
