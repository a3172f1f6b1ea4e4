"""What the ranks of a process group tell each other through its store: which worker has their slices."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

#: how many worlds this process has begun: a store may have answers of the one before
_worlds = 0
#: what names the worker that has a slice, by the slice's number
_places: list[Callable[[int], str]] = []


def tell_workers_apart_by(place_of: Callable[[int], str]) -> None:
    """Compare ranks' workers by what ``place_of`` returns for the index of a device."""
    _places[:] = [place_of]


def begin_world() -> None:
    """Take no notice of what ranks said in a world before."""
    global _worlds
    _worlds += 1


class Card(NamedTuple):
    """What a rank says of itself. ``nonce`` is random."""

    place: str
    nonce: str

    def digest(self, *parts: Any) -> bytes:
        """A name of 16 bytes that only this rank and those who have its card can know."""
        text = "/".join(map(str, (self.nonce, *parts)))
        return hashlib.sha256(text.encode()).digest()[:16]

    @property
    def box(self) -> bytes:
        """What the worker calls this rank."""
        return self.digest("box")


class Ranks:
    """The ranks of a process group, seen by one of them whose tensors are on the slice ``index``."""

    def __init__(self, pg: Any, timeout_s: float, index: int) -> None:
        self.size: int = pg.size()
        self.rank: int = pg.rank()
        self.timeout_s = timeout_s
        self.own = Card(_places[0](index), secrets.token_hex(16))
        #: the next number of a message, by its direction, the other rank and the tag
        self.counts: Counter[tuple[str, int, int]] = Counter()
        self._store = pg.get_group_store()
        self._key = f"gpupool/{_worlds}"
        self._cards = {self.rank: self.own}
        self._here = {index}

    def publish(self) -> None:
        """Let the others read this rank's card."""
        self._store.set(f"{self._key}/{self.rank}", json.dumps(self.own))

    def card(self, rank: int) -> Card:
        """A rank's card, waiting until it has one."""
        if rank not in self._cards:
            self._cards[rank] = Card(*json.loads(self._store.get(f"{self._key}/{rank}")))
        return self._cards[rank]

    def known_card(self, rank: int) -> Card | None:
        """A rank's card, if it has one already."""
        if rank not in self._cards and not self._store.check([f"{self._key}/{rank}"]):
            return None
        return self.card(rank)

    def is_near(self, rank: int) -> bool:
        """Whether that rank has its slices at the same worker; waits until it has said so."""
        return self.card(rank).place == self.own.place

    def check(self, index: int) -> None:
        """Raise RuntimeError for a tensor on a slice of another worker than this rank's others."""
        if index not in self._here:
            if _places[0](index) != self.own.place:
                raise RuntimeError(
                    f"rank {self.rank} exchanges tensors on cuda:{index}, which is on another GPU server than the ones "
                    "before in this process group; choose slices of one server, or make another group"
                )
            self._here.add(index)
