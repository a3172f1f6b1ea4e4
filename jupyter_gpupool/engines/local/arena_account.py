"""Which chunks of a server's arena are whose. Pure: the memory itself is in arena.py."""

from __future__ import annotations

from collections.abc import Iterable


class ArenaFull(Exception):
    """There are not enough free chunks; ``missing`` more are needed."""

    def __init__(self, missing: int) -> None:
        super().__init__(f"{missing} chunks too few")
        self.missing = missing


class ArenaAccount:
    """Chunks by number. A chunk that was lent is replaced before it is lent again."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._lent: dict[str, list[int]] = {}
        self._cleaning: set[int] = set()

    def add(self, chunk: int) -> None:
        """A new chunk, or one that has been replaced."""
        self._cleaning.discard(chunk)
        self._free.append(chunk)

    def lent(self, lease_id: str) -> tuple[int, ...]:
        """The chunks of a lease."""
        return tuple(self._lent.get(lease_id, ()))

    def lend(self, lease_id: str, count: int) -> list[int]:
        """Lend so many more chunks. Raises :class:`ArenaFull`, and lends none then."""
        if count > len(self._free):
            raise ArenaFull(count - len(self._free))
        chunks = [self._free.pop() for _ in range(count)]
        if chunks:
            self._lent.setdefault(lease_id, []).extend(chunks)
        return chunks

    def release(self, lease_id: str) -> list[int]:
        """Take all chunks of a lease back; they are free again once :meth:`add` is called for each."""
        chunks = self._lent.pop(lease_id, [])
        self._cleaning.update(chunks)
        return chunks

    def lenders(self, besides: Iterable[str]) -> list[str]:
        """The leases that have chunks, the one with the most first, without those of ``besides``."""
        others = set(self._lent) - set(besides)
        return sorted(others, key=lambda lease_id: -len(self._lent[lease_id]))

    @property
    def free(self) -> int:
        """How many chunks can be lent now."""
        return len(self._free)

    @property
    def total(self) -> int:
        """How many chunks there are."""
        return len(self._free) + len(self._cleaning) + sum(map(len, self._lent.values()))
