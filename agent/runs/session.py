"""A run's parts, started: engine, chat template, tools, and the one event loop they live on.

Invariant: the engine starts on, and only ever sees, the session's own loop thread, which lives until `close`. Sync and
async callers hand coroutines to it, so that neither can give an SGLang engine a second event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from agent.config.config import Config
from agent.loop.calls import Dispatcher
from agent.engines.engine import Engine
from agent.engines.scripted import recorded
from agent.loop.users import load_interactions
from agent.loop.loop import LoopSettings, Runtime
from agent.loop.tracing import start_tracing
from conversations.run.store import read_trajectories
from conversations.template import ChatTemplate
from conversations.tokens import TOOL, USER
from conversations.truncate import cut_to_tokens
from tools.toolset import ToolSet

T = TypeVar("T")


class Session:
    """Starts everything a config asks for; blocks until the engine is up (seconds to a minute). Close it, or use `with`.

    `tools` are closed with the session. `log_path` is where the engine's processes write; None: this process's output.
    `start` and `template` take the place of the config's engine and of its model's chat template.
    Raises ConfigError, TemplateError, EngineStartError and other one-line errors; nothing is left running then.
    """

    def __init__(
        self,
        config: Config,
        tools: ToolSet | None = None,
        *,
        validate: bool = False,
        log_path: Path | None = None,
        start: Callable[[], Engine] | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        self.config = config
        self.tools = tools
        self.template = template or load_template(config, config.model_dir())
        interactions_path = config.interaction_config_path
        interactions = load_interactions(interactions_path) if interactions_path else None
        for kind, is_needed in ((TOOL, tools), (USER, interactions)):
            if is_needed:
                self.template.require(kind)
        self._tracing = start_tracing()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="turntrace-loop", daemon=True)
        self._started: concurrent.futures.Future[Engine] = concurrent.futures.Future()
        self._start = start or functools.partial(start_engine, config, config.model_dir(), log_path)
        self._thread.start()
        try:
            self.engine = self._started.result()
            dispatcher = make_dispatcher(config, tools, self.template) if tools else None
            settings = loop_settings(config, config.sampling(validate))
            runtime = Runtime(
                self.engine, self.template, settings, dispatcher, interactions=interactions
            )
            self.runtime = self._tracing.traced(runtime) if self._tracing else runtime
        except BaseException:
            self.close()
            raise

    def runtime_with(self, sampling: dict[str, Any], max_tokens: int | None = None) -> Runtime:
        """`runtime` with other sampling params and another cap on a turn's tokens."""
        return dataclasses.replace(
            self.runtime, settings=loop_settings(self.config, sampling, max_tokens)
        )

    def _serve(self) -> None:
        """The loop thread. SGLang's children end with the thread that started them, so it starts them here.

        Tools first: what they lack is known in a second, an engine takes a minute.
        """
        asyncio.set_event_loop(self._loop)
        try:
            if self.tools:
                self._loop.run_until_complete(self.tools.start())
            engine = self._start()
            if connect := getattr(engine, "connect", None):
                self._loop.run_until_complete(connect())
            self._started.set_result(engine)
        except BaseException as error:
            self._started.set_exception(error)
        self._loop.run_forever()

    # ------------------------------------------------------------------ handing work to the loop

    def run(
        self,
        coroutine: Coroutine[Any, Any, T],
        *,
        poll: Callable[[], None] | None = None,
        every_s: float = 0.2,
    ) -> T:
        """The coroutine's result, waited for here. `poll` is called meanwhile, every `every_s` seconds.

        Ctrl-C cancels the coroutine and waits for its clean-up before KeyboardInterrupt goes on.
        """
        work = _Work(coroutine)
        self._call(work.start, coroutine)
        try:
            while not concurrent.futures.wait((work.outcome,), every_s).done:
                if poll:
                    poll()
        except BaseException:
            self._call(work.cancel, coroutine)
            concurrent.futures.wait((work.outcome,))
            raise
        result: T = work.outcome.result()
        return result

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """`run`, awaited on the caller's own event loop; cancelling it cancels the coroutine and waits for its clean-up."""
        work = _Work(coroutine)
        self._call(work.start, coroutine)
        outcome = asyncio.wrap_future(work.outcome)
        try:
            return await asyncio.shield(outcome)
        except asyncio.CancelledError:
            self._call(work.cancel, coroutine)
            await asyncio.wait((outcome,))
            outcome.cancelled() or outcome.exception()  # seen: asyncio prints what nobody asked for
            raise

    def _call(self, callback: Callable[[], object], coroutine: Coroutine[Any, Any, Any]) -> None:
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("this engine is closed; start another one")
        self._loop.call_soon_threadsafe(callback)

    def close(self) -> None:
        """Cancels what still runs, closes tools and engine, ends the loop thread. Safe to call twice, and during start."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._cancel_all)
        concurrent.futures.wait((self._started,))  # SGLang's start cannot be cut short
        try:
            self.run(self._close_parts())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            if self._tracing:
                self._tracing.close()

    def _cancel_all(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    async def _close_parts(self) -> None:
        try:
            if self.tools:
                await self.tools.close()
        finally:
            if self._started.exception() is None:
                await self._started.result().close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Work:
    """A coroutine on its way through the loop; `outcome` is done when it has ended, its clean-up included."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._coroutine = coroutine
        self._task: asyncio.Task[Any] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._coroutine)
        self._task.add_done_callback(self._end)

    def cancel(self) -> None:
        if self._task:
            self._task.cancel()

    def _end(self, task: asyncio.Task[Any]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error:
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(task.result())


def start_engine(config: Config, model_dir: Path, log_path: Path | None) -> Engine:
    """The engine that `rollout.name` says. SGLang in process blocks until it is up."""
    rollout = config.rollout
    if rollout.name == "sglang":
        from agent.engines.sglang import start

        return start(config.verl_rollout(), model_dir, log_path=log_path).engine()
    if rollout.name == "sglang_server":
        from agent.engines.servers import SGLangServerEngine

        server = rollout.server
        return SGLangServerEngine(
            server.urls,
            config.api_key,
            max_connections=server.max_connections,
            read_timeout_s=server.timeout,
            attempts=server.max_attempts,
            wait_s=server.max_start_wait_time,
        )
    return recorded(read_trajectories(rollout.turntrace.recorded or ""))


def load_template(config: Config, model_dir: Path) -> ChatTemplate:
    """The chat template of a model folder, with the config's template arguments."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    return ChatTemplate(tokenizer, kwargs=config.rollout.turntrace.apply_chat_template_kwargs)


def loop_settings(
    config: Config, sampling: dict[str, Any], max_tokens: int | None = None
) -> LoopSettings:
    """The loop's limits as the config has them; `max_tokens` overrides the config's."""
    rollout, ours = config.rollout, config.rollout.turntrace
    return LoopSettings(
        prompt_length=rollout.prompt_length,
        response_length=rollout.response_length,
        max_model_len=config.max_model_len,
        max_tokens=max_tokens or ours.max_tokens,
        max_turns=config.max_assistant_turns,
        max_user_turns=rollout.multi_turn.max_user_turns,
        max_consecutive_invalid_calls=ours.max_consecutive_invalid_calls,
        deadline_s=ours.conversation_deadline_s,
        sampling=sampling,
    )


def make_dispatcher(config: Config, tools: ToolSet, template: ChatTemplate) -> Dispatcher:
    """The tools with the config's limits."""
    multi_turn = config.rollout.multi_turn
    limit, side = multi_turn.max_tool_response_length, multi_turn.tool_response_truncate_side
    cut = functools.partial(cut_to_tokens, template=template, limit=limit, side=side)
    return Dispatcher(tools, max_parallel_calls=multi_turn.max_parallel_calls, cut=cut)
