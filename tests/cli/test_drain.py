"""`gpupool server drain` and `undrain`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="workers need PyTorch")


def test_a_drained_server_gets_nothing_new_until_it_is_undrained(
    gpupool: Callable[..., Any], start: Callable[..., Any], eventually: Any, pool: Any, last_line: Any
) -> None:
    name = pool.client.pool()["servers"][0]["name"]
    running = start("run", "-p", 0.5, "--", "sh", "-c", "echo runs; read x")
    eventually(lambda: "runs" in running.out, "the command runs")
    done = gpupool("server", "drain", name)
    assert (done.returncode, done.stdout) == (0, f"{name} gets no new leases; 1 lease is left there\n")
    assert json.loads(gpupool("gpus", "--json").stdout)["servers"][0]["draining"] is True
    assert " drained " in gpupool("gpus").stdout
    refused = gpupool("run", "--no-wait", "--", "true")
    assert refused.returncode == 1 and "lets nothing new be placed" in last_line(refused)
    assert gpupool("server", "undrain", name).stdout == f"{name} gets new leases again\n"
    assert gpupool("run", "-p", 0.5, "--", "true").returncode == 0
    running.close_stdin()
    assert running.wait() == 1, "it went on all the while"


def test_a_server_that_is_not_there(gpupool: Callable[..., Any], pool: Any, last_line: Any) -> None:
    for word in ("drain", "undrain"):
        done = gpupool("server", word, "nowhere/else?")
        assert done.returncode == 1 and "no GPU server" in last_line(done)
    assert gpupool("server", "drain").returncode == 2


def test_a_pool_of_one_server_moves_nothing(gpupool: Callable[..., Any], pool: Any, last_line: Any) -> None:
    name = pool.client.pool()["servers"][0]["name"]
    done = gpupool("server", "drain", name, "--move")
    assert done.returncode == 1
    assert "cannot move leases: it has one GPU server; drain it without --move" in last_line(done)
    assert pool.client.drained(name) == {"name": name, "draining": False, "moves": [], "over": True}
    assert gpupool("server", "undrain", name, "--move").returncode == 2
