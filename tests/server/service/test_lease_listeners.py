"""Who listens to a pool hears of every change of a lease's state, in order."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.core.models import Request
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.server.service.service import PoolService

pytest.importorskip("torch", reason="workers need PyTorch")


def ask(partial: float) -> Request:
    return Request(str(uuid.uuid4()), "ada", 1, partial, secret_sha256=hashlib.sha256(b"s").hexdigest())


def test_every_change_of_state_is_told_until_one_stops_listening(tmp_path: Path) -> None:
    heard: list[tuple[str, str | None, str]] = []
    unheard: list[dict[str, Any]] = []

    def note(change: dict[str, Any]) -> None:
        assert change["type"] == "lease"
        heard.append((change["lease"]["id"], change["previous"], change["lease"]["state"]))

    def fail(change: dict[str, Any]) -> None:
        raise RuntimeError("a listener with a fault")

    async def play() -> tuple[str, str]:
        engine = LocalEngine(
            emulate="always", emulated_count=1, pool_id=str(tmp_path), attach_timeout_s=600.0
        )
        service = PoolService(db_url=f"sqlite:///{tmp_path / 'ledger.sqlite'}", engine=engine)
        await service.start()
        try:
            service.listen(fail)
            service.listen(note)
            stop = service.listen(unheard.append)
            stop()
            first = await service.request(ask(1.0), 60)
            second = await service.request(ask(0.5))
            await service.release(first.id, None)
            await service.wait(second.id, None, 60, until_settled=True)
            await service.release(second.id, None)
        finally:
            await service.stop()
        return first.id, second.id

    first, second = asyncio.run(play())
    assert [(before, after) for lease, before, after in heard if lease == first] == [
        (None, "GRANTED"),
        ("GRANTED", "ACTIVE"),
        ("ACTIVE", "RELEASED"),
    ]
    assert [(before, after) for lease, before, after in heard if lease == second] == [
        (None, "QUEUED"),
        ("QUEUED", "GRANTED"),
        ("GRANTED", "ACTIVE"),
        ("ACTIVE", "RELEASED"),
    ]
    assert not unheard
