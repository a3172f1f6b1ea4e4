"""What is a kernel's own stays its own, whether or not it runs: its ports."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import zmq
from jupyter_client.manager import KernelManager

from jupyter_gpupool.jupyter.port_reservation import ReservedPorts

from ..support.ports import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is kept")


def is_free(port: int) -> bool:
    """Whether the system would give it to somebody who leaves the choice to the system."""
    with socket.socket() as anybody:
        try:
            anybody.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_a_kept_port_is_nobodys_but_who_names_it_may_listen() -> None:
    ports, port = ReservedPorts(), free_port()
    ports.reserve("127.0.0.1", [port])
    assert not is_free(port)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as kernel, context.socket(zmq.DEALER) as server:
        kernel.bind(f"tcp://127.0.0.1:{port}")
        server.connect(f"tcp://127.0.0.1:{port}")
        server.send(b"kernel_info_request")
        assert kernel.poll(300_000)
        assert kernel.recv_multipart()[1] == b"kernel_info_request"
    other = free_port()
    ports.reserve("127.0.0.1", [other])
    assert not is_free(other)
    ports.release()
    assert is_free(other)


def test_one_that_is_taken_is_left_to_its_owner() -> None:
    ports = ReservedPorts()
    with socket.create_server(("127.0.0.1", 0)) as owner:
        ports.reserve("127.0.0.1", [owner.getsockname()[1]])
        ports.reserve("no address", [1])
        with socket.create_connection(owner.getsockname()), owner.accept()[0] as theirs:
            assert theirs.getsockname() == owner.getsockname()
        ports.release()
        assert not is_free(owner.getsockname()[1])


def test_a_kernel_that_died_keeps_its_ports_until_it_is_shut_down(
    kernelspec: Callable[..., str], eventually: Callable[..., Any]
) -> None:
    """Nobody has connected to it: there are no remains of a connection that would keep a port as well."""
    manager = KernelManager(kernel_name=kernelspec("no-gpu", num_gpus=0))
    manager.start_kernel()
    os.kill(manager.provisioner.pid, signal.SIGKILL)  # type: ignore[union-attr]
    eventually(lambda: not manager.is_alive(), "the kernel is dead")
    assert len(manager.ports) == 5
    assert not any(is_free(port) for port in manager.ports)
    manager.shutdown_kernel(now=True)
    assert all(is_free(port) for port in manager.ports)
