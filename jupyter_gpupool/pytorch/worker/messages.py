"""Tensors that ranks send to each other within one worker: a copy waits under its name until the other rank takes it.

The copies are shared storages, so a lease can be parked and moved while some wait.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from .shared_storages import NAME_BYTES, SharedStorages
from .storages import Slot
from .templates import BadRecord

#: The length in bytes of the random id of a rank that sends.
BOX_BYTES = 16
#: How many ranks that have ended are remembered.
_MAX_ENDED = 4096
#: How many messages workers of other servers may wait for.
_MAX_WATCHED = 4096
#: How often a rank that waits looks whether its own session still goes on, in seconds.
_LOOK_S = 0.5


class Messages:
    """What the ranks in one worker have sent. Safe to use from the threads of all sessions.

    A rank that sends has a box: the id by which others know whose messages they wait for.
    """

    def __init__(self, shared: SharedStorages) -> None:
        self._changed = threading.Condition()
        self._shared = shared
        self._owners: dict[bytes, object] = {}
        self._ended: OrderedDict[bytes, None] = OrderedDict()
        #: why messages could not be sent, by name
        self._failures: dict[bytes, dict[bytes, str]] = {}
        #: what has been sent and not taken: the session that sent it, by name
        self._waiting: dict[bytes, object] = {}
        self._knows_all_ranks = True
        #: what is to be called once a message is there or will not come
        self._watched: dict[tuple[bytes, bytes], list[Callable[[], None]]] = {}
        #: the boxes for whose messages ranks here wait
        self._awaited: Counter[bytes] = Counter()

    def join(self, member: object, box: object) -> bytes:
        """A session has that box from now on. Raises BadRecord if it is another one's."""
        if not isinstance(box, bytes) or len(box) != BOX_BYTES:
            raise BadRecord(f"a rank with the id {box!r:.60}")
        with self._changed:
            if self._owners.setdefault(box, member) is not member:
                raise BadRecord("the id of another rank")
        return box

    def come_from_elsewhere(self) -> None:
        """The lease has moved here, with ranks that had joined there: what nobody takes stays for them."""
        with self._changed:
            self._knows_all_ranks = False

    def post(self, member: object, box: object, name: bytes, content: Slot | str) -> None:
        """Send a storage, or why there is none; its slot is not used any more. Raises BadRecord."""
        mine = self.join(member, box)
        if not isinstance(name, bytes) or len(name) != NAME_BYTES:
            raise BadRecord(f"a message named {name!r:.60}")
        if isinstance(content, Slot):
            self._shared.send(content, name, member)
            self._shared.leave(content)
        with self._changed:
            if isinstance(content, str):
                self._failures.setdefault(mine, {})[name] = content
            else:
                self._waiting[name] = member
            self._changed.notify_all()
        self._call_decided()

    def withdraw(self, member: object, box: object, name: object) -> None:
        """Free what this session has sent under that name, unless it has been taken. Raises BadRecord."""
        mine = self.join(member, box)
        if not isinstance(name, bytes):
            raise BadRecord(f"a message named {name!r:.60}")
        with self._changed:
            self._failures.get(mine, {}).pop(name, None)
            self._waiting.pop(name, None)
        self._shared.withdraw(name, member)

    def has(self, box: bytes, name: bytes) -> bool:
        """Whether that message is there, or will not come."""
        with self._changed:
            return self._is_decided(box, name)

    def when_decided(self, box: bytes, name: bytes, act: Callable[[], None]) -> None:
        """Call ``act`` in some thread once that message is there, or will not come. Raises BadRecord for too many."""
        with self._changed:
            if sum(map(len, self._watched.values())) >= _MAX_WATCHED:
                raise BadRecord("more messages than may be waited for")
            self._watched.setdefault((box, name), []).append(act)
        self._call_decided()

    def _call_decided(self) -> None:
        with self._changed:
            decided = [message for message in self._watched if self._is_decided(*message)]
            acts = [act for message in decided for act in self._watched.pop(message)]
        for act in acts:
            act()

    def _is_decided(self, box: bytes, name: bytes) -> bool:
        return self._shared.has(name) or box in self._ended or name in self._failures.get(box, ())

    def take(
        self,
        box: bytes,
        name: bytes,
        ranks: tuple[int, int],
        timeout_s: float,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Slot:
        """Wait for a message, and return a slot on it. ``ranks``: who sends it, and who takes it.

        Raises RuntimeError, naming the rank, if it does not come.
        """
        source, here = ranks
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._awaited[box] += 1
            try:
                while not self._is_decided(box, name):
                    if is_over() or time.monotonic() > deadline:
                        raise RuntimeError(f"rank {here} waited {timeout_s:g} s in recv for rank {source}")
                    self._changed.wait(min(_LOOK_S, max(0.001, deadline - time.monotonic())))
            finally:
                self._awaited[box] -= 1
                if not self._awaited[box]:
                    del self._awaited[box]
            why = self._failures.get(box, {}).pop(name, None)
            self._waiting.pop(name, None)
        if why is not None:
            raise RuntimeError(f"rank {source} cannot send: {why}")
        if not self._shared.has(name):
            raise RuntimeError(f"rank {source} has ended or left the lease")
        return self._shared.open(name)

    def wait_for(self, member: object, elsewhere: Iterable[bytes] = ()) -> bool:
        """Whether a rank waits for a message of this session, as far as is known.

        ``elsewhere``: the boxes for which ranks at other workers wait.
        """
        with self._changed:
            return any(self._owners.get(box, member) is member for box in (*self._awaited, *elsewhere))

    def leave(self, member: object) -> None:
        """A session has ended: whoever waits for what it has not sent is told.

        With the last rank goes what nobody has taken.
        """
        with self._changed:
            for box in [box for box, owner in self._owners.items() if owner is member]:
                del self._owners[box]
                self._failures.pop(box, None)
                self._ended[box] = None
            while len(self._ended) > _MAX_ENDED:
                self._ended.popitem(last=False)
            if not self._owners and self._knows_all_ranks:
                for name, sender in self._waiting.items():
                    self._shared.withdraw(name, sender)
                self._waiting.clear()
            self._changed.notify_all()
        self._call_decided()
