"""What programs ask of CUDA's software and of a GPU's sensors: the GPU server answers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from jupyter_gpupool.pytorch.client.cuda.software import Software
from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.transport import handshake

#: What this process's PyTorch was built with; None for one for the CPU.
OWN_CUDA = torch.version.cuda
REAL = {"cuda": "12.8", "cudnn": 91002, "nccl": [2, 27, 3], "architectures": ["sm_80", "sm_90"]}


@pytest.fixture
def real_server(start_worker: Callable, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A lease whose worker welcomes its client as a server with CUDA does."""
    from jupyter_gpupool.pytorch.client import session

    connect = handshake.connect

    def connect_to_real(*args: Any) -> Any:
        sock, welcome = connect(*args)
        return sock, {**welcome, "software": REAL}

    monkeypatch.setattr(handshake, "connect", connect_to_real)
    spec = start_worker().spec
    devices = tuple(dataclasses.replace(d, name="NVIDIA H200", emulated=False) for d in spec.devices)
    session.activate(dataclasses.replace(spec, devices=devices))
    yield
    session.deactivate()


def test_versions_are_the_servers(real_server: None) -> None:
    assert torch.version.cuda == "12.8"
    assert torch.backends.cudnn.version() == 91002
    assert torch.backends.cudnn.is_available()
    assert torch.backends.cudnn.enabled
    assert torch.cuda.nccl.version() == (2, 27, 3)
    assert torch.cuda.get_arch_list() == ["sm_80", "sm_90"]
    assert torch.cuda.get_gencode_flags() == (
        "-gencode compute=compute_80,code=sm_80 -gencode compute=compute_90,code=sm_90"
    )


@pytest.mark.skipif(OWN_CUDA is not None, reason="the worker has this PyTorch, which was built with CUDA")
def test_a_server_of_emulated_gpus_has_no_cuda(attached: object) -> None:
    assert torch.version.cuda is None
    assert torch.backends.cudnn.version() is None
    assert not torch.backends.cudnn.is_available()
    assert torch.cuda.get_gencode_flags() == "-gencode compute=compute_70,code=sm_70"
    with pytest.raises(
        RuntimeError, match=r"^torch.cuda.nccl.version is not available on a leased GPU: [^\n]+$"
    ):
        torch.cuda.nccl.version()
    current = attachment.current()
    assert current is not None
    assert not current.connected, "such questions need no worker"


def test_without_a_lease_versions_are_this_processs(real_server: None) -> None:
    from jupyter_gpupool.pytorch.client import session

    assert torch.version.cuda == "12.8"
    session.deactivate()
    assert torch.version.cuda == OWN_CUDA


@pytest.mark.parametrize(
    "sent",
    [None, 3, {}, {"cuda": 12, "cudnn": "9", "nccl": 2, "architectures": "sm_80"}, {"nccl": [None]}],
)
def test_a_welcome_without_versions_means_unknown(sent: Any) -> None:
    assert Software.from_wire(sent) == Software()


def test_what_the_workers_pytorch_has_is_what_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    from jupyter_gpupool.pytorch.worker import software as module

    software = module.software
    monkeypatch.setattr(torch.version, "cuda", None)
    software.cache_clear()
    assert software() == {}, "PyTorch for the CPU has none"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(module, "nccl_version", lambda: 0)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(module, "architecture_flags", lambda: "sm_80 sm_90")
    software.cache_clear()
    assert software() == REAL
    assert Software.from_wire(software()) == Software("12.8", 91002, (2, 27, 3), ("sm_80", "sm_90"))

    def incompatible() -> int:
        raise RuntimeError("cuDNN version incompatibility")

    monkeypatch.setattr(torch.backends.cudnn, "version", incompatible)
    software.cache_clear()
    assert software() == {name: value for name, value in REAL.items() if name != "cudnn"}
    software.cache_clear()


def test_how_busy_an_emulated_gpu_is(attached: object) -> None:
    x = torch.randn(300, 300, device="cuda")
    seen: list[int] = []
    while not seen or seen[-1] == 0:  # a worker notes once a second how busy it was
        for _ in range(20):
            y = x @ x
        y.sum().item()
        seen.append(torch.cuda.utilization())
    assert 0 < seen[-1] <= 100
    assert torch.cuda.utilization("cuda:1") == 0


@pytest.mark.parametrize("name", ["temperature", "power_draw", "clock_rate", "memory_usage"])
def test_an_emulated_gpu_has_no_sensors(attached: object, name: str) -> None:
    with pytest.raises(
        RuntimeError, match=rf"^torch.cuda.{name}: Tesla V100.*\(emulated\) does not report it$"
    ):
        getattr(torch.cuda, name)()


def test_processes_on_a_slice(attached: object) -> None:
    assert torch.cuda.list_gpu_processes() == "GPU:0\nno processes are running"
    kept = torch.ones(1 << 18, device="cuda:1")
    assert torch.cuda.list_gpu_processes("cuda:1") == (
        f"GPU:1\nprocess {os.getpid():>10d} uses        1.000 MB GPU memory"
    )
    assert kept.numel() == 1 << 18
    torch.cuda.synchronize()
    assert torch.cuda.device_memory_used(1) == 1 << 20
