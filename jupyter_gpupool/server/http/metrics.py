"""A pool's metrics for Prometheus. All names begin with ``gpupool_`` and end with their unit."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from tornado import web
from tornado.web import RequestHandler

from jupyter_gpupool.core.errors import NotLeading, PoolError
from jupyter_gpupool.core.models import MIB, Lease, LeaseState, WorkerUsage
from jupyter_gpupool.server.service.health_monitor import expires_at
from jupyter_gpupool.server.service.service import PoolService

from .base import BaseHandler, Route

_GPU = ("server", "gpu", "name", "emulated")
#: Field of a GPU in ``GET pool`` → its gauge, what it says, and how many of the gauge's units are one of its own.
_PER_GPU = {
    "memory_mib": ("gpupool_gpu_memory_bytes", "Memory of a GPU that the pool may grant", MIB),
    "granted_mib": ("gpupool_gpu_granted_bytes", "Memory of a GPU that leases hold", MIB),
    "used_mib": ("gpupool_gpu_used_bytes", "Memory of a GPU that leases have allocated", MIB),
    "busy": ("gpupool_gpu_busy_ratio", "Share of the time that a GPU was computing for leases", 1),
    "healthy": ("gpupool_gpu_healthy", "1 where a GPU may get new slices, else 0", 1),
}
_LIVE = [state.value for state in LeaseState if not state.ended]
_WAITS_S = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400)
_RESUME_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 30, 300, 3600)
_MOVE_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
_LEDGER_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2)
_HTTP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 30)
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
#: What a check's status is as a number: an alert asks for ``> 1``.
_STATUS = {"unknown": -1, "ok": 0, "warning": 1, "failing": 2}


class PoolFigures:
    """The metrics of any pool: :meth:`show` sets its state, :meth:`changed` counts grants and ends of leases."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._namespaces = {"default"}  # that ever held GPUs: a series that ends would look like a lost one
        self.up = Gauge("gpupool_up", "1 while the GPU pool answers, else 0", registry=registry)
        self._gpus = {
            field: (Gauge(name, text, _GPU, registry=registry), factor)
            for field, (name, text, factor) in _PER_GPU.items()
        }
        self._leases = Gauge(
            "gpupool_leases", "Leases that have not ended", ("state", "namespace"), registry=registry
        )
        self._held = Gauge(
            "gpupool_namespace_granted_bytes",
            "Memory of GPUs that a namespace's leases hold",
            ("namespace",),
            registry=registry,
        )
        self._parked = Gauge(
            "gpupool_parked_leases",
            "Leases that are parked in host memory",
            ("namespace",),
            registry=registry,
        )
        self._kept = Gauge(
            "gpupool_parked_bytes",
            "Host memory that is kept for parked leases",
            ("namespace",),
            registry=registry,
        )
        self._queue = Gauge("gpupool_queue_length", "Requests and woken leases that wait", registry=registry)
        self._grants = Counter(
            "gpupool_grants", "Requests that were granted", ("namespace",), registry=registry
        )
        self._ends = Counter(
            "gpupool_lease_ends",
            "Leases and requests that ended, by the state they ended in",
            ("state", "namespace"),
            registry=registry,
        )
        self._waits = Histogram(
            "gpupool_wait_seconds",
            "From a request to its grant",
            buckets=_WAITS_S,
            registry=registry,
        )

    def show(self, pool: dict[str, Any], leases: Iterable[Lease]) -> None:
        """Set every gauge from ``GET pool`` and the live leases; GPUs that left the pool are dropped."""
        for gauge, _ in self._gpus.values():
            gauge.clear()
        for server in pool["servers"]:
            for gpu in server["gpus"]:
                labels = (server["name"], str(gpu["index"]), gpu["name"], str(gpu["emulated"]).lower())
                for field, (gauge, factor) in self._gpus.items():
                    gauge.labels(*labels).set(gpu.get(field, True) * factor)
        leases = list(leases)
        counted = Count((lease.state.value, lease.request.namespace) for lease in leases)
        self._leases.clear()
        self._namespaces |= {lease.request.namespace for lease in leases}
        for namespace in self._namespaces:
            for state in _LIVE:
                self._leases.labels(state, namespace).set(counted[state, namespace])
        held: Count[str] = Count()
        for lease in leases:
            if lease.state.holds:
                held[lease.request.namespace] += sum(piece.memory_mib for piece in lease.slices)
        for namespace in self._namespaces:
            self._held.labels(namespace).set(held[namespace] * MIB)
        parked = [lease for lease in leases if lease.parked is not None]
        asleep = Count(lease.request.namespace for lease in parked)
        kept: Count[str] = Count()
        for lease in parked:
            kept[lease.request.namespace] += lease.parked.memory_mib if lease.parked else 0
        for namespace in self._namespaces:
            self._parked.labels(namespace).set(asleep[namespace])
            self._kept.labels(namespace).set(kept[namespace] * MIB)
        self._queue.set(len(pool["queue"]))
        self.up.set(1)

    def changed(self, change: dict[str, Any]) -> None:
        """Count a change of a lease, as the pool's listeners receive it."""
        lease = change["lease"]
        state, namespace = lease["state"], lease["request"]["namespace"]
        if LeaseState(state).holds and change["previous"] in (None, LeaseState.QUEUED.value):
            self._grants.labels(namespace).inc()
            if lease["granted_at"] is not None:
                self._waits.observe(max(0.0, lease["granted_at"] - lease["created_at"]))
        elif LeaseState(state).ended:
            self._ends.labels(state, namespace).inc()


class ServerFigures(PoolFigures):
    """The metrics of a pool with a server of its own: also its HTTP calls, its ledger and its health."""

    def __init__(self, service: PoolService) -> None:
        registry = CollectorRegistry()
        super().__init__(registry)
        self._service = service
        self._requests = Counter(
            "gpupool_http_requests", "HTTP requests answered", ("call", "method", "status"), registry=registry
        )
        self._seconds = Histogram(
            "gpupool_http_request_seconds",
            "How long requests took; those that wait for a lease take as long as they wait",
            ("call",),
            buckets=_HTTP_S,
            registry=registry,
        )
        self._refusals = Counter(
            "gpupool_refusals", "Requests for slices that were refused, by why", ("error",), registry=registry
        )
        self._ledger = Histogram(
            "gpupool_ledger_transaction_seconds",
            "How long transactions of the ledger took",
            buckets=_LEDGER_S,
            registry=registry,
        )
        self._checks = Gauge(
            "gpupool_health_status",
            "A health check: -1 unknown, 0 ok, 1 warning, 2 failing",
            ("check", "server", "gpu"),
            registry=registry,
        )
        self._reconnects = Counter(
            "gpupool_reconnects",
            "Lost connections to workers that programs restored, by the GPU server",
            ("server",),
            registry=registry,
        )
        #: Live lease → its server, and how many of its reconnects have been counted.
        self._counted: dict[str, tuple[str, int]] = {}
        self._certfile = getattr(service.engine, "certfile", "")
        if self._certfile:
            self._certificate = Gauge(
                "gpupool_certificate_expiry_timestamp_seconds",
                "When this server's certificate ends, in seconds since the epoch; 0 where it cannot be read",
                registry=registry,
            )
            self._certificate.set_function(self._expiry)
        self._resumes = Histogram(
            "gpupool_resume_seconds",
            "From a parked program's need of its GPUs until it had them again",
            buckets=_RESUME_S,
            registry=registry,
        )
        service.on_resumed(self._resumes.observe)
        self._moves = Counter(
            "gpupool_moves", "Leases that were to move to another server", ["outcome"], registry=registry
        )
        self._move_seconds = Histogram(
            "gpupool_move_seconds",
            "From the decision to move a lease until its program could go on at the other server",
            buckets=_MOVE_S,
            registry=registry,
        )
        for outcome in ("moved", "stayed"):
            self._moves.labels(outcome)  # a series that begins with its first event hides that event
        service.on_moved(self._count_move)
        service.thread.timed = self._ledger.observe
        service.listen(self.changed)
        service.on_usage = self.count_reconnects

    def changed(self, change: dict[str, Any]) -> None:
        super().changed(change)
        lease = change["lease"]
        if LeaseState(lease["state"]).ended:
            self._counted.pop(lease["id"], None)
        elif lease["slices"]:
            _, before = self._counted.get(lease["id"], ("", 0))
            self._count_for(lease["id"], lease["slices"][0]["server"], before)

    def count_reconnects(self, usage: Mapping[str, WorkerUsage]) -> None:
        """Count the reconnects that workers have reported since the last time, by lease id."""
        for lease_id, of_lease in usage.items():
            if lease_id in self._counted:
                server, before = self._counted[lease_id]
                self._reconnects.labels(server).inc(max(0, of_lease.reconnects - before))
                self._counted[lease_id] = server, of_lease.reconnects

    def _adopt(self, leases: Iterable[Lease]) -> None:
        """Count from now on for leases of a former pool process, which counted those before."""
        usage = self._service.engine.usage()
        for lease in leases:
            if lease.slices and lease.id not in self._counted:
                before = usage[lease.id].reconnects if lease.id in usage else 0
                self._count_for(lease.id, lease.slices[0].server, before)

    def _count_for(self, lease_id: str, server: str, before: int) -> None:
        self._counted[lease_id] = server, before
        self._reconnects.labels(server)  # a series that begins with its first event hides that event

    def answered(self, handler: RequestHandler) -> None:
        """Count a request that has been answered."""
        call = type(handler).__name__.removesuffix("WithToken").removesuffix("Handler").lower()
        method = handler.request.method or ""
        method = method if method in _METHODS else "other"
        self._requests.labels(call, method, str(handler.get_status())).inc()
        self._seconds.labels(call).observe(handler.request.request_time())
        refusal = getattr(handler, "refusal", "")
        if refusal and call == "leases" and method == "POST":
            self._refusals.labels(refusal).inc()

    def _count_move(self, seconds: float | None) -> None:
        self._moves.labels("stayed" if seconds is None else "moved").inc()
        if seconds is not None:
            self._move_seconds.observe(seconds)

    def _expiry(self) -> float:
        try:
            return expires_at(Path(self._certfile))
        except (OSError, ValueError):
            return 0.0

    async def text(self) -> bytes:
        """Return all metrics as they are now, in Prometheus's text format."""
        try:
            pool, leases = await self._service.pool(None), await self._service.leases(None)
            self.show(pool, leases)
            self._adopt(leases)
        except NotLeading:
            self.up.set(1)  # the leader has the figures
        except PoolError:
            self.up.set(0)
        worst: dict[tuple[str, str, str], int] = {}
        for check in self._service.health_monitor.latest:
            key = (check.name, check.server, check.gpu)
            worst[key] = max(worst.get(key, -1), _STATUS[check.status])
        self._checks.clear()
        for key, status in worst.items():
            self._checks.labels(*key).set(status)
        return generate_latest(self.registry)


class MetricsHandler(BaseHandler):
    """``GET /metrics`` shows what every tenant does, so it requires an administrator token."""

    administrators_only = True

    @web.authenticated
    async def get(self) -> None:
        await _answer(self)


class OpenMetrics(RequestHandler):
    """``GET /metrics`` without a token, at an address of its own."""

    async def get(self) -> None:
        await _answer(self)


async def _answer(handler: RequestHandler) -> None:
    figures: ServerFigures = handler.settings["figures"]
    handler.set_header("Content-Type", CONTENT_TYPE_LATEST)
    handler.finish(await figures.text())


#: For a pool's own server, beside its API.
METRICS: list[Route] = [("/metrics", MetricsHandler)]
