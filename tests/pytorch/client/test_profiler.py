"""torch.profiler on leased GPUs is quiet, and shows the times of the worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler  # noqa: E402

BOTH = [ProfilerActivity.CPU, ProfilerActivity.CUDA]


def kernels(trace: Path) -> list[str]:
    events = json.loads(trace.read_text())["traceEvents"]
    return [e["name"] for e in events if e.get("cat") == "kernel" and e["dur"] > 0]


def test_a_linear_layer(attached: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    layer, x = torch.nn.Linear(4, 4).cuda(), torch.ones(2, 4, device="cuda")
    with profile(activities=BOTH, on_trace_ready=tensorboard_trace_handler(str(tmp_path / "board"))) as found:
        layer(x)
        torch.ones(2, 4) + 1
    assert "frame #" not in capfd.readouterr().err
    averages = {e.key: e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CPU}
    assert averages["aten::addmm"].device_time_total > 0
    assert averages["aten::linear"].device_time_total >= averages["aten::addmm"].device_time_total
    assert averages["aten::add"].device_time_total == 0
    assert "CUDA total" in found.key_averages().table()
    (board,) = (tmp_path / "board").iterdir()
    assert kernels(board) == ["aten::addmm"]


def test_the_older_profiler_and_one_without_devices(attached: object, tmp_path: Path) -> None:
    x = torch.ones(2, 4, device="cuda")
    with torch.autograd.profiler.profile(use_device="cuda") as found:
        x + 1
    assert found.key_averages().total_average().device_time_total > 0
    found.export_chrome_trace(str(tmp_path / "trace"))
    assert kernels(tmp_path / "trace") == ["aten::add"]
    with profile(activities=[ProfilerActivity.CPU]) as host:
        x + 1
    assert "CUDA" not in host.key_averages().table()


def test_nvtx_ranges_do_nothing(attached: object) -> None:
    x = torch.ones(2, device="cuda")
    with torch.autograd.profiler.emit_nvtx(), torch.cuda.nvtx.range("step"):
        assert (x + 1).tolist() == [2, 2]
