"""A pool whose GPUs fall ill and get well again: what it grants, and what everybody who looks is told."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from jupyter_gpupool.cli.health import picture
from jupyter_gpupool.core.checks import from_json, worst
from jupyter_gpupool.core.errors import ImpossibleRequest, LedgerUnavailable
from jupyter_gpupool.core.models import LeaseState, Request
from jupyter_gpupool.engines.local import engine as local
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.server.access.authentication import TokenStore
from jupyter_gpupool.server.http.handlers import standalone_handlers
from jupyter_gpupool.server.service import health_monitor
from jupyter_gpupool.server.service.service import PoolService
from jupyter_gpupool.server.watch.feed import Feed

from ...support.recorded_nvml import Recorded, install

pytest.importorskip("torch", reason="workers need PyTorch")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks several times a second."""
    monkeypatch.setattr(health_monitor, "CHECK_INTERVAL_S", 0.1)
    plain = local.Watch
    monkeypatch.setattr(local, "Watch", lambda read: plain(read, every_s=0.1))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Two GPUs, by a stand-in for the NVIDIA driver."""
    card = {"memory": (40960, 960, 0), "uncorrected": 0, "temperature": 40, "clocks": 0, "events": 8}
    return install(monkeypatch, [{**card, "uuid": f"GPU-{i}", "name": "NVIDIA A100"} for i in range(2)])


@asynccontextmanager
async def served(tmp_path: Path, **engine: Any) -> AsyncIterator[tuple[PoolService, httpx.AsyncClient]]:
    """A pool in this process, and a client of its HTTP server."""
    local_engine = LocalEngine(
        pool_id=str(tmp_path),
        run_dir=str(tmp_path / "run"),
        attach_timeout_s=600.0,  # nobody attaches
        **engine,
    )
    service = PoolService(db_url=f"sqlite:///{tmp_path / 'ledger.sqlite'}", engine=local_engine)
    sockets = bind_sockets(0, "127.0.0.1")
    server = HTTPServer(Application(standalone_handlers(service, TokenStore("secret"))))
    await service.start()
    try:
        server.add_sockets(sockets)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{sockets[0].getsockname()[1]}/gpupool/api/v1",
            headers={"Authorization": "Bearer secret"},
            timeout=300,
        ) as client:
            yield service, client
    finally:
        server.stop()
        await service.stop()


async def until(condition: Callable[[], Awaitable[Any]], what: str) -> Any:
    deadline = time.monotonic() + 300
    while not (value := await condition()):
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.02)
    return value


def ask(num_gpus: int = 1, wait: bool = True) -> Request:
    digest = hashlib.sha256(b"x").hexdigest()
    return Request(str(uuid.uuid4()), "me", num_gpus, 1.0, secret_sha256=digest, wait=wait)


def checks_of(answer: httpx.Response, name: str) -> list[dict[str, Any]]:
    return [check for check in answer.json()["checks"] if check["name"] == name]


@pytest.mark.usefixtures("quick")
def test_a_gpu_that_is_lost_gets_nothing_until_it_is_back(tmp_path: Path, machine: Recorded) -> None:
    async def story() -> None:
        async with served(tmp_path) as (service, client):
            before = await client.get("/health")
            assert before.status_code == 200 and before.json()["status"] in ("ok", "warning")
            assert {c["status"] for c in checks_of(before, "ecc")} == {"ok"}

            told: list[dict[str, Any]] = []

            class Watcher:
                def send(self, message: str) -> None:
                    told.append(json.loads(message))

                def end(self, reason: str) -> None:
                    raise AssertionError(reason)

            watcher = Watcher()
            view = Feed(service).view(None)
            await view.join(watcher)
            machine.devices[0]["lost"] = True

            async def sick() -> bool:
                gpus = (await client.get("/pool")).json()["servers"][0]["gpus"]
                return [gpu["healthy"] for gpu in gpus] == [False, True]

            await until(sick, "GET pool says that the first GPU is not healthy")
            pool = (await client.get("/pool")).json()
            assert pool["servers"][0]["gpus"][0]["trouble"] == "lost: it does not answer"
            assert pool["healthy"] is False
            answer = await client.get("/health")
            assert answer.status_code == 503 and answer.json()["status"] == "failing"
            (lost,) = checks_of(answer, "gpu")
            assert lost["gpu"] == "GPU-0" and lost["advice"]
            (gpus,) = checks_of(answer, "gpus")
            assert gpus["value"] == 1 and "1 of them unhealthy" in gpus["detail"]

            with pytest.raises(ImpossibleRequest, match="1 of them unhealthy"):
                await service.request(ask(2))
            lease = await service.request(ask())
            assert [piece.gpu_uuid for piece in lease.slices] == ["GPU-1"], "the pool goes on with the other"
            waiting = await service.request(ask())
            assert waiting.state is LeaseState.QUEUED

            async def told_of() -> list[bool]:
                changes = [m.get("gpus", {}).get("GPU-0") or {} for m in told if m["type"] == "delta"]
                return [c["healthy"] for c in changes if "healthy" in c]

            async def warned() -> bool:
                return await told_of() == [False]

            await until(warned, "who watches is told of it")
            del machine.devices[0]["lost"]

            async def granted() -> bool:
                found = await service.wait(waiting.id, None, 0)
                return [piece.gpu_uuid for piece in found.slices] == ["GPU-0"]

            await until(granted, "the GPU is back, and goes to who waited")

            async def seen() -> bool:
                return await told_of() == [False, True]

            await until(seen, "who watches was told of both")
            view.leave(watcher)

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
def test_memory_errors_and_reports_of_the_driver_take_gpus_out(tmp_path: Path, machine: Recorded) -> None:
    async def story() -> None:
        async with served(tmp_path) as (service, client):

            async def sick() -> list[str]:
                gpus = (await client.get("/pool")).json()["servers"][0]["gpus"]
                return [gpu["trouble"] for gpu in gpus if not gpu["healthy"]]

            await client.get("/health")
            assert await sick() == []
            held = await service.request(ask(), wait_s=60)
            machine.devices[0]["uncorrected"] = 2
            (why,) = await until(sick, "the first GPU is out")
            assert "2 double-bit errors" in why
            machine.report(1, 13)  # a program's own fault
            machine.report(1, 48)

            async def both() -> bool:
                return len(await sick()) == 2

            await until(both, "the second one too")
            assert not (await service.wait(held.id, None, 0)).state.ended, "nobody loses a lease by it"
            machine.devices[0]["uncorrected"] = 0

            async def one() -> bool:
                return len(await sick()) == 1

            await until(one, "a reset brings the first one back; the report of the second stands")

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
def test_a_question_waits_for_no_driver(
    tmp_path: Path, machine: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver hangs: the pool answers all the same, with what it knew."""
    import threading

    import pynvml

    gate = threading.Event()

    async def story() -> None:
        async with served(tmp_path) as (_, client):
            await client.get("/health")
            monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", lambda *_: gate.wait(300) and 40)
            first = (await client.get("/health")).json()["checks"]
            for _ in range(20):
                answer = await client.get("/health")
                assert answer.status_code == 200
            assert len(answer.json()["checks"]) == len(first)
            (age,) = checks_of(answer, "readings")
            assert age["unit"] == "s" and age["threshold"] == 60.0

    try:
        asyncio.run(story())
    finally:
        gate.set()


def test_the_checks_of_a_pool_with_emulated_gpus(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(tmp_path, emulate="always") as (_, client):
            answer = await client.get("/health")
            body = answer.json()
            assert body["status"] != "failing", [c for c in body["checks"] if c["status"] == "failing"]
            assert abs(body["time"] - time.time()) < 60 and body["age_s"] < 60
            names = {check["name"] for check in body["checks"]}
            assert names >= {"ledger", "gpus", "engine", "readings", "driver", "memory", "memory available"}
            assert names >= {"disk", "open files", "mtu", "link", "mps", "pytorch"}
            (ledger,) = checks_of(answer, "ledger")
            assert ledger["value"] > 0 and (ledger["unit"], ledger["threshold"]) == ("ms", 50.0)
            drawn = picture([from_json(check) for check in body["checks"]])
            assert len(drawn.splitlines()) >= 1 + len(body["checks"])
            json.dumps(body, allow_nan=False)

    asyncio.run(story())


def test_a_ledger_that_cannot_be_written_fails_and_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(tmp_path, emulate="always") as (service, client):
            await client.get("/health")

            async def refuse(function: Callable[[Ledger], Any]) -> Any:
                raise LedgerUnavailable("the disk is full")

            service.health_monitor._on_ledger = refuse
            service.health_monitor._touched = -1e9
            await service.health_monitor.look()
            answer = await client.get("/health")
            (ledger,) = checks_of(answer, "ledger")
            assert answer.status_code == 503 and ledger["detail"] == "the disk is full" and ledger["advice"]
            assert (await client.get("/pool")).json()["healthy"] is False

    asyncio.run(story())


def test_certificates_by_how_long_they_are_valid(tmp_path: Path) -> None:
    from jupyter_gpupool.server.daemon.certificates import new_authority, new_server

    file = tmp_path / "server.crt"
    ca = new_authority("test")

    def status(days: int, later_days: float = 0.0) -> str:
        file.write_bytes(new_server(ca, ["localhost"], days=days).certificate)
        (check,) = health_monitor._certificate(
            LocalEngine(certfile=str(file)), time.time() + later_days * 86400
        )
        return check.status

    assert [status(800), status(29), status(29, later_days=30)] == ["ok", "warning", "failing"]
    file.write_text("nothing of the kind")
    (check,) = health_monitor._certificate(LocalEngine(certfile=str(file)), time.time())
    assert check.status == "failing" and check.advice
    assert health_monitor._certificate(LocalEngine(), time.time()) == []


def test_a_check_of_a_later_version_is_understood() -> None:
    check = from_json({"name": "x", "status": "splendid", "detail": "d", "flavour": 3})
    assert check.status == "unknown" and worst([check]) == "ok"
