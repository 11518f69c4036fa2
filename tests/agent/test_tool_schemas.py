"""The model reads tools.yaml's schemas to the letter, and its calls are checked against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.loop.calls import ConversationTools, Dispatcher, PendingTurn
from agent.loop.conversation import Conversation
from agent.loop.runtime import Runtime
from conversations.formats.hermes import parse
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from tests.helpers import call, run_one, says, settings, task
from tools.base import BaseTool, ToolResponse
from tools.registry import load_tools

TRIP = """
tools:
  - class_name: tests.agent.test_tool_schemas.Anything
    config: {}
    tool_schema:
      type: function
      function:
        name: plan_trip
        description: "Plans a trip: <stops>, \\"days\\" & 'modes', in Zürich or 東京."
        strict: true
        parameters:
          type: object
          properties:
            stops:
              type: array
              minItems: 1
              items: {$ref: "#/$defs/stop"}
            mode: {type: string, enum: [walk, train, "ÖV", "null"], default: walk}
            budget:
              description: Either a number or a range.
              anyOf:
                - {type: number, exclusiveMinimum: 0}
                - type: object
                  properties: {low: {type: number}, high: {type: number, default: 1.0e+3}}
                  required: [low]
                  additionalProperties: false
              default: null
            matrix:
              type: array
              items: {type: array, items: {type: integer}, maxItems: 2}
              default: [[1, 2], []]
            leader: {$ref: "#/$defs/person"}
          required: [stops]
          additionalProperties: false
          $defs:
            stop:
              type: object
              properties:
                place:
                  type: object
                  properties: {name: {type: string, minLength: 1}, geo: {$ref: "#/$defs/geo"}}
                  required: [name]
                nights: {type: integer, minimum: 0, default: 1}
              required: [place]
            geo:
              oneOf:
                - {type: array, prefixItems: [{type: number}, {type: number}], minItems: 2}
                - {type: string, pattern: "^geo:"}
            person:
              type: object
              properties:
                name: {type: string}
                knows: {type: array, items: {$ref: "#/$defs/person"}}
              required: [name]
  - class_name: tests.agent.test_tool_schemas.Anything
    config: {}
    tool_schema:
      type: function
      function: {name: empty, description: "", parameters: {type: object, properties: {}}}
"""


class Anything(BaseTool):
    """Takes what its schema takes."""

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        return ToolResponse(json.dumps(parameters, sort_keys=True)), None, {}


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "tools.yaml"
    path.write_text(TRIP, encoding="utf-8")
    return path


def written() -> list[Any]:
    return [entry["tool_schema"] for entry in yaml.safe_load(TRIP)["tools"]]


async def test_schemas_reach_the_models_prompt_and_the_record_unchanged(
    template: ChatTemplate, yaml_file: Path
) -> None:
    """The order of keys included: models read it as an order of arguments."""
    dispatcher = Dispatcher(load_tools(yaml_file), max_parallel_calls=4, shorten=lambda text: None)
    runtime = Runtime(says(template, "No trip."), template, settings(), dispatcher)
    record = await run_one(runtime)
    prompt = template.decode(record.prompt_ids)
    shown = prompt.split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
    expected = [json.dumps(schema) for schema in written()]
    assert [json.dumps(json.loads(line)) for line in shown] == expected
    assert record.tools == written()

    conversation = Conversation(task(), 0, runtime)
    await conversation.open()
    assert [json.dumps(schema) for schema in conversation.schemas] == expected
    await conversation.close()


FINE: list[dict[str, Any]] = [
    {"stops": [{"place": {"name": "Bern"}}]},
    {
        "stops": [{"place": {"name": "Bern", "geo": [46.9, 7.4]}, "nights": 2}],
        "mode": "ÖV",
        "budget": {"low": 1},
        "matrix": [[], [1]],
    },
    {
        "stops": [{"place": {"name": "x", "geo": "geo:1,2"}}],
        "budget": 0.5,
        "leader": {"name": "A", "knows": [{"name": "B", "knows": []}]},
    },
]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, 'arguments: "stops" is a required property'),
    ({"stops": []}, "stops: [] has less than 1 item"),
    (
        {"stops": [{"place": {"name": "x"}}, {"nights": 1}]},
        'stops.1: "place" is a required property',
    ),
    ({"stops": [{"place": {"name": 7}}]}, 'stops.0.place.name: 7 is not of type "string"'),
    ({"stops": [{"place": {"name": ""}}]}, 'stops.0.place.name: "" is shorter than 1 character'),
    (
        {"stops": [{"place": {"name": "x"}, "nights": -1}]},
        "stops.0.nights: -1 is less than the minimum of 0",
    ),
    (
        {"stops": [{"place": {"name": "x", "geo": ["46", 7]}}]},
        'stops.0.place.geo: ["46",7] is not valid under any of the schemas listed in the '
        "'oneOf' keyword"
        ' (0: "46" is not of type "number"; ["46",7] is not of type "string")',
    ),
    (
        {"stops": [{"place": {"name": "x"}}], "mode": "fly"},
        'mode: "fly" is not one of ["walk", "train", "ÖV", "null"]',
    ),
    (
        {"stops": [{"place": {"name": "x"}}], "budget": {"low": "1", "top": 2}},
        'budget: {"low":"1","top":2} is not valid under any of the schemas listed in the '
        "'anyOf' keyword"
        ' ({"low":"1","top":2} is not of type "number"; low: "1" is not of type "number";'
        " Additional properties are not allowed ('top' was unexpected))",
    ),
    (
        {"stops": [{"place": {"name": "x"}}], "matrix": [[1], [1, 2.5]]},
        'matrix.1.1: 2.5 is not of type "integer"',
    ),
    (
        {
            "stops": [{"place": {"name": "x"}}],
            "leader": {"name": "A", "knows": [{"name": "B"}, {"name": None}]},
        },
        'leader.knows.1.name: null is not of type "string"',
    ),
    (
        {"stops": [{"place": {"name": "x"}}], "modes": "walk"},
        "arguments: Additional properties are not allowed ('modes' was unexpected)",
    ),
]


async def test_wrong_arguments_are_answered_with_the_field_and_the_reason(yaml_file: Path) -> None:
    dispatcher = Dispatcher(load_tools(yaml_file), max_parallel_calls=64, shorten=lambda text: None)
    tools = ConversationTools(dispatcher, {}, None)
    calls = parse(
        "".join(
            call("plan_trip", **arguments)
            for arguments in [*FINE, *(arguments for arguments, _ in WRONG)]
        )
    ).calls
    turn = PendingTurn(0, calls)
    await tools.create()
    await tools.run(turn)
    await tools.release()
    lines = turn.lines()
    fine, wrong = lines[: len(FINE)], lines[len(FINE) :]
    assert [(line.status, line.response) for line in fine] == [
        ("ok", json.dumps(arguments, sort_keys=True)) for arguments in FINE
    ]
    assert [line.response for line in wrong] == [
        f"Error: invalid arguments for plan_trip: {said}" for _, said in WRONG
    ]
    assert {line.status for line in wrong} == {"invalid_arguments"}
    assert all(
        line.attempts == [] and line.arguments == arguments
        for line, (arguments, _) in zip(wrong, WRONG, strict=True)
    )


async def test_all_that_is_wrong_is_said_at_once(yaml_file: Path) -> None:
    errors = load_tools(yaml_file)["plan_trip"].validate(
        {"stops": [{"place": {}}, 3], "mode": 1, "matrix": 2}
    )
    assert errors == [
        'matrix: 2 is not of type "array"',
        'mode: 1 is not of type "string"',
        'mode: 1 is not one of ["walk", "train", "ÖV", "null"]',
        'stops.0.place: "name" is a required property',
        'stops.1: 3 is not of type "object"',
    ]


async def test_the_model_reads_what_was_wrong(smollm2: ChatTemplate, yaml_file: Path) -> None:
    dispatcher = Dispatcher(load_tools(yaml_file), max_parallel_calls=4, shorten=lambda text: None)
    engine = says(smollm2, call("plan_trip", stops=[{"place": {"name": 7}}]), "Sorry.")
    record: Trajectory = await run_one(Runtime(engine, smollm2, settings(), dispatcher))
    shown = smollm2.decode(record.response_ids)
    said = 'Error: invalid arguments for plan_trip: stops.0.place.name: 7 is not of type "string"'
    assert f"<tool_response>\n{said}\n</tool_response>" in shown
    assert [line.status for line in record.tool_calls] == ["invalid_arguments"]
