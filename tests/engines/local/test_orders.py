"""Orders that the engine leaves for a worker in files."""

from __future__ import annotations

import asyncio
from pathlib import Path

from jupyter_gpupool.engines.local import worker_files


def test_an_order_to_a_worker_that_has_only_just_been_forked_reaches_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = worker_files.path(str(tmp_path), "lease")
        asked = asyncio.create_task(worker_files.obeyed(file, {"GPU-0": 1024}, asyncio.Event(), 300.0))
        while not list(tmp_path.iterdir()):  # the worker begins when the order was asked for
            await asyncio.sleep(0.01)
            worker_files.make_own_directory(file)
        worker_files.write(file, {"lease": "lease", "pid": 1, "created": 0.0, "port": 0})
        while (order := worker_files.read_order(file)) is None:
            await asyncio.sleep(0.01)
        assert order["limits"] == {"GPU-0": 1024}
        worker_files.report(file, {"obeyed": {"order": order["order"], "in_use": {}}})
        assert await asked == {}

    asyncio.run(scenario())


def test_nobody_waits_for_a_worker_that_is_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        gone = asyncio.Event()
        gone.set()
        file = worker_files.path(str(tmp_path), "lease")
        assert await worker_files.obeyed(file, {"GPU-0": 1024}, gone, 300.0) is None
        assert list(tmp_path.iterdir()) == []

    asyncio.run(scenario())
