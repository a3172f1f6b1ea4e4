"""What a user chooses on the spawn page: the fields are declared once, and the form and the checks follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from urllib.parse import parse_qsl, urlencode

from ...pool.errors import ImpossibleRequest, InvalidRequest

#: Where a choice is kept in JupyterHub's ``user_options``, and the prefix of the form's fields.
KEY = "gpupool"
MODES = ("server", "kernel")


@dataclass(frozen=True)
class Limits:
    """What may be chosen. ``least`` and ``step`` are shares of a GPU's memory; ``models`` are names, none: any."""

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


@dataclass(frozen=True)
class Choice:
    """``num_gpus`` GPUs with the share ``partial`` of each one's memory; of one ``model``, empty for any.

    A field's metadata is its line on the form.
    """

    num_gpus: int = field(metadata={"label": "GPUs"})
    partial: float = field(default=1.0, metadata={"label": "Share of each GPU's memory"})
    model: str = field(default="", metadata={"label": "Model"})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def wish(self) -> dict[str, Any]:
        """As a kernel's wish, and as fields of a request."""
        filters = {"name": self.model} if self.model else {}
        return {"num_gpus": self.num_gpus, "partial": self.partial, "filters": filters}

    def to_text(self) -> str:
        """One word, without the braces of JSON, which KubeSpawner takes for its own."""
        return urlencode(self.to_json())

    @classmethod
    def from_text(cls, text: str) -> Choice:
        """Raises ValueError for what :meth:`to_text` did not write."""
        said = dict(parse_qsl(text, strict_parsing=True, keep_blank_values=True))
        try:
            return cls(int(said["num_gpus"]), float(said["partial"]), said["model"])
        except KeyError:
            raise ValueError("not a choice") from None

    def __str__(self) -> str:
        return f"{self.num_gpus} × {self.partial:g}" + (f" {self.model}" if self.model else "")


FIELDS = tuple(f.name for f in fields(Choice))


def name_of(field_name: str) -> str:
    """The form's name of a field."""
    return f"{KEY}_{field_name}"


def from_form(data: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What a form (or a query) says of our fields, as numbers where they are; judged by :func:`parse` alone."""
    said: dict[str, Any] = {}
    for name in FIELDS:
        values = data.get(name_of(name)) or []
        if values and values[0] != "":
            said[name] = _number(values[0]) if name != "model" else values[0]
    return said


def _number(text: str) -> Any:
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if math.isfinite(value) and value == int(value) and "." not in text else value


def parse(said: Any, limits: Limits) -> Choice | None:
    """The choice that somebody made, by form or by REST; None for no GPU.

    Raises InvalidRequest for what makes no sense, ImpossibleRequest for what these limits do not allow.
    """
    if said is None or said == {}:
        said = {"num_gpus": limits.default_gpus, "partial": limits.default_partial}
    if not isinstance(said, Mapping):
        raise InvalidRequest(f'{KEY} must look like {{"num_gpus": 1, "partial": 0.5}}')
    unknown = sorted(str(k) for k in set(said) - set(FIELDS))
    if unknown:
        raise InvalidRequest(f"{KEY}: unknown field {unknown[0][:40]!r}; known are {', '.join(FIELDS)}")
    count, partial, model = said.get("num_gpus", 0), said.get("partial", limits.most), said.get("model", "")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise InvalidRequest(f"the number of GPUs must be a whole number from 0 up, not {_shown(count)}")
    if count == 0:
        return None
    if isinstance(partial, bool) or not isinstance(partial, (int, float)) or not 0 < partial <= 1:
        raise InvalidRequest(
            f"the share of a GPU's memory must be a number above 0 and at most 1, not {_shown(partial)}"
        )
    if not isinstance(model, str) or len(model) > 200 or not model.isprintable():
        raise InvalidRequest("the model must be the name of one")
    if count > limits.max_gpus:
        raise ImpossibleRequest(f"{count} GPUs were chosen; this hub lends at most {limits.max_gpus}")
    if not limits.least <= partial <= limits.most:
        raise ImpossibleRequest(
            f"{partial:g} of each GPU's memory was chosen; this hub lends from {limits.least:g} to {limits.most:g}"
        )
    if model and limits.models and model not in limits.models:
        raise ImpossibleRequest(f"this hub does not lend {_shown(model)}; it has {', '.join(limits.models)}")
    return Choice(count, float(partial), model)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"
