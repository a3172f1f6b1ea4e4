"""Copies between host and device in pieces, through page-locked memory, with some pieces on their way at once."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator

import torch

from jupyter_gpupool.pytorch.protocol.sizes import host_bytes

from .device import Event

#: Copies one piece without waiting, the second of two tensors of one size into the first.
Push = Callable[[torch.Tensor, torch.Tensor], Event]
#: Page-locked memory of so many bytes.
Allocate = Callable[[int], torch.Tensor]


class Staging:
    """Cuts copies into pieces of ``piece_bytes``, of which ``depth`` may be on their way at once.

    ``allocate`` returns page-locked memory, and ``push`` starts the copy of a piece and returns its end as an event.
    All tensors here are one-dimensional and of bytes.
    """

    def __init__(self, allocate: Allocate, push: Push, piece_bytes: int, depth: int) -> None:
        self._allocate = allocate
        self._push = push
        self._piece_bytes = piece_bytes
        self._depth = depth

    def pieces(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """The start and end of each piece."""
        for start in range(0, nbytes, self._piece_bytes):
            yield start, min(nbytes, start + self._piece_bytes)

    def upload(self, target: torch.Tensor, receive: Callable[[memoryview], None]) -> None:
        """Fill a device's tensor with what ``receive`` writes into one piece after the other.

        Every byte is received, even where a copy fails. The last copies may still be on their way.
        """
        on_the_way: collections.deque[tuple[Event, torch.Tensor]] = collections.deque()
        free: list[torch.Tensor] = []
        received = 0
        nbytes = target.numel()
        try:
            for start, end in self.pieces(nbytes):
                if len(on_the_way) == self._depth:
                    event, buffer = on_the_way.popleft()
                    event.synchronize()
                    free.append(buffer)
                buffer = free.pop() if free else self._allocate(min(self._piece_bytes, nbytes))
                piece = buffer[: end - start]
                received = end
                receive(host_bytes(piece))
                on_the_way.append((self._push(target[start:end], piece), buffer))
        except OSError:
            raise  # the connection has broken
        except Exception:
            discard(receive, nbytes - received)
            raise

    def download(self, source: torch.Tensor, target: torch.Tensor, pinned: bool) -> Iterator[int]:
        """Fill host memory from a device's tensor, and yield how many bytes are there, after each piece.

        ``pinned``: the host memory is page-locked, so that all pieces are started at once.
        """
        todo = self.pieces(source.numel())
        on_the_way: collections.deque[tuple[Event, torch.Tensor, int, int]] = collections.deque()
        free: list[torch.Tensor] = []
        for start, end in todo:
            if not pinned and len(on_the_way) == self._depth:
                yield self._arrive(target, on_the_way, free, pinned)
            if pinned:
                piece = target[start:end]
            else:
                # Only the last piece is shorter, so that a buffer that is used again is long enough.
                piece = free.pop()[: end - start] if free else self._allocate(end - start)
            on_the_way.append((self._push(piece, source[start:end]), piece, start, end))
        while on_the_way:
            yield self._arrive(target, on_the_way, free, pinned)

    def _arrive(
        self,
        target: torch.Tensor,
        on_the_way: collections.deque[tuple[Event, torch.Tensor, int, int]],
        free: list[torch.Tensor],
        pinned: bool,
    ) -> int:
        event, piece, start, end = on_the_way.popleft()
        event.synchronize()
        if not pinned:
            target[start:end].copy_(piece)
            free.append(piece)
        return end


def discard(receive: Callable[[memoryview], None], nbytes: int) -> None:
    """Receive bytes that nobody needs."""
    scratch = memoryview(bytearray(min(max(nbytes, 0), 1 << 20)))
    while nbytes > 0:
        piece = scratch[: min(nbytes, len(scratch))]
        receive(piece)
        nbytes -= len(piece)
