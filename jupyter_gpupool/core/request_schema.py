"""The fields of a request for GPUs, each declared once.

The OpenAPI document, the checks of JSON, the options of ``gpupool`` and ``%gpupool``, and what kernelspecs and
notebooks may ask for are derived from :data:`FIELDS`. What a value means is checked by :mod:`.validation`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import InvalidRequest

__all__ = ["FIELDS", "SIZE", "WANTED", "Option", "RequestField", "check_types", "named", "schema", "types"]

_JSON_NAMES: dict[type, str] = {
    bool: "boolean",
    dict: "object",
    float: "number",
    int: "integer",
    str: "string",
}


@dataclass(frozen=True)
class Option:
    """How a field is given as an option of a command; ``noun`` and ``rule`` make the line for a wrong value."""

    flags: tuple[str, ...]
    help: str
    metavar: str | None = None
    noun: str = ""
    rule: str = ""


@dataclass(frozen=True)
class RequestField:
    """One field of a request.

    ``minimum``, ``exclusive_minimum`` and ``maximum`` bound a number. ``default`` None: the field has none. ``items``:
    the type of an object's values.
    """

    name: str
    kind: type
    description: str = ""
    default: Any = None
    nullable: bool = False
    minimum: int | None = None
    exclusive_minimum: int | None = None
    maximum: int | None = None
    format: str = ""
    pattern: str = ""
    items: type | None = None
    option: Option | None = field(default=None, compare=False)

    @property
    def json_types(self) -> tuple[type, ...]:
        """The Python types of its values in JSON."""
        kinds = (int, float) if self.kind is float else (self.kind,)
        return (*kinds, type(None)) if self.nullable else kinds

    def schema(self) -> dict[str, Any]:
        """Return its JSON schema."""
        kind = _JSON_NAMES[self.kind]
        given: dict[str, Any] = {
            "type": [kind, "null"] if self.nullable else kind,
            "format": self.format or None,
            "pattern": self.pattern or None,
            "minimum": self.minimum,
            "exclusiveMinimum": self.exclusive_minimum,
            "maximum": self.maximum,
            "default": self.default,
            "additionalProperties": {"type": _JSON_NAMES[self.items]} if self.items else None,
            "description": self.description or None,
        }
        return {key: value for key, value in given.items() if value is not None}

    def from_text(self, text: str) -> int | float:
        """Return the number that an option's text stands for. Raises ValueError with one line."""
        value: int | float
        try:
            value = int(text) if self.kind is int else float(text)
        except ValueError:
            value = math.nan
        if not self.allows(value):
            assert self.option is not None
            raise ValueError(f"{self.option.noun} must be {self.option.rule}, not {text!r}")
        return value

    def allows(self, value: float) -> bool:
        """Whether a number is within the field's bounds."""
        return (
            not math.isnan(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.exclusive_minimum is None or value > self.exclusive_minimum)
            and (self.maximum is None or value <= self.maximum)
        )


#: All fields of a request by name, in the order in which they are documented. Its owner is never among them: that is
#: whoever calls.
FIELDS: Mapping[str, RequestField] = {
    f.name: f
    for f in (
        RequestField("id", str, "Chosen by the client; repeating it is harmless.", format="uuid"),
        RequestField(
            "num_gpus",
            int,
            default=1,
            minimum=1,
            option=Option(
                ("-n", "--num-gpus"), "number of GPUs", "N", "the number of GPUs", "a whole number from 1 up"
            ),
        ),
        RequestField(
            "partial",
            float,
            "Share of each GPU.",
            nullable=True,
            exclusive_minimum=0,
            maximum=1,
            option=Option(
                ("-p", "--partial"),
                "fraction of each GPU's memory, above 0 and at most 1",
                "F",
                "the fraction of each GPU's memory",
                "a number above 0 and at most 1",
            ),
        ),
        RequestField(
            "memory_mib",
            int,
            "MiB of each GPU, instead of partial.",
            nullable=True,
            minimum=1,
            option=Option(
                ("-m", "--memory"),
                "memory of each GPU in MiB, instead of a fraction",
                "MiB",
                "the memory per GPU",
                "a whole number of MiB from 1 up",
            ),
        ),
        RequestField(
            "filters",
            dict,
            items=str,
            option=Option(("--filter",), "request only GPUs that match; may be repeated", "NAME=VALUE"),
        ),
        RequestField(
            "spread",
            bool,
            "The GPUs may be of several servers.",
            default=False,
            option=Option(
                ("--spread",), "allow GPUs of several servers if no single server has room for all"
            ),
        ),
        RequestField("namespace", str),
        RequestField(
            "wait",
            bool,
            "Queue if it cannot be met now.",
            default=True,
            option=Option(("--no-wait",), "fail at once if no GPUs are free, instead of queueing"),
        ),
        RequestField("secret_sha256", str, pattern="^[0-9a-f]{64}$"),
        RequestField("label", str),
        RequestField("client", str),
    )
}

#: The fields that say how much of how many GPUs; a resize takes these.
SIZE = ("num_gpus", "partial", "memory_mib")
#: The fields that say which GPUs are wanted; kernelspecs, notebooks and frontends give these.
WANTED = (*SIZE, "filters", "spread")


def named(names: Collection[str]) -> dict[str, RequestField]:
    """Return those fields."""
    return {name: FIELDS[name] for name in names}


def schema(names: Collection[str] = tuple(FIELDS)) -> dict[str, Any]:
    """Return the JSON schemas of those fields by name, for the ``properties`` of an object."""
    return {name: f.schema() for name, f in named(names).items()}


def types(names: Collection[str] = tuple(FIELDS)) -> dict[str, tuple[type, ...]]:
    """Return the Python types that those fields may have in JSON, by name."""
    return {name: f.json_types for name, f in named(names).items()}


def check_types(body: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]]) -> None:
    """Raise InvalidRequest unless a body has those fields only, with values of their types."""
    unknown = sorted(set(body) - set(fields))
    if unknown:
        raise InvalidRequest(f"unknown field {unknown[0][:40]!r}; known are {', '.join(fields)}")
    for name, value in body.items():
        kinds = fields[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise InvalidRequest(f"{name} is a {type(value).__name__}, not {wanted}")
