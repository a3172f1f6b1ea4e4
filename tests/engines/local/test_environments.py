"""Several releases of PyTorch on one GPU server: which one a lease gets, and how long its parent lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from traitlets import TraitError

from jupyter_gpupool.client.requests import new_request
from jupyter_gpupool.core import torch_release
from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.engines import environment_records as records
from jupyter_gpupool.engines.environment_records import OWN, EnvironmentRecord
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.engines.local.environment import Environment, fitting
from jupyter_gpupool.transport.lifeline import Lifeline

from ...support.other_release import OTHER, interpreter
from .test_engine import alive, attach_spec, granted, running

torch = pytest.importorskip("torch", reason="workers need PyTorch")

HERE = torch_release.release_of(torch.__version__)


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
    return interpreter(tmp_path)


def lease_of(release: str) -> Lease:
    lease = granted()
    return replace(lease, request=replace(lease.request, client=f"host:1{torch_release.mark(release)}"))


def is_of_other(pid: int) -> bool:
    return psutil.Process(pid).environ().get("OF_OTHER") == "yes"


def test_each_client_gets_its_release(tmp_path: Path, other: str, eventually: Callable) -> None:
    """Three clients at once; then the other environment's parent ends, and comes back when it is needed."""

    async def main() -> None:
        options = {"environments": {"other": other}, "environment_idle_s": 1.0, "attach_timeout_s": 600.0}
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
        async with running(tmp_path, environments={"other": other}, attach_timeout_s=600.0) as (engine, ends):
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

    async def main() -> str:
        pythons = {"missing": str(tmp_path / "missing"), "bare": str(bare)}
        engine = LocalEngine(run_dir=str(tmp_path / "run"), emulate="always", environments=pythons)
        engine.log.propagate = True
        await engine.start(lambda *_: None)
        try:
            return (await engine.start_worker(lease_of(OTHER))).environment
        finally:
            await engine.stop()

    assert asyncio.run(main()) == OWN
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


def test_what_is_recorded_while_the_engine_runs_is_taken_up(
    tmp_path: Path, other: str, eventually: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """The next lease gets it; once it changes, the next one gets a new parent; once it is removed, none does."""
    folder = str(tmp_path / "environments")

    async def main() -> None:
        options = {"environments_dir": folder, "environment_idle_s": 1.0, "attach_timeout_s": 600.0}
        async with running(tmp_path, **options) as (engine, _):
            engine.log.propagate = True
            engine.log.setLevel("INFO")
            workers = [await engine.start_worker(lease_of(OTHER))]
            records.write(folder, EnvironmentRecord("new", other))
            workers.append(await engine.start_worker(lease_of(OTHER)))
            records.write(folder, EnvironmentRecord("new", other, ("math/no_library::nothing",)))
            workers.append(await engine.start_worker(lease_of(OTHER)))
            records.remove(folder, "new")
            workers.append(await engine.start_worker(lease_of(OTHER)))
            assert [worker.environment for worker in workers] == [OWN, "new", "new", OWN]
            assert {worker.torch for worker in workers} == {HERE}, "what it has, not what it says it has"
            parents = [psutil.Process(worker.pid).ppid() for worker in workers]
            assert parents[0] == parents[3] and len(set(parents)) == 3
            assert all(alive(worker.pid) for worker in workers), "no lease suffers from a change"

    asyncio.run(main())
    assert f"The environment new has PyTorch {OTHER}" in caplog.text
    assert "no_library::nothing is allowed, and cannot be used: math has no such operator" in caplog.text
    assert "The environment new gets no more leases" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is not a record of an environment: "), ("{}", "names no interpreter"), ("[]", "not a record")],
)
def test_a_file_that_is_no_record_is_left_out(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "broken.json").write_text(content)
    records.write(str(tmp_path), EnvironmentRecord("good", "/bin/python", ("a::b",), ("torch==2.15.0",)))
    found, (trouble,) = records.read_all(str(tmp_path))
    assert list(found.values()) == [EnvironmentRecord("good", "/bin/python", ("a::b",), ("torch==2.15.0",))]
    assert "broken.json" in trouble and words in trouble and "\n" not in trouble


def test_an_operator_of_pytorch_cannot_be_configured(tmp_path: Path) -> None:
    for wrong in ("aten::add", "nms", "torchvision::nms.default", "a::b;c", ""):
        with pytest.raises(TraitError, match="operators"):
            LocalEngine(run_dir=str(tmp_path), operators={"default": [wrong]})
    engine = LocalEngine(run_dir=str(tmp_path), operators={"default": ["x::b", "m.n/x::a", "x::b"]})
    assert engine.operators == {"default": ["m.n/x::a", "x::b"]}
