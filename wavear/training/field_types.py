"""Checks of values against the annotations of a dataclass's fields."""

from __future__ import annotations

import numbers
import types
from typing import Any, Literal, Union, get_args, get_origin

_TYPES: dict[Any, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
    type(None): (type(None), ""),
}


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the type of an annotation; True and False are not numbers."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return (
            isinstance(value, tuple | list)
            and len(value) == 2
            and all(fits(each, float) for each in value)
        )
    return isinstance(value, _TYPES[hint][0]) and (hint is bool or not isinstance(value, bool))


def described(hint: Any) -> str:
    """Return the words for an annotation, for a message."""
    if get_origin(hint) is tuple:
        return "two numbers"
    options = [option for option in get_args(hint) if option is not type(None)]
    if get_origin(hint) is Literal:
        return f"{', '.join(options[:-1])} or {options[-1]}"
    return described(options[0]) if options else _TYPES[hint][1]
