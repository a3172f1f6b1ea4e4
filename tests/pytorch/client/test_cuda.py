"""``cuda`` means the slices while a lease is attached, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset


def test_queries_answer_for_the_slices(attached: object) -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 2
    assert torch.cuda.get_device_name(1) == "Tesla V100-PCIE-32GB (emulated)"
    assert torch.cuda.get_device_properties(0).total_memory == 26008 << 20
    assert torch.cuda.get_device_capability() == (7, 0)
    assert torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 2


#: Public names of torch.cuda that mean here what they mean in PyTorch itself: modules, types of errors, and
#: functions that build on others.
UNCHANGED = {
    *(
        "amp",
        "memory",
        "nccl",
        "nvtx",
        "profiler",
        "random",
        "sparse",
        "streams",
        "graphs",
        "graph_annotations",
        "jiterator",
        "tunable",
    ),
    *("CudaError", "DeferredCudaCallError", "cudaStatus", "has_half", "has_magma"),
    *("get_gencode_flags", "memory_stats", "memory_summary"),
}


def test_every_public_name_of_torch_cuda_is_answered_or_refused_by_name(attached: object) -> None:
    from jupyter_gpupool.pytorch.client.cuda.queries import Queries
    from jupyter_gpupool.pytorch.client.cuda.unsupported import REFUSED

    answered = set(Queries((), cuda=True).by_name())
    assert not answered & set(REFUSED)
    public = {
        name
        for name in torch.cuda.__all__
        if not name.endswith("Storage") and name[:-6] not in legacy_types()
    }
    assert public - answered - set(REFUSED) == UNCHANGED & public
    for name in set(REFUSED) & public:
        with pytest.raises(
            RuntimeError, match=f"^torch.cuda.{name} is not available on a leased GPU: [^\n]+$"
        ):
            getattr(torch.cuda, name)()


def test_a_refused_class_is_refused_however_it_is_made(attached: object) -> None:
    with pytest.raises(
        RuntimeError, match="GreenContext is not available on a leased GPU: a slice cannot be"
    ):
        torch.cuda.green_contexts.GreenContext.create(num_sms=4)


def legacy_types() -> set[str]:
    return {"Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool"}


def test_older_programs_name_types(attached: object) -> None:
    Tensor = torch.cuda.FloatTensor if torch.cuda.is_available() else torch.FloatTensor
    x = torch.autograd.Variable(Tensor(2, 3).fill_(1.0), requires_grad=False)
    assert isinstance(x, torch.cuda.FloatTensor)
    assert not isinstance(x, torch.cuda.LongTensor)
    assert x.type() == "torch.cuda.FloatTensor"
    assert torch.ones(2).type() == "torch.FloatTensor"
    assert torch.cuda.LongTensor([1, 2]).tolist() == [1, 2]
    assert torch.ones(2).type("torch.cuda.HalfTensor").dtype is torch.float16
    assert x.type(torch.cuda.IntTensor).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert x.type(torch.FloatTensor).device.type == "cpu"
    assert torch.cuda.ByteTensor().numel() == 0


def test_ranges_of_a_profiler_that_does_not_listen(attached: object) -> None:
    with torch.cuda.nvtx.range("a"):
        assert torch.cuda.nvtx.range_push("b") == 1
        torch.cuda.nvtx.mark("c")
        torch.cuda.nvtx.range_pop()


def test_properties_that_programs_look_at(attached: object) -> None:
    found = torch.cuda.get_device_properties("cuda:1")
    assert (found.major, found.minor, found.multi_processor_count, found.warp_size) == (7, 0, 80, 32)
    assert torch.cuda.get_arch_list() == ["sm_70"]
    assert not torch.cuda.is_tf32_supported()
    assert torch.cuda.is_bf16_supported()
    assert not torch.cuda.is_bf16_supported(including_emulation=False)
    assert torch.cuda.can_device_access_peer(0, 1)
    assert torch.gpupool.get_device_name() == torch.cuda.get_device_name()
    assert torch.get_device_module("cuda") is torch.cuda
    assert torch.get_device_module("gpupool").current_device() == 0


def test_properties_are_whole_and_print_as_cudas(attached: object) -> None:
    found = torch.cuda.get_device_properties(1)
    assert str(found) == (
        "_CudaDeviceProperties(name='Tesla V100-PCIE-32GB (emulated)', major=7, minor=0, total_memory=26008MB, "
        "multi_processor_count=80, uuid=1, pci_bus_id=0, pci_device_id=0, pci_domain_id=0, L2_cache_size=6MB)"
    )
    numbers = {
        "max_threads_per_block": 1024,
        "max_threads_per_multi_processor": 2048,
        "regs_per_multiprocessor": 65536,
        "shared_memory_per_block": 49152,
        "shared_memory_per_block_optin": 98304,
        "shared_memory_per_multiprocessor": 98304,
        "clock_rate": 1380000,
        "memory_clock_rate": 877000,
        "memory_bus_width": 4096,
        "is_integrated": 0,
        "is_multi_gpu_board": 0,
    }
    assert {name: getattr(found, name) for name in numbers} == numbers
    assert found.gcnArchName == found.name
    with pytest.raises(AttributeError, match="no attribute 'tensor_cores'"):
        _ = found.tensor_cores


def test_properties_of_a_real_gpu() -> None:
    from jupyter_gpupool.pytorch.client.device.properties import DeviceProperties
    from jupyter_gpupool.transport.specs import DeviceSpec

    uuid = "b1f4c2e0-7a65-4d0c-9a55-2f3b8f0f9d11"
    spec = DeviceSpec(0, f"GPU-{uuid}", "NVIDIA H200", 70000, 143771, False)
    found = DeviceProperties(spec, {"major": 9, "minor": 0, "warp_size": 32, "pci_bus_id": "no number"})
    assert (found.major, found.warp_size, found.total_memory) == (9, 32, 70000 << 20)
    assert str(found.uuid) == uuid
    assert found.uuid.bytes.hex() == uuid.replace("-", "")
    with pytest.raises(AttributeError, match="does not report 'pci_bus_id' of NVIDIA H200"):
        _ = found.pci_bus_id


def test_without_a_lease_nothing_has_changed(attached: object) -> None:
    from jupyter_gpupool.pytorch.client import session

    tensor = torch.ones(1, device="cuda")
    session.deactivate()
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
    assert "gpupool" not in (torch.tensor.__module__ or "")
    assert torch.Tensor.to is torch._C.TensorBase.to
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    with pytest.raises(session.NotAttached, match="released.*tensors are gone"):
        tensor.item()


def test_a_tensor_of_an_ended_lease_is_not_taken_for_one_of_the_next(
    attached: object, start_worker: Callable
) -> None:
    from jupyter_gpupool.pytorch.client import session

    stale = torch.ones(3, device="cuda")
    stale.sum().item()
    session.deactivate()
    session.activate(start_worker().spec)
    torch.zeros(3, device="cuda").sum().item()
    with pytest.raises(RuntimeError, match="lease that has ended"):
        (stale + 1).sum().item()


def test_the_current_device_is_each_threads_own(attached: object) -> None:
    seen = []
    with torch.cuda.device(1):
        assert str(torch.ones(1, device="cuda").device) == "cuda:1"
        assert str(torch.ones(1).cuda().device) == "cuda:1"
        thread = threading.Thread(target=lambda: seen.append(str(torch.ones(1, device="cuda").device)))
        thread.start()
        thread.join()
    assert seen == ["cuda:0"]
    assert torch.cuda.current_device() == 0


def test_default_device(attached: object) -> None:
    torch.set_default_device("cuda:1")
    try:
        assert str(torch.tensor([1.0]).device) == str(torch.ones(2).device) == "cuda:1"
        assert str(torch.nn.Linear(2, 2).weight.device) == "cuda:1"
    finally:
        torch.set_default_device(None)
    with torch.device("cuda"):
        assert str(torch.zeros(2).device) == "cuda:0"
    assert torch.zeros(2).device.type == "cpu"


def test_several_threads_compute_at_once(attached: object) -> None:
    results: dict[int, float] = {}

    def work(n: int) -> None:
        device = f"cuda:{n % 2}"
        x = torch.full((16, 16), float(n), device=device, requires_grad=True)
        for _ in range(50):
            y = (x * 2).sum()
            (g,) = torch.autograd.grad(y, x)
        results[n] = g.sum().item() + y.item()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {n: 512.0 + 512.0 * n for n in range(6)}


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loaders_with_workers_and_pinned_memory(attached: object, workers: int) -> None:
    torch.ones(1, device="cuda")  # the connection stands before the workers fork
    data = TensorDataset(torch.arange(64.0), torch.arange(64))
    loader = DataLoader(data, batch_size=16, num_workers=workers, pin_memory=True, shuffle=True)
    total = sum((x.cuda(non_blocking=True).sum() for x, _ in loader), torch.zeros((), device="cuda"))
    assert total.item() == sum(range(64))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_is_refused_in_cudas_words_and_does_no_harm(attached: object) -> None:
    kept = torch.ones(3, device="cuda")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            (kept + 1).sum().item()
            message = "it worked"
        except RuntimeError as e:
            message = str(e)
        os.write(writer, message.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 500).decode().startswith("Cannot re-initialize CUDA in forked subprocess")
    os.close(reader)
    os.close(writer)
    assert kept.sum().item() == 3


def run(script: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


def test_import_torch_attaches_by_itself(worker: object, tmp_path: Path) -> None:
    file = tmp_path / "lease"
    file.write_text(worker.spec.to_json())  # type: ignore[attr-defined]
    done = run("import torch; print(torch.ones(3).to('cuda').sum().item())", GPUPOOL_LEASE=str(file))
    assert (done.returncode, done.stdout) == (0, "3.0\n"), done.stderr


def test_without_a_lease_import_torch_loads_nothing_of_ours() -> None:
    done = run(
        "import sys, torch; print([m for m in sys.modules if m.startswith('jupyter_gpupool.pytorch.')])",
        GPUPOOL_LEASE="",
    )
    # The folder's empty package, and the module of the entry point.
    loaded = ["jupyter_gpupool.pytorch.client", "jupyter_gpupool.pytorch.client.autoload"]
    assert done.stdout == f"{loaded}\n", done.stderr


def test_a_lease_file_that_is_gone_is_said_in_one_line(tmp_path: Path) -> None:
    done = run("import torch", GPUPOOL_LEASE=str(tmp_path / "gone"))
    assert done.returncode != 0
    assert "the lease has probably been released" in done.stderr
