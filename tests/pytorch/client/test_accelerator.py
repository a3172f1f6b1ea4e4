"""``torch.accelerator`` is ``cuda`` in a lease: what is created by it is found and loaded as CUDA's."""

from __future__ import annotations

import io

import pytest
import torch


def test_the_accelerator_is_cuda(attached: object) -> None:
    device = torch.accelerator.current_accelerator()
    assert device == torch.device("cuda")
    assert torch.accelerator.current_accelerator(check_available=True) == device
    assert torch.get_device_module(device).__name__ == "torch.cuda"
    assert torch.get_device_module("gpupool").__name__ == "torch.gpupool"
    assert torch.ones(2, device=device).is_cuda
    assert torch.Generator(device).device.type == "cuda"
    assert torch.nn.Linear(2, 2).to(device).weight.device == torch.device("cuda", 0)


def test_files_saved_from_the_accelerator_are_tagged_cuda(attached: object) -> None:
    file = io.BytesIO()
    torch.save({"a": torch.arange(3, device=torch.accelerator.current_accelerator())}, file)
    assert b"cuda:0" in file.getvalue()
    assert b"gpupool" not in file.getvalue()
    file.seek(0)
    assert torch.load(file, map_location="cpu")["a"].tolist() == [0, 1, 2]


def test_devices_and_streams_of_the_accelerator(attached: object) -> None:
    accelerator = torch.accelerator
    assert accelerator.is_available()
    assert accelerator.device_count() == 2
    assert accelerator.current_device_index() == 0
    with accelerator.device_index(1):
        assert accelerator.current_device_index() == 1
        assert str(torch.ones(1, device="cuda").device) == "cuda:1"
    accelerator.set_device_index(1)
    assert torch.cuda.current_device() == 1
    accelerator.set_device_index("cuda:0")
    stream = torch.Stream()
    assert isinstance(stream, torch.cuda.Stream)
    assert stream.device == accelerator.current_stream().device == torch.device("cuda", 0)
    assert isinstance(torch.Event(), torch.cuda.Event)
    with stream:
        assert accelerator.current_stream() == stream
    accelerator.set_stream(stream)
    assert torch.cuda.current_stream() == stream
    accelerator.set_stream(torch.cuda.default_stream())
    accelerator.synchronize()
    accelerator.synchronize("cuda:1")


def test_memory_of_the_accelerator(attached: object) -> None:
    accelerator = torch.accelerator
    kept = torch.ones(1 << 18, device=accelerator.current_accelerator())
    assert accelerator.memory_allocated() == accelerator.memory_reserved() == 1 << 20
    assert accelerator.max_memory_allocated() == accelerator.max_memory_reserved() == 1 << 20
    assert accelerator.memory_stats()["allocated_bytes.all.current"] == 1 << 20
    torch.cuda.synchronize()
    assert accelerator.get_memory_info() == ((26008 << 20) - (1 << 20), 26008 << 20)
    del kept
    accelerator.empty_cache()
    accelerator.reset_peak_memory_stats()
    accelerator.reset_accumulated_memory_stats()
    assert accelerator.max_memory_allocated() == 0
    assert accelerator.memory_stats()["allocated_bytes.all.allocated"] == 0


def test_every_name_of_the_accelerator_is_answered_or_refused(attached: object) -> None:
    needs_arguments = {"device_index", "set_device_idx", "set_device_index", "set_stream"}
    for name in {*torch.accelerator.__all__} - needs_arguments:
        if name in ("Graph",):
            with pytest.raises(
                RuntimeError, match="^torch.accelerator.Graph is not available on a leased GPU"
            ):
                torch.accelerator.Graph()
        else:
            getattr(torch.accelerator, name)()


def test_the_accelerator_without_a_lease(attached: object) -> None:
    from jupyter_gpupool.pytorch.client import session

    session.deactivate()
    assert not torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator(check_available=True) is None
