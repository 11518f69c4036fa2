"""The record's form: every field with its type, none missing, none unknown, numbers in range.

What passes here can be read by attribute: the other checks need not check types.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NotRequired, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import TypedDict

from conversations import messages, trajectory
from conversations.checks.finding import LONGEST_ID, Finding, printable, quoted
from conversations.errors import RecordError
from conversations.messages import ROLES
from conversations.tokens import KINDS
from conversations.trajectory import (
    BRANCH_REASONS,
    CALL_STATUSES,
    FIELD_TYPES,
    STOP_REASONS,
    Branch,
)
from conversations.upgrade import READABLE
from conversations.warning import KINDS as WARNING_KINDS
from conversations.warning import RecordWarning

MAX_SHOWN = 20
"""Findings shown of one record's form."""

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_OPEN = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def _among(*allowed: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return check


Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Place = Annotated[int, Field(ge=0, le=2**53)]
Seconds = Annotated[float, Field(ge=0)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
Status = Annotated[str, AfterValidator(_among(*CALL_STATUSES))]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Segment = Annotated[
    tuple[Annotated[str, AfterValidator(_among(*KINDS))], Place, Place], Field(strict=False)
]
"""A list in JSON, read as a tuple; its values stay strict."""


class _Turn(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    start: Place
    end: Place
    finish_reason: Literal["stop", "length", "abort"]
    prompt_tokens: Place
    cached_tokens: Place | None
    queue_s: Seconds | None
    engine_s: Seconds | None
    weight_version: str | None
    resumed: NotRequired[list[Annotated[tuple[Place, str | None], Field(strict=False)]] | None]
    response_id: NotRequired[str | None]
    asked: NotRequired[dict[str, Any] | None]
    notes: NotRequired[list[str] | None]


class _Attempt(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    status: Status
    queue_s: Seconds
    run_s: Seconds
    error: str | None
    error_class: NotRequired[str | None]
    bytes: NotRequired[Place | None]
    tokens_cut: NotRequired[Place]


class LedgerLine(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    call_id: str
    turn: Place
    name: str
    arguments: dict[str, Any] | str
    status: Status
    response: str | None
    full_response: str | None
    reward: float | None
    metrics: dict[str, Any]
    attempts: list[_Attempt]
    queue_s: Seconds
    run_s: Seconds
    error: str | None
    images: NotRequired[list[Hash]]


class Function(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str
    arguments: str


class _Call(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: Literal["function"]
    function: Function


class _TextPart(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    type: Literal["text"]
    text: str


class _ImagePart(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    type: Literal["image"]
    image: str | int


class _Message(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    role: Annotated[str, AfterValidator(_among(*ROLES))]
    content: str | list[_TextPart | _ImagePart]
    raw: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[_Call]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class ToolName(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str


class _Tool(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    function: ToolName


class Warning(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    kind: Annotated[str, AfterValidator(_among(*WARNING_KINDS))]
    text: str


class _Image(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    sha256: Hash
    width: Annotated[int, Field(ge=1, le=1 << 24)]
    height: Annotated[int, Field(ge=1, le=1 << 24)]
    grid: Annotated[
        list[Annotated[int, Field(ge=1, le=1 << 24)]], Field(min_length=3, max_length=3)
    ]
    start: Place
    end: Place


class _BranchParent(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    branch: Place
    turn: Place


class _Parent(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    run: str
    id: str
    turn: Place | None


_FORMS: dict[Any, Any] = {
    trajectory.Ids: Tokens,
    trajectory.Mask: Annotated[list[Annotated[int, Field(ge=0, le=1)]], Field(fail_fast=True)],
    trajectory.LogProbs: Annotated[list[float | None], Field(fail_fast=True)],
    trajectory.Segments: list[Segment],
    trajectory.StopReason: Annotated[str, AfterValidator(_among(*STOP_REASONS))],
    trajectory.Tools: list[_Tool],
    trajectory.Parent: _Parent | None,
    trajectory.Reason: Annotated[str, AfterValidator(_among(*BRANCH_REASONS))],
    trajectory.BranchParent: _BranchParent | None,
    trajectory.Images: list[_Image],
    list[trajectory.Turn]: list[_Turn],
    list[trajectory.ToolCallRecord]: list[LedgerLine],
    list[RecordWarning]: list[Warning],
    list[messages.Message]: list[_Message],
    int: Place,
    float: Seconds,
}
"""The form of a record's field, by its type in `Trajectory`; other types are used as they are."""


def _typed_dict(name: str, types: dict[str, Any], **more: Any) -> Any:
    """The form of an object whose fields have these types, and `more` fields."""
    forms = {field: _FORMS.get(kind, kind) for field, kind in types.items()}
    found = TypedDict(name, {**forms, **more})  # type: ignore[misc]
    setattr(found, "__pydantic_config__", _STRICT)  # noqa: B010 - no attribute that mypy knows
    return found


@functools.cache
def _record() -> TypeAdapter[Any]:
    hints = get_type_hints(Branch, include_extras=True)
    branch = _typed_dict("Branch", hints, images=NotRequired[list[_Image]])
    record = _typed_dict(
        "Record",
        FIELD_TYPES,
        schema=Annotated[str, AfterValidator(_among(*READABLE))],
        sha256=Hash,
        branches=list[branch],  # type: ignore[valid-type]
    )
    return TypeAdapter(record)


def shape_findings(record: dict[str, Any]) -> Iterator[Finding]:
    """The first `MAX_SHOWN` values that do not have the form above."""
    try:
        _record().validate_python(record)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        yield from (_finding(detail, record) for detail in errors[:MAX_SHOWN])
        if len(errors) > MAX_SHOWN:
            yield Finding(f"{len(errors) - MAX_SHOWN} more values of the wrong form")


def well_formed(record: dict[str, Any]) -> dict[str, Any]:
    """The record. Raises RecordError, naming the first value that has not the form above."""
    for finding in shape_findings(record):
        name = printable(str(record.get("id"))[:LONGEST_ID])
        raise RecordError(f"trajectory {name}: {finding.what}; `turntrace verify` shows all of it")
    return record


def _finding(detail: ErrorDetails, record: dict[str, Any]) -> Finding:
    place = detail["loc"]
    path = ".".join(map(str, place))
    if detail["type"] in ("missing", "extra_forbidden"):
        problem = "missing" if detail["type"] == "missing" else "not known"
        return Finding(f"the field {quoted(path)[1:-1]} is {problem}")
    expected = (
        detail["msg"]
        .removeprefix("Input should be ")
        .removeprefix("Value error, ")
        .replace("a valid ", "a ")
    )
    return Finding(
        f"{path} is {quoted(detail['input'])}, expected {expected}",
        _turn(place),
        _token(place, record),
    )


def _turn(place: tuple[int | str, ...]) -> int | None:
    return int(place[1]) if len(place) > 1 and place[0] == "turns" else None


def _token(place: tuple[int | str, ...], record: dict[str, Any]) -> int | None:
    """The token index of a place in one of the token lists."""
    if len(place) < 2 or not isinstance(place[1], int):
        return None
    if place[0] == "prompt_ids":
        return place[1]
    if place[0] in ("response_ids", "response_mask", "response_logprobs") and isinstance(
        record.get("prompt_ids"), list
    ):
        return len(record["prompt_ids"]) + place[1]
    return None
