"""An examination asks every question in every way, and a condition changes sampling and tool order
and nothing else.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from agent.config.config import load_config
from agent.recipe.evaluate import CONDITIONS, runtime_for
from agent.recipe.report import ADAPTER, BASE, GENERATED, GSM8K, RECOVERY, Condition
from agent.runs.parts import prepare
from agent.runs.session import Session
from tests.agent.recipe.test_metrics import record
from tools.registry import load_tools


def test_the_adapter_is_asked_greedy_and_sampled_in_both_orders_and_the_base_model_beside_it() -> (
    None
):
    asked = set(CONDITIONS)
    assert len(asked) == len(CONDITIONS)
    assert asked >= {
        Condition(ADAPTER, *way) for way in product((GENERATED, GSM8K), (0.0, 1.0), (False, True))
    }
    assert asked >= {
        Condition(ADAPTER, RECOVERY, 0.0),
        Condition(BASE, GENERATED, 0.0),
        Condition(BASE, GSM8K, 0.0),
    }


def test_a_condition_sets_temperature_and_tool_order(tmp_path: Path) -> None:
    (tmp_path / "recorded.jsonl").write_text(record([]).to_line() + "\n")
    recorded = f"rollout.turntrace.recorded={tmp_path / 'recorded.jsonl'}"
    config = load_config(None, ("model_path=smollm2-base", "rollout.name=scripted", recorded))
    with Session(prepare(config, load_tools("gsm8k"))) as session:
        shipped = runtime_for(session, Condition(ADAPTER, GENERATED, 0.0))
        other = runtime_for(session, Condition(ADAPTER, GENERATED, 1.0, reverse=True))
    assert shipped.dispatcher is not None
    assert other.dispatcher is not None
    assert list(shipped.dispatcher.tools) == ["code_interpreter", "calculate_answer"]
    assert list(other.dispatcher.tools) == ["calculate_answer", "code_interpreter"]
    assert (shipped.settings.sampling["temperature"], other.settings.sampling["temperature"]) == (
        0.0,
        1.0,
    )
    assert other.engine is shipped.engine
