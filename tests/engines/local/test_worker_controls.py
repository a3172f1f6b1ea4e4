"""The engine and a worker that somebody has taken over: it says anything, or nothing, and harms nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.engines.local import worker_answers, worker_files
from jupyter_gpupool.engines.local.parking import Parking
from jupyter_gpupool.engines.local.worker_controls import WorkerChannel
from jupyter_gpupool.engines.local.worker_tasks import WorkerTasks
from jupyter_gpupool.transport import control

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="workers run on Linux only")

STATE = {"parked": True, "clean": False, "bytes": 1 << 20, "lent": 0, "idle_s": 0.5}


class Worker:
    """One at the other end of a control socket: ``answer`` gets each question, and says what is sent."""

    def __init__(
        self, folder: Path, lease_id: str, answer: Callable[[dict[str, Any], list[int]], bytes | None]
    ) -> None:
        self._listener = control.listen(str(folder), lease_id + worker_files.CONTROL)
        self._answer = answer
        self.sock: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.sock, _ = self._listener.accept()
                with contextlib.suppress(OSError):
                    while True:
                        message, descriptors = control.receive(self.sock)
                        packet = self._answer(message, descriptors)
                        for descriptor in descriptors:
                            os.close(descriptor)
                        if packet is not None:
                            self.sock.send(packet)

    def close(self) -> None:
        for sock in (self._listener, self.sock):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        self._thread.join()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def start(lease_id: str, answer: Callable[[dict[str, Any], list[int]], bytes | None]) -> Worker:
        started.append(Worker(tmp_path, lease_id, answer))
        return started[-1]

    yield start
    for one in started:
        one.close()


def says(**fields: Any) -> Callable[[dict[str, Any], list[int]], bytes]:
    return lambda message, descriptors: json.dumps({"id": message["id"], **fields}).encode()


def silent(message: dict[str, Any], descriptors: list[int]) -> None:
    return None


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_answers, "time_limit_s", lambda what: 3.0)


@pytest.mark.parametrize(
    "packet",
    [b"[]", b"{", b"[" * 60000, b'{"a":' * 10000, b"\xff", b"9" * 5000]
    + [b'{"id": []}', b'{"id": {}}', b'{"id": true}', b'{"id": 1}', b'{"id": 1, "failed": {}}']
    + [b'{"wanted": 1}', b'{"parked": "x"}', b'{"lent": -1}', b'{"parked": true, "lent": 1e99}']
    + [
        json.dumps({"id": 1, **STATE, name: bad}).encode()
        for name in STATE
        for bad in ("x", None, -1.5, [])
        if (name, bad) != ("idle_s", -1.5)
    ]
    + [b'{"id": 1, "parked": true, "clean": true, "bytes": 0, "lent": 0, "idle_s": NaN}'],
    ids=lambda packet: packet[:80].decode(errors="replace"),
)
def test_a_worker_that_says_what_it_should_not_is_hung_up_on(
    packet: bytes, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    notices: list[dict[str, Any]] = []
    worker("lease", lambda message, descriptors: packet)

    async def main() -> None:
        channel = WorkerChannel(str(tmp_path), "lease", notices.append)
        with pytest.raises(EngineError):
            await channel.ask("state")
        assert not channel.is_open

    asyncio.run(main())
    assert notices == []


def test_descriptors_from_a_worker_are_not_kept(worker: Callable[..., Worker], tmp_path: Path) -> None:
    sent = os.open(tmp_path, os.O_RDONLY)

    def answer(message: dict[str, Any], descriptors: list[int]) -> None:
        assert one.sock is not None
        control.send(one.sock, {"id": message["id"], **STATE}, [sent] * 100)

    def is_sent(descriptor: str) -> bool:
        with contextlib.suppress(OSError):  # that of the folder itself
            return os.path.samestat(os.stat(int(descriptor)), os.stat(sent))
        return False

    one = worker("lease", answer)

    async def main() -> None:
        channel = WorkerChannel(str(tmp_path), "lease", lambda notice: None)
        with pytest.raises(EngineError):
            await channel.ask("state")
        assert not channel.is_open
        assert [name for name in os.listdir("/proc/self/fd") if is_sent(name)] == [str(sent)]

    asyncio.run(main())
    os.close(sent)


def test_an_answer_that_comes_too_late_is_not_that_of_the_next_question(
    worker: Callable[..., Worker], tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(message: dict[str, Any], descriptors: list[int]) -> bytes | None:
        if message["do"] == "state":
            return None
        assert one.sock is not None
        control.send(one.sock, {"id": message["id"] - 1, **STATE})
        return json.dumps({"id": message["id"], "clean": False}).encode()

    one = worker("lease", answer)

    async def main() -> None:
        channel = WorkerChannel(str(tmp_path), "lease", lambda notice: None)
        with pytest.raises(EngineError, match="does not answer"):
            await channel.ask("state")
        monkeypatch.undo()
        assert (await channel.ask("clean"))["clean"] is False
        channel.close()

    asyncio.run(main())


def test_why_something_failed_is_one_line(worker: Callable[..., Worker], tmp_path: Path) -> None:
    worker("lease", says(failed="a\nb \x1b[2J" + "c" * 10000))

    async def main() -> str:
        channel = WorkerChannel(str(tmp_path), "lease", lambda notice: None)
        with pytest.raises(EngineError) as raised:
            await channel.ask("park")
        channel.close()
        return str(raised.value)

    line = asyncio.run(main())
    assert line.startswith("a b [2Jccc") and len(line) == 500


def test_a_silent_worker_does_not_keep_others_from_being_adopted(
    worker: Callable[..., Worker], tmp_path: Path, impatient: None
) -> None:
    worker("silent", silent)
    worker("wrong", says(parked=[]))
    worker("good", says(**STATE))

    async def main() -> None:
        parking = Parking(str(tmp_path), 0.0, logging.getLogger())
        await parking.adopt(["silent", "wrong", "good", "gone"])
        assert parking.parked == {"good"}
        await parking.stop()

    asyncio.run(main())


def test_a_task_that_does_not_end_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    async def never(lease_id: str) -> None:
        await asyncio.Event().wait()

    async def wrong(lease_id: str) -> None:
        raise KeyError(lease_id)

    async def good(lease_id: str) -> None:
        done.append(lease_id)

    async def main() -> None:
        tasks = WorkerTasks(logging.getLogger())
        for lease_id, work in (("a", never), ("b", wrong), ("c", good)):
            tasks.start(lease_id, work)
        while not done:
            await asyncio.sleep(0)
        for lease_id in "abc":
            tasks.start(lease_id, good)
        while done != ["c", "b", "c"]:
            await asyncio.sleep(0)
        await tasks.stop()
        tasks.start("a", good)
        await asyncio.sleep(0)
        await tasks.stop()
        assert done == ["c", "b", "c", "a"]

    asyncio.run(main())
    assert "The worker of lease b could not be looked after" in caplog.text
