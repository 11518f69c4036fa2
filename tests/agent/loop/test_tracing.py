"""Spans as an OTLP collector receives them: one tree a conversation, by the GenAI conventions."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from agent.errors import ConfigError, EngineError
from agent.loop.batch import run_tasks
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from agent.loop.tracing import ENDPOINTS, PROTOCOLS, Tracing, start_tracing
from conversations.template import ChatTemplate
from tests.agent.loop.test_users import asks, patient
from tests.helpers import Toy, call, runtime, says, task

Attributes = dict[str, Any]


class Collector:
    """An OTLP/HTTP endpoint that keeps the spans it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.services |= {
                        item.value.string_value
                        for item in resource.resource.attributes
                        if item.key == "service.name"
                    }
                    collector.spans += [
                        span for scope in resource.scope_spans for span in scope.spans
                    ]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                """Quiet."""

        return Handler

    def named(self, name: str) -> list[Attributes]:
        return [attributes(span) for span in self.spans if span.name == name]


def attributes(span: Span) -> Attributes:
    return {item.key: _value(item.value) for item in span.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return (
        [_value(item) for item in value.array_value.values]
        if kind == "array_value"
        else getattr(value, kind)
    )


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    yield collector
    collector.server.shutdown()
    thread.join()
    collector.server.server_close()


@pytest.fixture
def tracing(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Tracing:
    for name in (*ENDPOINTS, *PROTOCOLS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    started = start_tracing()
    assert started
    return started


def run(tracing: Tracing, shared: Runtime, the_task: Task | None = None) -> None:
    asyncio.run(run_tasks([the_task or task("t")], dataclasses.replace(shared, observer=tracing)))
    tracing.close()


def test_a_conversation_is_one_tree_of_spans(
    tracing: Tracing, collector: Collector, template: ChatTemplate
) -> None:
    turn = call("toy", do="say", text="42") + "\n" + call("nothing")
    run(
        tracing,
        runtime(
            template,
            says(template, turn, "It is 42."),
            [Toy()],
            sampling={"temperature": 0.5, "top_k": 7},
        ),
    )
    assert collector.services == {"turntrace"}
    (root,) = [span for span in collector.spans if span.name == "invoke_agent turntrace"]
    assert {span.trace_id for span in collector.spans} == {root.trace_id}
    assert {span.parent_span_id for span in collector.spans if span is not root} == {root.span_id}
    assert [
        span.name for span in sorted(collector.spans, key=lambda span: span.start_time_unix_nano)
    ] == [
        "invoke_agent turntrace",
        "chat scripted",
        "execute_tool toy",
        "execute_tool nothing",
        "chat scripted",
    ]
    assert attributes(root) | {"gen_ai.usage.output_tokens": 0} == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "turntrace",
        "gen_ai.conversation.id": "t-0",
        "gen_ai.usage.output_tokens": 0,
        "turntrace.task.id": "t",
        "turntrace.sample": 0,
        "turntrace.num_turns": 2,
        "turntrace.stop_reason": "stop",
    }


def test_a_generation_says_what_was_asked_and_what_it_cost(
    tracing: Tracing, collector: Collector, template: ChatTemplate
) -> None:
    run(
        tracing,
        runtime(
            template,
            says(template, "Hello."),
            sampling={"temperature": 0.5, "top_k": 7},
            max_tokens=99,
        ),
    )
    (chat,) = collector.named("chat scripted")
    assert {
        key: chat[f"gen_ai.request.{key}"]
        for key in ("model", "temperature", "top_k", "max_tokens")
    } == {
        "model": "scripted",
        "temperature": 0.5,
        "top_k": 7,
        "max_tokens": 99,
    }
    assert chat["gen_ai.response.finish_reasons"] == ["stop"]
    assert chat["gen_ai.usage.output_tokens"] == len(template.encode("Hello.")) + 1
    assert chat["gen_ai.usage.input_tokens"] > 0
    assert len(chat["gen_ai.response.id"]) == 32


def test_failures_have_an_error_type_and_no_content(
    tracing: Tracing, collector: Collector, template: ChatTemplate
) -> None:
    turn = (
        call("toy", do="say", text="s3cret")
        + call("toy", do="tool_error", text="s3cret")
        + "<tool_call>{s3cret</tool_call>"
    )
    run(
        tracing, runtime(template, says(template, turn, EngineError("the engine is gone")), [Toy()])
    )
    failed = {
        span.name: attributes(span)["error.type"]
        for span in collector.spans
        if span.status.code == Status.STATUS_CODE_ERROR
    }
    assert failed["chat scripted"] == "EngineError"
    assert failed["invoke_agent turntrace"] == "engine_error"
    statuses = [
        span["turntrace.tool.status"]
        for span in collector.named("execute_tool toy") + collector.named("execute_tool ")
    ]
    assert statuses == ["ok", "tool_error", "malformed"]
    assert not any("s3cret" in str(span) for span in collector.spans)


def test_the_rewards_of_a_user_are_part_of_the_reward(
    tracing: Tracing, collector: Collector, smollm2: ChatTemplate
) -> None:
    shared = runtime(smollm2, says(smollm2, "It is 41.", "It is 42."), [Toy(calc_reward="reward")])
    run(tracing, dataclasses.replace(shared, interactions=patient()[0]), asks())
    (root,) = collector.named("invoke_agent turntrace")
    assert root["turntrace.reward"] == 2.0


class Broken:
    """An observer that fails at every place named."""

    def __init__(self, *places: str) -> None:
        self._places = places

    @contextmanager
    def _observe(self, *args: Any) -> Iterator[Any]:
        self._may_fail("begin")
        yield lambda result: self._may_fail("result")
        self._may_fail("end")

    conversation = generation = tool_call = _observe

    def _may_fail(self, place: str) -> None:
        if place in self._places:
            raise TypeError(f"a bug at the {place}")


@pytest.mark.parametrize("place", ["begin", "result", "end"])
def test_an_observers_bug_changes_no_record(smollm2: ChatTemplate, place: str) -> None:
    records = []
    for observer in (None, Broken(place)):
        engine = says(smollm2, call("toy", do="say", text="42"), "It is 42.")
        shared = runtime(smollm2, engine, [Toy(calc_reward="reward")])
        shared = dataclasses.replace(shared, observer=observer)
        progress = asyncio.run(run_tasks([task("t")], shared, on_done=records.append))
        assert progress.done == 1
    first, second = records
    assert (second.response_ids, second.stop_reason, second.reward, second.error) == (
        first.response_ids,
        "stop",
        1.0,
        None,
    )
    assert [line.status for line in second.tool_calls] == ["ok"]


def test_without_an_endpoint_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert start_tracing() is None


def test_a_protocol_that_is_not_spoken_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match=r"'grpc'.*http/protobuf"):
        start_tracing()


def test_an_endpoint_that_does_not_answer_costs_one_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    started = start_tracing()
    assert started
    with started.span("chat", "model", {}):
        pass
    started.close()
    assert capsys.readouterr().err.count("note: traces are not arriving") == 1
