"""What connects the workers of a lease on several servers: to each other, when one asks, and to nothing else."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.core.models import WorkerAddress
from jupyter_gpupool.engines.local import worker_files
from jupyter_gpupool.engines.local.linking import Linking
from jupyter_gpupool.engines.local.parking import Parking
from jupyter_gpupool.transport import control

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="workers run on Linux only")

LOG = logging.getLogger(__name__)


class Worker:
    """The end of a worker that asks for links, and hears what the engine answers."""

    def __init__(self, folder: Path, lease_id: str) -> None:
        self._listener = control.listen(str(folder), lease_id + worker_files.CONTROL)
        self._sock: socket.socket | None = None

    def learn(self) -> Any:
        """The names of the lease's other workers."""
        self._sock, _ = self._listener.accept()
        self._sock.settimeout(300)
        message, _ = self.hear()
        return message["names"] if message["do"] == "peers" else None

    def ask(self, *names: Any) -> None:
        assert self._sock is not None
        for name in names:
            control.send(self._sock, {"link": name})

    def hear(self) -> tuple[dict[str, Any], list[int]]:
        assert self._sock is not None
        message, descriptors = control.receive(self._sock)
        control.send(self._sock, {"id": message["id"]})
        return message, descriptors

    def is_hung_up_on(self) -> bool:
        assert self._sock is not None
        try:
            self._sock.settimeout(300)
            return not self._sock.recv(1)
        except OSError:
            return True

    def close(self) -> None:
        for sock in (self._listener, self._sock):
            if sock is not None:
                sock.close()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    one = Worker(tmp_path, "lease")
    yield one
    one.close()


@pytest.fixture
def there() -> Iterator[socket.socket]:
    """Where the lease's other worker listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(300)
        yield listener


def engine(
    folder: Path,
    worker: Worker,
    there: socket.socket,
    program: Callable[[], Any],
    others: tuple[str, ...] = ("other",),
) -> Any:
    """What ``program`` returns, beside which an engine runs that links the lease's worker to those."""
    found: list[Any] = []

    async def main() -> None:
        parking = Parking(str(folder), 1.0, LOG)
        linking = Linking(parking.channel, True, LOG)
        parking.on_link = linking.on_asked
        address = WorkerAddress(*there.getsockname()[:2], 0, 0.0)
        introduced = asyncio.to_thread(worker.learn)
        _, names = await asyncio.gather(
            linking.introduce("lease", dict.fromkeys(others, address)), introduced
        )
        assert names == list(others)
        found.append(await asyncio.to_thread(program))
        await linking.stop()
        await parking.stop()

    asyncio.run(main())
    return found[0]


def test_a_worker_that_asks_gets_a_connection_to_the_other_one(
    tmp_path: Path, worker: Worker, there: socket.socket
) -> None:
    def program() -> bytes:
        worker.ask("other")
        message, (descriptor,) = worker.hear()
        assert message["peer"] == "other" and message["to"] == list(there.getsockname())
        assert message["secure"] is True
        accepted, _ = there.accept()
        with socket.socket(fileno=descriptor) as ours, accepted:
            ours.sendall(b"hello")
            return accepted.recv(5)

    assert engine(tmp_path, worker, there, program) == b"hello"


def test_a_worker_that_asks_for_another_leases_gets_none(
    tmp_path: Path, worker: Worker, there: socket.socket
) -> None:
    def program() -> None:
        worker.ask("stranger")
        message, descriptors = worker.hear()
        assert descriptors == []
        assert message["failed"] == "the engine knows of no such worker of the lease"

    engine(tmp_path, worker, there, program)
    there.setblocking(False)
    with pytest.raises(BlockingIOError):
        there.accept()


def test_several_others_are_linked_at_once(tmp_path: Path, worker: Worker, there: socket.socket) -> None:
    def program() -> set[str]:
        worker.ask("one", "two")
        found = set()
        for _ in range(2):
            message, (descriptor,) = worker.hear()
            os.close(descriptor)
            found.add(message["peer"])
        return found

    assert engine(tmp_path, worker, there, program, ("one", "two")) == {"one", "two"}


def test_another_server_that_cannot_be_reached_is_said(tmp_path: Path, worker: Worker) -> None:
    def program() -> str:
        worker.ask("other")
        message, descriptors = worker.hear()
        assert descriptors == []
        return str(message["failed"])

    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        why = engine(tmp_path, worker, nobody_listens, program)
    assert why.startswith("the other worker cannot be reached")


@pytest.mark.parametrize("name", ["", "x" * 201, 7, None, ["other"]], ids=str)
def test_a_worker_that_asks_for_what_is_no_name_is_hung_up_on(
    name: Any, tmp_path: Path, worker: Worker, there: socket.socket
) -> None:
    def program() -> bool:
        worker.ask(name)
        return worker.is_hung_up_on()

    assert engine(tmp_path, worker, there, program)
