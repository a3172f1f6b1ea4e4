"""The ledger as a file of SQLite's; test_ledgers.py has what both databases do."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from jupyter_gpupool.core.errors import LedgerUnavailable, PoolError
from jupyter_gpupool.core.models import LeaseState, Request, Server
from jupyter_gpupool.pool.ledger.file_lock import LedgerLock
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager

Ask = Callable[..., Request]


@pytest.fixture
def db_url(path: Path) -> str:
    return f"sqlite:///{path}"


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and "Traceback" not in text
    return text


def test_the_file_is_private_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "ledger.sqlite"
    before = os.umask(0)
    try:
        ledger = Ledger(f"sqlite:///{path}")
        ledger.check()
    finally:
        os.umask(before)
    files = list(path.parent.iterdir())
    assert path in files
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {f.name: "0o600" for f in files}
    assert path.parent.stat().st_mode & 0o777 == 0o700
    ledger.close()


def test_commits_are_durable(ledger: Ledger) -> None:
    with ledger.reading() as tx:
        pragma = {
            name: tx._connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragma == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////proc/nowhere/ledger.sqlite", "nodatabase://host/x"])
def test_an_address_that_cannot_work_gets_one_line(url: str) -> None:
    with pytest.raises(LedgerUnavailable) as caught:
        Ledger(url)
    one_line(caught.value)


def test_a_password_is_not_shown() -> None:
    with pytest.raises(LedgerUnavailable) as caught:
        Ledger("nodatabase://me:hunter2@host/x")
    assert "hunter2" not in one_line(caught.value)


def test_what_is_not_a_ledger_is_left_alone(path: Path) -> None:
    path.write_bytes(b"my thesis, the only copy" * 1000)
    with pytest.raises(LedgerUnavailable, match="not a ledger"):
        Ledger(f"sqlite:///{path}")
    assert path.read_bytes() == b"my thesis, the only copy" * 1000


def test_a_damaged_ledger_is_named(path: Path, manager: Manager, ledger: Ledger, ask: Ask) -> None:
    manager.request(ask(partial=0.2))
    ledger.close()
    blob = bytearray(path.read_bytes())
    blob[4096:] = b"\xff" * (len(blob) - 4096)
    path.write_bytes(blob)
    with pytest.raises(LedgerUnavailable, match="damaged|ledger") as caught:
        Manager(Ledger(f"sqlite:///{path}"))
    one_line(caught.value)


def test_a_newer_format_is_refused(path: Path, ledger: Ledger) -> None:
    ledger.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE gpupool_schema SET version = 99")
    connection.close()
    with pytest.raises(LedgerUnavailable, match="newer version .its format is 99"):
        Ledger(f"sqlite:///{path}")


def test_a_locked_ledger_changes_nothing(
    path: Path, manager: Manager, ask: Ask, monkeypatch: pytest.MonkeyPatch, ledger: Ledger
) -> None:
    with ledger.reading() as tx:  # the connection that the next calls use again
        tx._connection.exec_driver_sql("PRAGMA busy_timeout = 1")
    intruder = sqlite3.connect(path, isolation_level=None)
    intruder.execute("BEGIN IMMEDIATE")
    request = ask()
    with pytest.raises(LedgerUnavailable, match="another process keeps it locked"):
        manager.request(request)
    intruder.execute("ROLLBACK")
    intruder.close()
    assert manager.leases() == []
    lease = manager.request(request).lease
    assert lease is not None and lease.state is LeaseState.GRANTED


def test_a_full_ledger_changes_nothing_and_works_again(manager: Manager, ledger: Ledger, ask: Ask) -> None:
    """SQLite's own page limit gives the very error of a full disk, at every possible moment."""
    held = manager.request(ask(partial=0.5)).lease
    assert held is not None
    with ledger.reading() as tx:
        pages = tx._connection.exec_driver_sql("PRAGMA page_count").scalar()
        tx._connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    refused = None
    for _ in range(200):
        before = manager.snapshot()
        request = ask(partial=0.001, label="x" * 200, client="y" * 200)
        try:
            manager.request(request)
        except LedgerUnavailable as error:
            refused = one_line(error)
            assert manager.snapshot() == before
            break
    assert refused is not None and "the disk is full; free some space" in refused
    manager.heartbeat(held.id)  # holders stay alive on a full disk
    with ledger.reading() as tx:
        tx._connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    lease = manager.request(request).lease
    assert lease is not None and lease.state is LeaseState.GRANTED


FILE_LIMIT = textwrap.dedent(
    """
    import resource, signal, sys, uuid
    from jupyter_gpupool.gpus import emulated_gpus
    from jupyter_gpupool.core.errors import LedgerUnavailable
    from jupyter_gpupool.pool.ledger.ledger import Ledger
    from jupyter_gpupool.pool.manager import Manager
    from jupyter_gpupool.core.models import Request, Server

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    ledger = Ledger("sqlite:///" + sys.argv[1])
    manager = Manager(ledger, ttl_s=3600.0)
    manager.set_servers([Server("one", "127.0.0.1", emulated_gpus("one"))])
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    for _ in range(2000):
        request = Request(id=str(uuid.uuid4()), owner="ada", partial=0.001, secret_sha256="0" * 64)
        before = manager.snapshot()
        try:
            manager.request(request)
            manager.release(request.id)
        except LedgerUnavailable as error:
            print("refused:", error)
            after = manager.snapshot()
            held = sum(piece.memory_mib for lease in after.leases for piece in lease.slices)
            assert held == sum(after.granted_mib.values())
            break
    """
)


def test_a_file_that_may_not_grow_is_refused_in_one_line(path: Path) -> None:
    """A real failing write(2): the operating system stops the files at 400 kB."""
    child = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, str(path)], capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("refused: the ledger ") and child.stdout.count("\n") == 1
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_full_file_system_is_refused_in_one_line(tmp_path: Path, ask: Ask, servers: list[Server]) -> None:
    place = tmp_path / "tiny"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command: a tiny file system cannot be made here")
    if mounted.returncode != 0:
        pytest.skip(f"a tiny file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        ledger = Ledger(f"sqlite:///{place}/ledger.sqlite")
        manager = Manager(ledger)
        manager.set_servers(servers)
        ballast = place / "ballast"
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"\0" * 4096)
        with pytest.raises(LedgerUnavailable, match="full") as caught:
            for _ in range(100):
                manager.request(ask(partial=0.001))
        one_line(caught.value)
        with pytest.raises(LedgerUnavailable):
            for _ in range(100):
                ledger.check()
        before = manager.snapshot()
        ballast.unlink()
        assert manager.snapshot() == before
        lease = manager.request(ask(partial=0.5)).lease
        assert lease is not None and lease.state is LeaseState.GRANTED
        ledger.close()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_ledger_gets_one_line(manager: Manager, ledger: Ledger, ask: Ask) -> None:
    with ledger.reading() as tx:
        tx._connection.exec_driver_sql("PRAGMA query_only = ON")
    with pytest.raises(LedgerUnavailable, match="read-only"):
        manager.request(ask())
    with pytest.raises(LedgerUnavailable, match="read-only"):
        ledger.check()
    assert manager.leases() == []


def test_a_second_pool_is_told_who_has_the_ledger(path: Path) -> None:
    with LedgerLock(path) as lock:
        assert lock.held and lock.path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(PoolError, match=f"process {os.getpid()} runs a pool on this ledger already"):
            LedgerLock(path).acquire()
    with LedgerLock(path):
        pass


def test_the_lock_of_a_killed_pool_is_free(path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from jupyter_gpupool.pool.ledger.file_lock import LedgerLock; "
            "lock = LedgerLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(600)",
            str(path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(PoolError, match=f"process {holder.pid} "):
            LedgerLock(path).acquire()
    finally:
        holder.kill()
        holder.communicate()
    with LedgerLock(path):
        pass
