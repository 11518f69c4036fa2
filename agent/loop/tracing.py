"""OpenTelemetry spans of a run: `invoke_agent` a conversation, `chat` a turn, `execute_tool` a tool call.

Off unless the environment names an OTLP endpoint (`OTEL_EXPORTER_OTLP_ENDPOINT` or `..._TRACES_ENDPOINT`); then the
engine and the dispatcher are wrapped at a run's start, so the loop itself knows nothing of it and an untraced run pays
nothing. Names and attributes are those of the GenAI semantic conventions 1.41 (opentelemetry.io/docs/specs/semconv/gen-ai).
Prompts, arguments and answers are never in a span: they are in the record, which each span names by its id.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agent.engines.engine import Engine, Generation, SamplingParams
from agent.errors import ConfigError
from conversations.trajectory import ToolCallRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from agent.loop.loop import Conversation, Runtime

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

_REQUEST = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_new_tokens": "max_tokens",
}
"""SGLang's sampling params as the conventions name them, under `gen_ai.request.`"""

_LOGGER = logging.getLogger("opentelemetry")


def start_tracing() -> Tracing | None:
    """The run's tracing; None where the environment names no endpoint. Raises ConfigError for a protocol we do not speak."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    protocol = next(filter(None, map(os.environ.get, PROTOCOLS)), "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigError(
            f"{PROTOCOLS[1]} is {protocol!r}; traces are sent as http/protobuf only (port 4318 by convention)"
        )
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {} if "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: "turntrace"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class _FirstWarning(logging.Handler):
    """Says once that traces do not arrive; the exporter would say so at every try."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._said:
            self._said = True
            print(f"note: traces are not arriving: {record.getMessage()[:300]}", file=sys.stderr)


class Tracing:
    """Makes the spans. `provider` is any SDK TracerProvider; it is shut down, its spans sent, by `close`."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("turntrace")
        self._warning = _FirstWarning()
        _LOGGER.addHandler(self._warning)

    @contextmanager
    def span(
        self, operation: str, subject: str, attributes: dict[str, Any], *, client: bool = False
    ) -> Iterator[Span]:
        """A span that is current inside the block; what is raised there is its `error.type`."""
        from opentelemetry.trace import SpanKind

        with self._tracer.start_as_current_span(
            f"{operation} {subject}",
            kind=SpanKind.CLIENT if client else SpanKind.INTERNAL,
            attributes={"gen_ai.operation.name": operation, **attributes},
            record_exception=False,
        ) as span:
            try:
                yield span
            except (Exception, asyncio.CancelledError) as error:
                fail(span, type(error).__name__)
                raise

    @contextmanager
    def conversation(self, conversation: Conversation) -> Iterator[None]:
        """`invoke_agent` around one conversation, with what became of it."""
        attributes = {
            "gen_ai.agent.name": "turntrace",
            "gen_ai.conversation.id": f"{conversation.task.id}-{conversation.sample}",
            "turntrace.task.id": conversation.task.id,
            "turntrace.sample": conversation.sample,
        }
        with self.span("invoke_agent", "turntrace", attributes) as span:
            try:
                yield
            finally:
                span.set_attributes(_outcome(conversation))
                if conversation.infra_error:
                    fail(span, conversation.stop_reason or "infra_error", conversation.error)

    def traced(self, runtime: Runtime) -> Runtime:
        """The runtime with spans around its conversations, generations and tool calls."""
        if runtime.dispatcher:
            runtime.dispatcher.around = self.tool_call
        return replace(runtime, engine=_TracedEngine(runtime.engine, self), tracing=self)

    async def tool_call(
        self, answer: Callable[[], Coroutine[Any, Any, None]], line: ToolCallRecord
    ) -> None:
        """`execute_tool` around the answering of one call; `line` is its line in the ledger."""
        attributes = {
            "gen_ai.tool.name": line.name,
            "gen_ai.tool.call.id": line.call_id,
            "gen_ai.tool.type": "function",
        }
        with self.span("execute_tool", line.name, attributes) as span:
            await answer()
            span.set_attributes(
                {
                    "turntrace.tool.status": line.status,
                    "turntrace.tool.attempts": len(line.attempts),
                }
            )
            if line.status != "ok":
                fail(span, line.status)

    def close(self) -> None:
        """Sends what is left, for a few seconds at most."""
        self._provider.shutdown()
        _LOGGER.removeHandler(self._warning)


def fail(span: Span, error_type: str, description: str | None = None) -> None:
    """Marks the span as failed, as the conventions on errors have it."""
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", error_type)
    span.set_status(Status(StatusCode.ERROR, description))


def _outcome(conversation: Conversation) -> dict[str, Any]:
    sampled = sum(turn.end - turn.start for turn in conversation.turns)
    outcome = {
        "turntrace.stop_reason": conversation.stop_reason or "cancelled",
        "turntrace.num_turns": len(conversation.turns),
        "gen_ai.usage.output_tokens": sampled,
    }
    return outcome | (
        {"turntrace.reward": sum(conversation.rewards.values())} if conversation.rewards else {}
    )


class _TracedEngine:
    """An engine, and a span around each of its generations."""

    def __init__(self, engine: Engine, tracing: Tracing) -> None:
        self._engine = engine
        self._tracing = tracing
        self.describe = engine.describe
        self.abort = engine.abort
        self.close = engine.close
        said = engine.describe()
        self._model = str(said.get("model") or said.get("name"))
        self._attributes = {
            "gen_ai.provider.name": str(said.get("name")),
            "gen_ai.request.model": self._model,
        }

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        asked = {
            f"gen_ai.request.{name}": sampling[key]
            for key, name in _REQUEST.items()
            if key in sampling
        }
        attributes = {
            **self._attributes,
            **asked,
            "gen_ai.response.id": request_id,
            "gen_ai.usage.input_tokens": len(prompt_ids),
        }
        with self._tracing.span("chat", self._model, attributes, client=True) as span:
            generation = await self._engine.generate(prompt_ids, sampling, request_id=request_id)
            span.set_attribute("gen_ai.response.finish_reasons", [generation.finish_reason])
            span.set_attribute("gen_ai.usage.output_tokens", len(generation.token_ids))
            if generation.cached_tokens is not None:
                span.set_attribute("gen_ai.usage.cache_read.input_tokens", generation.cached_tokens)
            return generation
