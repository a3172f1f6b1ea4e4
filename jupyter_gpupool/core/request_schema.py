"""The fields of a request for GPUs, each declared once.

The OpenAPI document, the checks of JSON, the options of ``gpupool`` and ``%gpupool``, and what kernelspecs and
notebooks may ask for are derived from :data:`FIELDS`. What a value means is checked by :mod:`.validation`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import InvalidRequest

__all__ = [
    "FIELDS",
    "FORECAST",
    "RECORDED",
    "SIZE",
    "WANTED",
    "Option",
    "RequestField",
    "body_of",
    "check_types",
    "from_query",
    "named",
    "query_of",
    "query_parameters",
    "schema",
    "types",
]

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
    the type of an object's values. ``query``: its name in a query, if that is another one.
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
    query: str = ""
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

    @property
    def query_name(self) -> str:
        """Its name in a query."""
        return self.query or self.name

    def query_parameter(self) -> dict[str, Any]:
        """Return its description as a parameter of a query, for the OpenAPI document."""
        schema = self.schema()
        text = schema.pop("description", "")
        if self.kind is dict:
            schema = {"type": "array", "items": {"type": "string"}}
        elif self.kind is bool:
            schema = {"type": "string", "enum": ["0", "1"]}
            text = f"1: {text[0].lower()}{text[1:]}"
        else:
            schema["type"] = _JSON_NAMES[self.kind]
        return {
            "name": self.query_name,
            "in": "query",
            "required": False,
            "schema": schema,
            "description": text,
        }

    def from_query(self, texts: Sequence[str]) -> Any:
        """Return the value that a query's texts stand for. Raises InvalidRequest."""
        if self.kind is dict:
            return dict(self._pair(text) for text in texts)
        text = texts[-1]
        if self.kind is bool:
            return text in ("1", "true")
        if self.kind is str:
            return text
        wanted = "a whole number" if self.kind is int else "a number"
        try:
            if self.kind is int and not re.fullmatch(r"[0-9]{1,9}", text):
                raise ValueError(text)
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not abs(value) < 1e12:
            raise InvalidRequest(f"{self.query_name}={text[:40]}: give {wanted}")
        return value

    def _pair(self, text: str) -> tuple[str, str]:
        key, sign, value = text.partition("=")
        if not sign:
            raise InvalidRequest(
                f"{self.query_name}={text[:40]}: write it as {self.query_name}=NAME=VALUE, such as name=V100"
            )
        return key, value

    def to_query(self, value: Any) -> str | list[str]:
        """Return what a query has for a value; the inverse of :meth:`from_query`."""
        if self.kind is dict:
            return [f"{key}={item}" for key, item in value.items()]
        return str(int(value)) if self.kind is bool else str(value)

    def is_default(self, value: Any) -> bool:
        """Whether a request that lacks the field means the same."""
        if value is None or (self.kind is dict and not value):
            return True
        return type(value) is type(self.default) and value == self.default

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
            "Only GPUs that match, such as `name=V100`.",
            items=str,
            query="filter",
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
        RequestField(
            "never_park",
            bool,
            "Keep the GPUs while idle, whoever waits.",
            default=False,
            option=Option(("--never-park",), "keep the GPUs while idle, even if others wait for them"),
        ),
        RequestField("namespace", str, "Whose limits count; default: `default`."),
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
WANTED = (*SIZE, "filters", "spread", "never_park")
#: The fields that decide what becomes of a request; a forecast takes these.
FORECAST = (*WANTED, "namespace")
#: The fields of a request that its lease shows, besides its owner.
RECORDED = tuple(name for name in FIELDS if name != "secret_sha256")


def named(names: Collection[str]) -> dict[str, RequestField]:
    """Return those fields."""
    return {name: FIELDS[name] for name in names}


def schema(names: Collection[str] = tuple(FIELDS)) -> dict[str, Any]:
    """Return the JSON schemas of those fields by name, for the ``properties`` of an object."""
    return {name: f.schema() for name, f in named(names).items()}


def types(names: Collection[str] = tuple(FIELDS)) -> dict[str, tuple[type, ...]]:
    """Return the Python types that those fields may have in JSON, by name."""
    return {name: f.json_types for name, f in named(names).items()}


def query_parameters(names: Collection[str]) -> list[dict[str, Any]]:
    """Return the descriptions of those fields as parameters of a query, for the OpenAPI document."""
    return [f.query_parameter() for f in named(names).values()]


def from_query(query: Mapping[str, Sequence[str]], names: Collection[str]) -> dict[str, Any]:
    """Return the values of those fields that a query has, by name. Raises InvalidRequest."""
    given = ((f, [text for text in query.get(f.query_name, ()) if text]) for f in named(names).values())
    return {f.name: f.from_query(texts) for f, texts in given if texts}


def query_of(request: object, names: Collection[str]) -> dict[str, str | list[str]]:
    """Return those fields of a request as a query, without those that mean the same if they are missing."""
    values = ((f, getattr(request, f.name)) for f in named(names).values())
    return {f.query_name: f.to_query(value) for f, value in values if not f.is_default(value)}


def body_of(request: object, names: Collection[str] = tuple(FIELDS)) -> dict[str, Any]:
    """Return those fields of a request as JSON, without those that mean the same if they are missing.

    So a field that is newer than a server reaches that server only where it matters.
    """
    values = ((f, getattr(request, f.name)) for f in named(names).values())
    return {f.name: dict(v) if f.kind is dict else v for f, v in values if not f.is_default(v)}


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
