"""A real GPU's slice, against a simulated driver: what it lets a program have, and in which order it copies."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.protocol.sizes import host_bytes  # noqa: E402
from jupyter_gpupool.pytorch.worker import cuda_device  # noqa: E402
from jupyter_gpupool.pytorch.worker.device_errors import device_failure  # noqa: E402
from jupyter_gpupool.transport.specs import DeviceSpec  # noqa: E402

from ...support.simulated_cuda import MIB, SimulatedGpu  # noqa: E402


class Allocator:
    """What PyTorch's allocator has reserved: host memory stands for it, full of what programs have left."""

    def __init__(self, gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, *blocks: tuple[int, str]) -> None:
        self.memory = torch.full((sum(size for size, _ in blocks),), 7, dtype=torch.uint8)
        self.blocks = [{"size": size, "state": state} for size, state in blocks]
        segment = {"device": None, "address": self.memory.data_ptr(), "blocks": self.blocks}
        of_another_gpu = {"device": 1, "address": 64, "blocks": [{"size": 1 << 40, "state": "inactive"}]}
        self.segments = [of_another_gpu, segment]
        monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: self.segments)

    def content(self) -> list[set[int]]:
        """The values in each block."""
        sizes = [block["size"] for block in self.blocks]
        return [set(part.tolist()) for part in self.memory.split(sizes)]


class TestMemory:
    def test_nothing_is_left_in_what_the_gpu_gets_back(
        self, gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        device = gpu.device(500)
        blocks = (
            (512, "inactive"),
            (1024, "active_allocated"),
            (512, "active_pending_free"),
            (2048, "inactive"),
        )
        held = Allocator(gpu, monkeypatch, *blocks)
        device.clear_memory(only_unused=True)
        assert held.content() == [{0}, {7}, {7}, {0}], "tensors keep what they have"
        device.clear_memory()
        assert held.content() == [{0}] * 4

    def test_context_and_workspaces_belong_to_the_slice(self, gpu: SimulatedGpu) -> None:
        device = gpu.device(500)
        assert device.overhead == 108 * MIB
        assert device.limit == 392 * MIB
        assert device.in_use == 108 * MIB
        assert gpu.cap_mib == 400, "the allocator reserves workspaces and tensors, and no more"

    def test_slices_that_fill_a_card_fit_with_everything_counted(self, gpu: SimulatedGpu) -> None:
        sizes = [125] * 8
        total = 0
        for size in sizes:
            gpu.processes.clear()
            gpu.device(size)
            total += gpu.cap_mib + gpu.context_mib
        assert total <= gpu.total_mib

    @pytest.mark.parametrize("sizes", [[125] * 8, [500, 250, 250], [999], [333, 333, 334]])
    def test_all_slices_of_a_card_are_filled_at_once(
        self, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
    ) -> None:
        """Each by a process of its own, a piece at a time in turns, until all refuse: none for another one's sake."""
        card = [SimulatedGpu() for _ in sizes]
        slices = []
        for gpu, size in zip(card, sizes):
            gpu.install(monkeypatch)  # what is called from here on is this process's
            slices.append(gpu.device(size))
        filling = dict(zip(slices, card))
        piece = 3 * MIB
        while filling:
            for device, gpu in list(filling.items()):
                try:
                    device.take(piece)
                except torch.OutOfMemoryError:
                    assert device.limit - device.allocated < piece
                    del filling[device]
                    continue
                gpu.allocated_mib += piece // MIB
                gpu.reserved_mib = max(gpu.reserved_mib, gpu.allocated_mib)
                assert gpu.reserved_mib <= gpu.cap_mib, "its own allocator refuses"
                used = sum(g.context_mib + g.reserved_mib for g in card)
                assert used <= 1000, "the card is full, and the slice is not"
        for device, size in zip(slices, sizes):
            assert device.allocated + device.overhead > size * MIB - piece

    def test_a_slice_smaller_than_the_context_has_nothing_to_give(self, gpu: SimulatedGpu) -> None:
        device = gpu.device(64)
        assert device.limit == 0 and gpu.cap_mib == 0
        with pytest.raises(torch.OutOfMemoryError, match="CUDA itself takes 108.00 MiB of it"):
            device.take(512)

    def test_a_resize_keeps_the_context(self, gpu: SimulatedGpu) -> None:
        device = gpu.device(500)
        device.resize(DeviceSpec(0, "GPU-simulated", "a GPU", 300, 1000, False))
        assert device.limit == 192 * MIB and gpu.cap_mib == 200

    def test_a_process_that_the_driver_numbers_otherwise_is_the_one_that_appeared(
        self, gpu: SimulatedGpu
    ) -> None:
        gpu.processes = {1: 300, 2: 200}
        assert gpu.device(500).overhead == 108 * MIB

    def test_where_the_driver_tells_processes_apart_no_more_growth_is_taken(
        self, gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        appear = gpu.warm_up

        def warm_up() -> None:
            appear()
            gpu.processes[99] = 0  # another one started in this moment

        monkeypatch.setattr(gpu, "warm_up", warm_up)
        assert gpu.device(500).overhead == 108 * MIB

    def test_without_a_driver_that_reports_it_a_context_is_assumed(
        self, gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import pynvml

        def no_driver() -> None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

        monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
        assert gpu.device(900).overhead == (600 + 8) * MIB


class TestOutOfMemory:
    @staticmethod
    def refuse(times: int) -> Any:
        calls = []

        def allocate(value: int) -> int:
            calls.append(value)
            if len(calls) <= times:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139 GiB of "
                    "which 3 GiB is free. Process 77 has 120 GiB memory in use."
                )
            return value

        return allocate

    def test_a_call_is_repeated_after_the_cache_is_emptied(self, gpu: SimulatedGpu) -> None:
        device = gpu.device(500)
        emptied, reclaimed = gpu.emptied, []
        device.reclaim = lambda: bool(reclaimed.append(1))
        error = torch.OutOfMemoryError("full")
        assert device.call_again(error, self.refuse(0), 7) == 7
        assert gpu.emptied == emptied + 1 and reclaimed

    def test_the_message_is_about_the_slice_and_nobody_else(self, gpu: SimulatedGpu) -> None:
        device = gpu.device(500)
        device.take(100 * MIB)
        with pytest.raises(torch.OutOfMemoryError) as found:
            device.call_again(torch.OutOfMemoryError("full"), self.refuse(9), 7)
        message = str(found.value)
        assert "Tried to allocate 2.00 GiB" in message and "total capacity of 500.00 MiB" in message
        assert "292.00 MiB is free" in message and "77" not in message

    def test_a_call_that_may_have_changed_something_is_not_repeated(self, gpu: SimulatedGpu) -> None:
        device, emptied = gpu.device(500), gpu.emptied
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            device.call_again(torch.OutOfMemoryError("full"), None, 7)
        assert gpu.emptied == emptied


class TestCopies:
    @staticmethod
    def upload(device: Any, target: Any, source: Any) -> None:
        left = host_bytes(source)

        def receive(view: memoryview) -> None:
            nonlocal left
            view[:] = left[: len(view)]
            left = left[len(view) :]

        device.upload(target, receive)
        assert not len(left) and torch.equal(target, source)

    def test_while_nothing_runs_an_upload_goes_straight_into_its_tensor(self, gpu: SimulatedGpu) -> None:
        device, source = gpu.device(500), torch.arange(3 * MIB, dtype=torch.float64)
        self.upload(device, torch.empty_like(source), source)
        assert gpu.log == ["copy"] * 3 + ["compute waits for copies"]

    def test_while_operators_run_an_upload_does_not_wait_for_them(self, gpu: SimulatedGpu) -> None:
        device, source = gpu.device(500), torch.arange(MIB, dtype=torch.float64)
        gpu.compute.working = True
        self.upload(device, torch.empty_like(source), source)
        assert gpu.log == ["copy", "compute waits for copies", "kept for compute"]

    def test_it_waits_where_there_is_no_memory_beside(self, gpu: SimulatedGpu) -> None:
        device, source = gpu.device(500), torch.arange(MIB, dtype=torch.float64)
        device.take(390 * MIB)
        gpu.compute.working = True
        self.upload(device, torch.empty_like(source), source)
        assert gpu.log == ["copies waits for compute", "copy", "compute waits for copies"]

    def test_other_layouts_arrive_too(self, gpu: SimulatedGpu) -> None:
        device, source = gpu.device(500), torch.arange(MIB, dtype=torch.int32).view(1024, 1024)
        self.upload(device, torch.empty(1024, 1024, dtype=torch.int32).t(), source)
        self.upload(device, torch.empty(2048, 1024, dtype=torch.int32)[::2], source)

    def test_a_broken_upload_leaves_no_copy_that_nothing_waits_for(self, gpu: SimulatedGpu) -> None:
        device, calls = gpu.device(500), []

        def receive(view: memoryview) -> None:
            calls.append(len(view))
            if len(calls) == 2:
                raise ConnectionError("gone")

        with pytest.raises(ConnectionError):
            device.upload(torch.empty(3 * MIB, dtype=torch.float64), receive)
        assert gpu.log == ["copy", "compute waits for copies"]

    @pytest.mark.parametrize("largest", [cuda_device._MAX_PINNED_BYTES, MIB])
    def test_downloads_follow_what_was_computed(
        self, gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, largest: int
    ) -> None:
        monkeypatch.setattr(cuda_device, "_MAX_PINNED_BYTES", largest)
        device, source = gpu.device(500), torch.arange(5 * MIB, dtype=torch.float64)[::2]
        copy = device.download(source)
        arrived = b"".join(bytes(piece) for piece in copy.pieces())
        assert arrived == bytes(host_bytes(source.contiguous()))
        assert gpu.log[0] == "copies waits for compute" and gpu.log.count("copy") == 3

    def test_whole_storages_go_to_the_host_and_back(self, gpu: SimulatedGpu) -> None:
        device, source = gpu.device(500), torch.arange(MIB, dtype=torch.float64)
        buffer, target = bytearray(8 * MIB), torch.zeros(MIB, dtype=torch.float64)
        device.copy_to_host(source, memoryview(buffer))
        device.copy_from_host(target, memoryview(buffer))
        assert torch.equal(target, source)


class TestBusy:
    def test_it_is_what_runs_and_not_what_is_called(self, gpu: SimulatedGpu) -> None:
        device = gpu.device(500)
        device.busy_s += 5.0  # the host spent a long time in calls
        assert device.measure_busy(10.0) == 0.0

    def test_kernels_that_no_session_submits_count(self, gpu: SimulatedGpu) -> None:
        device = gpu.device(500)
        gpu.utilization = [(gpu.own_pid, 10, 80), (gpu.own_pid, 20, 40), (7, 20, 100)]
        assert device.measure_busy(1.0) == pytest.approx(0.6)
        assert device.measure_busy(1.0) == 0.0, "the samples are read once"


class TestFailures:
    @pytest.mark.parametrize(
        ("text", "is_programs"),
        [
            ("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`", True),
            ("CUDA error: an illegal memory access was encountered", True),
            ("CUDA error: uncorrectable ECC error encountered", False),
            ("CUDA error: unknown error", False),
        ],
    )
    def test_errors_that_end_the_device(self, text: str, is_programs: bool) -> None:
        found = device_failure(RuntimeError(text))
        assert found is not None and found.is_programs is is_programs

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
            RuntimeError("CUDA error: invalid configuration argument"),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            IndexError("CUDA error: device-side assert triggered"),
        ],
    )
    def test_errors_of_an_operator_alone(self, error: Exception) -> None:
        assert device_failure(error) is None

    def test_the_error_behind_that_of_a_library_is_found(self, gpu: SimulatedGpu) -> None:
        device, error = gpu.device(500), RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
        assert device.failure(error) is None
        gpu.sticky = RuntimeError("CUDA error: an illegal memory access was encountered")
        found = device.failure(error)
        assert found is not None and "not its own" in found.reason


def test_sensors_that_the_driver_does_not_have_are_left_out(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(device: Any) -> int:
        raise RuntimeError("Not Supported")

    values = {"utilization": 71, "memory_usage": 12, "temperature": 55, "power_draw": 423000}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "clock_rate", unknown)
    assert gpu.device(500).readings() == values


def test_operators_draw_from_the_generator_that_seeds_go_to(gpu: SimulatedGpu) -> None:
    device = gpu.device(500)
    device.generator.manual_seed(5)
    drawn = device.kernel(torch.ops.aten.rand.default, torch.ops.aten.rand.default)([3])
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
