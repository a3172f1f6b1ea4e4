"""What only a real GPU shows. ``GPUPOOL_REHEARSE=1`` runs the same on an emulated one, beside the CPU.

The process has a GPU of its own, so that ``cuda:0`` is native and the slice is ``gpupool:0``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.gpus.mps import mps_runs  # noqa: E402
from jupyter_gpupool.gpus.nvml import nvml_gpus  # noqa: E402
from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.pytorch.client.dispatch import attachment  # noqa: E402
from jupyter_gpupool.pytorch.protocol.commands import MEMORY  # noqa: E402
from jupyter_gpupool.pytorch.worker.devices import create_devices  # noqa: E402
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec  # noqa: E402

pytestmark = pytest.mark.gpu

REHEARSE = bool(os.environ.get("GPUPOOL_REHEARSE"))
NATIVE = "cpu" if REHEARSE else "cuda:0"
SLICE = "gpupool:0"
MIB = 1 << 20
#: What a slice here has: room for a context and some tensors.
SLICE_MIB = 512 if REHEARSE else 4096
BLOCK_MIB = 16 if REHEARSE else 128
#: More than cuBLAS and others keep for the stream on which graphs are captured.
MAX_WORKSPACES_MIB = 64


def a_slice(memory_mib: int = SLICE_MIB) -> DeviceSpec:
    if REHEARSE:
        return DeviceSpec(0, "GPU-0", "a GPU (emulated)", memory_mib, 32_510, True)
    gpu = nvml_gpus("localhost")[0]
    return DeviceSpec(0, gpu.uuid, gpu.name, memory_mib, gpu.memory_mib, False)


@pytest.fixture
def worker(start_worker: Callable[..., Any]) -> Any:
    return start_worker(devices=(a_slice(),))


@pytest.fixture
def attached(worker: Any) -> Any:
    session.activate(worker.spec)
    yield worker
    session.deactivate()


def fill() -> list[Any]:
    """Blocks on the slice until there is no room for another one."""
    blocks = []
    try:
        while True:
            blocks.append(torch.zeros(BLOCK_MIB * MIB, dtype=torch.uint8, device=SLICE))
            torch.gpupool.synchronize()
    except torch.OutOfMemoryError:
        return blocks


def in_use() -> int:
    """The bytes of the slice that ``torch.cuda.mem_get_info()`` counts as used."""
    return int(attachment.stream(0).ask((MEMORY, 0)))


def used_mib(pid: int) -> float | None:
    """What the driver counts of a process; None where it does not know it by that number."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        found = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    return next((p.usedGpuMemory / MIB for p in found if p.pid == pid and p.usedGpuMemory), None)


class TestMemory:
    def test_the_context_is_counted(self) -> None:
        device = create_devices([a_slice()])[0]
        assert device.limit + device.overhead == SLICE_MIB * MIB
        assert REHEARSE or 100 * MIB < device.overhead < 2000 * MIB

    def test_a_full_slice_takes_no_more_than_its_size(self, attached: Any) -> None:
        blocks = fill()
        assert len(blocks) * BLOCK_MIB > SLICE_MIB // 2
        used = used_mib(attached.process.pid)
        assert used is None or used <= SLICE_MIB

    def test_room_is_there_again_after_an_error(self, attached: Any) -> None:
        blocks = fill()
        count = len(blocks)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(SLICE_MIB * MIB, dtype=torch.uint8, device=SLICE)
            torch.gpupool.synchronize()
        del blocks
        assert len(fill()) == count
        assert torch.ones(3, device=SLICE).sum().item() == 3

    def test_pieces_do_not_keep_large_tensors_out(self, attached: Any) -> None:
        pieces = [torch.zeros(MIB, dtype=torch.uint8, device=SLICE) for _ in range(SLICE_MIB // 4)]
        torch.gpupool.synchronize()
        del pieces[::2]
        torch.zeros(SLICE_MIB // 4 * MIB, dtype=torch.uint8, device=SLICE)
        torch.gpupool.synchronize()

    def test_two_slices_fill_up_at_once_and_neither_takes_from_the_other(
        self, start_worker: Callable[..., Any]
    ) -> None:
        workers = [start_worker(devices=(a_slice(),)) for _ in range(2)]
        counts = []
        for worker in (*workers, workers[0]):
            session.activate(worker.spec)
            counts.append(len(fill()))
            session.deactivate()
        assert counts[0] == counts[1] == counts[2]

    def test_a_direct_program_has_no_more_than_its_slice(self, tmp_path: Any) -> None:
        if REHEARSE:
            pytest.skip("an emulated GPU cannot be attached directly")
        config = tmp_path / "lease.json"
        spec = AttachSpec("lease", "127.0.0.1", 1, "secret", (a_slice(),), mode="direct")
        config.write_text(spec.to_json())
        program = (
            "import torch\n"
            "from jupyter_gpupool.transport.specs import AttachSpec\n"
            "from jupyter_gpupool.pytorch.client.cuda import alias\n"
            f"alias.cap_memory(AttachSpec.from_json(open({str(config)!r}).read()))\n"
            "try:\n"
            f"    torch.empty({SLICE_MIB} << 20, dtype=torch.uint8, device='cuda')\n"
            "except torch.OutOfMemoryError:\n"
            "    print('refused')\n"
            f"print(torch.empty({SLICE_MIB // 2} << 20, dtype=torch.uint8, device='cuda').numel())\n"
        )
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": a_slice().uuid}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.split() == ["refused", str(SLICE_MIB // 2 << 20)], done.stderr

    def test_mps_refuses_what_is_beyond_the_slice(self) -> None:
        if not mps_runs():
            pytest.skip("the control daemon of MPS does not run")
        from jupyter_gpupool.gpus.mps import mps_limits

        spec = a_slice()
        program = f"import torch; torch.empty({SLICE_MIB} << 20, dtype=torch.uint8, device='cuda')"
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": spec.uuid, **mps_limits([spec])}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert "out of memory" in done.stderr


class TestNumbers:
    def test_random_numbers_are_the_gpus_own(self, attached: Any) -> None:
        for draw in (
            lambda device: torch.rand(1000, device=device),
            lambda device: torch.randn(1000, device=device),
            lambda device: torch.randint(0, 99, (1000,), device=device),
            lambda device: torch.nn.functional.dropout(torch.ones(1000, device=device)),
        ):
            torch.manual_seed(11)
            native = draw(NATIVE).cpu()
            torch.manual_seed(11)
            assert torch.equal(draw(SLICE).cpu(), native)

    def test_a_few_steps_give_the_native_losses(self, attached: Any) -> None:
        def losses(device: str) -> list[float]:
            torch.manual_seed(1)
            net = torch.nn.Sequential(
                torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 10)
            ).to(device)
            optimizer = torch.optim.Adam(net.parameters())
            x, y = torch.randn(16, 1, 8, 8).to(device), torch.arange(16).to(device) % 10
            found = []
            for _ in range(5):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(net(x), y)
                loss.backward()
                optimizer.step()
                found.append(loss.item())
            return found

        assert losses(SLICE) == pytest.approx(losses(NATIVE), rel=1e-4)

    def test_autocast_computes_in_halves(self, attached: Any) -> None:
        a = torch.randn(64, 64)
        with torch.autocast("gpupool", dtype=torch.bfloat16):
            found = a.to(SLICE) @ a.to(SLICE)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float().cpu(), a @ a, rtol=0.1, atol=0.5)

    @pytest.mark.parametrize("nbytes", [1, 4096, 100_000, 3 * MIB + 7, 64 * MIB])
    def test_copies_keep_every_byte_while_operators_run(self, attached: Any, nbytes: int) -> None:
        data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
        n = 256 if REHEARSE else 4096
        a = torch.ones(n, n, device=SLICE)
        target = torch.zeros(nbytes, dtype=torch.uint8, device=SLICE)
        for _ in range(5):
            a @ a
        target += 1  # uses the memory right before it is overwritten
        target.copy_(data)
        assert torch.equal(target.cpu(), data)
        assert torch.equal(data.to(SLICE).flip(0).cpu(), data.flip(0))


class TestGraphs:
    """What is compiled is recorded as a CUDA graph; on an emulated GPU its operators run one by one."""

    @staticmethod
    def network() -> Any:
        torch.manual_seed(3)
        layers = [layer for _ in range(8) for layer in (torch.nn.Linear(64, 64), torch.nn.Tanh())]
        return torch.nn.Sequential(*layers).to(SLICE)

    @staticmethod
    def compiled(function: Callable[..., Any], **options: Any) -> Any:
        return torch.compile(function, backend="gpupool", options={"inductor": False, **options})

    def test_they_compute_what_operators_do(self, attached: Any) -> None:
        from jupyter_gpupool.pytorch.client.compile.graphs import states

        net = self.network()
        fast, kept = self.compiled(net), []
        with torch.no_grad():
            for k in range(12):
                x = torch.full((4, 64), 0.1 * k, device=SLICE)
                kept.append((fast(x), net(x)))
            net[0].weight.mul_(2)
            kept.append((fast(x), net(x)))
            net[2].weight = torch.nn.Parameter(net[2].weight + 1)
            kept += [(fast(x), net(x)) for _ in range(8)]
        for found, expected in kept:
            torch.testing.assert_close(found.cpu(), expected.cpu())
        assert REHEARSE or "recorded" in states()

    def test_they_draw_the_numbers_that_operators_draw(self, attached: Any) -> None:
        from jupyter_gpupool.pytorch.client.compile.graphs import states

        def noisy(x: Any) -> Any:
            for _ in range(4):
                x = torch.nn.functional.dropout(x, 0.3).sin() + 1
            return x

        x, found = torch.ones(1000, device=SLICE), []
        for options in ({"cudagraphs": True}, {"cudagraphs": False}):
            fast = self.compiled(noisy, **options)
            fast(x)
            torch.manual_seed(7)
            found.append([fast(x).cpu() for _ in range(10)])
        assert all(map(torch.equal, *found))
        assert REHEARSE or "recorded" in states()

    def test_what_they_keep_leaves_room_when_tensors_need_it(self, attached: Any) -> None:
        from jupyter_gpupool.pytorch.client.compile.graphs import states

        count = len(fill())
        net = self.network()
        torch.gpupool.synchronize()
        before = in_use()
        fast = self.compiled(net)
        with torch.no_grad():
            for _ in range(8):
                result = fast(torch.ones(4, 64, device=SLICE))
        assert REHEARSE or "recorded" in states()
        assert len(fill()) >= count - 1  # the network's own memory
        assert in_use() - before <= MAX_WORKSPACES_MIB * MIB
        assert result.isfinite().all().item()


class TestTime:
    def test_events_measure_what_the_gpu_does(self, attached: Any) -> None:
        n = 256 if REHEARSE else 4096
        a = torch.ones(n, n, device=SLICE)
        first, last = (torch.gpupool.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(10):
            a @ a
        last.record()
        last.synchronize()
        assert first.elapsed_time(last) > 0

    def test_streams_wait_for_each_other(self, attached: Any) -> None:
        n = 256 if REHEARSE else 4096
        a, side = torch.ones(n, n, device=SLICE), torch.gpupool.Stream()
        with torch.gpupool.stream(side):
            b = a @ a
        torch.gpupool.current_stream().wait_stream(side)
        assert (b + 1)[0, 0].item() == n + 1

    def test_what_is_submitted_counts_as_busy_until_it_has_run(self) -> None:
        if REHEARSE:
            pytest.skip("the calls of an emulated GPU return when their work is done")
        device = create_devices([a_slice()])[0]
        a = torch.ones(8192, 8192, device=device.torch_device)
        device.synchronize()
        device.measure_busy(1.0)
        began = time.perf_counter()
        for _ in range(50):
            a @ a
        device.busy_s += time.perf_counter() - began
        device.submitted(began)
        device.synchronize()
        took = time.perf_counter() - began
        assert device.measure_busy(took) > 0.8
        assert device.measure_busy(1.0) < 0.9


class TestFailures:
    def test_an_assertion_of_a_kernel_names_its_operator(self, attached: Any) -> None:
        table = torch.ones(4, 4, device=SLICE)
        index = torch.tensor([99], device=SLICE)
        with pytest.raises((RuntimeError, IndexError), match=r"(?s)index.*test_real_gpu"):
            torch.nn.functional.embedding(index, table).sum().item()

    def test_others_on_the_card_go_on(self, attached: Any) -> None:
        x = torch.ones(1000, device=NATIVE)
        with pytest.raises((RuntimeError, IndexError)):
            torch.ones(3, device=SLICE)[torch.tensor([7], device=SLICE)].cpu()
        assert (x + x).sum().item() == 2000
