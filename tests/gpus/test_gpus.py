from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from jupyter_gpupool.core.models import GPU
from jupyter_gpupool.gpus import discover, emulated_gpus, nvml


def driver_works() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    pynvml.nvmlShutdown()
    return True


def test_two_v100s_whose_eighty_percent_are_26008() -> None:
    gpus = emulated_gpus("here")
    assert [(gpu.index, gpu.name, gpu.memory_mib) for gpu in gpus] == [
        (0, "Tesla V100-PCIE-32GB (emulated)", 32510),
        (1, "Tesla V100-PCIE-32GB (emulated)", 32510),
    ]
    assert all(gpu.emulated and gpu.healthy and gpu.server == "here" for gpu in gpus)


def test_emulated_gpus_stay_the_same_and_are_never_each_other() -> None:
    assert emulated_gpus("here", 3)[:2] == emulated_gpus("here", 2)
    assert emulated_gpus("here")[0].uuid == "GPU-0a152c19-53eb-5005-a3ba-7d90bb5d1e80"
    uuids = [gpu.uuid for server in ("a", "b") for gpu in emulated_gpus(server, 8)]
    assert len(set(uuids)) == 16


def test_an_emulated_gpu_cannot_hide_it() -> None:
    assert emulated_gpus("here", 1, name="NVIDIA H200")[0].name == "NVIDIA H200 (emulated)"
    with pytest.raises(ValueError, match="at least 1 MiB"):
        emulated_gpus("here", memory_mib=0)
    with pytest.raises(ValueError, match="must not be negative"):
        emulated_gpus("here", count=-1)


def test_discover_always_emulates_when_told() -> None:
    assert discover("here", "always", count=1, memory_mib=100) == emulated_gpus("here", 1, memory_mib=100)
    with pytest.raises(ValueError, match="auto, always or never"):
        discover("here", "sometimes")  # type: ignore[arg-type]


@pytest.mark.skipif(driver_works(), reason="this machine has an NVIDIA driver: its absence cannot be tested")
def test_without_a_driver_there_are_no_gpus_and_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    assert nvml.nvml_gpus("here") == ()
    assert nvml.samples() == ()
    assert discover("here", "never") == ()
    assert discover("here") == emulated_gpus("here")
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


@pytest.mark.skipif(not driver_works(), reason="this machine has no NVIDIA driver: no real GPU to look at")
def test_real_gpus_are_described() -> None:
    gpus = nvml.nvml_gpus("here")
    assert gpus == discover("here") == discover("here", "never")
    for gpu in gpus:
        assert gpu.uuid.startswith(("GPU-", "MIG-")) and gpu.memory_mib > 0 and not gpu.emulated
    samples = {sample.uuid: sample for sample in nvml.samples()}
    assert set(samples) >= {gpu.uuid for gpu in gpus}


def test_answers_of_recorded_devices_are_read(
    recorded: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """With a stand-in for the driver: see ``recorded``."""
    recorded(
        [
            {
                "uuid": "GPU-v100",
                "name": b"Tesla V100-PCIE-32GB",
                "memory": (32768, 258, 1000),
                "load": SimpleNamespace(gpu=40),
            },
            {"uuid": "GPU-old", "name": "Tesla K80", "memory": (11441, 0, 5), "old_driver": True},
            {"uuid": "GPU-shared", "name": "NVIDIA GB10"},
            {"lost": True},
            {
                "uuid": "GPU-a100",
                "name": "NVIDIA A100",
                "memory": (40960, 0, 0),
                "mig": (1, 1),
                "instances": [
                    {"uuid": "MIG-1", "name": "NVIDIA A100 MIG 3g.20gb", "memory": (20000, 50, 7)},
                    {"uuid": "MIG-2", "name": "NVIDIA A100 MIG 1g.5gb", "memory": (5000, 50, 0)},
                ],
            },
        ]
    )
    assert nvml.nvml_gpus("here") == (
        GPU("GPU-v100", "here", 0, "Tesla V100-PCIE-32GB", 32510),
        GPU("GPU-old", "here", 1, "Tesla K80", 11441),
        GPU("MIG-1", "here", 5, "NVIDIA A100 MIG 3g.20gb", 19950),
        GPU("MIG-2", "here", 6, "NVIDIA A100 MIG 1g.5gb", 4950),
    )
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "NVIDIA GB10 (GPU-shared) reports no memory of its own; it is left out of the pool",
        "GPU 3 does not answer; it is left out of the pool",
    ]
    assert discover("here", "auto") == nvml.nvml_gpus("here"), "real ones come before emulated ones"
    assert {sample.uuid: (sample.busy, sample.used_mib, sample.total_mib) for sample in nvml.samples()} == {
        "GPU-v100": (0.4, 1000, 32510),
        "GPU-old": (None, 5, 11441),
        "GPU-shared": (None, None, None),
        "MIG-1": (None, 7, 19950),
        "MIG-2": (None, 0, 4950),
    }
