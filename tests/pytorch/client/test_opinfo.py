"""A representative part of PyTorch's operator suite. `make soak` runs more, `make conformance` all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

torch = pytest.importorskip("torch", reason="the suite is PyTorch's")

from benchmarks.conformance import refusals  # noqa: E402
from benchmarks.conformance.cases import NotASample, cases, entries  # noqa: E402

from ...conftest import often  # noqa: E402

DEVICE = "gpupool:0"
#: Samples of an entry in one dtype, one way: in float32, and in the other dtypes.
MANY, FEW = often(1, 2), 1
#: Every so many entries are looked at in other ways than forward, and in all dtypes and all ways.
WAYS, STEP = often(3, 1), often(40, 20)


@pytest.fixture
def attached(start_worker: Callable) -> Iterator[None]:
    """One thread here and there, so that sums are made in the same order."""
    from jupyter_gpupool.pytorch.client import session

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    session.activate(start_worker(num_gpus=1, attach_timeout_s=36000.0).spec)
    yield
    session.deactivate()
    torch.set_num_threads(before)


def failures(found: Iterator) -> tuple[list[str], int]:
    failed, count = [], 0
    for case in found:
        refusal = refusals.REFUSALS.get(case.entry)
        if refusal is not None and refusal.covers(case.kind, case.dtype):
            continue
        try:
            case.check(DEVICE)
        except NotASample:
            continue
        except Exception as e:
            failed.append(
                f"{case.entry} {case.kind} {case.dtype} {case.index}: {type(e).__name__}: {e}"[:400]
            )
        count += 1
    return failed, count


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_every_entry_in_float32(attached: None, part: int) -> None:
    found = (case for e in entries()[part::4] for case in cases(e, ("forward",), {torch.float32}, MANY))
    failed, count = failures(found)
    assert not failed, "\n".join(failed)
    assert count > 150 * MANY


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["backward", "in place", "out", "not contiguous"])
def test_every_entry_in_other_ways(attached: None, kind: str) -> None:
    found = (case for e in entries()[::WAYS] for case in cases(e, (kind,), {torch.float32}, FEW))
    failed, count = failures(found)
    assert not failed, "\n".join(failed)
    assert count > 90 / WAYS


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_some_entries_in_every_dtype(attached: None) -> None:
    found = (case for e in entries()[::STEP] for case in cases(e, limit=FEW))
    failed, count = failures(found)
    assert not failed, "\n".join(failed)
    assert count > 10_000 / STEP


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["matmul", "linalg_lu_solve"])
def test_entries_whose_kernels_are_peculiar_with_out(attached: None, name: str) -> None:
    """One copies its output back into itself, one leaves it to be read as a conjugate."""
    (entry,) = (e for e in entries() if e.formatted_name == name)
    failed, count = failures(cases(entry, ("out",), {torch.float32, torch.complex128}))
    assert not failed, "\n".join(failed)
    assert count > 10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(refusals.REFUSALS))
def test_what_is_declared_as_refused_is_still_refused(attached: None, name: str) -> None:
    refusal = refusals.REFUSALS[name]
    (entry,) = (e for e in entries() if e.formatted_name == name)
    kinds = tuple(refusal.kinds) or ("forward",)
    for case in cases(entry, kinds):
        if not refusal.covers(case.kind, case.dtype):
            continue
        try:
            case.check(DEVICE)
        except NotASample:
            continue
        except Exception:
            return
    pytest.fail(f"every sample of {name} passes now: take it from the list ({refusal.reason})")
