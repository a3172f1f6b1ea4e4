"""The values that the pool speaks in. Frozen, without behaviour beyond describing themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

MIB = 1024 * 1024


class LeaseState(str, Enum):
    """Where a lease is in its life; see the diagram in docs/architecture.md."""

    QUEUED = "QUEUED"
    GRANTED = "GRANTED"
    ACTIVE = "ACTIVE"
    PARKED = "PARKED"
    RELEASED = "RELEASED"
    EXPIRED = "EXPIRED"
    LOST = "LOST"
    CANCELLED = "CANCELLED"

    @property
    def holds(self) -> bool:
        """Whether a lease in this state occupies its slices."""
        return self in _HOLDING

    @property
    def ended(self) -> bool:
        return self in _ENDED


_HOLDING = (LeaseState.GRANTED, LeaseState.ACTIVE)
_ENDED = (LeaseState.RELEASED, LeaseState.EXPIRED, LeaseState.LOST, LeaseState.CANCELLED)


@dataclass(frozen=True)
class GPU:
    """One physical device of one GPU server; ``memory_mib`` is what the pool may grant of it, less ``taken_mib``,
    which others than this pool hold now. One that is not ``healthy`` gets no new slices; ``trouble`` says why."""

    uuid: str
    server: str
    index: int
    name: str
    memory_mib: int
    emulated: bool = False
    healthy: bool = True
    taken_mib: int = 0
    trouble: str = ""


@dataclass(frozen=True)
class Server:
    """A machine that holds GPUs and runs workers; ``host`` is where clients reach its workers.

    ``draining``: what is granted there stays, but nothing new is placed there.
    """

    name: str
    host: str
    gpus: tuple[GPU, ...]
    draining: bool = False


@dataclass(frozen=True)
class Limits:
    """What the leases of a namespace may hold together; None is no limit.

    ``memory_mib`` and ``gpus`` (whole GPUs that the slices amount to) are sums over all slices, ``leases`` counts
    those that hold slices. ``user_share`` (0 < share <= 1) is what one user may hold of these three. ``lease_s``
    is the longest lease, ``idle_s`` how long one may compute nothing.
    """

    memory_mib: int | None = None
    gpus: float | None = None
    leases: int | None = None
    user_share: float | None = None
    lease_s: float | None = None
    idle_s: float | None = None


class Role(str, Enum):
    """What a member of a namespace may do there; each may do what those before it may."""

    VIEW = "view"
    USE = "use"
    ADMINISTER = "administer"


@dataclass(frozen=True)
class Namespace:
    """A tenant. ``ceiling`` is what the pool's administrator allows, ``limits`` is what holds: never more than that.

    ``weight``: the share that it gets when requests queue, compared with others. ``names_holders``: its members
    see who of them holds what.
    """

    name: str
    description: str = ""
    limits: Limits = Limits()
    ceiling: Limits = Limits()
    weight: float = 1.0
    names_holders: bool = False
    members: Mapping[str, Role] = field(default_factory=dict)


@dataclass(frozen=True)
class AskedBack:
    """Somebody would like to have what a lease holds."""

    by: str
    at: float
    message: str = ""


@dataclass(frozen=True)
class Request:
    """What a user asks for, checked by :func:`jupyter_gpupool.pool.placement.validate`.

    Exactly one of ``partial`` (0 < p <= 1, of each GPU's memory) and ``memory_mib`` (MiB per GPU)
    is set. ``spread``: the GPUs may be of several servers. ``id`` is a uuid that the client chose, so
    that repeating the request is harmless.
    ``secret_sha256`` is the hex digest of a secret that only the client knows: the worker admits
    who can show it, and the pool never sees it.
    """

    id: str
    owner: str
    num_gpus: int = 1
    partial: float | None = None
    memory_mib: int | None = None
    filters: Mapping[str, str] = field(default_factory=dict)
    spread: bool = False
    namespace: str = "default"
    wait: bool = True
    secret_sha256: str = ""
    label: str = ""
    client: str = ""


@dataclass(frozen=True)
class Slice:
    """A share of one GPU held by one lease."""

    gpu_uuid: str
    server: str
    index: int
    name: str
    memory_mib: int
    total_mib: int
    emulated: bool = False


@dataclass(frozen=True)
class WorkerAddress:
    """Where a lease's worker listens, and which process it is (``created`` guards pid reuse).

    ``elsewhere``: the workers on the other servers of a lease that spans several, by server. A lease's own is that
    of its first slice.
    """

    host: str
    port: int
    pid: int
    created: float
    elsewhere: Mapping[str, WorkerAddress] = field(default_factory=dict)

    def on(self, server: str) -> WorkerAddress:
        """The one that serves the slices on that server."""
        return self.elsewhere.get(server, self)

    def to_json(self) -> dict[str, Any]:
        """Without those elsewhere."""
        return {"host": self.host, "port": self.port, "pid": self.pid, "created": self.created}


@dataclass(frozen=True)
class Lease:
    """A request and what became of it. Times are seconds since the epoch, None if not yet.

    It ends at ``expires_at``, if that is set. ``idle_since``: since when its worker has computed nothing, None
    while it computes or has paused for a moment only. ``waits_for``: the limit that a queued request waits for,
    empty while it waits for free memory.
    """

    request: Request
    state: LeaseState
    slices: tuple[Slice, ...] = ()
    worker: WorkerAddress | None = None
    reason: str = ""
    created_at: float = 0.0
    granted_at: float | None = None
    ended_at: float | None = None
    heartbeat_at: float = 0.0
    ttl_s: float = 15.0
    position: int | None = None
    waits_for: str = ""
    expires_at: float | None = None
    idle_since: float | None = None
    asked_back: tuple[AskedBack, ...] = ()

    @property
    def id(self) -> str:
        return self.request.id

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary without any secret or digest of one."""
        # dataclasses.asdict takes ten times as long: it copies even text and numbers.
        data = dict(vars(self))
        data["state"] = self.state.value
        data["request"] = request = dict(vars(self.request))
        request["filters"] = dict(self.request.filters)
        del request["secret_sha256"]
        data["slices"] = tuple(dict(vars(piece)) for piece in self.slices)
        data["worker"] = worker = self.worker.to_json() if self.worker else None
        if self.worker and self.worker.elsewhere:
            others = {server: one.to_json() for server, one in self.worker.elsewhere.items()}
            data["workers"] = {self.slices[0].server: worker, **others}
        data["asked_back"] = tuple(dict(vars(one)) for one in self.asked_back)
        data["id"] = self.id
        return data


@dataclass(frozen=True)
class WorkerUsage:
    """A worker's own account, by GPU uuid: bytes allocated, and the busy share (0 to 1) lately; ``held_at``: since
    when (in seconds since the epoch) it has had a holder."""

    allocated_bytes: Mapping[str, int] = field(default_factory=dict)
    busy: Mapping[str, float] = field(default_factory=dict)
    sessions: int = 0
    held_at: float | None = None


@dataclass(frozen=True)
class StartWorker:
    """To be done after a change: start the worker of this granted lease."""

    lease: Lease


@dataclass(frozen=True)
class StopWorker:
    """To be done after a change: end the worker of this lease, if it has one."""

    lease_id: str


Action = StartWorker | StopWorker


@dataclass(frozen=True)
class Change:
    """What a call to the manager did: the lease it was about, and what has to follow.

    ``actions`` are carried out in their order: what was freed is stopped before what was granted
    in its place is started. ``changed`` holds every lease whose state changed, ``lease`` included.
    ``positions`` are those of the requests that wait now, by id; None where nothing of that has changed.
    """

    lease: Lease | None = None
    actions: tuple[Action, ...] = ()
    changed: tuple[Lease, ...] = ()
    positions: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Snapshot:
    """The pool at one instant. ``granted_mib`` is by GPU uuid and names every GPU of ``servers``.

    ``leases`` hold slices now; ``queue`` is in the order of ``position``.
    """

    servers: tuple[Server, ...] = ()
    granted_mib: Mapping[str, int] = field(default_factory=dict)
    leases: tuple[Lease, ...] = ()
    queue: tuple[Lease, ...] = ()
