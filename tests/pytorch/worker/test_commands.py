"""The worker executes every command that the protocol defines."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.protocol import commands  # noqa: E402
from jupyter_gpupool.pytorch.worker.emulated_device import EmulatedDevice  # noqa: E402
from jupyter_gpupool.pytorch.worker.executor import WorkerSession  # noqa: E402
from jupyter_gpupool.pytorch.worker.templates import BadRecord  # noqa: E402
from jupyter_gpupool.transport.specs import DeviceSpec  # noqa: E402


def test_every_code_of_the_protocol_is_executed_and_no_other() -> None:
    spec = DeviceSpec(0, "GPU-0", "a GPU (emulated)", 64, 64, True)
    session = WorkerSession([EmulatedDevice(spec)], lambda header, payload: None, lambda report: None)
    assert set(session._commands) == set(commands.FIELDS)


def test_a_lack_of_memory_names_the_number_that_the_client_has_for_the_gpu() -> None:
    """CUDA_VISIBLE_DEVICES=1 makes the lease's second GPU the client's GPU 0."""
    devices = [EmulatedDevice(DeviceSpec(n, f"GPU-{n}", "a GPU (emulated)", 64, 64, True)) for n in (0, 1)]
    complaints: list[dict] = []
    session = WorkerSession(devices, lambda *answer: None, complaints.append, numbers={0: devices[1]})
    session._allocate(1, 65 << 20, 0)
    assert [c["type"] for c in complaints] == ["OutOfMemoryError"]
    assert "GPU 0 (a gpupool slice) has a total capacity of 64.00 MiB" in complaints[0]["message"]


@pytest.mark.parametrize("table", [None, [], "aten::add.Tensor", {str(k): "" for k in range(50_001)}])
def test_only_a_table_of_schemas_is_compared(table: object) -> None:
    spec = DeviceSpec(0, "GPU-0", "a GPU (emulated)", 64, 64, True)
    session = WorkerSession([EmulatedDevice(spec)], lambda header, payload: None, lambda report: None)
    with pytest.raises(BadRecord, match="no table of digests"):
        session.run([commands.SCHEMAS, table])
