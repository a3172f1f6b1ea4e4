"""The workers of an engine, shut in: what they reach of the engine's own, and what the engine believes them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="workers need PyTorch")

from jupyter_gpupool.core.models import WorkerAddress  # noqa: E402
from jupyter_gpupool.engines.local import warm_parent, worker_files  # noqa: E402
from jupyter_gpupool.engines.local.sandbox import layers, sandbox  # noqa: E402
from jupyter_gpupool.engines.local.workers import LocalWorkers  # noqa: E402
from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.transport import proofs  # noqa: E402
from jupyter_gpupool.transport.lifeline import Lifeline  # noqa: E402

from ...support import hostile_operator  # noqa: E402
from .test_data_port import SECRET, play  # noqa: E402
from .test_data_port import attach_spec as over_tls  # noqa: E402
from .test_data_port import granted as granted_over_tls  # noqa: E402
from .test_engine import alive, attach_spec, granted, running  # noqa: E402
from .test_parking import Server  # noqa: E402

OPERATORS = {"default": ["tests.support.hostile_operator/gpupool_hostile::run"]}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))


@pytest.fixture
def shut_in(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """All layers are here but perhaps that of namespaces, which closes no files."""
    why = layers.objection("require", sandbox.prepare("auto", tmp_path).lacks)
    if why:
        shows = request.node.name.removeprefix("test_").replace("_", " ")
        pytest.skip(f"not shown: {shows}; {why}")


def tried(**attempts: str) -> dict[str, str]:
    """What comes of each piece of Python in the worker of the lease of this process; empty: it worked."""
    code = "import os, socket\nanswer = {}\n"
    for name, attempt in attempts.items():
        code += f"try:\n    {attempt}; answer[{name!r}] = ''\n"
        code += f"except BaseException as e: answer[{name!r}] = type(e).__name__\n"
    return dict(hostile_operator.run(code))


@contextlib.contextmanager
def attached(spec: Any) -> Iterator[None]:
    line = Lifeline(spec)
    session.activate(spec)
    try:
        yield
    finally:
        session.deactivate()
        line.release()


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_a_worker_that_was_taken_over_reaches_nothing_of_the_engines(
    mode: str, tmp_path: Path, shut_in: None, eventually: Callable
) -> None:
    run = tmp_path / "run"
    server = Server(run, sandbox=mode, operators=OPERATORS)
    try:
        one, other = granted(), granted()
        worker, _ = server.start(one), server.start(other)
        state = worker_files.path(str(run), one.id)
        eventually(state.exists, "the worker's state is written")
        before = state.read_text()
        with attached(attach_spec(one, worker)):
            there = worker_files.path(str(run), other.id)
            own = worker_files.own_directory(state)
            outcome = tried(
                its_state=f"open({str(state)!r}, 'w')",
                anothers_state=f"open({str(there)!r})",
                anothers_directory=f"open({str(worker_files.own_directory(there) / 'x')!r}, 'w')",
                the_folder=f"os.listdir({str(run)!r})",
                its_control=f"os.unlink({str(state.with_suffix(worker_files.CONTROL))!r})",
                a_pipe=f"os.mkfifo({str(own / 'pipe')!r})",
                its_own=f"open({str(own / 'x')!r}, 'w')",
            )
        assert outcome.pop("its_own") == ""
        refusals = {"PermissionError", "FileNotFoundError", "OSError"}  # the last: its root is read-only
        assert set(outcome.values()) <= refusals, outcome
        assert state.read_text() == before
    finally:
        server.stop()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "[" * 60000, '{"usage": 1}', '{"usage": {"allocated_bytes": [], "busy": {}}}', '{"code": "x"}']
    + ['{"obeyed": {"order": 1}}', '{"pid": 1, "lease": "x"}', " " * (1 << 17) + "{}"],
)
def test_a_report_is_believed_only_where_it_has_its_form(content: str, tmp_path: Path) -> None:
    file = worker_files.path(str(tmp_path), "lease")
    identity = {"lease": "lease", "pid": 7, "created": 1.0, "port": 0}
    worker_files.write(file, identity)
    own = worker_files.make_own_directory(file)
    (own / "report.json").write_text(content)
    assert worker_files.read(file) == identity
    usage = {
        "allocated_bytes": {"GPU-x": 1},
        "busy": {"GPU-x": 0.5},
        "sessions": 1,
        "held_at": None,
        "reconnects": 0,
        "overhead_bytes": {"GPU-x": 1},
    }
    worker_files.report(file, {"usage": usage, "code": 3, "pid": 1})
    assert worker_files.read(file) == {**identity, "usage": usage, "code": 3}
    worker_files.remove(file)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo], ids=["link", "pipe"])
def test_a_report_that_is_no_file_is_not_waited_for(make: Callable[[Path], None], tmp_path: Path) -> None:
    file = worker_files.path(str(tmp_path), "lease")
    worker_files.write(file, {"lease": "lease", "pid": 7, "created": 1.0, "port": 0})
    make(worker_files.make_own_directory(file) / "report.json")
    assert worker_files.read(file) == json.loads(file.read_text())


@pytest.mark.parametrize("parent", ["reaps it", "died before it"])
def test_what_a_worker_starts_ends_with_it(
    parent: str, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    server = Server(tmp_path / "run", persistent=True, operators=OPERATORS)
    try:
        lease = granted()
        worker = server.start(lease)
        with attached(attach_spec(lease, worker)):
            started = hostile_operator.run(
                "import os, time\nanswer = os.fork()\nif not answer:\n    time.sleep(600)\n    os._exit(0)"
            )
            assert alive(started)
            if parent == "died before it":
                zygote = server.engine._parent.process
                zygote.kill()
                eventually(lambda: server.engine._parent.process is not zygote, "another parent is started")
                assert alive(started) and alive(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
            eventually(lambda: lease.id in server.ended, "the lease ends")
            eventually(lambda: not alive(started), "what it has started ends")
    finally:
        server.stop()


@pytest.fixture
def left_behind(tmp_path: Path) -> Path:
    """A state file whose worker left what is hard to delete: depth, width, links, and directories without rights."""
    file = worker_files.path(str(tmp_path / "run"), "lease")
    file.parent.mkdir()
    worker_files.write(file, {"lease": "lease", "pid": 7, "created": 1.0, "port": 0})
    own = worker_files.make_own_directory(file)
    for k in range(20):
        (own / f"wide{k}" / "inner").mkdir(parents=True)
        (own / f"wide{k}" / "inner" / "file").touch()
    (own / "link").symlink_to(tmp_path)
    at = os.open(own, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=at)
        at, above = os.open("d", os.O_RDONLY, dir_fd=at), at
        os.close(above)
    os.mkdir("closed", dir_fd=at)
    os.close(at)
    (own / "wide0" / "inner").chmod(0)
    (own / "wide1").chmod(0)
    return file


def test_whatever_a_worker_leaves_is_deleted(left_behind: Path) -> None:
    worker_files.remove(left_behind)
    assert list(left_behind.parent.iterdir()) == []
    assert left_behind.parent.is_dir(), "links are not followed"


def test_a_lease_ends_before_what_its_worker_left_is_deleted(
    left_behind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted: list[Path] = []
    monkeypatch.setattr(worker_files, "delete", deleted.append)
    ended: list[str] = []

    async def main() -> None:
        workers = LocalWorkers(str(left_behind.parent), None)
        workers.on_exit = lambda lease_id, state, reason: ended.append(lease_id)
        workers.add("lease", WorkerAddress("127.0.0.1", 1, 7, 1.0))
        workers.remove("lease", 0)
        assert ended == ["lease"]

    asyncio.run(main())
    assert deleted == worker_files.put_aside(str(left_behind.parent))
    assert not left_behind.exists()
    monkeypatch.undo()
    worker_files.make_own_directory(left_behind)
    worker_files.delete(*deleted)
    assert list(left_behind.parent.iterdir()) == [worker_files.own_directory(left_behind)]


def test_what_nobody_deleted_is_deleted_when_a_pool_starts(left_behind: Path) -> None:
    worker_files.forget(left_behind)

    async def main() -> None:
        async with running(left_behind.parents[1]) as (engine, _):
            await engine.adopt([])
            while worker_files.put_aside(str(left_behind.parent)):
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_what_an_engine_says_of_its_sandbox(tmp_path: Path) -> None:
    async def said(mode: str) -> dict[str, str]:
        async with running(tmp_path / mode, sandbox=mode) as (engine, _):
            await engine.until_warm()
            while not engine.readings():
                await asyncio.sleep(0.01)
            return dict(engine.readings()[0].sandbox or {})

    lacks = sandbox.prepare("auto", tmp_path).lacks
    assert asyncio.run(said("auto")) == lacks
    assert asyncio.run(said("off")) == dict.fromkeys(lacks, "sandbox is set to 'off'")


#: Looks for ``needles`` in all that the process can read of its own memory. They come with each bit turned over, so
#: that to look for them does not put them there.
SCAN = """
import os
turned, found, size = bytes(range(255, -1, -1)), set(), 1 << 22
memory = os.open('/proc/self/mem', os.O_RDONLY)
with open('/proc/self/maps') as f:
    regions = [line.split()[:2] for line in f if 'r' in line.split()[1] and '[v' not in line]
for region, _ in regions:
    at, end = (int(text, 16) for text in region.split('-'))
    while at < end:
        try: chunk = os.pread(memory, min(size, end - at), at).translate(turned)
        except OSError: break
        found.update(name for name, needle in needles.items() if needle in chunk)
        at += size - 256 if at + size < end else size
answer = sorted(found)
"""


def in_memory(**needles: bytes) -> list[str]:
    """Which of these the worker of the lease of this process has in its memory."""
    turned = {name: bytes(255 - byte for byte in needle) for name, needle in needles.items()}
    return list(hostile_operator.run(f"needles = {turned!r}\n{SCAN}"))


def key_of(pem: bytes) -> dict[str, bytes]:
    """The forms of a private key: its number as it is written, and as OpenSSL computes with it; its files."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(pem, None)
    number = key.private_numbers().private_value.to_bytes(32, "big")  # type: ignore[union-attr]
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    der = key.private_bytes(serialization.Encoding.DER, *form)
    return {"number": number, "limbs": number[::-1], "der": der, "pem": pem.splitlines()[1]}


@pytest.fixture
def certificates_made(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The certificates of workers with their keys, in the order in which the workers are started."""
    made: list[bytes] = []
    make = warm_parent.new_certificate

    def recorded(name: str) -> bytes:
        made.append(make(name))
        return made[-1]

    monkeypatch.setattr(warm_parent, "new_certificate", recorded)
    return made


def test_no_worker_has_the_servers_key_or_what_others_prove_themselves_by(
    tmp_path: Path, certificates: Any, certificates_made: list[bytes]
) -> None:
    async def story(engine: Any, first: Any) -> None:
        lease = of_lease("the second")
        spec = over_tls(lease, await engine.start_worker(lease))
        keys = {"server": certificates.keyfile.read_bytes()}
        keys.update(zip(("another", "own"), map(key_part, certificates_made)))
        needles = {
            f"{whose} {form}": part for whose, key in keys.items() for form, part in key_of(key).items()
        }
        needles["another digest"] = digest(SECRET)
        needles["another digest's bytes"] = bytes.fromhex(digest(SECRET).decode())
        needles["another secret"] = SECRET.encode()
        needles["own digest"], needles["own secret"] = digest("the second"), b"the second"
        with attached(replace(spec, secret="the second")):
            found = in_memory(**needles)
        assert {"own limbs", "own digest", "own secret"} <= set(found), "what is there is found"
        assert all(name.startswith("own ") for name in found), found

    play(tmp_path, certificates, story, operators=OPERATORS)


def test_a_worker_that_is_given_the_servers_key_has_it_in_its_memory(
    tmp_path: Path, certificates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above finds a key where there is one, and it is the keys of their own that keep it from workers."""
    both = certificates.certfile.read_bytes() + certificates.keyfile.read_bytes()
    monkeypatch.setattr(warm_parent, "new_certificate", lambda name: both)

    def story(engine: Any, spec: Any) -> None:
        with attached(spec):
            assert "limbs" in in_memory(**key_of(certificates.keyfile.read_bytes()))

    play(tmp_path, certificates, story, operators=OPERATORS)


def test_the_process_that_forks_workers_is_told_no_secret(
    tmp_path: Path, certificates: Any, certificates_made: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker inherits that process's memory."""
    sent: list[bytes] = []
    send = socket.send_fds

    def recorded(sock: socket.socket, packets: list[bytes], descriptors: list[int]) -> int:
        sent.extend(packets)
        return send(sock, packets, descriptors)

    monkeypatch.setattr(socket, "send_fds", recorded)

    def story(engine: Any, spec: Any) -> None:
        (packet,) = (packet for packet in sent if spec.lease_id.encode() in packet)
        assert digest(SECRET) not in packet and b"PRIVATE KEY" not in packet

    play(tmp_path, certificates, story)


@pytest.mark.parametrize("filtered", [True, False])
def test_no_worker_has_the_credentials_of_its_pools_environment(
    filtered: bool, tmp_path: Path, certificates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without the filter it has them."""
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "the-token-of-a-hub")
    monkeypatch.setenv("LEDGER", "postgresql://gpupool:the-word-of-a-database@db/ledger")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive-as-set-for-the-pool")
    if not filtered:
        monkeypatch.setattr(warm_parent, "without_secrets", dict)

    def story(engine: Any, spec: Any) -> None:
        with attached(spec):
            found = in_memory(
                token=b"the-token-of-a-hub",
                word=b"the-word-of-a-database",
                other=b"passive-as-set-for-the-pool",
            )
        assert found == (["other"] if filtered else ["other", "token", "word"])

    play(tmp_path, certificates, story, operators=OPERATORS)


def digest(secret: str) -> bytes:
    return proofs.digest_of(secret).encode()


def key_part(pem: bytes) -> bytes:
    return pem[pem.index(b"-----BEGIN PRIVATE KEY") :]


def of_lease(secret: str) -> Any:
    lease = granted_over_tls()
    return replace(lease, request=replace(lease.request, secret_sha256=proofs.digest_of(secret)))


def test_a_worker_cannot_read_the_certificates_key(tmp_path: Path, certificates: Any, shut_in: None) -> None:
    def story(engine: Any, spec: Any) -> None:
        with attached(spec):
            files = {"key": certificates.keyfile, "certificate": certificates.certfile}
            outcome = tried(**{name: f"open({str(file)!r})" for name, file in files.items()})
        assert set(outcome.values()) <= {"PermissionError", "FileNotFoundError"}, outcome

    play(tmp_path, certificates, story, operators=OPERATORS)
