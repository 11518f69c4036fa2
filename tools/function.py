"""Plain functions as tools: the schema from type hints and docstring, the checks from pydantic.

A sync function runs in a daemon thread of its own: calls that hang take no thread from others, and
do not keep the process alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import numbers
import threading
from collections.abc import Callable, Mapping
from typing import Any, Unpack, get_type_hints, overload

import docstring_parser
import pydantic
import pydantic_core
from pydantic.json_schema import GenerateJsonSchema

from tools.base import BaseTool, ToolConfigError, ToolError, ToolResponse
from tools.policy import PolicyConfig

_Outcome = tuple[Any, BaseException | None]


class FunctionTool(BaseTool):
    """A function as a tool. It can still be called as a function.

    The function returns text, any other JSON value (shown as JSON text; numpy's numbers and arrays
    are JSON too), a ToolResponse, or verl's (response, step reward) and (response, step reward,
    metrics), in which a response is text, a mapping or a ToolResponse. It raises ToolError to tell
    the model why the call could not be served.
    """

    config_keys = frozenset()

    def __init__(
        self,
        function: Callable[..., Any],
        config: dict[str, Any] | None = None,
        tool_schema: dict[str, Any] | None = None,
    ) -> None:
        self._function = function
        self._arguments = _arguments_model(function)
        super().__init__(config or {}, tool_schema or _function_schema(function, self._arguments))
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def with_config(
        self, config: dict[str, Any], tool_schema: dict[str, Any] | None = None
    ) -> FunctionTool:
        """The same function under another config, as tools.yaml may give it."""
        return FunctionTool(
            self._function, {**self.config, **config}, tool_schema or self.tool_schema
        )

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        call = functools.partial(self._function, **self._checked(parameters))
        result = (
            await call()
            if inspect.iscoroutinefunction(self._function)
            else await _in_own_thread(call, self.name)
        )
        return _as_answer(result)

    def _checked(self, parameters: dict[str, Any]) -> dict[str, Any]:
        try:
            model = self._arguments.model_validate(parameters)
        except pydantic.ValidationError as error:
            raise ToolError(
                "; ".join(_plain(problem) for problem in error.errors(include_url=False))
            ) from error
        return {
            info.alias or "": getattr(model, field)
            for field, info in self._arguments.model_fields.items()
        }


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...


@overload
def tool(**config: Unpack[PolicyConfig]) -> Callable[[Callable[..., Any]], FunctionTool]: ...


def tool(
    function: Callable[..., Any] | None = None, /, **config: Any
) -> FunctionTool | Callable[[Callable[..., Any]], FunctionTool]:
    """`@tool` or `@tool(timeout_s=5)`: makes a function a tool with its name and description.

    The keywords are those of `tools.policy.PolicyConfig`. Raises ToolConfigError if the function
    cannot be called with named arguments.
    """
    if function is None:
        return lambda decorated: FunctionTool(decorated, config)
    return FunctionTool(function, config)


def _arguments_model(function: Callable[..., Any]) -> type[pydantic.BaseModel]:
    """A pydantic model with one field for each parameter; extra arguments are refused.

    The parameter's name is the field's alias: a field cannot be called `_x`, `schema` or `copy`.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ToolConfigError(
            f"function {name}: a type hint cannot be resolved: {error}"
        ) from error
    except TypeError as error:  # a functools.partial, an object with __call__
        raise ToolConfigError(
            f"{name}: only a function or a method can become a tool; wrap it in one"
        ) from error
    fields: dict[str, Any] = {}
    for index, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolConfigError(
                f"function {name}: parameter {parameter} cannot be given by name; "
                "a tool's arguments are named"
            )
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[f"field_{index}"] = (
            hints.get(parameter.name, Any),
            pydantic.Field(default, alias=parameter.name),
        )
    try:
        return pydantic.create_model(name, __config__=pydantic.ConfigDict(extra="forbid"), **fields)
    except pydantic.PydanticUserError as error:
        raise ToolConfigError(f"function {name}: {error.message.splitlines()[0]}") from error


def _function_schema(
    function: Callable[..., Any], arguments: type[pydantic.BaseModel]
) -> dict[str, Any]:
    try:
        parameters = arguments.model_json_schema(schema_generator=_Untitled)
    except pydantic.PydanticUserError as error:
        raise ToolConfigError(
            f"function {arguments.__name__}: {error.message.splitlines()[0]}"
        ) from error
    # A title is the class's name, and only costs tokens.
    for titled in (parameters, *parameters.get("$defs", {}).values()):
        titled.pop("title", None)
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    for param in doc.params:
        if param.description and param.arg_name in parameters["properties"]:
            parameters["properties"][param.arg_name].setdefault(
                "description", " ".join(param.description.split())
            )
    return {
        "type": "function",
        "function": {
            "name": arguments.__name__,
            "description": (doc.description or "").strip(),
            "parameters": parameters,
        },
    }


class _Untitled(GenerateJsonSchema):
    """pydantic's JSON schema without titles of fields, which only cost tokens."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


async def _in_own_thread(call: Callable[[], Any], name: str) -> Any:
    loop = asyncio.get_running_loop()
    context = contextvars.copy_context()
    done: asyncio.Future[_Outcome] = loop.create_future()

    def work() -> None:
        outcome: _Outcome
        try:
            outcome = (context.run(call), None)
        except BaseException as error:
            outcome = (None, error)
        # RuntimeError: the loop is closed, and nobody waits for this call.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_settle, done, outcome)

    threading.Thread(target=work, name=f"tool-{name}", daemon=True).start()
    value, error = await done
    if error is None:
        return value
    if isinstance(error, Exception):
        raise error
    # SystemExit or KeyboardInterrupt out of a tool's function must not end the program.
    raise RuntimeError(f"the function raised {type(error).__name__}") from error


def _settle(done: asyncio.Future[_Outcome], outcome: _Outcome) -> None:
    if not done.done():
        done.set_result(outcome)


def _as_answer(result: Any) -> tuple[ToolResponse, float | None, dict[str, Any]]:
    """verl's shapes: a response, (response, reward), (response, reward, metrics).

    A response is text, a mapping or a ToolResponse; reward and metrics may be None. Any other tuple
    is a JSON list: shown as text, its numbers are nobody's reward.
    """
    response, reward, metrics = result, None, None
    if _is_with_reward(result):
        response, reward, metrics = (*result, None)[:3]
    if not isinstance(response, ToolResponse):
        text = response if isinstance(response, str) else _json_text(response)
        response = ToolResponse(text=text)
    return response, None if reward is None else float(reward), dict(metrics or {})


def _is_with_reward(result: Any) -> bool:
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        return False
    response, reward, metrics = (*result, None)[:3]
    is_reward = reward is None or (
        isinstance(reward, numbers.Real) and not isinstance(reward, bool)
    )
    is_metrics = metrics is None or isinstance(metrics, Mapping)
    return isinstance(response, (str, Mapping, ToolResponse)) and is_reward and is_metrics


def _json_text(result: Any) -> str:
    try:
        return pydantic_core.to_json(result, fallback=_plain_values).decode()
    except pydantic_core.PydanticSerializationError as error:
        kind = type(result).__name__
        raise TypeError(
            f"the function returned {kind}, not text or a JSON value: {error}; "
            "return str(...) of it, for example"
        ) from None


def _plain_values(value: Any) -> Any:
    """numpy's and torch's scalars and arrays as plain numbers and lists."""
    if not callable(tolist := getattr(value, "tolist", None)):
        raise TypeError(f"{type(value).__name__} has no JSON form")
    return tolist()


def _plain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "arguments"
    return f"{where}: {problem['msg']}"
