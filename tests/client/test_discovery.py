"""How a program finds the pool of its user where one is about to end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jupyter_gpupool.client import discovery, pool_finder
from jupyter_gpupool.client.requests import new_request
from jupyter_gpupool.core.models import LeaseState

#: A pool that is ending: it holds the ledger until its standard input is closed.
ENDING = """
import sys
from jupyter_gpupool.client import discovery
from jupyter_gpupool.pool.ledger.file_lock import LedgerLock, ledger_file
from jupyter_gpupool.server.service.service import PoolService

with LedgerLock(ledger_file(PoolService().db_url)):
    discovery.publish("http://127.0.0.1:1", "token")
    discovery.announce_end()
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def ending() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", ENDING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_new_pool_waits_for_the_one_that_is_ending(
    ending: subprocess.Popen[str], eventually: Callable[..., Any]
) -> None:
    assert discovery.find() is None
    assert pool_finder.running_pool() is None
    command = [sys.executable, "-m", "jupyter_gpupool", "run", "-p", "0.1", "--", "true"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = discovery.folder() / "ephemeral.log"
    line = f"Waiting for pool process {ending.pid} to end"
    eventually(lambda: run.poll() is not None or (log.exists() and line in log.read_text()), "it waits")
    ending.kill()
    output, _ = run.communicate()
    assert run.returncode == 0, output


def end_own_pool(eventually: Callable[..., Any]) -> None:
    """End the pool that this process has started, as if this process had ended."""
    discovery._after_fork()
    eventually(lambda: discovery.find() is None, "the pool ends")


def test_a_pool_that_was_killed_while_it_was_ending_is_not_waited_for(ending: subprocess.Popen[str]) -> None:
    ending.kill()
    ending.wait()
    waited_for: list[discovery.PoolAddress] = []
    discovery.wait_for_ending(waited_for.append)
    assert waited_for == []


def test_a_request_goes_to_the_next_pool_if_the_one_that_was_found_ends(
    eventually: Callable[..., Any],
) -> None:
    said: list[str] = []
    client, _ = pool_finder.find_pool(say=said.append)
    first = discovery.find()
    assert first is not None
    end_own_pool(eventually)
    lease = client.request(new_request(partial=0.1)[0])
    second = discovery.find()
    assert second is not None
    assert lease.state in (LeaseState.GRANTED, LeaseState.ACTIVE)
    assert client.url == second.url != first.url
    assert said.count("The GPU pool has just ended. Looking for another one") == 1
    client.release(lease.id)
    client.close()
