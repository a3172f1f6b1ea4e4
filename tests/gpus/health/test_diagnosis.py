"""What follows from what a GPU server says of itself; no machine is looked at here."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from jupyter_gpupool.core.checks import Check, graded, worst
from jupyter_gpupool.core.models import GPU, Server
from jupyter_gpupool.core.readings import GPUReading, ServerReading, from_json
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.gpus.health.diagnosis import QUARANTINE_S, STALE_S, Diagnosis, diagnose, marked

NOW = 1_800_000_000.0
CARD = GPUReading(
    "GPU-a",
    0,
    "A100",
    ("GPU-a",),
    memory_mib=40000,
    uncorrected=0,
    uncorrected_ever=0,
    corrected=3,
    remapping_failed=False,
    needs_reset=False,
    temperature_c=45,
    slowdown_c=90,
    throttled=(),
)
OTHER = replace(CARD, uuid="GPU-b", index=1, covers=("GPU-b",))
MACHINE = ServerReading(
    "s",
    NOW - 2,
    driver="550.54.15",
    cuda="12.4",
    no_driver="",
    gpus=(CARD, OTHER),
    memory_mib=256_000,
    available_mib=200_000,
    free_mib={"/run": 9000},
    open_files=40,
    open_files_limit=65536,
    interface="eth0",
    mtu=9000,
    link_mbit=25_000,
    mps=True,
    torch="2.13.0",
)
GPUS = tuple(GPU(uuid, "s", i, "A100", 40000) for i, uuid in enumerate(("GPU-a", "GPU-b")))


def of(diagnosis: Diagnosis, name: str, gpu: str = "") -> Check:
    (check,) = [c for c in diagnosis.checks if c.name == name and (not gpu or c.gpu == gpu)]
    return check


def with_gpu(**changes: Any) -> ServerReading:
    """The first GPU of the machine is another one."""
    return replace(MACHINE, gpus=(replace(CARD, **changes), OTHER))


def test_a_machine_in_good_order_has_no_complaint() -> None:
    diagnosis = diagnose(MACHINE, GPUS, NOW)
    assert {c.status for c in diagnosis.checks} == {"ok"} and not diagnosis.sick
    assert worst(diagnosis.checks) == "ok"
    assert of(diagnosis, "driver").detail == "NVIDIA 550.54.15, CUDA 12.4"
    memory = of(diagnosis, "memory")
    assert (memory.value, memory.unit, memory.bound, memory.threshold) == (
        3.2,
        "x GPU memory",
        "at least",
        1.5,
    )


@pytest.mark.parametrize(
    ("changes", "check", "why"),
    [
        ({"uncorrected": 1}, "ecc", "1 double-bit errors"),
        ({"remapping_failed": True}, "ecc", "could not be replaced"),
        ({"remapping_failed": True, "uncorrected": None}, "ecc", "could not be replaced"),
        ({"xids": ((79, NOW - 5),)}, "xid", "XID 79, 5 s ago: it has fallen off the bus"),
        ({"xids": ((48, NOW - 50), (13, NOW - 5))}, "xid", "XID 48, 50 s ago: double-bit"),
        ({"xids": ((119, NOW + 30),)}, "xid", "XID 119, 0 s ago"),  # its clock is ahead
    ],
)
def test_what_takes_a_gpu_out(changes: dict[str, Any], check: str, why: str) -> None:
    diagnosis = diagnose(with_gpu(**changes), GPUS, NOW)
    found = of(diagnosis, check, "GPU-a")
    assert found.status == "failing" and why in found.detail and found.advice
    assert list(diagnosis.sick) == ["GPU-a"] and why in diagnosis.sick["GPU-a"]
    assert of(diagnosis, check, "GPU-b").status == "ok"


@pytest.mark.parametrize(
    ("changes", "check", "status"),
    [
        ({"uncorrected_ever": 7}, "ecc", "ok"),  # before its last reset, after which it is trusted again
        ({"xids": ((79, NOW - QUARANTINE_S - 1),)}, "xid", "ok"),
        ({"xids": ((31, NOW),)}, "xid", "ok"),  # a program's own page fault
        ({"needs_reset": True}, "ecc pending", "warning"),
        ({"temperature_c": 89}, "temperature", "warning"),
        ({"temperature_c": 150, "slowdown_c": None}, "temperature", "ok"),
        ({"temperature_c": 60, "slowdown_c": 0}, "temperature", "ok"),
        ({"temperature_c": None}, "temperature", "unknown"),
        ({"throttled": ("temperature", "power cap")}, "throttling", "warning"),
        ({"throttled": ("power cap",)}, "throttling", "ok"),
        ({"throttled": None}, "throttling", "unknown"),
        ({"uncorrected": None, "remapping_failed": None}, "ecc", "unknown"),
    ],
)
def test_what_leaves_a_gpu_in(changes: dict[str, Any], check: str, status: str) -> None:
    diagnosis = diagnose(with_gpu(**changes), GPUS, NOW)
    assert of(diagnosis, check, "GPU-a" if check != "ecc pending" else "").status == status
    assert not diagnosis.sick


def test_a_gpu_that_does_not_answer_is_lost() -> None:
    diagnosis = diagnose(replace(MACHINE, gpus=(OTHER,)), GPUS, NOW)
    assert diagnosis.sick == {"GPU-a": "lost: it does not answer"}
    assert of(diagnosis, "gpu").detail == "GPU 0 (A100) is lost: it does not answer"
    assert of(diagnosis, "memory").value == 3.2, "what is lost still counts"


def test_a_driver_that_fails_takes_all_of_its_gpus_out_and_no_emulated_one() -> None:
    broken = replace(MACHINE, gpus=(), no_driver="Driver/library version mismatch")
    diagnosis = diagnose(broken, GPUS, NOW)
    assert of(diagnosis, "driver").status == "failing"
    assert set(diagnosis.sick) == {"GPU-a", "GPU-b"}
    mixed = diagnose(broken, (GPUS[0], *emulated_gpus("s", 1)), NOW)
    assert set(mixed.sick) == {"GPU-a"}


def test_a_machine_that_says_nothing_any_more() -> None:
    silent = replace(MACHINE, at=NOW - STALE_S - 1)
    diagnosis = diagnose(silent, GPUS, NOW)
    assert of(diagnosis, "readings").status == "failing" and set(diagnosis.sick) == {"GPU-a", "GPU-b"}
    emulated = diagnose(silent, emulated_gpus("s"), NOW)
    assert of(emulated, "readings").status == "warning" and not emulated.sick
    ahead = replace(MACHINE, at=NOW - STALE_S - 1 + 500, clock_ahead_s=500.0)
    assert of(diagnose(ahead, GPUS, NOW), "readings").status == "failing", "by the pool's clock, not its own"
    assert of(diagnose(ahead, GPUS, NOW), "clock").status == "failing"


def test_a_machine_that_has_not_been_read_yet_is_not_blamed() -> None:
    diagnosis = diagnose(None, GPUS, NOW, "s")
    assert [c.status for c in diagnosis.checks] == ["unknown"] and not diagnosis.sick


def test_emulated_gpus_without_a_driver() -> None:
    diagnosis = diagnose(ServerReading("s", NOW, torch="2.13.0"), emulated_gpus("s"), NOW)
    driver = of(diagnosis, "driver")
    assert (driver.status, driver.detail) == ("unknown", "no NVIDIA driver here")
    assert {of(diagnosis, name).status for name in ("memory", "mtu", "link", "mps")} == {"unknown"}
    assert worst(diagnosis.checks) == "ok"


def test_a_mig_instance_is_as_well_as_its_gpu() -> None:
    card = replace(CARD, covers=("MIG-1", "MIG-2"), uncorrected=2)
    instances = tuple(GPU(uuid, "s", i, "A100 MIG", 19000) for i, uuid in enumerate(card.covers))
    diagnosis = diagnose(replace(MACHINE, gpus=(card,)), instances, NOW)
    assert set(diagnosis.sick) == {"MIG-1", "MIG-2"}
    assert of(diagnosis, "memory").value == 6.4, "the GPU's memory counts once"


@pytest.mark.parametrize("memory", [None, 0])
def test_gpus_that_share_the_machines_memory(memory: int | None) -> None:
    shared = replace(MACHINE, gpus=(replace(CARD, memory_mib=memory),))
    found = of(diagnose(shared, GPUS[:1], NOW), "memory")
    assert found.status == "unknown" and "memory of its own" in found.detail


@pytest.mark.parametrize(
    ("changes", "check", "status"),
    [
        ({"memory_mib": 100_000}, "memory", "warning"),
        ({"memory_mib": None}, "memory", "unknown"),
        ({"available_mib": 1000}, "memory available", "failing"),
        ({"available_mib": 20_000}, "memory available", "warning"),
        ({"free_mib": {"/run": 63}}, "disk", "failing"),
        ({"free_mib": {"/run": 1000}}, "disk", "warning"),
        ({"open_files_limit": 256}, "open files", "warning"),
        ({"open_files_limit": 1024, "open_files": 1000}, "open files", "failing"),
        ({"open_files_limit": None}, "open files", "ok"),
        ({"mtu": 1400}, "mtu", "warning"),
        ({"mtu": 1500}, "mtu", "ok"),
        ({"link_mbit": 1000}, "link", "warning"),
        ({"mps": False}, "mps", "warning"),
        ({"torch": None}, "pytorch", "failing"),
        ({"clock_ahead_s": -3.0}, "clock", "warning"),
    ],
)
def test_machines(changes: dict[str, Any], check: str, status: str) -> None:
    diagnosis = diagnose(replace(MACHINE, **changes), GPUS, NOW)
    found = of(diagnosis, check)
    assert found.status == status and not diagnosis.sick
    assert bool(found.advice) == (status in ("warning", "failing")), (
        "what to do, where there is anything to do"
    )
    assert found.server == "s"


def test_marked_servers_say_why() -> None:
    (server,) = marked([Server("s", "h", GPUS)], {"GPU-b": "because"})
    assert [(gpu.healthy, gpu.trouble) for gpu in server.gpus] == [(True, ""), (False, "because")]
    assert marked([server], {}) == [Server("s", "h", GPUS)], "and no more once the cause is gone"


def test_a_reading_travels_as_json() -> None:
    sent = with_gpu(xids=((48, NOW),), throttled=("temperature",))
    assert from_json(json.loads(json.dumps(asdict(sent)))) == sent
    bare = ServerReading("s", NOW)
    assert from_json(json.loads(json.dumps(asdict(bare)))) == bare


def test_the_worst_check_counts_and_what_is_unknown_does_not() -> None:
    def one(value: float | None) -> Check:
        return graded("x", value, "", at_most=1, fails_beyond=2, detail="", advice="do")

    assert [one(v).status for v in (1, 1.5, 2, 2.1, None)] == [
        "ok",
        "warning",
        "warning",
        "failing",
        "unknown",
    ]
    assert worst([]) == worst([one(None)]) == worst([one(None), one(0)]) == "ok"
    assert worst([one(3), one(1.5), one(None)]) == "failing"
