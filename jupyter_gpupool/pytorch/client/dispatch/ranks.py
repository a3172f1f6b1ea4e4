"""What the ranks of a process group tell each other through its store: which worker has their slices."""

from __future__ import annotations

import atexit
import hashlib
import json
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

#: how many worlds this process has begun: a store may have answers of the one before
_worlds = 0
#: The longest pause between two looks for a rank's card, in seconds.
_MAX_PAUSE_S = 0.1
#: set when the process ends
_over = threading.Event()
_natives: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
#: The longest time that the end of the process waits for all of them, in seconds.
_END_S = 5.0
#: what names the worker that has a slice, by the slice's number: for this process, and for the lease's other workers
_places: list[Callable[[int], str]] = []
_peers: list[Callable[[int], str]] = []


@atexit.register
def _end_natives() -> None:
    """Leave no thread in c10d: one that comes back from it while the interpreter ends aborts the process."""
    _over.set()
    deadline = time.monotonic() + _END_S
    for thread in list(_natives):
        thread.join(max(0.0, deadline - time.monotonic()))


def start_native(thread: threading.Thread) -> None:
    """Start a thread that waits in c10d. The end of the process waits for it, though not for long."""
    _natives.add(thread)
    thread.start()


def tell_workers_apart_by(place_of: Callable[[int], str], peer_of: Callable[[int], str]) -> None:
    """Compare ranks' workers by what ``place_of`` returns for the index of a device.

    ``peer_of`` returns the name by which other workers of the lease know it; empty where they are not linked.
    """
    _places[:] = [place_of]
    _peers[:] = [peer_of]


def begin_world() -> None:
    """Take no notice of what ranks said in a world before."""
    global _worlds
    _worlds += 1


class Card(NamedTuple):
    """What a rank says of itself.

    ``nonce`` is random; ``peer``: its worker's name among those of the lease; ``linked``: the names of those that its
    worker was linked to when it said so.
    """

    place: str
    nonce: str
    peer: str = ""
    linked: Sequence[str] = ()

    def digest(self, *parts: Any) -> bytes:
        """A name of 16 bytes that only this rank and those who have its card can know."""
        text = "/".join(map(str, (self.nonce, *parts)))
        return hashlib.sha256(text.encode()).digest()[:16]

    @property
    def box(self) -> bytes:
        """What the worker calls this rank."""
        return self.digest("box")


class _Peer:
    """What is to be called when a rank's card is known, in that order."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.acts: list[Callable[[], None]] = []


class Ranks:
    """The ranks of a process group, seen by one of them whose tensors are on the slice ``index``."""

    def __init__(self, pg: Any, timeout_s: float, index: int) -> None:
        self.size: int = pg.size()
        self.rank: int = pg.rank()
        self.timeout_s = timeout_s
        self.own = Card(_places[0](index), secrets.token_hex(16), _peers[0](index))
        #: the next number of a message, by its direction, the other rank and the tag
        self.counts: Counter[tuple[str, int, int]] = Counter()
        self._store = pg.get_group_store()
        self._key = f"gpupool/{_worlds}"
        self._cards = {self.rank: self.own}
        self._here = {index}
        self._peers: dict[int, _Peer] = {}
        self._watching = threading.Lock()
        self._watcher: threading.Thread | None = None

    def publish(self, linked: Sequence[str] = ()) -> None:
        """Let the others read this rank's card, by which its worker is linked to those of these names."""
        self._cards[self.rank] = self.own = self.own._replace(linked=list(linked))
        self._store.set(f"{self._key}/{self.rank}", json.dumps(self.own))

    def card(self, rank: int) -> Card:
        """A rank's card, waiting until it has one. Raises RuntimeError as :meth:`cards`."""
        return self.cards([rank])[0]

    def cards(self, ranks: Sequence[int]) -> list[Card]:
        """The cards of several ranks, waiting until they have them.

        Raises RuntimeError, naming the missing ones, after the group's timeout.
        """
        self._wait_for(lambda: [r for r in ranks if self.known_card(r) is None])
        for r in ranks:
            self.settle(r)
        return [self._cards[r] for r in ranks]

    def gather(self, what: str, text: str) -> list[str]:
        """What each rank of the group says under that name, once all have. Raises RuntimeError as :meth:`cards`."""
        keys = [f"{self._key}/{what}/{r}" for r in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(text))
        self._wait_for(lambda: [r for r, key in enumerate(keys) if not self._store.check([key])])
        return [str(json.loads(self._store.get(key))) for key in keys]

    def _wait_for(self, missing: Callable[[], list[int]]) -> None:
        deadline, pause_s = time.monotonic() + self.timeout_s, 0.001
        while ranks := missing():
            if time.monotonic() > deadline:
                named = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                raise RuntimeError(
                    f"rank {self.rank} waited {self.timeout_s:g} s for {named} to exchange tensors"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def known_card(self, rank: int, store: Any = None) -> Card | None:
        """A rank's card, if it has one already. ``store``: where to look, instead of the group's own connection."""
        store = store or self._store
        if rank not in self._cards and not store.check([f"{self._key}/{rank}"]):
            return None
        if rank not in self._cards:
            self._cards[rank] = Card(*json.loads(store.get(f"{self._key}/{rank}")))
        return self._cards[rank]

    def when_known(self, rank: int, act: Callable[[], None]) -> None:
        """Call ``act`` as soon as that rank has its card, after what was to be called before."""
        peer = self._peers.setdefault(rank, _Peer())
        with peer.lock:
            peer.acts.append(act)
        if self.known_card(rank) is not None:
            self.settle(rank)
        else:
            self._watch()

    def settle(self, rank: int) -> None:
        """Call now what waits for that rank's card, which is known; return when all of it has been called."""
        peer = self._peers.get(rank)
        if peer is not None:
            with peer.lock:
                acts, peer.acts = peer.acts, []
                for act in acts:
                    act()

    def _watch(self) -> None:
        """Look for cards in the background: a program need not wait for what it sends."""
        with self._watching:
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._look, name="gpupool-ranks", daemon=True)
                start_native(self._watcher)

    def _look(self) -> None:
        pause_s, store = 0.001, None
        while True:
            with self._watching:
                waited_for = [r for r, peer in list(self._peers.items()) if peer.acts]
                if not waited_for:
                    self._watcher = None
                    return
            try:
                store = store or _own(self._store)
                for rank in waited_for:
                    if self.known_card(rank, store) is not None:
                        self.settle(rank)
            except Exception:  # the store is gone with its world; who waits in the program hears of it
                with self._watching:
                    self._watcher = None
                return
            if _over.wait(pause_s):
                return
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def is_near(self, rank: int) -> bool:
        """Whether that rank has its slices at the same worker; waits until it has said so."""
        return self.card(rank).place == self.own.place

    def is_linked(self, rank: int) -> bool:
        """Whether that rank's worker and this one are linked, as both say; waits until it has said so."""
        card, own = self.card(rank), self.own
        leases = {one.place.partition(" ")[0] for one in (card, own)}
        return len(leases) == 1 and card.peer in own.linked and own.peer in card.linked

    def check(self, index: int) -> None:
        """Raise RuntimeError for a tensor on a slice of another worker than this rank's others."""
        if index not in self._here:
            if _places[0](index) != self.own.place:
                raise RuntimeError(
                    f"rank {self.rank} exchanges tensors on cuda:{index}, which is on another GPU server than the ones "
                    "before in this process group; choose slices of one server, or make another group"
                )
            self._here.add(index)


def _own(store: Any) -> Any:
    """A connection to the store that nobody else waits on: one of a TCPStore serves one call at a time."""
    ground = getattr(store, "_underlying_non_prefix_store", store)
    return (
        store.clone() if isinstance(ground, torch.distributed.TCPStore) and hasattr(store, "clone") else store
    )
