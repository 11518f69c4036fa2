"""OpenTelemetry spans of a run: `invoke_agent`, `chat` and `execute_tool`.

They stand for a conversation, a turn and a call.

Off unless the environment names an OTLP endpoint (`OTEL_EXPORTER_OTLP_ENDPOINT` or
`..._TRACES_ENDPOINT`). `Tracing` is an `Observer`: it changes nothing, and a run without it pays
nothing. Names and attributes are those of the GenAI semantic conventions 1.41
(opentelemetry.io/docs/specs/semconv/gen-ai). Prompts, arguments and responses are never in a span:
they are in the record, which each span names by its id.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from agent.engines.engine import Generation
from agent.errors import ConfigError
from agent.loop.ledger import CallResult
from conversations.trajectory import Trajectory

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

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
    """The run's tracing; None if the environment names no endpoint.

    Raises ConfigError for a protocol other than http/protobuf.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    protocol = next(filter(None, map(os.environ.get, PROTOCOLS)), "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigError(
            f"{PROTOCOLS[1]} is {protocol!r}; traces are sent as http/protobuf only "
            "(port 4318 by convention)"
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
    """Prints once that traces do not arrive; the exporter would log it at every attempt."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._said:
            self._said = True
            print(f"note: traces are not arriving: {record.getMessage()[:300]}", file=sys.stderr)


class Tracing:
    """Makes the spans. `provider` is an SDK TracerProvider; `close` sends its spans and ends it."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("turntrace")
        self._warning = _FirstWarning()
        _LOGGER.addHandler(self._warning)

    @contextmanager
    def span(
        self, operation: str, subject: str, attributes: dict[str, Any], *, client: bool = False
    ) -> Iterator[Span]:
        """A span that is current in the block; an exception raised there is its `error.type`."""
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
    def conversation(self, task_id: str, sample: int) -> Iterator[Callable[[Trajectory], None]]:
        """`invoke_agent` around one conversation; its result is how it ended."""
        attributes = {
            "gen_ai.agent.name": "turntrace",
            "gen_ai.conversation.id": f"{task_id}-{sample}",
            "turntrace.task.id": task_id,
            "turntrace.sample": sample,
        }
        with self.span("invoke_agent", "turntrace", attributes) as span:

            def tell(trajectory: Trajectory) -> None:
                span.set_attributes(_outcome(trajectory))
                if trajectory.infra_error:
                    fail(span, trajectory.stop_reason, trajectory.error)

            yield tell

    @contextmanager
    def generation(
        self,
        engine: Mapping[str, Any],
        request_id: str,
        prompt_tokens: int,
        sampling: Mapping[str, Any],
    ) -> Iterator[Callable[[Generation], None]]:
        """`chat` around one generation; its result is what was sampled."""
        model = str(engine.get("model") or engine.get("name"))
        params = {
            f"gen_ai.request.{name}": sampling[key]
            for key, name in _REQUEST.items()
            if key in sampling
        }
        attributes = {
            "gen_ai.provider.name": str(engine.get("name")),
            "gen_ai.request.model": model,
            **params,
            "gen_ai.response.id": request_id,
            "gen_ai.usage.input_tokens": prompt_tokens,
        }
        with self.span("chat", model, attributes, client=True) as span:

            def tell(generation: Generation) -> None:
                span.set_attribute("gen_ai.response.finish_reasons", [generation.finish_reason])
                span.set_attribute("gen_ai.usage.output_tokens", len(generation.token_ids))
                if generation.cached_tokens is not None:
                    key = "gen_ai.usage.cache_read.input_tokens"
                    span.set_attribute(key, generation.cached_tokens)

            yield tell

    @contextmanager
    def tool_call(self, call_id: str, name: str) -> Iterator[Callable[[CallResult], None]]:
        """`execute_tool` around the answering of one call; its result is how the call ended."""
        attributes = {
            "gen_ai.tool.name": name,
            "gen_ai.tool.call.id": call_id,
            "gen_ai.tool.type": "function",
        }
        with self.span("execute_tool", name, attributes) as span:

            def tell(result: CallResult) -> None:
                span.set_attribute("turntrace.tool.status", result.status)
                span.set_attribute("turntrace.tool.attempts", len(result.attempts))
                if result.status != "ok":
                    fail(span, result.status)

            yield tell

    def close(self) -> None:
        """Sends the remaining spans, for a few seconds at most."""
        self._provider.shutdown()
        _LOGGER.removeHandler(self._warning)


def fail(span: Span, error_type: str, description: str | None = None) -> None:
    """Marks the span as failed, as the conventions on recording errors say."""
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", error_type)
    span.set_status(Status(StatusCode.ERROR, description))


def _outcome(trajectory: Trajectory) -> dict[str, Any]:
    outcome: dict[str, Any] = {
        "turntrace.stop_reason": trajectory.stop_reason,
        "turntrace.num_turns": trajectory.num_turns,
        "gen_ai.usage.output_tokens": sum(turn.end - turn.start for turn in trajectory.turns),
    }
    if trajectory.reward is not None:
        outcome["turntrace.reward"] = trajectory.reward
    return outcome
