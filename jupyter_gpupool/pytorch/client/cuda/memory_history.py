"""``torch.cuda.memory._record_memory_history()`` and snapshots of what this process has allocated on the slices.

A snapshot has the form that PyTorch's viewer (memory_viz) reads. Nothing is recorded, and nothing costs time, until
a program asks for it.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.tensor.command_stream import CommandStream
from jupyter_gpupool.pytorch.client.tensor.tensor import Storage
from jupyter_gpupool.pytorch.protocol.sizes import rounded

#: A storage has no address here. It gets a number from here on, as large as CUDA's addresses are.
_FIRST_ADDRESS = 0x7F00_0000_0000
#: From this size on, CUDA's allocator calls a segment large.
_LARGE_BYTES = 1 << 20
_OURS = str(Path(__file__).resolve().parents[2])

#: The functions that run when a program calls them: (code, position in it).
_Stack = tuple[tuple[CodeType, int], ...]


class _Allocation:
    """One storage while it is allocated."""

    __slots__ = ("address", "nbytes", "requested", "index", "stack")

    def __init__(self, address: int, requested: int, index: int, stack: _Stack) -> None:
        self.address = address
        self.requested = requested
        self.nbytes = rounded(requested)
        self.index = index
        self.stack = stack


class MemoryHistory:
    """Records the allocations of one lease, by replacing methods of its streams while it is enabled."""

    def __init__(self) -> None:
        self._next = _FIRST_ADDRESS
        self._live: dict[int, _Allocation] = {}
        self._events: dict[int, deque[tuple[str, int, int, int, _Stack]]] = {}
        self._streams: list[CommandStream] = []
        self._context: str | None = "all"
        self._skipped: frozenset[str] = frozenset()

    # -- torch.cuda.memory's functions

    def record(
        self,
        enabled: Any = "all",
        context: str | None = "all",
        stacks: str = "all",
        max_entries: int = sys.maxsize,
        device: Any = None,
        clear_history: bool = False,
        compile_context: bool = False,
        global_record_annotations: bool = False,
        skip_actions: list[str] | None = None,
        **legacy: Any,
    ) -> None:
        """``_record_memory_history``: record what is allocated ("state"), also its history ("all"), or stop (None).

        Stacks are of Python alone. ``max_entries`` limits the history of each slice. Raises ValueError.
        """
        if isinstance(enabled, bool):  # its former form
            enabled = (
                ("all" if legacy.get("trace_alloc_max_entries", 1) > 1 else "state") if enabled else None
            )
        if enabled not in (None, "state", "all") or context not in (None, "state", "alloc", "all"):
            raise ValueError(
                f"expected enabled to be None, 'state' or 'all', and context None, 'state', 'alloc' or 'all', "
                f"not {enabled!r} and {context!r}"
            )
        self._stop()
        if enabled is None:
            return
        if clear_history:
            self._events.clear()
        kept = min(max_entries, sys.maxsize) if enabled == "all" else 0
        self._context, self._skipped = context, frozenset(skip_actions or ())
        for stream in attachment.streams():
            for index in stream.memory:
                self._events[index] = deque(self._events.get(index, ()), maxlen=kept)
            self._start(stream)

    def snapshot(self, device: Any = None, augment_with_fx_traces: bool = False) -> dict[str, Any]:
        """``_snapshot``: what is allocated now, and the recorded history of each slice. Sizes are in bytes."""
        streams = attachment.streams()
        for index in self._events if self._streams else ():
            self._note("snapshot", 0, 0, index, ())
        traces = [
            [_entry(*event) for event in list(self._events.get(index, ()))]
            for index in range(len(attachment.attached().spec.devices))
        ]
        segments = [_segment(allocation) for allocation in list(self._live.values())]
        for stream in streams:
            for index, memory in stream.memory.items():
                known = sum(s["total_size"] for s in segments if s["device"] == index)
                if memory.allocated() > known:  # allocated while nothing was recorded
                    rest = memory.allocated() - known
                    segments.append(_segment(_Allocation(1 << 30 | index << 20, rest, index, ())))
        return {
            "segments": sorted(segments, key=lambda s: s["address"]),
            "device_traces": traces,
            "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "", "expandable_segments": False},
            "external_annotations": [],
        }

    def segments(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """``torch.cuda.memory_snapshot``: the segments of :meth:`snapshot`, one for each storage."""
        return self.snapshot()["segments"]

    # -- recording

    def _start(self, stream: CommandStream) -> None:
        new, known, free = stream.new_storage, stream.known_storage, stream.free

        def new_storage(nbytes: int, index: int) -> Storage:
            try:
                storage = new(nbytes, index)
            except torch.OutOfMemoryError:
                memory = stream.memory[index]
                self._note("oom", memory.limit - memory.allocated(), rounded(nbytes), index, _stack())
                raise
            self._allocated(storage)
            return storage

        def known_storage(id: int, nbytes: int, index: int) -> Storage:
            storage = known(id, nbytes, index)
            self._allocated(storage)
            return storage

        def free_storage(storage: Storage) -> None:
            # Destructors call this at any moment, so everything here must be possible at any moment.
            found = self._live.pop(storage.id, None)
            free(storage)
            if found is not None:
                stack = _stack() if self._context == "all" else ()
                for action in ("free_requested", "free_completed"):
                    self._note(action, found.address, found.nbytes, found.index, stack)

        vars(stream).update(new_storage=new_storage, known_storage=known_storage, free=free_storage)
        self._streams.append(stream)

    def _stop(self) -> None:
        for stream in self._streams:
            for name in ("new_storage", "known_storage", "free"):
                vars(stream).pop(name, None)
        self._streams.clear()
        self._live.clear()

    def _allocated(self, storage: Storage) -> None:
        address = self._next
        stack = _stack() if self._context is not None else ()
        made = _Allocation(address, storage.nbytes, storage.index, stack)
        self._next += made.nbytes
        self._live[storage.id] = made
        stack = stack if self._context in ("alloc", "all") else ()
        self._note("alloc", address, made.nbytes, made.index, stack)

    def _note(self, action: str, address: int, nbytes: int, index: int, stack: _Stack) -> None:
        if action not in self._skipped:
            self._events[index].append((action, address, nbytes, _now_us(), stack))


def _now_us() -> int:
    return time.time_ns() // 1000


def _stack() -> _Stack:
    """The functions that run now, the innermost first, without this package's own."""
    frame: Any = sys._getframe(2)
    found = []
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_OURS):
            found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


def _frames(stack: _Stack) -> list[dict[str, Any]]:
    return [
        {
            "filename": code.co_filename,
            "line": next((n for a, b, n in code.co_lines() if a <= at < b and n), code.co_firstlineno),
            "name": code.co_name,
        }
        for code, at in stack
    ]


def _entry(action: str, address: int, nbytes: int, time_us: int, stack: _Stack) -> dict[str, Any]:
    where = {"device_free": address} if action == "oom" else {"addr": address}
    return {
        "action": action,
        **where,
        "size": nbytes,
        "stream": 0,
        "time_us": time_us,
        "compile_context": "N/A",
        "frames": _frames(stack),
    }


def _segment(made: _Allocation) -> dict[str, Any]:
    """A segment with one block: freed memory is not kept, so a segment has nothing else."""
    frames = _frames(made.stack)
    return {
        "device": made.index,
        "address": made.address,
        "total_size": made.nbytes,
        "allocated_size": made.nbytes,
        "active_size": made.nbytes,
        "requested_size": made.requested,
        "stream": 0,
        "segment_type": "large" if made.nbytes >= _LARGE_BYTES else "small",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": frames,
        "blocks": [
            {
                "address": made.address,
                "size": made.nbytes,
                "requested_size": made.requested,
                "state": "active_allocated",
                "frames": frames,
            }
        ],
    }
