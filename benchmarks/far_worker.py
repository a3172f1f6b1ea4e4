"""A worker without a pool, behind a link with a given round trip and rate."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from jupyter_gpupool.gpus.nvml import nvml_gpus
from jupyter_gpupool.pytorch.client import session
from jupyter_gpupool.server.daemon import certificates
from jupyter_gpupool.transport.lifeline import Lifeline
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec, WorkerSpec

from .link import Link

_SECRET = "of one benchmark"
_MEMORY_MIB = 16 * 1024


def serve(listener: socket.socket, spec: WorkerSpec) -> None:
    from jupyter_gpupool.pytorch.worker import worker

    torch.set_num_threads(1)
    os._exit(worker.serve(spec, listener, lambda usage: None))


def _device() -> DeviceSpec:
    """Return a real GPU where the machine has one."""
    for gpu in nvml_gpus("localhost"):
        return DeviceSpec(0, gpu.uuid, gpu.name, gpu.memory_mib, gpu.memory_mib, False)
    return DeviceSpec(0, "GPU-emulated", "emulated", _MEMORY_MIB, _MEMORY_MIB, True)


class Certificate:
    """Create a CA for this run, and the certificate and key (files) of a server on this machine."""

    def __init__(self, folder: str) -> None:
        ca = certificates.new_authority("benchmark")
        server = certificates.new_server(ca, ["127.0.0.1"])
        self.ca = ca.certificate.decode()
        self.certfile, self.keyfile = str(Path(folder, "server.crt")), str(Path(folder, "server.key"))
        Path(self.certfile).write_bytes(server.certificate)
        Path(self.keyfile).write_bytes(server.key)


@contextlib.contextmanager
def certificate() -> Iterator[Certificate]:
    with tempfile.TemporaryDirectory(prefix="gpupool-bench-") as folder:
        yield Certificate(folder)


@contextlib.contextmanager
def far_worker(linked: bool = True, secured: Certificate | None = None) -> Iterator[Link]:
    """Attach one slice to this process through a link, which adds no delay at first.
    Without ``linked``, connect directly. With a certificate, use TLS 1.3 as a secured pool does."""
    devices = (_device(),)
    spec = WorkerSpec(
        "benchmark", hashlib.sha256(_SECRET.encode()).hexdigest(), devices, attach_timeout_s=120.0
    )
    if secured:
        spec = dataclasses.replace(spec, certfile=secured.certfile, keyfile=secured.keyfile)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        near = AttachSpec(spec.lease_id, "127.0.0.1", listener.getsockname()[1], _SECRET, devices, spec.ttl_s)
        if secured:
            near = dataclasses.replace(near, secure=True)
        process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(listener, spec), daemon=True
        )
        process.start()
    try:
        lifeline = Lifeline(near, lambda reason: None)
        with Link(("127.0.0.1", near.port)) as link:
            session.activate(dataclasses.replace(near, port=link.port) if linked else near)
            try:
                yield link
            finally:
                session.deactivate()
        lifeline.release()
    finally:
        process.kill()
        process.join()
