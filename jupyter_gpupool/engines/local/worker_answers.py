"""What a worker may say on its control socket, and how long it may take: one that was taken over says anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

#: What a worker answers from what it knows, and what takes as long as it takes to copy or send all of its memory; in
#: seconds.
_SHORT_S, _LONG_S = 10.0, 600.0
_SHORT = (
    *("state", "forget", "stay", "leave", "link"),
    *("hold", "rest", "release", "name", "expect", "linked", "replace"),
)
_MAX_FAILURE_CHARACTERS = 500
_MAX_NAME_CHARACTERS = 200


def time_limit_s(what: str) -> float:
    """How long a worker may take to answer that question."""
    return _SHORT_S if what in _SHORT else _LONG_S


def _is_flag(given: Any) -> bool:
    return type(given) is bool


def _is_size(given: Any) -> bool:
    return type(given) is int and 0 <= given < 1 << 63


def _is_time(given: Any) -> bool:
    return _is_size(given) or (type(given) is float and math.isfinite(given))


def _is_name(given: Any) -> bool:
    return isinstance(given, str) and 0 < len(given) <= _MAX_NAME_CHARACTERS


_Forms = Mapping[str, Callable[[Any], bool]]
_ANSWERS: Mapping[str, _Forms] = {
    "state": {
        "parked": _is_flag,
        "clean": _is_flag,
        "bytes": _is_size,
        "lent": _is_size,
        "idle_s": _is_time,
    },
    "clean": {"clean": _is_flag},
    "rest": {"resting": _is_flag, "uses": _is_size},
    "send": {"bytes": _is_size, "rest_s": _is_time},
    "send_rest": {"bytes": _is_size, "rest_s": _is_time, "ahead": _is_size},
    "name": {"name": lambda given: given == "" or _is_name(given)},
    "linked": {"missing": _is_size},
}
#: What an answer may have besides; workers of an earlier version do not say it.
_BESIDES: Mapping[str, _Forms] = {"send": {"ahead": _is_size}}
#: A notice has any of these.
_NOTICE: _Forms = {"parked": _is_flag, "wanted": _is_flag, "lent": _is_size, "link": _is_name}


def is_answer(what: str, message: Mapping[str, Any]) -> bool:
    """Whether this can be an answer to that question."""
    if "failed" in message:
        return isinstance(message["failed"], str)
    besides = {name: form for name, form in _BESIDES.get(what, {}).items() if name in message}
    forms = {**_ANSWERS.get(what, {}), **besides}
    return all(name in message and has_form(message[name]) for name, has_form in forms.items())


def is_notice(message: Mapping[str, Any]) -> bool:
    """Whether this can be what a worker says unasked."""
    return all(has_form(message[name]) for name, has_form in _NOTICE.items() if name in message)


def failure(message: Mapping[str, Any]) -> str:
    """Why something did not work, in one line for people."""
    line = " ".join(message["failed"].split())
    return "".join(c for c in line if c.isprintable())[:_MAX_FAILURE_CHARACTERS]
