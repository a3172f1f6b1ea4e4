"""Evaluate a reading: checks, and the GPUs that must get no new slices. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jupyter_gpupool.core.checks import Check, graded
from jupyter_gpupool.core.models import GPU, Server
from jupyter_gpupool.core.readings import GPUReading, ServerReading

#: A reading older than this, in seconds, means that the machine or its driver hangs.
STALE_S = 60.0
#: How long a GPU gets no new slices after an error that requires a reset, in seconds.
QUARANTINE_S = 3600.0
#: Recommended memory of a GPU server, as a multiple of its GPUs' memory.
MEMORY_PER_GPU_MEMORY = 1.5
#: Recommended between a client and a GPU server: round trip in µs, bandwidth in Gbit/s.
ROUND_TRIP_US, BANDWIDTH_GBIT = 50.0, 10.0
MIN_MTU = 1500

#: Driver errors (XIDs) after which a GPU must get no new work. All others are errors of programs, or were contained.
FATAL_XIDS = {
    48: "double-bit memory error",
    62: "its microcontroller halted",
    64: "a broken row of its memory could not be replaced",
    74: "NVLink error",
    79: "it has fallen off the bus",
    95: "memory error that was not contained",
    119: "its system processor does not answer",
    120: "its system processor failed",
    140: "memory error that was not recovered",
    143: "it could not be initialised",
}


@dataclass(frozen=True)
class Diagnosis:
    """The checks, and ``sick``: the reasons, by uuid, why GPUs of the pool must get no new slices."""

    checks: tuple[Check, ...]
    sick: Mapping[str, str]


def diagnose(reading: ServerReading | None, gpus: Sequence[GPU], now: float, server: str = "") -> Diagnosis:
    """Evaluate one server's reading for its ``gpus`` at ``now``, in seconds since the epoch by the pool's clock.

    ``reading`` is None for a server that has not been read yet; its GPUs are then assumed healthy.
    """
    real = [gpu for gpu in gpus if not gpu.emulated]
    if reading is None:
        return Diagnosis((Check("readings", "unknown", "not read yet", server=server),), {})
    age = max(0.0, now - (reading.at - (reading.clock_ahead_s or 0.0)))
    checks = [
        graded(
            "readings",
            round(age, 1),
            "s",
            at_most=STALE_S,
            fails_beyond=STALE_S if real else None,
            detail=f"read {age:.0f} s ago",
            advice="the machine or its NVIDIA driver hangs: look for it in dmesg, or reboot that server",
            server=reading.server,
        )
    ]
    sick: dict[str, str] = {}
    if age > STALE_S:
        sick.update(
            (gpu.uuid, f"{reading.server} has reported nothing about its GPUs for {age:.0f} s")
            for gpu in real
        )
    checks += _driver(reading, real)
    by_uuid = {uuid: entry for entry in reading.gpus for uuid in entry.covers}
    for gpu in real:
        if gpu.uuid not in by_uuid:
            why = reading.no_driver or "it does not answer"
            checks.append(
                Check(
                    "gpu",
                    "failing",
                    f"GPU {gpu.index} ({gpu.name}) is lost: {why}",
                    advice="reset the GPU or reboot; see nvidia-smi and dmesg on that server",
                    server=reading.server,
                    gpu=gpu.uuid,
                )
            )
            sick.setdefault(gpu.uuid, f"lost: {why}")
    for entry in reading.gpus:
        if not set(entry.covers) & {gpu.uuid for gpu in real}:
            continue  # not the pool's
        for check in _gpu(entry, reading, now):
            checks.append(check)
            if check.status == "failing":
                sick.update((uuid, check.detail) for uuid in entry.covers if uuid not in sick)
    checks += _machine(reading, real)
    checks += _layers("sandbox", reading.sandbox, "workers are shut in", reading.server)
    checks += _layers("bounds", reading.bounds, "what a worker takes is bounded", reading.server)
    return Diagnosis(tuple(checks), {gpu.uuid: sick[gpu.uuid] for gpu in real if gpu.uuid in sick})


def marked(servers: Iterable[Server], sick: Mapping[str, str]) -> list[Server]:
    """Return the servers, with the GPUs marked that must get no new slices."""
    return [
        replace(
            server,
            gpus=tuple(
                replace(gpu, healthy=gpu.uuid not in sick, trouble=sick.get(gpu.uuid, ""))
                for gpu in server.gpus
            ),
        )
        for server in servers
    ]


def disk_check(folder: str, free_mib: int, server: str = "") -> Check:
    """Return the check of the free disk space of a folder that the pool writes to."""
    return graded(
        "disk",
        free_mib,
        "MiB",
        at_least=1024,
        fails_beyond=64,
        detail=f"{free_mib} MiB free for {folder}",
        advice="free disk space there; a pool that cannot write grants nothing",
        server=server,
    )


def _driver(reading: ServerReading, real: Sequence[GPU]) -> Iterator[Check]:
    if not reading.no_driver:
        yield Check(
            "driver",
            "ok",
            f"NVIDIA {reading.driver or '(unknown version)'}, CUDA {reading.cuda or 'unknown'}",
            server=reading.server,
        )
    elif real or reading.driver_expected:
        advice = "install the NVIDIA driver, or reboot that server if it was just updated; see nvidia-smi"
        yield Check("driver", "failing", reading.no_driver, advice=advice, server=reading.server)
    else:
        yield Check("driver", "unknown", reading.no_driver, server=reading.server)


def _gpu(gpu: GPUReading, reading: ServerReading, now: float) -> Iterator[Check]:
    about: dict[str, Any] = {"server": reading.server, "gpu": gpu.uuid}
    label = f"GPU {gpu.index}"
    never = "this GPU does not count memory errors"
    broken = gpu.remapping_failed
    yield graded(
        "ecc",
        gpu.uncorrected if not broken else max(1, gpu.uncorrected or 0),
        "errors",
        at_most=0,
        fails_beyond=0,
        detail=f"{label} has memory that could not be replaced"
        if broken
        else f"{label}: {gpu.uncorrected} double-bit errors since it was reset, {_shown(gpu.uncorrected_ever)} ever, "
        f"{_shown(gpu.corrected)} corrected",
        advice="have the GPU replaced"
        if broken
        else "nvidia-smi --gpu-reset when its leases have ended, or reboot",
        unknown=f"{label}: {never}",
        **about,
    )
    if gpu.needs_reset:
        detail = f"{label} has retired memory, which takes effect at its next reset"
        yield Check(
            "ecc pending", "warning", detail, advice="nvidia-smi --gpu-reset at a quiet time", **about
        )
    yield _xid(gpu, label, now, about)
    limit = gpu.slowdown_c
    yield graded(
        "temperature",
        gpu.temperature_c,
        "°C",
        at_most=None if not limit else float(limit - 5),
        detail=f"{label}: {gpu.temperature_c} °C" + (f", it slows down at {limit} °C" if limit else ""),
        advice="check the cooling of that server",
        unknown=f"{label} does not report its temperature",
        **about,
    )
    if gpu.throttled is None:
        yield Check("throttling", "unknown", f"{label} does not report what reduces its clocks", **about)
    elif [reason for reason in gpu.throttled if reason != "power cap"]:
        detail = f"{label} is slower than it could be: {', '.join(gpu.throttled)}"
        yield Check(
            "throttling",
            "warning",
            detail,
            advice="check the cooling and the power supply of that server",
            **about,
        )
    else:
        why = " (at its power cap)" if gpu.throttled else ""
        yield Check("throttling", "ok", f"{label}: full speed{why}", **about)


def _xid(gpu: GPUReading, label: str, now: float, about: Mapping[str, Any]) -> Check:
    fatal = [(n, at) for n, at in gpu.xids if n in FATAL_XIDS and now - at < QUARANTINE_S]
    if fatal:
        number, at = fatal[-1]
        return Check(
            "xid",
            "failing",
            f"{label}: XID {number}, {max(0.0, now - at):.0f} s ago: {FATAL_XIDS[number]}",
            float(number),
            advice=f"reset the GPU or reboot; it gets new slices {QUARANTINE_S / 3600:g} h after the last such error",
            **about,
        )
    if gpu.xids:
        number, at = gpu.xids[-1]
        detail = f"{label}: last XID {number}, {max(0.0, now - at):.0f} s ago, not the GPU's own fault or long past"
        return Check("xid", "ok", detail, float(number), **about)
    return Check("xid", "ok", f"{label}: no errors reported since the pool was started", **about)


def _layers(kind: str, layers: Mapping[str, str] | None, on: str, server: str) -> Iterator[Check]:
    """What workers lack of these layers is no fault: the kernel or the administrator has it so."""
    for layer, why in (layers or {}).items():
        yield Check(
            f"{kind} {layer}",
            "unknown" if why else "ok",
            f"off: {why}" if why else f"on: {on}",
            server=server,
        )


def _machine(reading: ServerReading, real: Sequence[GPU]) -> Iterator[Check]:
    server = reading.server
    memory, of_gpus = reading.memory_mib, _gpu_memory(reading, real)
    yield graded(
        "memory",
        round(memory / of_gpus, 2) if memory and of_gpus else None,
        "x GPU memory",
        at_least=MEMORY_PER_GPU_MEMORY,
        detail=f"{memory} MiB for GPUs with {of_gpus} MiB",
        advice=f"give that server {MEMORY_PER_GPU_MEMORY:g} times the memory of its GPUs, or offer fewer",
        unknown="no GPU here has memory of its own" if memory else "the machine does not report its memory",
        server=server,
    )
    free = None if not memory or reading.available_mib is None else 100.0 * reading.available_mib / memory
    yield graded(
        "memory available",
        None if free is None else round(free, 1),
        "%",
        at_least=10.0,
        fails_beyond=3.0,
        detail=f"{reading.available_mib} MiB available of {memory} MiB",
        advice="end other programs on that server; workers are killed when memory runs out",
        unknown="the machine does not report it",
        server=server,
    )
    for folder, mib in (reading.free_mib or {}).items():
        yield disk_check(folder, mib, server)
    limit, used = reading.open_files_limit, reading.open_files or 0
    least = max(1024, used * 5 // 4)
    yield graded(
        "open files",
        limit if limit is not None else 1 << 20,
        "files",
        at_least=least,
        fails_beyond=used + 32,
        detail=f"{used} open, {limit if limit is not None else 'any number'} allowed",
        advice="raise LimitNOFILE of the service, or ulimit -n, for example to 65536",
        server=server,
    )
    yield graded(
        "mtu",
        reading.mtu,
        "bytes",
        at_least=MIN_MTU,
        detail=f"{reading.interface} has {reading.mtu}"
        + ("; 9000 is better from 10 Gbit/s up" if (reading.mtu or 0) == MIN_MTU else ""),
        advice="look for a tunnel on the path; an MTU of 9000 bytes between clients and servers works best",
        unknown="the network interface towards the clients could not be determined",
        server=server,
    )
    yield graded(
        "link",
        None if reading.link_mbit is None else reading.link_mbit / 1000,
        "Gbit/s",
        at_least=BANDWIDTH_GBIT,
        detail=f"{reading.interface} has {(reading.link_mbit or 0) / 1000:g} Gbit/s",
        advice=f"{BANDWIDTH_GBIT:g} Gbit/s are recommended between clients and GPU servers",
        unknown="the network interface does not report its speed",
        server=server,
    )
    yield from _software(reading, real)


def _software(reading: ServerReading, real: Sequence[GPU]) -> Iterator[Check]:
    server = reading.server
    if not real:
        yield Check("mps", "unknown", "no NVIDIA GPUs here that would need it", server=server)
    elif reading.mps is None:
        yield Check("mps", "unknown", "not looked for", server=server)
    elif reading.mps:
        yield Check("mps", "ok", "CUDA's multi-process service runs", server=server)
    else:
        detail = (
            "CUDA's multi-process service does not run: leases on one GPU take turns instead of sharing it"
        )
        yield Check("mps", "warning", detail, advice="nvidia-cuda-mps-control -d", server=server)
    if reading.torch:
        yield Check("pytorch", "ok", f"PyTorch {reading.torch}", server=server)
    else:
        advice = "pip install 'jupyter_gpupool[torch]' on that server"
        yield Check(
            "pytorch",
            "failing",
            "PyTorch is not installed: no lease can compute",
            advice=advice,
            server=server,
        )
    if reading.clock_ahead_s is not None:
        yield graded(
            "clock",
            round(abs(reading.clock_ahead_s), 3),
            "s",
            at_most=1.0,
            fails_beyond=300.0,
            detail=f"{reading.clock_ahead_s:+.3f} s against the pool's clock",
            advice="synchronize that server's clock, for example with chrony",
            server=server,
        )


def _gpu_memory(reading: ServerReading, real: Sequence[GPU]) -> int:
    """Return the memory in MiB of the physical devices in the pool: NVML's values, else the pool's own."""
    known = {uuid: entry for entry in reading.gpus for uuid in entry.covers}
    devices = {known[gpu.uuid].uuid: known[gpu.uuid].memory_mib for gpu in real if gpu.uuid in known}
    lost = sum(gpu.memory_mib for gpu in real if gpu.uuid not in known)
    return sum(mib or 0 for mib in devices.values()) + lost


def _shown(count: int | None) -> str:
    return "an unknown number" if count is None else str(count)
