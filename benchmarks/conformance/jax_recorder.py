"""A plugin of pytest: takes a sample of JAX's own tests, and writes what became of each as soon as it is known.

Loaded by :mod:`.jax_suite` as ``-p benchmarks.conformance.jax_recorder``; reads what is set there in the environment.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest

#: The file of the record, a line of JSON for each test; the share of the tests that is taken; and how many slices are
#: leased, 0 for the CPU.
RECORD, SHARE, SLICES = "JAX_SUITE_RECORD", "JAX_SUITE_SHARE", "JAX_SUITE_SLICES"

_lease: Any = None


def pytest_configure(config: pytest.Config) -> None:
    global _lease
    count = int(os.environ[SLICES])
    if count:
        import jupyter_gpupool

        _lease = jupyter_gpupool.attach(num_gpus=count, partial=0.5)
    import jax

    # From now on a test's module cannot ask for more devices of the CPU.
    devices = jax.devices()
    if any(("emulated" in device.device_kind) is not bool(count) for device in devices):
        raise pytest.UsageError(f"the tests would run on {devices}")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _lease is not None:
        _lease.release()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    share = float(os.environ[SHARE])
    done = {json.loads(line)[0] for line in _record().read_text().splitlines()}
    items[:] = [item for item in items if item.name not in done and is_taken(item.name, share)]


def is_taken(name: str, share: float) -> bool:
    """Whether a test is in the sample: the same ones on every machine."""
    return zlib.crc32(name.encode()) % 1000 < 1000 * share


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(nodeid.rpartition("::")[2], "begun", "")


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        why = ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = " ".join(str(getattr(crash, "message", report.longrepr)).split())[:600]
        _write(report.nodeid.rpartition("::")[2], report.outcome, why)


def _record() -> Path:
    return Path(os.environ[RECORD])


def _write(name: str, outcome: str, why: str) -> None:
    with _record().open("a") as file:
        file.write(json.dumps([name, outcome, why]) + "\n")
