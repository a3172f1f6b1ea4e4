"""OpenTelemetry: one trace for each request, from the call until a program has attached.

OpenTelemetry is imported only if an endpoint is configured.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from jupyter_gpupool._version import __version__
from jupyter_gpupool.core import tracing
from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.models import Lease, LeaseState, Request, WorkerUsage

#: OpenTelemetry's own variables; either one names the receiver of traces.
VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
#: The most leases whose trace is remembered.
_MAX_LEASES = 10_000


class NoTraces:
    """Traces nothing."""

    def request(self, headers: Mapping[str, str], request: Request) -> AbstractContextManager[object]:
        """Return a context in which a request for GPUs is made. ``headers`` may name the caller's trace."""
        return nullcontext()

    def starting(self, lease: Lease) -> AbstractContextManager[object]:
        """Return a context in which that lease's worker is started."""
        return nullcontext()

    def changed(self, change: dict[str, Any]) -> None:
        """Take a change of a lease, as :class:`.Listeners` sends it."""

    def look(self, usage: Callable[[], Mapping[str, WorkerUsage]]) -> None:
        """Record which leases programs have attached to since the last call."""

    def stop(self) -> None:
        """Send the spans that are left. This takes seconds if the receiver does not answer."""


#: Of this process.
current = NoTraces()


def begin(endpoint: str = "", complain: Callable[[str], None] = lambda line: None) -> NoTraces:
    """Trace from now on if there is an ``endpoint`` (an OTLP receiver's base URL) or one of :data:`VARIABLES`.

    Raises PoolError if ``endpoint`` is given and OpenTelemetry is missing. If only the environment names a receiver,
    calls ``complain`` instead, because that environment may be meant for other programs.
    """
    global current
    if endpoint or any(os.environ.get(name) for name in VARIABLES):
        try:
            current = Traces(endpoint)
        except ImportError as e:
            line = f"there will be no traces ({e}): pip install 'jupyter_gpupool[otel]'"
            if endpoint:
                raise PoolError(line) from None
            complain(line)
    return current


def end() -> None:
    """Stop tracing. Returns when the spans that are left were sent, or could not be."""
    global current
    ended, current = current, NoTraces()
    ended.stop()


class Traces(NoTraces):
    """``request`` (a server's span, below the one that ``traceparent`` names) with ``placement``, ``commit``,
    ``queue``, ``worker start`` and ``attach`` below it."""

    def __init__(self, endpoint: str) -> None:
        """Raises ImportError."""
        from opentelemetry import context, propagate, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._context, self._propagate, self._trace = context, propagate, trace
        named = {
            "service.name": os.environ.get("OTEL_SERVICE_NAME", "gpupool"),
            "service.version": __version__,
        }
        self._provider = TracerProvider(resource=Resource.create(named))
        exporter = (
            OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces") if endpoint else OTLPSpanExporter()
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("jupyter_gpupool", __version__)
        self._of: OrderedDict[str, Any] = OrderedDict()  # lease → the context of its request
        self._active: dict[str, float] = {}  # lease that nobody has attached to yet → since when it could be
        tracing.tell(self._below)

    def request(self, headers: Mapping[str, str], request: Request) -> AbstractContextManager[object]:
        given = {name.lower(): value for name, value in headers.items()}
        caller = self._propagate.extract(given)
        attributes: dict[str, Any] = {
            "gpupool.lease": request.id[:64],
            "gpupool.namespace": request.namespace,
            "gpupool.num_gpus": request.num_gpus,
        }
        return self._remembering(request.id, caller, attributes)

    def _remembering(
        self, lease_id: str, caller: Any, attributes: dict[str, Any]
    ) -> AbstractContextManager[object]:
        @contextmanager
        def within() -> Iterator[object]:
            kind = self._trace.SpanKind.SERVER
            with self._tracer.start_as_current_span("request", caller, kind, attributes) as span:
                self._of[lease_id] = self._context.get_current()
                while len(self._of) > _MAX_LEASES:
                    self._of.popitem(last=False)
                yield span

        return within()

    def starting(self, lease: Lease) -> AbstractContextManager[object]:
        servers = sorted({piece.server for piece in lease.slices})
        return self._tracer.start_as_current_span(
            "worker start",
            self._of.get(lease.id),
            attributes={"gpupool.lease": lease.id, "gpupool.servers": servers},
        )

    def changed(self, change: dict[str, Any]) -> None:
        lease = change["lease"]
        lease_id, state = lease["id"], LeaseState(lease["state"])
        if lease_id not in self._of:
            return
        if state.holds and change["previous"] == LeaseState.QUEUED.value and lease["granted_at"]:
            self._between("queue", lease_id, lease["created_at"], lease["granted_at"])
        if state is LeaseState.ACTIVE:
            self._active.setdefault(lease_id, time.time())
        elif state.ended:
            self._of.pop(lease_id, None)
            self._active.pop(lease_id, None)

    def look(self, usage: Callable[[], Mapping[str, WorkerUsage]]) -> None:
        if not self._active:
            return
        said = usage()
        for lease_id, since in list(self._active.items()):
            held_at = said[lease_id].held_at if lease_id in said else None
            if held_at is not None:
                del self._active[lease_id]
                self._between("attach", lease_id, min(since, held_at), held_at)

    def stop(self) -> None:
        tracing.tell(None)
        self._provider.shutdown()

    def _below(self, name: str) -> AbstractContextManager[object]:
        """Return a span below the current request's, or none outside of a request."""
        if not self._trace.get_current_span().get_span_context().is_valid:
            return nullcontext()
        return self._tracer.start_as_current_span(name)

    def _between(self, name: str, lease_id: str, began: float, ended: float) -> None:
        """Record a span that has ended; times in seconds since the epoch."""
        attributes = {"gpupool.lease": lease_id}
        span = self._tracer.start_span(
            name, self._of.get(lease_id), attributes=attributes, start_time=int(began * 1e9)
        )
        span.end(int(ended * 1e9))
