"""Lists of numbers as JSON text, identical to what `json` writes, in a third of the time.

Ids, masks and log-probs are most of a record. orjson writes the same digits, the fewest that read
back as the same double, but other exponents: they are corrected here, or `json` writes the list.
"""

from __future__ import annotations

import json
import re

import orjson

_encode = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), allow_nan=False, check_circular=False
).encode
_OF_NUMBERS = b"[],-.0123456789e" + b"null"
_NOT_ONE_DIGIT = re.compile(r"e(?!-0\d[,\]])")
_BELOW_1E_4 = re.compile(r"(?<![0-9])0\.0000\d+")


def number_list_json(values: object) -> str:
    """`json.dumps` of a list of numbers and nulls, or of any other value, without spaces.

    Raises what `json.dumps` raises: ValueError for NaN, TypeError for a value that has no JSON
    form.
    """
    if not isinstance(values, list):
        return _encode(values)
    try:
        written = orjson.dumps(values)
    except TypeError:  # more than 64 bits, or no number
        return _encode(values)
    if written.translate(None, _OF_NUMBERS) or written.count(b"null") != values.count(
        None
    ):  # orjson writes NaN as null
        return _encode(values)
    text = written.decode("ascii")
    if "e" in text:
        text = text.replace("e-", "e-0")
        if _NOT_ONE_DIGIT.search(text):
            return _encode(values)
    return _BELOW_1E_4.sub(lambda found: repr(float(found[0])), text) if "0.0000" in text else text
