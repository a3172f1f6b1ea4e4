"""Storages that several processes of a lease use: sent by one session, opened by others."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from .device import Device
from .storages import Poisoned, Slot
from .templates import BadRecord

if TYPE_CHECKING:
    from .residence import Copy

#: The length in bytes of the random name under which a storage is sent.
NAME_BYTES = 16


class SharedBlock:
    """The memory behind the slots of several sessions.

    It is freed when no session has a slot on it and nothing that was sent still waits to be opened.
    """

    __slots__ = ("base", "copy", "device", "name", "nbytes", "senders", "users")

    def __init__(self, slot: Slot, name: bytes) -> None:
        self.base: torch.Tensor | None = slot.memory()
        #: as a slot has one
        self.copy: Copy | None = slot.copy
        self.device = slot.device
        self.nbytes = slot.nbytes
        self.name = name
        #: the sessions that have a slot on it
        self.users = 1
        #: one entry for each time that it was sent and not opened yet: the session that sent it
        self.senders: list[object] = []

    def memory(self) -> torch.Tensor | None:
        """The tensor on it, which is brought back if it was away."""
        if self.base is None and self.copy is not None:
            self.copy.fetch()
        return self.base


class SharedStorages:
    """What the sessions of a worker have sent to each other. Safe to use from several threads.

    A block outlives the session that sent it, so a process may send its results and end. If nobody opens them,
    they are dropped when their memory is needed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[bytes, SharedBlock] = {}
        self._ended: set[object] = set()

    def send(self, slot: Slot, name: Any, sender: object) -> None:
        """Keep the storage of ``slot`` until somebody opens ``name``. Raises Poisoned and BadRecord."""
        if not isinstance(name, bytes) or len(name) != NAME_BYTES:
            raise BadRecord(f"a shared storage named {name!r:.60}")
        if slot.poison is not None:
            raise Poisoned(slot.poison)
        with self._lock:
            block = slot.shared
            if (block.name != name) if block is not None else (name in self._blocks):
                raise BadRecord("a name of another shared storage")
            if block is None:
                block = slot.shared = self._blocks[name] = SharedBlock(slot, name)
            block.senders.append(sender)

    def open(self, name: Any) -> Slot:
        """Return a new slot on the storage sent as ``name``. Raises RuntimeError if its memory was freed."""
        with self._lock:
            block = self._blocks.get(name) if isinstance(name, bytes) else None
            if block is None:
                raise RuntimeError(
                    "the memory of this tensor was freed before it was received; "
                    "keep the tensor in the process that sends it until the other has received it"
                )
            if block.senders:
                block.senders.pop()
            block.users += 1
            slot = Slot(block.memory(), block.device, block.nbytes)
            slot.shared, slot.copy = block, block.copy
            return slot

    def has(self, name: bytes) -> bool:
        """Whether something sent as ``name`` is there."""
        with self._lock:
            return name in self._blocks

    def blocks(self) -> list[SharedBlock]:
        """Every block that there is."""
        with self._lock:
            return list(self._blocks.values())

    def put(self, slot: Slot, name: bytes, senders: list[object], ended: list[object]) -> SharedBlock:
        """Enter a block that no session has a slot on yet: sent by ``senders``, of which some have ``ended``.

        Raises BadRecord.
        """
        with self._lock:
            if len(name) != NAME_BYTES or name in self._blocks:
                raise BadRecord(f"a shared storage named {name!r:.60}")
            block = self._blocks[name] = SharedBlock(slot, name)
            block.users, block.senders = 0, senders
            self._ended.update(ended)
            return block

    def withdraw(self, name: bytes, sender: object) -> None:
        """Free what ``sender`` has sent as ``name``, unless somebody has opened it."""
        with self._lock:
            block = self._blocks.get(name)
            if block is None or sender not in block.senders:
                return
            block.senders.remove(sender)
            is_free = self._drop_unused(block)
        if is_free:
            block.device.give_storage(block.nbytes)

    def leave(self, slot: Slot) -> bool:
        """Drop a slot. Return whether the memory is free now, which the caller accounts for."""
        block = slot.shared
        if block is None:
            return True
        with self._lock:
            block.users -= 1
            return self._drop_unused(block)

    def end(self, session: object) -> None:
        """Note that ``session`` has ended; what it sent stays until the memory is needed."""
        with self._lock:
            if any(session in block.senders for block in self._blocks.values()):
                self._ended.add(session)

    def reclaim(self, device: Device) -> bool:
        """Free what ended sessions sent and nobody opened. Return whether there was any on ``device``."""
        with self._lock:
            lost = [
                block
                for block in self._blocks.values()
                if block.device is device and not block.users and self._ended.issuperset(block.senders)
            ]
            for block in lost:
                block.senders.clear()
                self._drop_unused(block)
            waiting = {sender for block in self._blocks.values() for sender in block.senders}
            self._ended &= waiting
        for block in lost:
            device.give_storage(block.nbytes)
        return bool(lost)

    def _drop_unused(self, block: SharedBlock) -> bool:
        if block.users or block.senders:
            return False
        self._blocks.pop(block.name, None)
        block.base = block.copy = None
        return True
