"""The environment of programs with a lease."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupyter_gpupool.client.lease_environment import ChildrensLease, lease_variables
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

SLICE = DeviceSpec(0, "GPU-a", "H200", 35_000, 140_000, False)
DIRECT = AttachSpec("lease", "127.0.0.1", 1, "secret", (SLICE,), mode="direct")


@pytest.fixture
def mps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    (tmp_path / "nvidia-cuda-mps-control.pid").write_text("1\n")


def test_a_direct_connection_has_the_hard_limits_of_mps_where_it_runs(mps: None) -> None:
    assert lease_variables(DIRECT, "/lease.json", {}) == {
        "GPUPOOL_LEASE": "/lease.json",
        "CUDA_VISIBLE_DEVICES": "GPU-a",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=35000M",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25",
    }


def test_without_mps_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert set(lease_variables(DIRECT, "/lease.json", {})) == {"GPUPOOL_LEASE", "CUDA_VISIBLE_DEVICES"}


def test_a_withdrawn_lease_leaves_the_environment_as_it_was(
    mps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "90")
    lease = ChildrensLease()
    before = dict(os.environ)
    lease.offer(DIRECT)
    assert os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
    lease.withdraw()
    assert dict(os.environ) == before
