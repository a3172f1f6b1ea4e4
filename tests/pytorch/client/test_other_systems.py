"""The client's side neither needs nor imports what only Unix has."""

from __future__ import annotations

import base64
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.transport.polling import READABLE, WRITABLE, SelectPoll, new_poll

HERE = Path(__file__).resolve().parents[3]


def test_every_module_of_the_client_and_an_operator_where_unix_is_hidden(worker: Any) -> None:
    spec = base64.b64encode(pickle.dumps(worker.spec)).decode()
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.without_unix", spec],
        capture_output=True,
        text=True,
        cwd=HERE,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    imported, mean = ended.stdout.split()
    assert int(imported) > 150 and float(mean) == 2.0


@pytest.mark.parametrize("kind", [SelectPoll, new_poll])
def test_waiting_with_and_without_poll(kind: Any) -> None:
    here, there = socket.socketpair()
    with here, there:
        poll = kind()
        poll.register(here, READABLE)
        assert poll.poll(0) == []
        there.sendall(b"x")
        assert poll.poll(None) == [(here.fileno(), READABLE)]
        both = kind()
        both.register(here, READABLE | WRITABLE)
        assert both.poll(0) == [(here.fileno(), READABLE | WRITABLE)]
