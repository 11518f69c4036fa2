"""Fixtures that several test modules share. The helpers behind them are in `tests/helpers.py`."""

from __future__ import annotations

import pytest

from conversations.template import ChatTemplate
from tests.helpers import hermes_template, qwen_template


@pytest.fixture(scope="session")
def smollm2() -> ChatTemplate:
    """SmolLM2's tokenizer with the hermes chat template: always there."""
    return hermes_template()


@pytest.fixture(scope="session")
def qwen2_5() -> ChatTemplate:
    return qwen_template("qwen2_5")


@pytest.fixture(scope="session")
def qwen3() -> ChatTemplate:
    return qwen_template("qwen3")


@pytest.fixture(params=["smollm2", "qwen2_5", "qwen3"])
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    """Each of the real templates in turn."""
    found: ChatTemplate = request.getfixturevalue(request.param)
    return found
