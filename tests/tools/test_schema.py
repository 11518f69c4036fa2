"""Rules: a schema is read in its own dialect; what no call can meet is refused; what models will
stumble over is a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.base import ToolConfigError
from tools.registry import load_tools


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_yaml(document: Any) -> Path:
        path = tmp_path / "tools.yaml"
        text = document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
        path.write_text(text)
        return path

    return write_yaml


def entry(schema: dict[str, Any]) -> dict[str, Any]:
    return {"class_name": "tools.gsm8k.Gsm8kTool", "tool_schema": schema}


def schema_with(**parameters: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": "f", "description": "", "parameters": parameters},
    }


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("float", "did you mean 'number'"),
        ("dict", "did you mean 'object'"),
        ("str", "did you mean 'string'"),
        ("int", "did you mean 'integer'"),
        ("Boolean", "did you mean 'boolean'"),
        ("tuple", "did you mean 'array'"),
        ("objekt", "did you mean 'object'"),
        ("any", "leave type out"),
        ("date-time", "known are array, boolean, integer, null, number, object, string"),
    ],
)
def test_a_wrong_name_of_a_type_gets_the_right_one(write: Any, name: str, meant: str) -> None:
    inside = schema_with(properties={"list": {"type": "array", "items": {"type": ["null", name]}}})
    with pytest.raises(ToolConfigError) as caught:
        load_tools(write([entry(inside)]))
    place = "entry 0: tool_schema.function.parameters.properties.list.items.type: "
    assert place in str(caught.value)
    assert f"{name!r}" in str(caught.value)
    assert meant in str(caught.value)


DRAFT_7 = "http://json-schema.org/draft-07/schema#"
PAIR = {"type": "array", "items": [{"type": "number"}, {"type": "string"}]}


@pytest.mark.parametrize("dialect", [{"$schema": DRAFT_7}, {}])
def test_the_dialect_that_a_schema_names_is_the_one_it_is_read_in(
    write: Any, dialect: dict[str, Any]
) -> None:
    """A tuple is a list under `items` up to draft 2019-09; it is read without `$schema` as well."""
    schema = schema_with(**dialect, type="object", properties={"pair": PAIR})
    (loaded,) = load_tools(write([entry(schema)])).values()
    assert loaded.schema == schema
    assert loaded.validate({"pair": [1, "a"]}) == []
    (problem,) = loaded.validate({"pair": [1, 2]})
    assert "pair.1" in problem


def test_a_dialect_that_is_not_known_is_refused(write: Any) -> None:
    schema = schema_with(**{"$schema": "https://example.com/mine"}, type="object")
    with pytest.raises(ToolConfigError, match=r"https://example\.com/mine"):
        load_tools(write([entry(schema)]))
    newest = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    with pytest.raises(ToolConfigError, match=r"properties\.pair\.items"):
        load_tools(write([entry(schema_with(**newest, properties={"pair": PAIR}))]))


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, [None, 1], ["1"]),
        ({"type": ["integer", "string"]}, [None, 1, "1"], [1.5]),
        ({"type": "string", "enum": ["a", "b"]}, [None, "a"], ["c"]),
        ({"$ref": "#/$defs/A"}, [None, "a"], [1]),
        ({"anyOf": [{"type": "string"}]}, [None, "a"], [1]),
        ({"const": 5}, [None, 5], [6]),
        ({}, [None, 1, "a"], []),
    ],
)
def test_nullable_allows_null_and_nothing_else(
    write: Any, schema: dict[str, Any], good: list[Any], bad: list[Any]
) -> None:
    """OpenAPI's word, which the schemas have that transformers makes of Optional."""
    places = {
        "top": {**schema, "nullable": True},
        "list": {"type": "array", "items": {**schema, "nullable": True}},
        "off": {**schema, "nullable": False},
    }
    written = schema_with(properties=places, **{"$defs": {"A": {"type": "string"}}})
    (loaded,) = load_tools(write([entry(written)])).values()
    assert loaded.schema == written
    for value in good:
        assert loaded.validate({"top": value, "list": [value]}) == []
    for value in bad:
        assert len(loaded.validate({"top": value, "list": [value]})) == 2
    assert bool(loaded.validate({"off": None})) == bool(schema)


def test_nullable_is_a_property_like_any_other(write: Any) -> None:
    schema = schema_with(
        properties={"nullable": {"type": "boolean"}, "x": {"enum": [{"nullable": True}]}}
    )
    (loaded,) = load_tools(write([entry(schema)])).values()
    assert loaded.validate({"nullable": True, "x": {"nullable": True}}) == []
    assert loaded.validate({"nullable": None}) != []
    assert loaded.validate({"x": None}) != []


@pytest.mark.parametrize("text", ["[DE, NO, SE]", "[yes, no]", "[a, on]"])
def test_an_enum_of_yaml_booleans_for_a_string_is_refused(write: Any, text: str) -> None:
    document = f"""
- class_name: tools.gsm8k.Gsm8kTool
  tool_schema:
    type: function
    function: {{name: f, parameters: {{properties: {{c: {{type: string, enum: {text}}}}}}}}}
"""
    with pytest.raises(ToolConfigError, match=r"properties\.c\.enum\.\d .*quotes"):
        load_tools(write(document))
    quoted = (
        document.replace("NO", "'NO'").replace("yes, no", "'yes', 'no'").replace("on]", "'on']")
    )
    assert load_tools(write(quoted))["f"].warnings == ()


def test_a_required_name_that_may_not_be_given_is_refused(write: Any) -> None:
    schema = schema_with(
        properties={"solution": {"type": "string"}},
        required=["solutoin"],
        additionalProperties=False,
    )
    with pytest.raises(ToolConfigError, match=r"required names 'solutoin'.*'solution'"):
        load_tools(write([entry(schema)]))


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        (
            {"properties": {"solution": {}}, "required": ["code"]},
            "parameters.required names 'code'",
        ),
        (
            {"properties": {"a": {"type": "integer", "default": None}}},
            "parameters.properties.a.default is null, but the type is integer",
        ),
        (
            {"properties": {"a": {"items": {"type": ["string", "null"], "default": 5}}}},
            "parameters.properties.a.items.default is 5, but the type is string or null",
        ),
        (
            {"properties": {"a": {"type": "string", "enum": ["1", 2]}}},
            "parameters.properties.a.enum holds 2",
        ),
        (
            {"properties": {"a": {"enum": ["auto", True]}}},
            "parameters.properties.a.enum holds true",
        ),
    ],
)
def test_what_models_will_stumble_over_is_a_warning(
    write: Any, schema: dict[str, Any], word: str
) -> None:
    tools = load_tools(write([entry(schema_with(**schema))]))
    (warning,) = tools.warnings
    assert warning.startswith("tool ")
    assert word in warning


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "integer", "nullable": True, "default": None}}},
        {"properties": {"a": {"type": "number", "default": 1}}},
        {"properties": {"a": {"type": "integer", "default": 2.0}}},
        {"properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"properties": {"a": {}}, "patternProperties": {"^x": {}}, "required": ["x1"]},
        {"properties": {"default": {"type": "integer"}}, "required": ["default"]},
        {"properties": {"a": {"const": {"type": "integer", "default": None}}}},
        {"required": ["a"]},
    ],
)  # fmt: skip
def test_what_models_can_meet_is_no_warning(write: Any, schema: dict[str, Any]) -> None:
    assert load_tools(write([entry(schema_with(**schema))])).warnings == []
