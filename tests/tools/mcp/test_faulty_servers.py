"""Rules: a fault of one tool names the server and the tool; a list ends; an answer is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.base import BackendError, ToolConfigError, ToolError
from tools.registry import load_tools
from tools.toolset import ToolSet

SCRIPTED = str(Path(__file__).with_name("scripted.py"))
GOOD = {"name": "good", "inputSchema": {"type": "object", "properties": {"x": {"type": "string"}}}}


def server(lists: dict[str, Any], answer: Any = None) -> dict[str, Any]:
    script = json.dumps({"lists": lists, "answer": answer or {}})
    return {"command": "python", "args": [SCRIPTED, script]}


def load(tmp_path: Path, mcp: dict[str, Any], **entry: Any) -> ToolSet:
    path = tmp_path / "tools.yaml"
    path.write_text(yaml.safe_dump([{"mcp": mcp, **entry}]))
    return load_tools(path)


def schema(**parameters: Any) -> dict[str, Any]:
    return {"name": "bad", "inputSchema": {"type": "object", **parameters}}


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "without a schema": ({"name": "bad"}, "inputSchema"),
    "null for a schema": ({"name": "bad", "inputSchema": None}, "inputSchema"),
    "required in properties": (schema(properties={"required": ["x"]}), "properties.required"),
    "type string": ({"name": "bad", "inputSchema": {"type": "string"}}, "type object"),
    "enum null": (schema(properties={"x": {"enum": None}}), "properties.x.enum"),
    "dangling ref": (schema(properties={"x": {"$ref": "#/$defs/X"}}), "$ref"),
    "wrong type name": (schema(properties={"x": {"type": "float"}}), "'number'"),
    "description is a list": ({**GOOD, "name": "bad", "description": ["x"]}, "description"),
}


@pytest.mark.parametrize(("bad", "word"), BROKEN.values(), ids=BROKEN)
def test_one_broken_tool_of_several_is_named_and_can_be_left_out(
    tmp_path: Path, bad: dict[str, Any], word: str
) -> None:
    mcp = server({"": {"tools": [GOOD, bad]}})
    with pytest.raises(ToolConfigError) as caught:
        load(tmp_path, mcp)
    message = str(caught.value)
    assert "scripted.py" in message
    assert "tool 'bad'" in message
    assert word in message
    assert "`tools: [good]`" in message
    assert "\n" not in message
    assert list(load(tmp_path, {**mcp, "tools": ["good"]})) == ["good"]


@pytest.mark.parametrize(
    ("page", "word"),
    [
        ({"tools": [GOOD, {"inputSchema": {}}]}, "number 2 has no name"),
        ({"tools": [GOOD, GOOD]}, "two tools named 'good'"),
        ({"tools": None}, "tools must be a list"),
        ({}, "tools is missing"),
        ({"tools": ["good"]}, "tools.0"),
        ({"tools": []}, "has no tools"),
    ],
)
def test_a_broken_list_names_the_server(tmp_path: Path, page: Any, word: str) -> None:
    with pytest.raises(ToolConfigError) as caught:
        load(tmp_path, server({"": page}))
    assert "scripted.py" in str(caught.value)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cursor_that_never_advances_is_said(tmp_path: Path) -> None:
    second = {**GOOD, "name": "second"}
    pages = {"": {"tools": [GOOD], "nextCursor": "8"}, "8": {"tools": [second], "nextCursor": "8"}}
    with pytest.raises(ToolConfigError, match=r"scripted.*never ends.*'8'"):
        load(tmp_path, server(pages))
    around = {
        "": {"tools": [GOOD], "nextCursor": "a"},
        "a": {"tools": [], "nextCursor": "b"},
        "b": {"tools": [], "nextCursor": "a"},
    }
    with pytest.raises(ToolConfigError, match=r"never ends.*'a'"):
        load(tmp_path, server(around))


def test_pages_that_end_are_all_read(tmp_path: Path) -> None:
    pages = {
        "": {"tools": [GOOD], "nextCursor": "1"},
        "1": {"tools": [], "nextCursor": "2"},
        "2": {"tools": [{**GOOD, "name": "last"}], "nextCursor": None},
    }
    assert list(load(tmp_path, server(pages))) == ["good", "last"]


ANSWERS: list[tuple[Any, str]] = [
    ({"structuredContent": {"größe": 1}}, '{"größe": 1}'),
    ({"content": [], "structuredContent": {"a": [None]}}, '{"a": [null]}'),
    ({"content": [{"type": "text", "text": "t"}], "structuredContent": {"a": 1}}, "t"),
    ({"content": [{"type": "hologram", "data": "x"}]}, "[hologram, not shown]"),
    (
        {"content": [{"type": "video", "mimeType": "video/mp4"}, {"type": "text", "text": "t"}]},
        "[video/mp4, not shown]\nt",
    ),
    ({}, ""),
]


@pytest.mark.parametrize(("answer", "text"), ANSWERS)
async def test_an_answer_is_shown_whatever_it_consists_of(
    tmp_path: Path, answer: Any, text: str
) -> None:
    tools = load(tmp_path, server({"": {"tools": [GOOD]}}, answer))
    try:
        await tools["good"].tool.create("t")
        response, reward, _ = await tools["good"].tool.execute("t", {})
        assert ((response.text or ""), reward) == (text, None)
    finally:
        await tools.close()


async def test_a_structured_error_is_an_error(tmp_path: Path) -> None:
    answer = {"isError": True, "structuredContent": {"code": 5}}
    tools = load(tmp_path, server({"": {"tools": [GOOD]}}, answer))
    try:
        await tools["good"].tool.create("t")
        with pytest.raises(ToolError, match='"code": 5'):
            await tools["good"].tool.execute("t", {})
    finally:
        await tools.close()


async def test_what_is_no_answer_is_the_backends_failure_with_its_place(tmp_path: Path) -> None:
    tools = load(tmp_path, server({"": {"tools": [GOOD]}}, {"content": "text"}))
    try:
        await tools["good"].tool.create("t")
        with pytest.raises(BackendError, match=r"content .*list"):
            await tools["good"].tool.execute("t", {})
    finally:
        await tools.close()
