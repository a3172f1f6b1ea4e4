"""What Prometheus is served by a secured server, who may read it, and the dashboard that reads it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jupyter_gpupool.client import bundle
from jupyter_gpupool.core.errors import ImpossibleRequest
from jupyter_gpupool.core.models import Request

from ...conftest import PATIENCE_S
from ...support.ports import free_port
from .conftest import Server, initialised

MIB = 1024 * 1024


class Scraped(dict[str, dict[frozenset[tuple[str, str]], float]]):
    """Name of a sample → its labels → its value."""

    def of(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels; KeyError where there is none."""
        found = [v for key, v in self[name].items() if labels.items() <= dict(key).items()]
        if not found:
            raise KeyError(f"{name} {labels}")
        return sum(found)


def parsed(text: str) -> Scraped:
    found = Scraped()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


@pytest.fixture(scope="module")
def metered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    options = (f"--GPUPoolDaemon.metrics_address=127.0.0.1:{port}",)
    server = initialised(tmp_path_factory.mktemp("metered"), options=options)
    server.metrics = f"http://127.0.0.1:{port}/metrics"  # type: ignore[attr-defined]
    server.start()
    yield server
    server.end()


def scrape(server: Any) -> Scraped:
    answer = httpx.get(server.metrics, timeout=PATIENCE_S)
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("text/plain; version=")
    return parsed(answer.text)


def with_token(server: Server, token: str) -> httpx.Response:
    import ssl

    context = ssl.create_default_context(cadata=server.ca)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.get(f"{server.url}/metrics", headers=headers, verify=context, timeout=PATIENCE_S)


def ask(**fields: Any) -> Request:
    return Request(str(uuid.uuid4()), "", secret_sha256=hashlib.sha256(b"x").hexdigest(), **fields)


def test_who_may_read_them(metered: Server) -> None:
    assert with_token(metered, "").status_code == 401
    assert with_token(metered, "never.heard").status_code == 401
    tenant = with_token(metered, metered.token("a tenant", owner="ada")["token"])
    assert tenant.status_code == 403 and "administrator" in tenant.json()["message"]
    text = (metered.folder / "admin" / bundle.CLIENT).read_text()
    administrator = with_token(metered, text.partition("token: ")[2].strip())
    assert administrator.status_code == 200 and "gpupool_up 1.0" in administrator.text
    pool = metered.metrics.replace("/metrics", "/gpupool/api/v1/pool")  # type: ignore[attr-defined]
    elsewhere = httpx.get(pool, timeout=PATIENCE_S)
    assert elsewhere.status_code == 404, "nothing else is served there"


def test_what_leases_do_is_counted(metered: Server, eventually: Callable[..., Any]) -> None:
    client = metered.client(metered.token("another", owner="bob")["token"])
    before = scrape(metered)
    lease = client.request(ask(memory_mib=1000), wait_s=60)
    filling = [client.request(ask(partial=1.0)) for _ in range(2)]
    with pytest.raises(ImpossibleRequest):
        client.request(ask(num_gpus=9, partial=1.0))
    during = scrape(metered)
    assert during.of("gpupool_leases", state="QUEUED", namespace="default") == 1
    assert during.of("gpupool_queue_length") == 1
    assert during.of("gpupool_gpu_granted_bytes") == (1000 + 32510) * MIB
    assert during.of("gpupool_namespace_granted_bytes", namespace="default") == (1000 + 32510) * MIB
    assert during.of("gpupool_gpu_memory_bytes") == 2 * 32510 * MIB
    assert set(during["gpupool_gpu_healthy"].values()) == {1.0}

    def grown(name: str, **labels: str) -> float:
        try:
            start = before.of(name, **labels)
        except KeyError:
            start = 0.0
        return during.of(name, **labels) - start

    assert grown("gpupool_grants_total", namespace="default") == 2
    assert grown("gpupool_wait_seconds_count") == 2
    assert grown("gpupool_refusals_total", error="ImpossibleRequest") == 1
    assert grown("gpupool_http_requests_total", call="leases", method="POST", status="422") == 1
    assert grown("gpupool_http_request_seconds_count", call="leases") >= 4
    assert grown("gpupool_ledger_transaction_seconds_count") >= 3
    for held in (lease, *filling):
        client.release(held.id)
    after = scrape(metered)
    assert after.of("gpupool_lease_ends_total", state="RELEASED") >= 2
    assert after.of("gpupool_gpu_granted_bytes") == 0 and after.of("gpupool_queue_length") == 0


def test_health_and_the_certificate_are_among_them(metered: Server) -> None:
    metered.administrator().health()
    now = scrape(metered)
    assert now.of("gpupool_health_status", check="ledger") in (
        0,
        1,
    )  # how fast it is, is the machine's matter
    assert now.of("gpupool_health_status", check="certificate") == 0
    assert set(now["gpupool_health_status"].values()) <= {-1.0, 0.0, 1.0}
    days = (now.of("gpupool_certificate_expiry_timestamp_seconds") - time.time()) / 86400
    assert 700 < days < 900


def test_names_are_prometheus_own_and_end_with_units(metered: Server) -> None:
    text = httpx.get(metered.metrics, timeout=PATIENCE_S).text  # type: ignore[attr-defined]
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("gpupool_") and family.documentation, family.name
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
    assert "MIB" not in text.upper().replace("MIBI", "")


def expressions(dashboard: dict[str, Any]) -> list[str]:
    found = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    return found + [v["definition"] for v in dashboard["templating"]["list"] if v["type"] == "query"]


RECONNECTING = """
import gc, socket
import torch
from jupyter_gpupool import attach
from jupyter_gpupool.transport.resumable_connection import ResumableConnection

with attach(1, 0.1):
    x = torch.ones(2, device="cuda")
    for _ in range(3):
        assert x.sum().item() == 2
        (connection,) = [o for o in gc.get_objects() if isinstance(o, ResumableConnection)]
        connection._sock.shutdown(socket.SHUT_RDWR)
    assert x.sum().item() == 2
    print("computed", flush=True)
    input()
"""


def test_lost_connections_that_were_restored_are_counted(
    metered: Server, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    metered.bundle(tmp_path / "client", owner="kay")
    program = subprocess.Popen(
        [sys.executable, "-c", RECONNECTING],
        env={**os.environ, "GPUPOOL_CONFIG_DIR": str(tmp_path / "client")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdout is not None and program.stdout.readline() == "computed\n"
        eventually(lambda: scrape(metered).of("gpupool_reconnects_total") == 3, "they are counted")
        program.communicate("\n")
    assert program.returncode == 0
    assert scrape(metered).of("gpupool_reconnects_total") == 3, "those of a lease that has ended stay counted"


def test_every_figure_of_the_dashboard_is_served(metered: Server, project_root: Path) -> None:
    dashboard = json.loads((project_root / "docs" / "grafana.json").read_text())
    client = metered.client(metered.token("traffic", owner="eve")["token"])
    client.release(
        client.request(ask(partial=0.1), wait_s=60).id
    )  # counters with labels begin with their first event
    with pytest.raises(ImpossibleRequest):
        client.request(ask(num_gpus=9, partial=1.0))
    served = scrape(metered)
    asked = {
        (name, label)
        for expression in expressions(dashboard)
        for name in re.findall(r"gpupool_\w+", expression)
        for label in (*re.findall(r"by \(([^)]*)\)", expression), "")
    }
    assert len({name for name, _ in asked}) >= 15
    for name, labels in asked:
        assert name in served, f"the dashboard asks for {name}, which nobody serves"
        known = {key for series in served[name] for key, _ in series}
        for label in filter(None, labels.split(", ")):
            assert label in known, f"{name} has no label {label}"
    shown = {name for name, _ in asked}
    unseen = {n for n in served if not n.endswith(("_created", "_sum", "_count"))} - shown
    assert not unseen, "served and never shown"


def test_the_dashboard_is_one_that_grafana_imports(project_root: Path) -> None:
    """Its structure: what the import form and the panels of Grafana 10 and later look at."""
    dashboard = json.loads((project_root / "docs" / "grafana.json").read_text())
    assert (
        dashboard["id"] is None
        and dashboard["uid"]
        and dashboard["title"]
        and dashboard["schemaVersion"] >= 36
    )
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert (
        variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    )
    panels = dashboard["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        columns, rows = range(grid["x"], grid["x"] + grid["w"]), range(grid["y"], grid["y"] + grid["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert cells and not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        assert panel["title"] and panel["type"] in ("row", "stat", "timeseries", "state-timeline")
        refs = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(refs)) == len(refs) and bool(refs) == (panel["type"] != "row")
        for target in panel.get("targets", []):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert target["expr"].count("(") == target["expr"].count(")")
            named = {name for name in re.findall(r"\$(\w+)", target["expr"]) if not name.startswith("__")}
            assert named <= set(variables), "a variable that nobody defines"
