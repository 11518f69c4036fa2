"""The list of call formats: names are unique, an unknown one names the nearest."""

from __future__ import annotations

import pytest

from conversations.errors import CallFormatError
from conversations.formats.registry import FORMATS, format_named, format_names


def test_no_two_formats_share_a_name() -> None:
    every = [name for each in FORMATS for name in (each.name, *each.aliases)]
    assert len(every) == len(set(every))
    assert len(format_names()) == len(FORMATS)


def test_a_format_is_found_by_its_name_and_by_each_alias() -> None:
    for each in FORMATS:
        assert all(format_named(name) is each for name in (each.name, *each.aliases))


@pytest.mark.parametrize(("name", "says"), [("hermess", "hermes"), ("zzz", "hermes")])
def test_an_unknown_format_names_the_nearest_or_all(name: str, says: str) -> None:
    with pytest.raises(CallFormatError, match=says):
        format_named(name)
