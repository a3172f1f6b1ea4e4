"""Traces of requests, received as OTLP by a server on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from jupyter_gpupool.client import discovery
from jupyter_gpupool.transport.lifeline import Lifeline

from ..conftest import SECRET, Pool, ask, attach_spec

pytest.importorskip(
    "opentelemetry.sdk", reason="OpenTelemetry is not installed: pip install 'jupyter_gpupool[otel]'"
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"


class Receiver:
    """Takes what is posted to /v1/traces, as a collector does."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.spans: list[Any] = []
        self.resources: list[Any] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                if self.path == "/v1/traces":
                    said = ExportTraceServiceRequest.FromString(body)
                    for group in said.resource_spans:
                        receiver.resources.append(group.resource)
                        for scope in group.scope_spans:
                            receiver.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def of(self, trace: str) -> dict[str, Any]:
        """The first span of each name."""
        found = [span for span in self.spans if span.trace_id.hex() == trace]
        return {s.name: s for s in sorted(found, key=lambda s: s.start_time_unix_nano, reverse=True)}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_request_is_one_trace_from_the_call_to_the_attachment(
    receiver: Receiver, start_pool: Callable[..., Pool], eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    pool = start_pool()
    address = discovery.find()
    assert address is not None
    wish = ask(0.5)
    body = {"id": wish.id, "partial": 0.5, "secret_sha256": wish.secret_sha256}
    answer = httpx.post(
        f"{address.url}/gpupool/api/v1/leases",
        params={"wait": 30},
        json=body,
        headers={"Authorization": f"Bearer {address.token}", "traceparent": f"00-{TRACE}-{CALLER}-01"},
        timeout=300,
    )
    assert answer.status_code == 201
    lease = eventually(
        lambda: (now := pool.client.lease(wish.id)).worker is not None and now, "its worker runs"
    )
    with_holder = Lifeline(attach_spec(lease))
    wanted = {"request", "placement", "commit", "worker start", "attach"}
    eventually(
        lambda: wanted <= set(receiver.of(TRACE)), f"all of {wanted}, not only {set(receiver.of(TRACE))}"
    )
    with_holder.release()
    spans = receiver.of(TRACE)
    request = spans["request"]
    assert request.parent_span_id.hex() == CALLER and request.kind == 2, "a server's span below its caller's"
    for name in wanted - {"request"}:
        assert spans[name].parent_span_id == request.span_id, name
        assert spans[name].start_time_unix_nano <= spans[name].end_time_unix_nano
    starts = [spans[name].start_time_unix_nano for name in ("request", "placement", "commit", "worker start")]
    assert starts == sorted(starts)
    # On the same clock, but rounded to other units.
    assert spans["attach"].end_time_unix_nano >= spans["worker start"].start_time_unix_nano
    attributes = {a.key: a.value for a in request.attributes}
    assert (
        attributes["gpupool.lease"].string_value == wish.id and attributes["gpupool.num_gpus"].int_value == 1
    )
    named = {a.key: a.value.string_value for a in receiver.resources[0].attributes}
    assert named["service.name"] == "gpupool"
    everything = b"".join(span.SerializeToString() for span in receiver.spans)
    assert SECRET.encode() not in everything and address.token.encode() not in everything
    assert wish.secret_sha256.encode() not in everything

    # Who waited has a span for it, without a caller's trace a trace of its own; the last ones are sent at the end.
    first, second = ask(1.0, 2), ask(1.0)
    held = pool.client.request(first, wait_s=30)
    pool.client.request(second)
    pool.client.release(held.id)
    eventually(lambda: pool.client.lease(second.id).state.value != "QUEUED", "the second is granted")
    pool.process.terminate()
    pool.process.wait(300)
    queued = [s for s in receiver.spans if s.name == "queue" and second.id in str(s.attributes)]
    assert len(queued) == 1 and queued[0].trace_id.hex() != TRACE


def test_nothing_of_it_is_imported_unless_it_is_configured() -> None:
    program = (
        "import sys, jupyter_gpupool.server.daemon.pool_app as s; from jupyter_gpupool.server.service import traces; traces.begin(); "  # noqa: E501
        "sys.exit(any(m.startswith('opentelemetry') for m in sys.modules))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


def test_without_the_extra_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from jupyter_gpupool.core.errors import PoolError
    from jupyter_gpupool.server.service import traces

    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(PoolError, match=r"pip install 'jupyter_gpupool\[otel\]'"):
        traces.begin("http://127.0.0.1:1")
    lines: list[str] = []
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    assert type(traces.begin("", lines.append)) is traces.NoTraces and len(lines) == 1
