"""How the health of a machine is read: with a stand-in for the driver, and this machine itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pynvml
import pytest

from jupyter_gpupool.core.readings import ServerReading
from jupyter_gpupool.gpus.health import host_reader, nvml_reader
from jupyter_gpupool.gpus.health.monitor import Watch

A100 = {
    "uuid": "GPU-a100",
    "name": b"NVIDIA A100",
    "memory": (40960, 960, 0),
    "uncorrected": 1,
    "uncorrected_ever": 4,
    "corrected": 9,
    "rows": (1, 1, 1, 0),
    "temperature": 93,
    "slowdown": 92,
    "clocks": 0x20 | 0x04 | 0x01,
    "events": 0x18,
}


def test_everything_that_a_gpu_tells_is_read(recorded: Callable[..., Any]) -> None:
    recorded([dict(A100)])
    driver, (gpu,) = nvml_reader.read({"GPU-a100": [(31, 5.0)], "GPU-other": [(79, 6.0)]})
    assert (driver.version, driver.cuda, driver.missing) == ("550.54.15", "12.4", "")
    assert (gpu.name, gpu.covers, gpu.memory_mib) == ("NVIDIA A100", ("GPU-a100",), 40000)
    assert (gpu.uncorrected, gpu.uncorrected_ever, gpu.corrected) == (1, 4, 9)
    assert (gpu.needs_reset, gpu.remapping_failed) == (True, False)
    assert (gpu.temperature_c, gpu.slowdown_c) == (93, 92)
    assert gpu.throttled == ("power cap", "temperature") and gpu.xids == ((31, 5.0),)


def test_what_a_gpu_does_not_support_is_not_known(recorded: Callable[..., Any]) -> None:
    recorded([{"uuid": "GPU-shared", "name": "NVIDIA GB10"}, {"lost": True}, {"name": "without a uuid"}])
    _, (gpu,) = nvml_reader.read()
    told = (gpu.memory_mib, gpu.uncorrected, gpu.needs_reset, gpu.temperature_c, gpu.throttled)
    assert told == (None,) * 5 and gpu.index == 0


def test_unified_memory_of_total_zero_is_no_memory_of_its_own(recorded: Callable[..., Any]) -> None:
    recorded([{"uuid": "GPU-zero", "name": "x", "memory": (0, 200, 0)}])
    _, (gpu,) = nvml_reader.read()
    assert gpu.memory_mib is None


def test_pages_that_wait_for_a_reset_on_older_gpus(recorded: Callable[..., Any]) -> None:
    recorded([{"uuid": "GPU-v100", "name": "V100", "memory": (32768, 0, 0), "pages": 1}])
    _, (gpu,) = nvml_reader.read()
    assert gpu.needs_reset is True and gpu.remapping_failed is None


def test_a_gpu_in_mig_mode_covers_its_instances(recorded: Callable[..., Any]) -> None:
    instances = [{"uuid": "MIG-1", "name": "i", "memory": (1, 0, 0)}, {"name": "nameless"}]
    recorded([{**A100, "mig": (1, 1), "instances": instances}])
    _, (gpu,) = nvml_reader.read()
    assert gpu.uuid == "GPU-a100" and gpu.covers == ("MIG-1",)


def test_why_there_is_no_driver(recorded: Callable[..., Any]) -> None:
    machine = recorded([])
    machine.broken = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    assert nvml_reader.read() == (nvml_reader.Driver(missing="no NVIDIA driver here"), ())
    machine.broken = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    driver, _ = nvml_reader.read()
    assert driver.installed and driver.missing and driver.missing != "no NVIDIA driver here"
    assert not nvml_reader.Errors().open()


def test_a_watch_hears_what_the_driver_reports_at_once(recorded: Callable[..., Any], eventually: Any) -> None:
    machine = recorded([dict(A100), {**A100, "uuid": "GPU-b"}])

    def read(xids: Mapping[str, Any]) -> ServerReading:
        return host_reader.read("here", xids=xids)

    watch = Watch(read, every_s=3600.0)  # what is seen below comes from the report
    watch.start()
    eventually(lambda: watch.latest, "the first reading")
    machine.report(1, 79)
    seen = eventually(lambda: watch.latest and watch.latest.gpus[1].xids, "the error is in the reading")
    assert [number for number, _ in seen] == [79] and abs(seen[0][1] - time.time()) < 60
    assert watch.latest is not None and watch.latest.gpus[0].xids == ()
    watch.stop()


def test_a_watch_outlives_a_reading_that_fails(eventually: Any, caplog: pytest.LogCaptureFixture) -> None:
    outcomes = [RuntimeError("once"), host_reader.read("here")]

    def read(xids: Mapping[str, Any]) -> ServerReading:
        outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
        if isinstance(outcome, RuntimeError):
            raise outcome
        return outcome

    watch = Watch(read, every_s=0.01)
    watch.start()
    assert eventually(lambda: watch.latest, "the second reading").server == "here"
    watch.stop()


def test_this_machine(tmp_path: Path) -> None:
    reading = host_reader.read(
        "here", folders=[str(tmp_path), str(tmp_path / "missing")], address="127.0.0.1"
    )
    assert reading.memory_mib and reading.available_mib and reading.memory_mib > reading.available_mib > 0
    assert reading.free_mib is not None and list(reading.free_mib) == [str(tmp_path)]
    assert reading.open_files and reading.open_files > 2
    assert (reading.interface, reading.mtu) == ("lo", 65536)
    assert abs(reading.at - time.time()) < 60


def test_interfaces_that_cannot_be_told() -> None:
    assert host_reader.interface_of("192.0.2.77") == ("", None, None), "not this machine's"
    assert host_reader.interface_of("no such name.invalid") == ("", None, None)
    assert host_reader.local_address("127.0.0.1", 1) == "127.0.0.1"


@pytest.mark.gpu
def test_real_gpus_tell_their_health() -> None:
    if os.environ.get("GPUPOOL_REHEARSE"):
        pytest.skip("a rehearsal has no driver")
    driver, gpus = nvml_reader.read()
    assert driver.version and driver.cuda and not driver.missing
    for gpu in gpus:
        assert gpu.uuid.startswith("GPU-") and gpu.covers and gpu.temperature_c
