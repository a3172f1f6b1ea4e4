"""The values that the pool works with: frozen dataclasses that only describe themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

MIB = 1024 * 1024


class LeaseState(str, Enum):
    """The state of a lease; see the diagram in docs/explanation/life-of-a-lease.md."""

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
    def has_worker(self) -> bool:
        """Whether a lease in this state has a worker, or one that starts: it holds its slices or is parked."""
        return self in _HOLDING or self is LeaseState.PARKED

    @property
    def ended(self) -> bool:
        """Whether a lease in this state has ended."""
        return self in _ENDED


_HOLDING = (LeaseState.GRANTED, LeaseState.ACTIVE)
_ENDED = (LeaseState.RELEASED, LeaseState.EXPIRED, LeaseState.LOST, LeaseState.CANCELLED)


@dataclass(frozen=True)
class GPU:
    """One physical device of one GPU server.

    The pool may grant ``memory_mib`` less ``taken_mib``, which programs outside this pool use now. A GPU that is not
    ``healthy`` gets no new slices; ``trouble`` is the reason.
    """

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
    """A machine with GPUs that runs workers; ``host`` is the address at which clients reach them.

    ``draining``: its leases stay, but nothing new is granted on it.
    """

    name: str
    host: str
    gpus: tuple[GPU, ...]
    draining: bool = False


@dataclass(frozen=True)
class Limits:
    """Limits on what all leases of a namespace hold together; None is no limit.

    ``memory_mib`` and ``gpus`` (in whole GPUs) are sums over all slices; ``leases`` counts leases that hold slices.
    ``user_share`` (0 < share <= 1): the fraction of these three that one user may hold. ``lease_s``: the longest
    lease; ``idle_s``: how long a lease may be idle; ``reclaim_after_s``: how long an idle lease keeps its GPUs while
    others wait, if it may be parked. These three in seconds.
    """

    memory_mib: int | None = None
    gpus: float | None = None
    leases: int | None = None
    user_share: float | None = None
    lease_s: float | None = None
    idle_s: float | None = None
    reclaim_after_s: float | None = None


class Role(str, Enum):
    """What a member of a namespace may do there. Each role includes the ones before it."""

    VIEW = "view"
    USE = "use"
    ADMINISTER = "administer"


class Scope(str, Enum):
    """The most that a token may do of what its user may. Each scope includes the ones before it."""

    READ = "read"
    LEASE = "lease"
    ADMINISTER = "administer"


class Reclaim(str, Enum):
    """Whether leases may be parked while others wait for their GPUs: never, or once they are idle."""

    NEVER = "never"
    IDLE = "idle"


@dataclass(frozen=True)
class Namespace:
    """A tenant of the pool. ``limits`` apply; the pool's administrator sets ``ceiling``, which they never exceed.

    ``weight``: its weight, relative to other namespaces, when requests queue. ``names_holders``: members see which
    member holds which GPUs. ``reclaim``: whether its leases may be parked; None is the pool's default.
    """

    name: str
    description: str = ""
    limits: Limits = Limits()
    ceiling: Limits = Limits()
    weight: float = 1.0
    names_holders: bool = False
    members: Mapping[str, Role] = field(default_factory=dict)
    reclaim: Reclaim | None = None


@dataclass(frozen=True)
class AskedBack:
    """A request by another user that a lease be released. ``at``: seconds since the epoch."""

    by: str
    at: float
    message: str = ""


@dataclass(frozen=True)
class Parked:
    """What is known of a lease while it is parked.

    ``memory_mib``: host memory of its servers that is kept for it. ``since``: when it was parked; ``wanted_since``:
    since when its program has waited for its GPUs, None while it needs none. Both in seconds since the epoch.
    ``by_server``: the MiB on each server of a lease that spans servers; empty for others.
    """

    memory_mib: int
    since: float
    wanted_since: float | None = None
    by_server: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Request:
    """A request for GPUs, checked by :func:`.validation.validate`.

    Exactly one of ``partial`` (0 < p <= 1, of each GPU's memory) and ``memory_mib`` (MiB per GPU)
    is set. ``spread``: the GPUs may be of several servers. ``never_park``: the lease keeps its GPUs while it is idle
    and others wait. ``id`` is a uuid that the client chooses, so that the request may be repeated.
    ``secret_sha256`` is the hex digest of a secret that only the client has. The worker admits clients that present
    the secret; the pool never sees it.
    """

    id: str
    owner: str
    num_gpus: int = 1
    partial: float | None = None
    memory_mib: int | None = None
    filters: Mapping[str, str] = field(default_factory=dict)
    spread: bool = False
    never_park: bool = False
    namespace: str = "default"
    wait: bool = True
    secret_sha256: str = ""
    label: str = ""
    client: str = ""


@dataclass(frozen=True)
class Slice:
    """A share of one GPU's memory that one lease holds."""

    gpu_uuid: str
    server: str
    index: int
    name: str
    memory_mib: int
    total_mib: int
    emulated: bool = False


@dataclass(frozen=True)
class WorkerAddress:
    """The address and the process of a lease's worker; ``created`` tells it from a later process with the same pid.

    A lease that spans servers has a worker on each. This one is that of the first slice; ``elsewhere`` has the
    others, by server. ``environment``: the name of the environment that it runs in, and ``torch`` its release of
    PyTorch; empty where an engine does not say.
    """

    host: str
    port: int
    pid: int
    created: float
    elsewhere: Mapping[str, WorkerAddress] = field(default_factory=dict)
    environment: str = ""
    torch: str = ""

    def on(self, server: str) -> WorkerAddress:
        """Return the worker of the slices on that server."""
        return self.elsewhere.get(server, self)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: the address and the process alone."""
        return {"host": self.host, "port": self.port, "pid": self.pid, "created": self.created}


@dataclass(frozen=True)
class Lease:
    """A request and its state. Times are seconds since the epoch, None if not yet.

    The lease ends at ``expires_at``, if that is set. ``idle_since``: since when the worker has been idle, None while
    it computes or has paused only briefly. ``waits_for``: the limit that blocks a queued request, or
    that what is free is kept for an earlier one; empty while it waits for free memory. ``slices`` of a parked lease are
    those that it held: they are others' now, and ``parked`` is set. ``moving_to``: while it is moved, the slices that
    it is to have; it holds those on another server as well meanwhile. Empty for others.
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
    parked: Parked | None = None
    moving_to: tuple[Slice, ...] = ()

    @property
    def is_woken(self) -> bool:
        """Whether it is parked and waits for room, because its program needs its GPUs."""
        return self.parked is not None and self.parked.wanted_since is not None and not self.moving_to

    @property
    def arriving(self) -> tuple[Slice, ...]:
        """While it is moved: the slices on the server that it moves to."""
        return tuple(piece for piece in self.moving_to if piece not in self.slices)

    @property
    def leaving(self) -> tuple[Slice, ...]:
        """While it is moved: the slices on the server that it leaves."""
        return tuple(piece for piece in self.slices if piece not in self.moving_to) if self.moving_to else ()

    @property
    def held(self) -> tuple[Slice, ...]:
        """All slices whose memory nobody else gets."""
        return (*self.slices, *self.arriving) if self.state.holds else self.moving_to

    @property
    def id(self) -> str:
        """The request's id, which is the lease's too."""
        return self.request.id

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, without any secret or digest of one."""
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
        data["environment"] = self.worker.environment if self.worker else ""
        data["torch"] = self.worker.torch if self.worker else ""
        data["asked_back"] = tuple(dict(vars(one)) for one in self.asked_back)
        data["parked"] = parked = dict(vars(self.parked)) if self.parked else None
        if parked is not None:
            del parked["by_server"]  # the pool's own affair, and earlier clients do not know it
        data["moving_to"] = tuple(dict(vars(piece)) for piece in self.moving_to)
        data["id"] = self.id
        return data


@dataclass(frozen=True)
class WorkerUsage:
    """A worker's report of its usage, by GPU uuid: bytes allocated, and the recent fraction of time busy (0 to 1).

    ``held_at``: since when it has had a holder, in seconds since the epoch. ``reconnects``: how often a program that
    had lost its connection has come back to it. ``frameworks``: those that programs use it by now, such as ``torch``.
    ``overhead_bytes``: what of the allocated bytes is for no tensor, but for CUDA itself, by GPU uuid.
    """

    allocated_bytes: Mapping[str, int] = field(default_factory=dict)
    busy: Mapping[str, float] = field(default_factory=dict)
    sessions: int = 0
    held_at: float | None = None
    reconnects: int = 0
    frameworks: Sequence[str] = ()
    overhead_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StartWorker:
    """Action after a change: start the worker of this granted lease."""

    lease: Lease


@dataclass(frozen=True)
class StopWorker:
    """Action after a change: end the worker of this lease, if it has one."""

    lease_id: str


@dataclass(frozen=True)
class ResumeWorker:
    """Action after a change: bring the parked state of this lease back, onto its new slices.

    ``woken_at``: since when its program has waited, in seconds since the epoch.
    """

    lease: Lease
    woken_at: float | None = None


@dataclass(frozen=True)
class MoveWorker:
    """Action after a change: move this lease to ``lease.moving_to``."""

    lease: Lease


Action = StartWorker | StopWorker | ResumeWorker | MoveWorker


@dataclass(frozen=True)
class Change:
    """The result of a call to the manager: its lease, and the actions that must follow.

    ``actions`` are carried out in this order: a freed worker is stopped before the one that replaces it is started.
    ``changed`` has every lease whose state changed, ``lease`` included. ``positions``: positions of the queued
    requests by id; None if they have not changed.
    """

    lease: Lease | None = None
    actions: tuple[Action, ...] = ()
    changed: tuple[Lease, ...] = ()
    positions: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Snapshot:
    """The pool at one instant. ``granted_mib`` has every GPU of ``servers``, by uuid.

    ``leases``: those that hold slices; ``parked``: parked ones that need no GPUs now; ``queue``: parked ones that do,
    and queued requests, in the order of ``position``.
    """

    servers: tuple[Server, ...] = ()
    granted_mib: Mapping[str, int] = field(default_factory=dict)
    leases: tuple[Lease, ...] = ()
    queue: tuple[Lease, ...] = ()
    parked: tuple[Lease, ...] = ()
