"""What a user chooses on the spawn page. The fields are declared here once, for the form and for the checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from urllib.parse import parse_qsl, urlencode

from jupyter_gpupool.core.errors import ImpossibleRequest, InvalidRequest
from jupyter_gpupool.core.request_schema import FIELDS as REQUEST_FIELDS
from jupyter_gpupool.core.request_schema import check_types

#: The key of the choice in JupyterHub's ``user_options``, and the prefix of the form's field names.
KEY = "gpupool"
MODES = ("server", "kernel")


@dataclass(frozen=True)
class Limits:
    """What users may choose.

    ``least``, ``most`` and ``step`` are shares of a GPU's memory, from 0 to 1.
    ``models`` are names of GPU models; if empty, any model may be chosen.
    Raises InvalidRequest for limits that contradict each other.
    """

    max_gpus: int = 2
    least: float = 0.05
    most: float = 1.0
    step: float = 0.05
    default_gpus: int = 0
    default_partial: float = 0.5
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.max_gpus, int) and self.max_gpus >= 1):
            raise InvalidRequest(f"max_gpus must be 1 or more, not {self.max_gpus!r}")
        if not 0 < self.least <= self.default_partial <= self.most <= 1:
            raise InvalidRequest("0 < least <= default_partial <= most <= 1 must hold")
        if not 0 <= self.default_gpus <= self.max_gpus:
            raise InvalidRequest("default_gpus must be between 0 and max_gpus")


def _flag(name: str) -> Any:
    """A field that is on or off, as a request declares it."""
    declared = REQUEST_FIELDS[name]
    return field(default=declared.default, metadata={"label": declared.description.rstrip(".")})


@dataclass(frozen=True)
class GPUOptions:
    """A choice: ``num_gpus`` GPU slices, each with the share ``partial`` of a GPU's memory.

    ``model`` is the name of a GPU model; empty for any. ``spread`` and ``never_park`` are those of a request.
    Each field's metadata contains its label on the form.
    """

    num_gpus: int = field(metadata={"label": "GPU slices"})
    partial: float = field(default=1.0, metadata={"label": "Share of each GPU's memory"})
    model: str = field(default="", metadata={"label": "GPU model"})
    spread: bool = _flag("spread")
    never_park: bool = _flag("never_park")

    def to_json(self) -> dict[str, Any]:
        """Return the choice as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> GPUOptions:
        """Read what :meth:`to_json` returned. Raises InvalidRequest if a field is unknown or of another type."""
        check_types(said, KINDS)
        if "num_gpus" not in said:
            raise InvalidRequest("the choice has no num_gpus")
        return cls(**said)

    def request_fields(self) -> dict[str, Any]:
        """Return the choice as the fields of a request."""
        filters = {"name": self.model} if self.model else {}
        chosen = {name: True for name in FLAGS if getattr(self, name)}
        return {"num_gpus": self.num_gpus, "partial": self.partial, "filters": filters, **chosen}

    def to_text(self) -> str:
        """Return the choice as one word. It has no braces, which KubeSpawner would expand."""
        return urlencode({k: int(v) if k in FLAGS else v for k, v in self.to_json().items()})

    @classmethod
    def from_text(cls, text: str) -> GPUOptions:
        """Read what :meth:`to_text` wrote. Raises ValueError for any other text."""
        said = dict(parse_qsl(text, strict_parsing=True, keep_blank_values=True))
        try:
            # Of a number's types, the last one reads every text of it.
            values: dict[str, Any] = {n: KINDS[n][-1](said[n]) for n in FIELDS if n not in FLAGS}
            values.update({name: said.get(name) == "1" for name in FLAGS})
            return cls(**values)
        except KeyError:
            raise ValueError("this is not a choice of GPUs") from None

    def __str__(self) -> str:
        return f"{self.num_gpus} × {self.partial:g}" + (f" {self.model}" if self.model else "")


FIELDS = tuple(f.name for f in fields(GPUOptions))
#: The types that the fields may have in JSON. Those that a request has, too, are declared there.
KINDS: dict[str, tuple[type, ...]] = {
    name: tuple(kind for kind in REQUEST_FIELDS[name].json_types if kind is not type(None))
    if name in REQUEST_FIELDS
    else (str,)
    for name in FIELDS
}


#: The fields that are on or off.
FLAGS = tuple(name for name in FIELDS if KINDS[name] == (bool,))


@dataclass(frozen=True)
class ServerStart:
    """What the hub tells its service of a server that starts: the body of ``PUT hub/server``.

    ``groups`` are its user's groups at the hub, ``lease`` is a UUID of this start, and ``mode`` one of :data:`MODES`.
    """

    groups: list[str]
    lease: str
    mode: str
    choice: GPUOptions

    def to_json(self) -> dict[str, Any]:
        """Return the body."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> ServerStart:
        """Read the body. Raises InvalidRequest."""
        check_types(body, {"groups": (list,), "lease": (str,), "mode": (str,), "choice": (dict,)})
        names = [f.name for f in fields(cls)]
        if set(body) != set(names) or body["mode"] not in MODES:
            raise InvalidRequest(
                f"the body must have {', '.join(names)}, and mode must be one of {', '.join(MODES)}"
            )
        groups = [str(group) for group in body["groups"]]
        return cls(**{**body, "groups": groups, "choice": GPUOptions.from_json(body["choice"])})


def name_of(field_name: str) -> str:
    """Return the name of a field in the form."""
    return f"{KEY}_{field_name}"


def from_form(data: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Read the GPU fields of a form or a query, numbers as numbers. :func:`parse` checks them."""
    said: dict[str, Any] = {}
    for name in FIELDS:
        values = data.get(name_of(name)) or []
        if not values or values[0] == "":
            continue
        if name in FLAGS:
            said[name] = {"1": True, "0": False}.get(values[0], values[0])
        else:
            said[name] = _number(values[0]) if name != "model" else values[0]
    return said


def _number(text: str) -> Any:
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if math.isfinite(value) and value == int(value) and "." not in text else value


def parse(said: Any, limits: Limits) -> GPUOptions | None:
    """Return the choice that a user made by form or by REST; None for no GPU.

    Raises InvalidRequest for a malformed choice, ImpossibleRequest for one that ``limits`` do not allow.
    """
    if said is None or said == {}:
        said = {"num_gpus": limits.default_gpus, "partial": limits.default_partial}
    if not isinstance(said, Mapping):
        raise InvalidRequest(f'{KEY} must look like {{"num_gpus": 1, "partial": 0.5}}')
    unknown = sorted(str(k) for k in set(said) - set(FIELDS))
    if unknown:
        raise InvalidRequest(f"{KEY}: unknown field {unknown[0][:40]!r}; the fields are {', '.join(FIELDS)}")
    count, partial, model = said.get("num_gpus", 0), said.get("partial", limits.most), said.get("model", "")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise InvalidRequest(f"the number of GPUs must be a whole number from 0 up, not {_shown(count)}")
    if count == 0:
        return None
    if (
        isinstance(partial, bool)
        or not isinstance(partial, (int, float))
        or not REQUEST_FIELDS["partial"].allows(partial)
    ):
        raise InvalidRequest(
            f"the share of a GPU's memory must be a number above 0 and at most 1, not {_shown(partial)}"
        )
    if not isinstance(model, str) or len(model) > 200 or not model.isprintable():
        raise InvalidRequest("the GPU model must be a name of at most 200 printable characters")
    flags = {name: said.get(name, False) for name in FLAGS}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} must be true or false, not {_shown(value)}")
    if count > limits.max_gpus:
        raise ImpossibleRequest(
            f"{count} GPUs were chosen; this hub lends at most {limits.max_gpus}: choose fewer"
        )
    if not limits.least <= partial <= limits.most:
        raise ImpossibleRequest(
            f"{partial:g} of each GPU's memory was chosen; choose a share from {limits.least:g} to {limits.most:g}"
        )
    if model and limits.models and model not in limits.models:
        raise ImpossibleRequest(
            f"this hub does not lend {_shown(model)}; choose one of {', '.join(limits.models)}"
        )
    return GPUOptions(count, float(partial), model, **flags)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"
