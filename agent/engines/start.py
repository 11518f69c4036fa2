"""Starts SGLang in this process's children.

Importing this is light. `start` prepares the process before it imports torch, verl and SGLang, and
afterwards puts back what they change in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.engines import compat, cpu_guards
from agent.engines.arguments import environment, start_variables
from agent.engines.processes import collector_paused, explain
from agent.errors import AgentError, ConfigError, EngineStartError
from agent.packages import not_installed

if TYPE_CHECKING:
    from agent.engines.rollout import EngineRollout


def start(
    rollout: Mapping[str, Any], model_path: Path, *, log_path: Path | None = None
) -> EngineRollout:
    """Starts the engine, on the GPUs if there are any, and returns the rollout that holds it.

    `rollout` holds keys of verl's RolloutConfig, `model_path` is a local directory. `log_path` is
    where the engine's processes write; None: this process's output. Call it on a thread that lives
    as long as the engine: Linux ends the children with the thread that started them. Blocks for
    10 to 60 s. Raises EngineStartError if the engine does not start, and ConfigError if verl
    refuses the config; both are one line.
    """
    with starting():
        with collector_paused():
            from agent.engines.rollout import EngineRollout

        return EngineRollout.alone(rollout, model_path, log_path)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Prepares this process to import a rollout class and make one in the block.

    Raises what `start` raises.
    """
    with collector_paused():
        import torch

    cuda = torch.cuda.is_available()
    if not cuda:
        cpu_guards.install()
    with environment(start_variables(cuda=cuda)), _process_state_kept():
        try:
            with collector_paused():
                compat.prepare_sglang()
            yield
        except AgentError:
            raise
        except AssertionError as error:  # verl's config checks
            raise ConfigError(
                f"verl refuses the rollout config: {' '.join(str(error).split())}"
            ) from error
        except ModuleNotFoundError as error:
            reason = not_installed(error) or str(error)
            raise EngineStartError(f"the engine did not start: {reason}") from error
        except Exception as error:  # verl, SGLang and torch raise errors of every kind
            raise EngineStartError(
                f"the engine did not start: {explain(f'{type(error).__name__}: {error}', None)}"
            ) from error


@contextlib.contextmanager
def _process_state_kept() -> Iterator[None]:
    """Restores what importing and starting SGLang changes: event loop policy, start method, root
    logger and more.

    SGLang's own logger stays at ERROR: its warnings are about defaults that were chosen on purpose.
    """
    # SGLang replaces this function, and then idle executor threads keep the process from exiting.
    register_atexit = threading._register_atexit  # type: ignore[attr-defined]
    policy = asyncio.get_event_loop_policy()
    start_method = multiprocessing.get_start_method(allow_none=True)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logging.getLogger("sglang").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # About hardware that is not there, and about SGLangRollout's age.
            warnings.simplefilter("ignore")
            yield
    finally:
        threading._register_atexit = register_atexit  # type: ignore[attr-defined]
        asyncio.set_event_loop_policy(policy)
        multiprocessing.set_start_method(start_method, force=True)
        root.handlers[:] = handlers
        root.setLevel(level)
