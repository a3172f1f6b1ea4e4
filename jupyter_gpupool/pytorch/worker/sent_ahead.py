"""Sends a lease's memory to its next worker while the sessions go on, and knows what was written since.

Each piece of memory is marked before it is sent, as one is that has a copy in the arena: a write makes the mark
invalid. What has no valid mark once the sessions rest is sent then.
"""

from __future__ import annotations

from .residence import Copy, Piece, Residence
from .state_stream import PIECE_BYTES, StateWriter

#: So few bytes that it is not worth while to send them ahead again, in bytes.
_FEW_BYTES = 4 << 20


class SentAhead:
    """What the next worker has of this one's memory. ``nbytes``: what has been sent."""

    def __init__(self, residence: Residence) -> None:
        self._residence = residence
        self._marks: dict[int, Copy] = {}
        self._whole: set[int] = set()
        self._own: set[Copy] = set()
        self._staging = memoryview(bytearray(PIECE_BYTES))
        self.nbytes = 0

    def send(self, writer: StateWriter) -> None:
        """Send all memory that is on a device, and again what was written meanwhile, while that gets less and less.

        Raises CannotPark, WireError and OSError.
        """
        self._residence.until_resident()
        before: int | None = None
        while True:
            if not self._residence.alone():
                return  # it is parked, or computes for long: everything is sent at rest
            try:
                pieces = self._residence.pieces()
                valid = self._valid(pieces)
                todo = [key for key in pieces if key not in valid]
                nbytes = sum(pieces[key].storage.nbytes() for key in todo)
                if nbytes <= _FEW_BYTES or (before is not None and nbytes > before // 2):
                    return
            finally:
                self._residence.gate.open()
            before = nbytes
            self._drop(writer, valid)
            for key in todo:
                if not self._send(writer, key, pieces.pop(key)):
                    return

    def finish(self, writer: StateWriter) -> set[int]:
        """Return the memory that need not be sent again, by key. Call it while the sessions rest.

        Raises CannotPark, WireError and OSError.
        """
        valid = set() if self._residence.gate.parked else self._valid(self._residence.pieces())
        self._drop(writer, valid)
        return valid

    def forget(self) -> None:
        """The lease goes on here: remove the marks."""
        self._residence.unmark(self._own)
        self._own.clear()

    def _drop(self, writer: StateWriter, valid: set[int]) -> None:
        """Let the other worker free what is out of date: it has no more room than this one."""
        for key in self._marks.keys() - valid:
            writer.freed(key)
            del self._marks[key]
            self._whole.discard(key)

    def _valid(self, pieces: dict[int, Piece]) -> set[int]:
        # Another piece may have the key of one that was freed. It has no mark.
        return {key for key in self._whole & pieces.keys() if pieces[key].copy is self._marks[key]}

    def _send(self, writer: StateWriter, key: int, piece: Piece) -> bool:
        """Send a piece in parts, between two of which the sessions go on. False if they do not come to rest.

        Only as long as nothing is written to it: else it is sent again later.
        """
        at, total = 0, piece.storage.nbytes()
        mark: Copy | None = None
        self._whole.discard(key)
        while mark is None or at < total:
            if not self._residence.alone():
                return False
            try:
                if mark is None:
                    if not piece.is_used:
                        return True
                    mark = piece.copy
                if mark is None:
                    mark = self._residence.mark(piece)
                    self._own.add(mark)
                if not mark.valid or not piece.is_used:
                    return True
                part = self._staging[: min(PIECE_BYTES, total - at)]
                piece.read(at, part)
            finally:
                self._residence.gate.open()
            if at == 0:
                self._marks[key] = mark
                writer.begin(key, self._residence.ordinal(piece.device), total)
            writer.part(key, at, part)
            at += len(part)
            self.nbytes += len(part)
        self._whole.add(key)
        return True
