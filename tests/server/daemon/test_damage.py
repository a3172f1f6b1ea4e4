"""What somebody may do to others with what they have: a token, a lease's id, a name in a shared directory."""

from __future__ import annotations

import io
import logging
import os
import stat
import tarfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.cli.app import main
from jupyter_gpupool.client import bundle, lease_holder, requests
from jupyter_gpupool.core.errors import RequestConflict, UnknownLease
from jupyter_gpupool.server.daemon.json_logs import Damper
from jupyter_gpupool.transport import frames, handshake
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

from ...conftest import PATIENCE_S
from .conftest import Server
from .test_tokens import hold


def test_a_cut_ends_leases_whose_holder_is_silent(server: Server, eventually: Callable[..., Any]) -> None:
    """Neither a client that sends no heartbeat nor another tenant, who claims its lease, keeps it."""
    token = server.token()
    ada, eve = server.client(token["token"]), server.client(server.token()["token"])
    request, secret = requests.new_request(partial=0.1)
    lease = requests.acquire(ada, request)
    line = handshake.connect(requests.attach_spec(ada, lease, secret, "remote"), "holder", {})[0]
    with pytest.raises(RequestConflict):
        eve.request(replace(request, memory_mib=7, partial=None))
    with pytest.raises(UnknownLease):
        eve.heartbeat(lease.id)
    server.administrator().revoke_token(token["id"], end_leases=True)
    assert server.administrator().lease(lease.id).reason == "its token was revoked"
    line.settimeout(PATIENCE_S)
    with pytest.raises(ConnectionError):
        while True:
            frames.receive(line)


def test_ids_are_not_guessed(server: Server) -> None:
    ada, eve = (server.client(server.token()["token"]) for _ in range(2))
    lease, _, line = hold(ada)
    near = [lease.id[:-1] + digit for digit in "0123456789abcdef" if digit != lease.id[-1]]
    messages = set()
    for guess in [lease.id, *near, str(uuid.uuid4())]:
        for call in (eve.lease, eve.heartbeat, eve.release, lambda g: eve.resize(g, 0.2)):
            with pytest.raises(UnknownLease) as refused:
                call(guess)
            messages.add(str(refused.value).replace(guess, "…"))
    assert len(messages) == 1, "somebody else's lease is told of as none is"
    assert line.alive
    line.release()
    ada.release(lease.id)


def test_a_bundle_holds_three_files_whatever_a_server_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsysbinary: Any
) -> None:
    """Its administrator may pass on what a server made; nothing of it is unpacked anywhere else."""
    from jupyter_gpupool.cli import token

    files = dict.fromkeys((bundle.CA, bundle.CLIENT, bundle.SERVERS), "x")
    hostile = {**files, "../../.bashrc": "x", "/etc/passwd": "x", ".ssh/authorized_keys": "x"}

    class Hostile:
        def create_token(self, *args: Any, **more: Any) -> dict[str, Any]:
            made = {"id": "abc", "owner": "x", "namespace": "default", "expires_at": None, "token": "x"}
            return {**made, "files": hostile}

        def close(self) -> None:
            pass

    monkeypatch.setattr(token.TokenCommand, "client", lambda self: Hostile())
    archive = tmp_path / "a.tar"
    monkeypatch.setattr(
        "sys.argv", ["gpupool", "token", "create", "--description", "x", "--output", str(archive)]
    )
    try:
        main()
    except SystemExit as e:
        assert not e.code
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as tar:
        assert sorted(tar.getnames()) == sorted(files)
        assert all(member.isreg() and member.mode == 0o600 for member in tar.getmembers())


def test_a_configuration_file_is_written_where_others_may_write(tmp_path: Path) -> None:
    """What somebody put in its way, by a name that can be foretold, is neither followed nor filled."""
    shared = tmp_path / "tmp"
    shared.mkdir()
    config, victim = shared / "gpupoolabc", tmp_path / "victim"
    config.write_text("")
    victim.write_text("precious")
    (shared / f".{config.name}.{os.getpid()}").symlink_to(victim)
    device = DeviceSpec(0, "GPU-x", "a name", 1, 1, True)
    lease_holder.write_config(config, AttachSpec("id", "host", 1, "a secret", (device,)))
    assert victim.read_text() == "precious"
    assert "a secret" in config.read_text() and stat.S_IMODE(config.stat().st_mode) == 0o600
    assert len(list(shared.iterdir())) == 2


def test_a_flood_of_lines_is_held_back_and_counted() -> None:
    damper = Damper(most=3, per_s=0.0)
    record = logging.LogRecord("x", logging.WARNING, "", 0, "m", (), None)
    assert damper.filter(record), "a new minute each time"
    damper = Damper(most=3, per_s=1e9)
    assert [damper.passes() for _ in range(5)] == [0, 0, 0, None, None]
    damper._per_s = 0.0
    assert damper.filter(record) and record.held_back == 2  # type: ignore[attr-defined]
