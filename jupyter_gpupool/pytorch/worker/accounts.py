"""What each session has of a slice's memory, so that its operators need no lock for the account of it.

An account has a part of the slice's memory in advance. Its session, which is one thread, takes from that and gives back
to it. A session that needs more than the slice has left calls in what accounts have unused; so a slice is full only
once its tensors fill it, however many sessions there are.
"""

from __future__ import annotations

import sys
import time
from typing import Protocol

from jupyter_gpupool.pytorch.protocol.sizes import GRAIN

#: An account takes so many bytes of its slice at once, if there are so many.
BLOCK_BYTES = 64 << 20

#: Without the interpreter's lock, threads need not see each other's assignments in their order.
_IN_ORDER: bool = getattr(sys, "_is_gil_enabled", lambda: True)()


class Slice(Protocol):
    """The memory of a device, which sessions share; its methods take its lock."""

    def refill(self, account: Account, nbytes: int) -> None:
        """Account for an allocation, and let the account have more in advance. Raises OutOfSliceMemory."""

    def give(self, nbytes: int) -> None:
        """Account for freed memory."""


class Account:
    """A session's account. Only the session's thread may call its methods, but for :meth:`call_in`.

    It says when it is ``inside`` of a change, and then looks whether it is ``closed``; :meth:`call_in` closes it, and
    then waits until it is not inside. So each sees the other, whichever comes first.
    """

    __slots__ = ("_slice", "closed", "inside", "left")

    def __init__(self, slice: Slice) -> None:
        self._slice = slice
        #: the bytes that it has in advance
        self.left = 0
        self.inside = False
        self.closed = not _IN_ORDER

    def take(self, nbytes: int) -> None:
        """Account for an allocation. Raises OutOfSliceMemory if it does not fit."""
        self.inside = True
        # What it has is read after that: it may just have been called in.
        if not self.closed and (left := self.left - nbytes) >= 0:
            self.left = left
            self.inside = False
            return
        self.inside = False
        self._slice.refill(self, nbytes)

    def give(self, nbytes: int) -> None:
        """Account for freed memory: what was taken, or a storage of ``nbytes`` bytes."""
        nbytes = -(-nbytes // GRAIN) * GRAIN  # a multiple of that already, or the bytes of a storage
        self.inside = True
        if not self.closed:
            self.left += nbytes
            self.inside = False
            return
        self.inside = False
        self._slice.give(nbytes)

    def call_in(self) -> int:
        """Take what it has in advance away from it, and return how much that was. The caller has the slice's lock."""
        self.closed = True
        while self.inside:
            time.sleep(0)  # it is about to come out, and waits for nothing meanwhile
        left, self.left = self.left, 0
        self.closed = not _IN_ORDER
        return left
