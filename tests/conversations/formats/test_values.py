"""Values that a format writes as text: the schema decides, JSON is strict, and only ValueError is
raised."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations.formats.format import ParameterTypes
from conversations.formats.json_values import whole_value
from conversations.formats.literals import PYTHON
from conversations.formats.values import read_value, types_of

STRING, INTEGER, OBJECT = {"type": "string"}, {"type": "integer"}, {"type": "object"}
UNION = {"anyOf": [STRING, INTEGER, {"type": "null"}]}


@pytest.mark.parametrize("text", ["7", "true", "null", "None", '{"a": 1}', "  x\n", "", '"quoted"'])
def test_a_string_is_verbatim(text: str) -> None:
    for schema in (STRING, {"enum": ["a", "b"]}, {"const": "a"}, {"type": ["string"]}):
        assert read_value(text, schema) == text


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("7", INTEGER, 7),
        (" 7\n", INTEGER, 7),
        ("-1.5e3", {"type": "number"}, -1500.0),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("None", {"type": "null"}, None),
        ('{"a": [1, null, "</x>"]}', OBJECT, {"a": [1, None, "</x>"]}),
        ("{'a': [1, None, \"it's\"]}", OBJECT, {"a": [1, None, "it's"]}),  # Seed-OSS writes repr()
        ("2", {"enum": [1, 2]}, 2),
    ],
)
def test_other_types_are_json_or_what_python_prints(text: str, schema: Any, value: object) -> None:
    read = read_value(text, schema)
    assert (read, type(read)) == (value, type(value))


def test_a_wrong_type_that_json_can_read_is_left_to_the_check_of_arguments() -> None:
    assert read_value("[1]", INTEGER) == [1]
    assert read_value('"7"', INTEGER) == "7"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("text", "text"),
        ("7", 7),
        ("null", None),
        ("None", None),
        ("7.5", "7.5"),  # no number in this union
        ('"7"', '"7"'),
        ("[1]", "[1]"),
        ("{broken", "{broken"),
    ],
)
def test_in_a_union_with_string_the_other_types_come_first(text: str, value: object) -> None:
    assert read_value(text, UNION) == value


@pytest.mark.parametrize("schema", [None, {}, True, {"$ref": "#/$defs/x"}, {"type": "odd"}])
def test_without_a_type_json_is_json_and_the_rest_is_a_string(schema: Any) -> None:
    assert read_value("A", schema) == "A"
    assert read_value('{"a": 1}', schema) == {"a": 1}
    assert read_value("True", schema) is True


def test_types_of_a_schema() -> None:
    assert types_of({"type": "string", "nullable": True}) == {"string", "null"}
    assert types_of({"oneOf": [INTEGER, {"oneOf": [STRING]}]}) == {"integer", "string"}
    assert types_of({"allOf": [{"type": ["string", "null"]}, STRING]}) == {"string"}
    assert types_of({"enum": [1, None]}) == {"integer", "number", "null"}
    shared = {"$defs": {"mode": {"enum": ["1", "2"]}, "more": {"$ref": "#/$defs/mode"}}}
    assert types_of({**shared, "$ref": "#/$defs/more"}) == {"string"}
    assert types_of({**shared, "anyOf": [{"$ref": "#/$defs/mode"}, INTEGER]}) == {
        "string",
        "integer",
    }
    assert types_of({"$ref": "http://elsewhere"}) == types_of(None)
    round_ = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    assert types_of(round_) == types_of(None)
    many = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 1000}}, "$ref": "#/$defs/a"}
    assert types_of(many) == types_of(None)
    endless: dict[str, Any] = {}
    endless["anyOf"] = [endless]
    assert types_of(endless) == types_of(None)


@pytest.mark.parametrize(
    "text",
    [
        *("", "three", "[1,", '{"a": ', "NaN", "-Infinity", "1e999", "01", "1 2", "True False"),
        *("[" * 100 + "]" * 100, "[" * 10_000, '{"a":' * 10_000, "9" * 5_000),
        *('"\\ud800"', "'\\ud800'", "'\\UFFFFFFFF'", "{'a': 1, 'a': 2}", "{1: 2}", "'open", "(1,)"),
    ],
)
def test_what_is_no_value_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ValueError, match="integer") as error:
        read_value(text, INTEGER)
    assert len(str(error.value)) < 200


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_json_and_what_python_prints_come_back(value: Any) -> None:
    assert whole_value(json.dumps(value)) == value
    assert PYTHON.read(repr(value)) == value


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="{}[]'\"\\,:1-.eE uxTrueNone\n"))
def test_no_text_raises_anything_but_value_error(text: str) -> None:
    for read in (PYTHON.read, whole_value):
        with contextlib.suppress(ValueError):
            json.dumps(read(text), allow_nan=False).encode()
    assert read_value(text, STRING) == text


def test_a_parameter_brings_the_definitions_of_its_tool() -> None:
    parameters = {
        "properties": {"mode": {"$ref": "#/$defs/mode"}, "odd": True},
        "$defs": {"mode": {"type": "string"}},
    }
    types = ParameterTypes.of([{"function": {"name": "f", "parameters": parameters}}])
    assert read_value("1", types.schema("f", "mode")) == "1"
    assert read_value("1", types.schema("f", "odd")) == 1
    assert types.schema("f", "other") is types.schema("g", "mode") is None
