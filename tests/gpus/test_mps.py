"""CUDA's multi-process service: whether it runs, and what it is told to limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupyter_gpupool.gpus.mps import mps_limits, mps_runs
from jupyter_gpupool.transport.specs import DeviceSpec


def test_mps_runs_where_its_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert not mps_runs()
    pid = tmp_path / "nvidia-cuda-mps-control.pid"
    pid.write_text("not a number")
    assert not mps_runs()
    pid.write_text("1\n")
    assert mps_runs()


def test_each_slice_has_its_memory_and_a_process_the_share_of_its_largest() -> None:
    devices = [
        DeviceSpec(0, "GPU-a", "H200", 20_000, 140_000, False),
        DeviceSpec(1, "GPU-b", "H200", 70_001, 140_000, False),
    ]
    assert mps_limits(devices) == {
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=20000M,1=70001M",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "51",
    }
    assert mps_limits([DeviceSpec(0, "GPU-c", "emulated", 100, 100, True)]) == {}
