"""Plain functions as tools: the schema comes from the type hints and the docstring, the checking from pydantic.

A sync function runs in a daemon thread of its own: however many calls hang, they take no thread from anybody else, and
none of them keeps the process alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, Unpack, get_type_hints, overload

import docstring_parser
import pydantic
import pydantic_core
from pydantic.json_schema import GenerateJsonSchema

from tools.base import BaseTool, ToolConfigError, ToolError, ToolResponse
from tools.policy import PolicyConfig

_Outcome = tuple[Any, BaseException | None]


class FunctionTool(BaseTool):
    """A function as a tool. It can still be called as the function it is.

    The function returns text, any other JSON value (shown as JSON text, numpy's numbers and arrays as well), a ToolResponse,
    or verl's triple of (ToolResponse or text, step reward, metrics). It raises ToolError to tell the model why it could not serve the call.
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
    """`@tool` or `@tool(timeout_s=5)`: makes a function a tool, named and described as the function is.

    The keywords are those of `tools.policy.Policy`.

    Raises ToolConfigError where the signature cannot be called with named arguments.
    """
    if function is None:
        return lambda decorated: FunctionTool(decorated, config)
    return FunctionTool(function, config)


def _arguments_model(function: Callable[..., Any]) -> type[pydantic.BaseModel]:
    """A pydantic model with one field per parameter; extra arguments are refused.

    The parameter's name is the field's alias, because a field may not be called `_x`, `schema` or `copy`.
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
                f"function {name}: parameter {parameter} cannot be given by name; a tool's arguments are named"
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
    for titled in (
        parameters,
        *parameters.get("$defs", {}).values(),
    ):  # the class's name, which only costs tokens
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
    """pydantic's JSON schema without the title it derives from each field's name, which only costs tokens."""

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
        # A closed loop refuses with RuntimeError: nobody waits for this call any more.
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


# A text, a step reward and metrics: as JSON text the reward would be shown to the model, and be nobody's.
_TEXT_TRIPLES = [[str, kind, dict] for kind in (float, int, type(None))]


def _as_answer(result: Any) -> tuple[ToolResponse, float | None, dict[str, Any]]:
    if isinstance(result, ToolResponse):
        return result, None, {}
    if isinstance(result, tuple) and len(result) == 3 and isinstance(result[0], ToolResponse):
        return result
    if isinstance(result, tuple) and list(map(type, result)) in _TEXT_TRIPLES:
        return ToolResponse(text=result[0]), *result[1:]
    return ToolResponse(text=result if isinstance(result, str) else _json_text(result)), None, {}


def _json_text(result: Any) -> str:
    try:
        return pydantic_core.to_json(result, fallback=_plain_values).decode()
    except pydantic_core.PydanticSerializationError as error:
        kind = type(result).__name__
        raise TypeError(
            f"the function returned {kind}, not text or a JSON value: {error}; return str(...) of it, say"
        ) from None


def _plain_values(value: Any) -> Any:
    """The numbers in numpy's and torch's scalars and arrays."""
    if not callable(tolist := getattr(value, "tolist", None)):
        raise TypeError(f"{type(value).__name__} has no JSON form")
    return tolist()


def _plain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "arguments"
    return f"{where}: {problem['msg']}"
