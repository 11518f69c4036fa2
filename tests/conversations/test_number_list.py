"""`number_list_json` writes what `json.dumps` writes, to the character, or raises what it
raises."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conversations.number_list import number_list_json

LOG_PROBS = st.floats(-30.0, 0.0, width=32)
NEAR_ZERO = st.builds(
    lambda mantissa, power: struct.unpack("f", struct.pack("f", -mantissa * 10.0**power))[0],
    st.floats(1, 10),
    st.integers(-12, 0),
)
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.none(), st.floats()), max_size=3),
)


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@settings(max_examples=500)
@given(
    st.one_of(
        st.lists(st.integers(0, 200_000)),
        st.lists(st.one_of(st.none(), LOG_PROBS, NEAR_ZERO)),
        st.lists(st.floats(allow_nan=False, allow_infinity=False)),
    )
)
@example([10.00005, 0.00005, -0.00005, 0.0001, 1e-5, 9.999e-5, 100.00001234])
@example([1e15, 1e16, 1e17, 123456789012345680.0, -1e-7, 1e-10, 5e-324, -0.0, 2**70])
def test_numbers_are_written_as_json_writes_them(values: list[Any]) -> None:
    assert number_list_json(values) == canonical(values)


@settings(max_examples=500)
@given(
    st.one_of(
        st.lists(ANYTHING, max_size=6),
        ANYTHING,
        st.dictionaries(st.text(max_size=3), ANYTHING, max_size=3),
    )
)
@example([[None], math.nan, None])
@example(["null", math.nan])
@example({"b": 1e-7, "a": 2})
def test_what_is_no_list_of_numbers_is_written_as_json_writes_it_or_refused_as_it_refuses(
    values: Any,
) -> None:
    try:
        expected = canonical(values)
    except ValueError:
        with pytest.raises(ValueError, match="JSON compliant"):
            number_list_json(values)
    else:
        assert number_list_json(values) == expected


def test_objects_have_no_json() -> None:
    with pytest.raises(TypeError):
        number_list_json([object()])
