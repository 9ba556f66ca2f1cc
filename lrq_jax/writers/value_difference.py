"""Where two JSON values differ."""

from __future__ import annotations

from typing import Any

_NOTHING = object()


def first_difference(found: Any, expected: Any, place: str = "") -> str | None:
    """A sentence on the first difference, with its place, such as `layers/3/shape`; None if there
    is none."""
    if type(found) is type(expected) and isinstance(found, dict | list):
        pairs = _pairs(found, expected)
        differences = (
            first_difference(ours, theirs, f"{place}/{key}".lstrip("/"))
            for key, ours, theirs in pairs
        )
        return next((difference for difference in differences if difference), None)
    if found == expected:
        return None
    return f"{place}: found {_shown(found)}, expected {_shown(expected)}"


def _pairs(found: Any, expected: Any) -> list[tuple[Any, Any, Any]]:
    if isinstance(found, list):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    keys = dict.fromkeys((*expected, *found))
    return [(key, found.get(key, _NOTHING), expected.get(key, _NOTHING)) for key in keys]


def _shown(value: Any) -> str:
    return "nothing" if value is _NOTHING else repr(value)
