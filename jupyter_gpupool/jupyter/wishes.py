"""What a kernel is to have: a wish, and the places it may be written in."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..pool.errors import InvalidRequest

#: Field of a wish → the JSON types that it may have, in a kernelspec, a notebook or a request.
FIELDS: dict[str, tuple[type, ...]] = {
    "num_gpus": (int,),
    "partial": (int, float),
    "memory_mib": (int,),
    "filters": (dict,),
    "spread": (bool,),
    "require": (bool,),
}
#: A notebook is read for its metadata; one that is larger than this is not.
_MAX_NOTEBOOK = 64 << 20


@dataclass(frozen=True)
class Wish:
    """``num_gpus`` GPUs with ``partial`` of each one's memory, or ``memory_mib`` MiB; with neither, whole ones.

    ``spread``: they may be of several servers. ``require``: the kernel shall not start without them. ``source`` says
    where the wish was found.
    """

    num_gpus: int = 1
    partial: float | None = None
    memory_mib: int | None = None
    filters: Mapping[str, str] = field(default_factory=dict)
    spread: bool = False
    require: bool = False
    source: str = ""

    def asked(self) -> dict[str, Any]:
        """As arguments of holder.new_request."""
        return {
            "num_gpus": self.num_gpus,
            "partial": self.partial,
            "memory_mib": self.memory_mib,
            "filters": dict(self.filters),
            "spread": self.spread,
        }

    def to_json(self) -> dict[str, Any]:
        """What :func:`parse` makes the same wish of."""
        return {**self.asked(), "require": self.require}


def parse(value: Any, source: str) -> Wish | None:
    """The wish that ``value`` says, None for one of no GPUs. Raises InvalidRequest with one line.

    How many GPUs and how much of them is the pool's to judge; here it is only whether a wish is one.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidRequest(f'{source}: a wish for GPUs looks like {{"num_gpus": 1, "partial": 0.5}}')
    unknown = sorted(str(k) for k in set(value) - set(FIELDS))
    if unknown:
        raise InvalidRequest(f"{source}: unknown field {unknown[0][:40]!r}; known are {', '.join(FIELDS)}")
    fields: dict[str, Any] = {}
    for name, given in value.items():
        if given is None:
            continue
        kinds = FIELDS[name]
        if not isinstance(given, kinds) or (isinstance(given, bool) and bool not in kinds):
            raise InvalidRequest(f"{source}: {name} is a {type(given).__name__}, not {kinds[-1].__name__}")
        fields[name] = given
    filters = fields.get("filters", {})
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in filters.items()):
        raise InvalidRequest(f"{source}: filters maps names to text")
    if not fields or fields.get("num_gpus") == 0:
        return None
    return Wish(**fields, source=source)


def of_notebook(path: str) -> tuple[bool, Wish | None]:
    """Whether the metadata of the notebook at ``path`` says anything (key ``gpupool``), and what it asks for.

    Raises InvalidRequest where what it says makes no sense.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_NOTEBOOK:
            return False, None
        value = json.loads(file.read_text(encoding="utf-8"))["metadata"]["gpupool"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False, None  # a notebook that nobody can read asks for nothing
    return value is not None, parse(value, f"the metadata of {file.name}")


class Wishes:
    """Wishes for kernels that are about to start, by the ids that their clients chose for them."""

    KEPT_S = 600.0
    MOST = 1000

    def __init__(self) -> None:
        self._wishes: dict[str, tuple[float, Wish | None]] = {}

    def put(self, kernel_id: str, wish: Wish | None) -> None:
        """``None`` is a wish too: no GPU, whatever the notebook or the kernelspec say."""
        now = time.monotonic()
        self._wishes = {k: v for k, v in self._wishes.items() if now - v[0] < self.KEPT_S}
        while len(self._wishes) >= self.MOST:
            self._wishes.pop(next(iter(self._wishes)))
        self._wishes[kernel_id] = (now, wish)

    def knows(self, kernel_id: str) -> bool:
        kept = self._wishes.get(kernel_id)
        return kept is not None and time.monotonic() - kept[0] < self.KEPT_S

    def get(self, kernel_id: str) -> Wish | None:
        """Raises KeyError where there is none."""
        return self._wishes[kernel_id][1]

    def forget(self, kernel_id: str) -> None:
        self._wishes.pop(kernel_id, None)

    def take(self, kernel_id: str) -> Wish | None:
        """The wish, which is then forgotten. Raises KeyError where there is none."""
        return self._wishes.pop(kernel_id)[1]


#: Of this process: the provisioner runs in the server that was asked.
wishes = Wishes()
