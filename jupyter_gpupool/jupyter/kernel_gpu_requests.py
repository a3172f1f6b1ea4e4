"""The GPU request of a kernel, and where it may be written: a kernelspec, a notebook, or a call."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.request_schema import WANTED, types

#: The fields of a request, and the JSON types that each may have.
FIELDS: dict[str, tuple[type, ...]] = {
    **{name: tuple(t for t in kinds if t is not type(None)) for name, kinds in types(WANTED).items()},
    "require": (bool,),
}
#: The metadata of a notebook that is larger than this is not read, in bytes.
_MAX_NOTEBOOK_BYTES = 64 << 20


@dataclass(frozen=True)
class GPURequest:
    """A request for ``num_gpus`` GPU slices.

    Each slice has the share ``partial`` of a GPU's memory, or ``memory_mib`` MiB, or else the whole GPU. ``spread``
    allows slices on several servers. With ``never_park``, the kernel keeps its slices while it is idle and others wait.
    With ``require``, the kernel does not start without its slices. ``source`` says where the request was found, for
    messages.
    """

    num_gpus: int = 1
    partial: float | None = None
    memory_mib: int | None = None
    filters: Mapping[str, str] = field(default_factory=dict)
    spread: bool = False
    never_park: bool = False
    require: bool = False
    source: str = ""

    def arguments(self) -> dict[str, Any]:
        """Return the request as arguments of requests.new_request."""
        return {name: getattr(self, name) for name in WANTED}

    def to_json(self) -> dict[str, Any]:
        """Return the request as JSON that :func:`parse` reads."""
        return {**self.arguments(), "require": self.require}


def parse(value: Any, source: str) -> GPURequest | None:
    """Return the request in ``value``, or None if it requests no GPUs. Raises InvalidRequest with one line.

    Only the form is checked here. The pool decides whether it can grant the request.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidRequest(f'{source}: a GPU request must look like {{"num_gpus": 1, "partial": 0.5}}')
    unknown = sorted(str(k) for k in set(value) - set(FIELDS))
    if unknown:
        raise InvalidRequest(
            f"{source}: unknown field {unknown[0][:40]!r}; the fields are {', '.join(FIELDS)}"
        )
    fields: dict[str, Any] = {}
    for name, given in value.items():
        if given is None:
            continue
        kinds = FIELDS[name]
        if not isinstance(given, kinds) or (isinstance(given, bool) and bool not in kinds):
            raise InvalidRequest(
                f"{source}: {name} is a {type(given).__name__}, but must be {kinds[-1].__name__}"
            )
        fields[name] = given
    filters = fields.get("filters", {})
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in filters.items()):
        raise InvalidRequest(f"{source}: filters must map names to text")
    if not fields or fields.get("num_gpus") == 0:
        return None
    return GPURequest(**fields, source=source)


def of_notebook(path: str) -> tuple[bool, GPURequest | None]:
    """Return whether a notebook's metadata has the key ``gpupool``, and the request that it contains.

    Raises InvalidRequest if that is malformed.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_NOTEBOOK_BYTES:
            return False, None
        value = json.loads(file.read_text(encoding="utf-8"))["metadata"]["gpupool"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False, None  # an unreadable notebook requests nothing
    return value is not None, parse(value, f"the metadata of {file.name}")


class PendingGPURequests:
    """GPU requests for kernels that are about to start, by the kernel ids that their clients chose."""

    KEPT_S = 600.0
    MAX_REQUESTS = 1000

    def __init__(self) -> None:
        self._requests: dict[str, tuple[float, GPURequest | None]] = {}

    def put(self, kernel_id: str, request: GPURequest | None) -> None:
        """Store a request. ``None`` means no GPU, whatever the notebook or the kernelspec request."""
        now = time.monotonic()
        self._requests = {k: v for k, v in self._requests.items() if now - v[0] < self.KEPT_S}
        while len(self._requests) >= self.MAX_REQUESTS:
            self._requests.pop(next(iter(self._requests)))
        self._requests[kernel_id] = (now, request)

    def has(self, kernel_id: str) -> bool:
        """Return whether a request, or None, is stored for the kernel."""
        kept = self._requests.get(kernel_id)
        return kept is not None and time.monotonic() - kept[0] < self.KEPT_S

    def get(self, kernel_id: str) -> GPURequest | None:
        """Return the request for a kernel. Raises KeyError if there is none."""
        return self._requests[kernel_id][1]

    def forget(self, kernel_id: str) -> None:
        """Remove the request for a kernel, if there is one."""
        self._requests.pop(kernel_id, None)

    def take(self, kernel_id: str) -> GPURequest | None:
        """Remove and return the request for a kernel. Raises KeyError if there is none."""
        return self._requests.pop(kernel_id)[1]


#: The requests of this process: a provisioner runs in the server that stored its kernel's request.
pending_requests = PendingGPURequests()
