"""Names the calls in frames that a worker has not acknowledged: one of them was under way when it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jupyter_gpupool.pytorch.protocol.commands import CALL_GRAPH, RUN, split
from jupyter_gpupool.transport import frames
from jupyter_gpupool.transport.resumption import Frame

#: The most calls that are named.
_MAX_CALLS = 200


class Called(NamedTuple):
    """What a template calls: its operator, how many fields a call has, and which of them come first."""

    operator: str
    tensors: int
    scalars: int
    new: int

    @property
    def size(self) -> int:
        """The number of fields of a call."""
        return self.tensors + self.scalars + self.new


def unfinished(kept: Sequence[Frame], templates: Mapping[int, Called]) -> list[dict[str, Any]]:
    """Return the calls in these frames as a worker reports them, newest first."""
    found: list[dict[str, Any]] = []
    for frame in kept:
        kind, commands = frames.header_of(frame.head)
        if kind is frames.Kind.RECORDS:
            found += _calls(commands, templates)
    return found[::-1][:_MAX_CALLS]


def _calls(commands: list[Any], templates: Mapping[int, Called]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for code, fields in split(commands, lambda template: templates[template].size):
        if code == RUN:
            found.append({"operator": str(fields[0]["op"])})
        elif code == CALL_GRAPH:
            found.append({"operator": "a compiled graph"})
        elif code >= 0:
            called = templates[code]
            made = called.tensors + called.scalars
            where = {"made": fields[made]} if called.new else {"changed": fields[: called.tensors]}
            found.append({"operator": called.operator, **where})
    return found
