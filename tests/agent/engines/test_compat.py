"""What an engine in process needs of other packages' versions."""

from __future__ import annotations

import importlib.metadata

import pytest

from agent.engines.compat import check_verl
from agent.errors import EngineStartError


def test_another_verl_is_refused_by_name() -> None:
    check_verl(importlib.metadata.version("verl"))
    with pytest.raises(
        EngineStartError, match=r"verl 0\.9\.1 does not have.*sglang_server"
    ) as told:
        check_verl("0.9.1")
    assert "\n" not in str(told.value)
