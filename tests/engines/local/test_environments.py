"""Several releases of PyTorch on one GPU server: which one a lease gets, and how long its parent lives."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from jupyter_gpupool.client.requests import new_request
from jupyter_gpupool.core import torch_release
from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.engines.local.environments import OWN, Environment, fitting
from jupyter_gpupool.transport.lifeline import Lifeline

from .test_engine import alive, attach_spec, granted, running

torch = pytest.importorskip("torch", reason="workers need PyTorch")

HERE = torch_release.release_of(torch.__version__)
#: Says that it has this release, which no worker here has; in truth it is the tests' own.
OTHER = "2.99.1"


def environments(*releases: str) -> list[Environment]:
    return [
        Environment(OWN if not n else f"torch-{release}", "", release) for n, release in enumerate(releases)
    ]


@pytest.mark.parametrize(
    ("client", "chosen"),
    [
        ("2.13.0", "2.13.0"),
        ("2.14.1", "2.14.1"),
        ("2.14.0", "2.14.2"),  # the newest of its minor release
        ("2.11.0", "2.15.0"),  # the newest of all
        ("2.16.0", "2.15.0"),
        ("", "2.13.0"),  # a client that names none: the pool's own
    ],
)
def test_the_environment_that_fits_best(client: str, chosen: str) -> None:
    there = environments("2.13.0", "2.14.1", "2.15.0", "2.14.2")
    assert fitting(client, there).release == chosen


def test_of_equals_the_pools_own() -> None:
    assert fitting("2.13.0", environments("2.13.0", "2.13.0")).name == OWN
    assert fitting("2.12.0", environments("2.13.0", "2.13.0")).name == OWN


def test_a_request_says_its_release_and_a_frontend_still_finds_the_kernel() -> None:
    request, _ = new_request(kernel="0f3c-1")
    assert torch_release.marked(request.client) == HERE and request.client.endswith(" kernel:0f3c-1")
    assert torch_release.marked("host:12 kernel:torch:2.1.0") == ""
    assert torch_release.marked("host:12") == torch_release.marked("host:12 torch:none") == ""


@pytest.fixture
def other(tmp_path: Path) -> str:
    """An interpreter that is this one, and says that its PyTorch is of another release."""
    packages = tmp_path / "packages"
    about = packages / f"torch-{OTHER}.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {OTHER}+cu130\n")
    python = tmp_path / "python"
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH", "")]))
    python.write_text(f"#!/bin/sh\nPYTHONPATH='{path}' OF_OTHER=yes exec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    return str(python)


def lease_of(release: str) -> Lease:
    lease = granted()
    return replace(lease, request=replace(lease.request, client=f"host:1{torch_release.mark(release)}"))


def is_of_other(pid: int) -> bool:
    return psutil.Process(pid).environ().get("OF_OTHER") == "yes"


def test_each_client_gets_its_release(tmp_path: Path, other: str, eventually: Callable) -> None:
    """Three clients at once; then the other environment's parent ends, and comes back when it is needed."""

    async def main() -> None:
        options = {"environments": {"other": other}, "environment_idle_s": 1.0, "attach_timeout_s": 60.0}
        async with running(tmp_path, **options) as (engine, ends):
            leases = [lease_of(HERE), lease_of(OTHER), lease_of("")]
            workers = await asyncio.gather(*map(engine.start_worker, leases))
            assert [is_of_other(worker.pid) for worker in workers] == [False, True, False]
            lines = [Lifeline(attach_spec(*pair)) for pair in zip(leases, workers)]
            parent = psutil.Process(workers[1].pid).ppid()
            lines[1].release()
            await ends.of(leases[1])
            await asyncio.to_thread(eventually, lambda: not alive(parent), "its parent ends")
            assert alive(workers[0].pid) and alive(workers[2].pid) and lines[0].alive and lines[2].alive

            again = await engine.start_worker(lease_of(OTHER))
            assert is_of_other(again.pid)
            for line in (lines[0], lines[2]):
                line.release()

    asyncio.run(main())


def test_the_death_of_one_parent_is_no_matter_to_the_others(tmp_path: Path, other: str) -> None:
    async def main() -> None:
        async with running(tmp_path, environments={"other": other}, attach_timeout_s=60.0) as (engine, ends):
            here, there = lease_of(HERE), lease_of(OTHER)
            workers = [await engine.start_worker(lease) for lease in (here, there)]
            line = Lifeline(attach_spec(here, workers[0]))
            psutil.Process(psutil.Process(workers[1].pid).ppid()).kill()
            await ends.of(there)
            assert line.alive and alive(workers[0].pid)
            assert is_of_other((await engine.start_worker(lease_of(OTHER))).pid), "it is replaced"
            line.release()

    asyncio.run(main())


def test_an_environment_that_cannot_be_used_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = tmp_path / "bare"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)

    async def main() -> dict[str, str]:
        pythons = {"missing": str(tmp_path / "missing"), "bare": str(bare)}
        engine = LocalEngine(run_dir=str(tmp_path / "run"), emulate="always", environments=pythons)
        engine.log.propagate = True
        await engine.start(lambda *_: None)
        try:
            await engine.start_worker(lease_of(OTHER))
            return engine.releases
        finally:
            await engine.stop()

    assert asyncio.run(main()) == {OWN: HERE}
    assert "missing is left out" in caplog.text and "No such file or directory" in caplog.text
    assert f"bare is left out: {bare} has no PyTorch" in caplog.text


def test_an_environment_that_breaks_names_itself(tmp_path: Path, other: str) -> None:
    async def main() -> None:
        async with running(tmp_path, environments={"other": other}) as (engine, _):
            Path(other).write_text("#!/bin/sh\nexit 1\n")
            with pytest.raises(EngineError, match="environment other: "):
                await engine.start_worker(lease_of(OTHER))
            await engine.start_worker(lease_of(HERE))

    asyncio.run(main())
