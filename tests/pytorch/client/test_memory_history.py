"""``torch.cuda.memory._record_memory_history()``: what was allocated where, as PyTorch's viewer reads it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.cuda import _memory_viz as viewer


def allocate(n: int) -> torch.Tensor:
    return torch.ones(n, device="cuda")


def actions(snapshot: dict[str, Any], index: int = 0) -> list[str]:
    return [event["action"] for event in snapshot["device_traces"][index]]


def test_allocations_are_recorded_with_their_lines(attached: object) -> None:
    torch.cuda.memory._record_memory_history()
    kept = allocate(1 << 18)
    gone = allocate(256)
    del gone
    snapshot = torch.cuda.memory._snapshot()
    assert actions(snapshot) == ["alloc", "alloc", "free_requested", "free_completed", "snapshot"]
    assert actions(snapshot, 1) == ["snapshot"]
    first, second, freed = snapshot["device_traces"][0][:3]
    assert (first["size"], second["size"]) == (1 << 20, 1024)
    assert freed["addr"] == second["addr"]
    assert first["frames"][0]["name"] == "allocate"
    assert first["frames"][0]["filename"] == __file__
    assert first["frames"][0]["line"] == allocate.__code__.co_firstlineno + 1
    (segment,) = snapshot["segments"]
    assert (segment["address"], segment["total_size"], segment["segment_type"]) == (
        first["addr"],
        1 << 20,
        "large",
    )
    assert segment["blocks"][0]["frames"][0]["name"] == "allocate"
    assert torch.cuda.memory_snapshot()[0]["total_size"] == kept.nbytes


def test_pytorchs_viewer_reads_a_dumped_snapshot(attached: object, tmp_path: Path) -> None:
    before = allocate(1 << 10)
    torch.cuda.memory._record_memory_history(max_entries=100)
    net = torch.nn.Linear(64, 64).cuda()
    net(torch.ones(8, 64, device="cuda")).sum().backward()
    file = tmp_path / "snapshot.pickle"
    torch.cuda.memory._dump_snapshot(str(file))
    snapshot = pickle.loads(file.read_bytes())
    for page in (viewer.trace_plot(snapshot), viewer.segment_plot(snapshot)):
        assert "<html>" in page or "<script" in page
    assert f"{len(snapshot['device_traces'][0])} entries" in viewer.trace(snapshot)
    assert "segments:" in viewer.segsum(snapshot)
    reserved = sum(segment["total_size"] for segment in snapshot["segments"])
    assert reserved == torch.cuda.memory_allocated()
    assert [s for s in snapshot["segments"] if not s["frames"]][0]["total_size"] == before.nbytes


def test_what_is_recorded(attached: object) -> None:
    record, snapshot = torch.cuda.memory._record_memory_history, torch.cuda.memory._snapshot
    record("state")
    state = allocate(4)
    assert actions(snapshot()) == []
    assert snapshot()["segments"][0]["frames"]
    record(max_entries=2, context="alloc", skip_actions=["free_requested", "snapshot"])
    for _ in range(3):
        allocate(4)
    found = snapshot()["device_traces"][0]
    assert [event["action"] for event in found] == ["alloc", "free_completed"]
    assert found[0]["frames"]
    assert not found[1]["frames"]
    record(None)
    other = allocate(4)
    assert len(snapshot()["device_traces"][0]) == 2
    assert state.numel() == other.numel()
    with pytest.raises(ValueError, match="expected enabled to be None, 'state' or 'all'"):
        record("everything")


def test_memory_that_was_refused(start_worker: Callable) -> None:
    from jupyter_gpupool.pytorch.client import session

    session.activate(start_worker(memory_mib=8).spec)
    try:
        torch.cuda.memory._record_memory_history(True, trace_alloc_max_entries=10)
        with pytest.raises(torch.OutOfMemoryError):
            allocate(1 << 22)
        event = torch.cuda.memory._snapshot()["device_traces"][0][0]
        assert (event["action"], event["size"], event["device_free"]) == ("oom", 16 << 20, 8 << 20)
    finally:
        session.deactivate()
