"""Rules: a function's hints and docstring are its schema; a hung call blocks no other; ToolError is
for the model."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import threading
import time
from typing import Any, Literal, NotRequired

import numpy as np
import pydantic
import pytest
from typing_extensions import TypedDict  # pydantic reads typing's from Python 3.12 on

from tools.base import ToolConfigError, ToolError, ToolResponse
from tools.function import FunctionTool, tool
from tools.toolset import loaded_tool


class Point(pydantic.BaseModel):
    x: float
    y: float = 0.0


@tool
def weather(
    city: str,
    unit: Literal["C", "F"] = "C",
    days: list[int] | None = None,
    where: Point | None = None,
) -> str:
    """Tells the weather.

    Rain and shine.

    Args:
        city: The city, by its
            full name.
        unit: Of the temperature.
    """
    return f"{city} {unit} {days} {where.x if where else None}"


async def text(function: FunctionTool, **arguments: Any) -> str | None:
    return (await function.execute("t", arguments))[0].text


def test_the_schema_comes_from_hints_and_docstring() -> None:
    function = weather.tool_schema["function"]
    assert (function["name"], function["description"]) == (
        "weather",
        "Tells the weather.\n\nRain and shine.",
    )
    parameters = function["parameters"]
    assert parameters["properties"]["city"] == {
        "type": "string",
        "description": "The city, by its full name.",
    }
    assert parameters["properties"]["unit"] == {
        "default": "C",
        "enum": ["C", "F"],
        "type": "string",
        "description": "Of the temperature.",
    }
    assert parameters["properties"]["days"]["anyOf"][0] == {
        "type": "array",
        "items": {"type": "integer"},
    }
    assert parameters["$defs"]["Point"]["required"] == ["x"]
    assert (parameters["required"], parameters["additionalProperties"]) == (["city"], False)


def test_it_is_still_the_function() -> None:
    assert weather("Oslo") == "Oslo C None None"
    assert weather.__doc__ is not None
    assert weather.__doc__.startswith("Tells")


async def test_arguments_arrive_as_the_hints_say() -> None:
    assert await text(weather, city="Oslo", days=[1], where={"x": 2}) == "Oslo C [1] 2.0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "city: Field required"),
        ({"city": "O", "unit": "K"}, "unit: Input should be 'C' or 'F'"),
        ({"city": "O", "zip": 1}, "zip: Extra"),
    ],
)
async def test_wrong_arguments_are_told_to_the_model(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ToolError, match=said):
        await weather.execute("t", arguments)


async def test_results_become_text() -> None:
    assert await text(tool(lambda: {"a": [1, None]})) == '{"a":[1,null]}'
    assert await text(tool(lambda: Point(x=1))) == '{"x":1.0,"y":0.0}'
    assert await text(tool(lambda: None)) == "null"
    assert await tool(lambda: (ToolResponse("x"), 0.5, {"n": 1})).execute("t", {}) == (
        ToolResponse("x"),
        0.5,
        {"n": 1},
    )
    assert await tool(lambda: ToolResponse("x")).execute("t", {}) == (ToolResponse("x"), None, {})
    assert await tool(lambda: ("x", 0.5, {"n": 1})).execute("t", {}) == (
        ToolResponse("x"),
        0.5,
        {"n": 1},
    )
    assert await tool(lambda: ("x", None, {})).execute("t", {}) == (ToolResponse("x"), None, {})
    assert await text(tool(lambda: ("x", 0.5, [1]))) == '["x",0.5,[1]]'


async def test_numbers_and_arrays_become_json() -> None:
    assert await text(tool(lambda: np.float32(0.5))) == "0.5"
    assert (
        await text(tool(lambda: {"ids": np.arange(3), "n": np.int64(7)})) == '{"ids":[0,1,2],"n":7}'
    )


@pytest.mark.parametrize(
    ("result", "kind"), [(object(), "object"), ([object()], "list"), (b"\xff", "bytes")]
)
async def test_what_has_no_json_form_is_named(result: object, kind: str) -> None:
    with pytest.raises(TypeError, match=f"returned {kind}"):
        await text(tool(lambda: result))


async def test_async_functions_run_in_the_loop() -> None:
    @tool(ends_conversation=True, timeout_s=5)
    async def whoami() -> str:
        await asyncio.sleep(0)
        return threading.current_thread().name

    assert await text(whoami) == threading.current_thread().name
    assert whoami.config == {"ends_conversation": True, "timeout_s": 5}


async def test_names_that_pydantic_reserves_are_arguments_too() -> None:
    def echo(schema: str, copy: int, _x: int = 1) -> str:
        return f"{schema} {copy} {_x}"

    assert await text(tool(echo), schema="s", copy=2, _x=3) == "s 2 3"


async def test_many_hung_calls_take_no_thread_from_the_next() -> None:
    release = threading.Event()

    @tool
    def hang() -> str:
        release.wait(30)
        return "late"

    hung = [asyncio.create_task(hang.execute("t", {})) for _ in range(100)]
    await asyncio.sleep(0)
    assert await text(weather, city="Oslo") == "Oslo C None None"
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "tool-hang")
    for task in hung:
        task.cancel()
    assert all(
        isinstance(result, asyncio.CancelledError)
        for result in await asyncio.gather(*hung, return_exceptions=True)
    )
    release.set()


async def test_the_loop_runs_on_while_a_function_blocks() -> None:
    ticks = 0

    @tool
    def block() -> str:
        time.sleep(0.2)
        return "done"

    call = asyncio.create_task(block.execute("t", {}))
    while not call.done():
        ticks += 1
        await asyncio.sleep(0.01)
    assert ticks > 3


def test_a_call_that_outlives_its_loop_ends_quietly() -> None:
    release = threading.Event()

    @tool
    def hang() -> None:
        release.wait(30)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(hang.execute("t", {}), 0.01)

    asyncio.run(main())
    release.set()
    for thread in threading.enumerate():
        if thread.name == "tool-hang":
            thread.join(5)  # An exception in it would fail the test through pytest's thread hook.


async def test_exceptions_and_context_cross_the_thread() -> None:
    trajectory: contextvars.ContextVar[str] = contextvars.ContextVar("trajectory")

    @tool
    def fail(how: str) -> str:
        if how == "context":
            return trajectory.get()
        raise {"tool": ToolError("no such city"), "stop": StopIteration(), "exit": SystemExit(1)}[
            how
        ]

    trajectory.set("t7")
    assert await text(fail, how="context") == "t7"
    with pytest.raises(ToolError, match="no such city"):
        await fail.execute("t", {"how": "tool"})
    with pytest.raises(RuntimeError, match="SystemExit"):
        await fail.execute("t", {"how": "exit"})
    with pytest.raises(RuntimeError):
        await fail.execute("t", {"how": "stop"})


def test_what_cannot_be_a_tool_is_refused_by_name() -> None:
    def rest(*args: int) -> None: ...

    def positional(a: int, /) -> None: ...

    def unknown(a: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    def opaque(a: threading.Event) -> None: ...

    for function, said in [
        (rest, r"\*args"),
        (positional, "by name"),
        (unknown, "Missing"),
        (opaque, "Event"),
    ]:
        with pytest.raises(ToolConfigError, match=said):
            tool(function)


@dataclasses.dataclass
class Node:
    """A node."""

    name: str
    children: list[Node] = dataclasses.field(default_factory=list)


class Order(pydantic.BaseModel):
    node: Node
    amount: int = pydantic.Field(description="How many.", ge=1)


class Options(TypedDict):
    exact: bool
    note: NotRequired[str]


async def test_nested_types_are_described_and_built() -> None:
    def place(
        order: Order,
        options: Options,
        mode: Literal["a", "b"] | None = None,
        more: list[Order] | None = None,
    ) -> Any:
        return [
            type(order.node).__name__,
            [child.name for child in order.node.children],
            options,
            mode,
            more and more[0].amount,
        ]

    loaded = loaded_tool(FunctionTool(place))
    parameters = loaded.schema["function"]["parameters"]
    assert parameters["properties"]["order"] == {"$ref": "#/$defs/Order"}
    assert parameters["$defs"]["Order"] == {
        "type": "object",
        "properties": {
            "node": {"$ref": "#/$defs/Node"},
            "amount": {"type": "integer", "description": "How many.", "minimum": 1},
        },
        "required": ["node", "amount"],
    }
    assert parameters["$defs"]["Node"]["properties"]["children"] == {
        "type": "array",
        "items": {"$ref": "#/$defs/Node"},
    }
    assert parameters["$defs"]["Options"]["required"] == ["exact"]
    assert parameters["properties"]["mode"] == {
        "anyOf": [{"type": "string", "enum": ["a", "b"]}, {"type": "null"}],
        "default": None,
    }
    order = {"node": {"name": "x", "children": [{"name": "y"}]}, "amount": 2}
    given = {"order": order, "options": {"exact": True}, "more": [order]}
    assert loaded.validate(given) == []
    assert (await loaded.tool.execute("t", given))[0].text == '["Node",["y"],{"exact":true},null,2]'
    order["amount"] = 0
    assert loaded.validate({**given, "more": None}) == [
        "order.amount: 0 is less than the minimum of 1"
    ]


def test_an_object_that_is_no_function_is_refused_in_one_line() -> None:
    with pytest.raises(ToolConfigError, match="partial: "):
        FunctionTool(functools.partial(print, 1))


@pytest.mark.parametrize(
    ("returned", "answer"),
    [
        (("good", 1.0), ("good", 1.0, {})),
        (("good", 1), ("good", 1.0, {})),
        (("good", np.float32(0.5)), ("good", 0.5, {})),
        (("good", None), ("good", None, {})),
        (("good", None, None), ("good", None, {})),
        (("good", 0.0, {"n": 1}), ("good", 0.0, {"n": 1})),
        (({"a": 1}, 1.0, {}), ('{"a":1}', 1.0, {})),
        (({"a": 1}, 1.0), ('{"a":1}', 1.0, {})),
        ((ToolResponse("x"), 2), ("x", 2.0, {})),
        (({"a": 1}, None, {"n": 1}), ('{"a":1}', None, {"n": 1})),
    ],
    ids=repr,
)
async def test_verls_shapes_of_an_answer_leak_no_reward_into_the_text(
    returned: Any, answer: tuple[str, float | None, dict[str, Any]]
) -> None:
    """verl documents a response, (response, reward), (response, reward, metrics)."""
    response, reward, metrics = await tool(lambda: returned).execute("t", {})
    assert (response.text, reward, metrics) == answer
    assert reward is None or type(reward) is float


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ((1.0, 2.0), "[1.0,2.0]"),
        (("a", "b"), '["a","b"]'),
        (("a", True), '["a",true]'),
        (("a", 1.0, "b"), '["a",1.0,"b"]'),
        (("a", 1, {}, {}), '["a",1,{},{}]'),
        (["a", 1.0], '["a",1.0]'),
        ((), "[]"),
    ],
    ids=repr,
)
async def test_any_other_tuple_is_a_json_list(returned: Any, text: str) -> None:
    response, reward, metrics = await tool(lambda: returned).execute("t", {})
    assert (response.text, reward, metrics) == (text, None, {})
