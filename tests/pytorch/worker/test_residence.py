"""A worker's memory is parked in host memory and comes back, and the sessions get the same numbers as without."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

numpy = pytest.importorskip("numpy", reason="the data plane needs PyTorch")
torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.protocol import commands as codes  # noqa: E402
from jupyter_gpupool.pytorch.worker import lease_state  # noqa: E402
from jupyter_gpupool.pytorch.worker.arena_memory import ArenaFull, ArenaMemory, Extents  # noqa: E402
from jupyter_gpupool.pytorch.worker.gate import Gate, needs_memory  # noqa: E402
from jupyter_gpupool.pytorch.worker.graph_fusion import while_nothing_is_compiled  # noqa: E402
from jupyter_gpupool.pytorch.worker.other_frameworks import OtherSession  # noqa: E402
from jupyter_gpupool.pytorch.worker.residence import CannotPark, Residence  # noqa: E402
from jupyter_gpupool.pytorch.worker.sent_ahead import SentAhead  # noqa: E402
from jupyter_gpupool.pytorch.worker.state_stream import StateWriter  # noqa: E402
from jupyter_gpupool.pytorch.worker.templates import Template  # noqa: E402

from ...support.worker_programs import definition, program  # noqa: E402
from ...support.workplace import Workplace  # noqa: E402


def chunk(nbytes: int) -> int:
    descriptor = os.memfd_create("arena of a test")
    os.ftruncate(descriptor, nbytes)
    return descriptor


def parkable(chunks: int = 4, nbytes: int = 1 << 20, memory_mib: int = 64) -> Workplace:
    place = Workplace(memory_mib)
    place.residence = Residence(lambda: place.devices, place.shared)
    for _ in range(chunks):
        place.residence.arena.add_chunk(chunk(nbytes))
    return place


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_a_program_does_not_notice_that_it_was_parked(seed: int) -> None:
    first, commands = program(random.Random(seed), 25)
    undisturbed, parked = Workplace(), parkable(chunks=8, nbytes=4096)
    for place in (undisturbed, parked):
        for who in "ab":
            place.new_session(who)
        for command in first:
            place.run(*command)
    rng = random.Random(seed)
    for command in commands:
        undisturbed.run(*command)
        what = rng.randrange(4)
        if what == 1:
            parked.residence.park()
        elif what == 2:
            parked.residence.clean()
        if parked.residence.gate.parked:
            parked.residence.resume()
        parked.run(*command)
        parked.residence.until_resident()
        assert parked.content() == undisturbed.content()
    assert parked.answers == undisturbed.answers


def filled(place: Workplace, id: int, nbytes: int = 4 << 20, device: int = 0) -> torch.Tensor:
    content = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    place.run("a", codes.ALLOCATE, id, nbytes, device)
    place.run("a", codes.WRITE, id, [[nbytes], [1], 0, "uint8", device], content.numpy().tobytes())
    return content


def test_memory_is_let_go_and_comes_back_when_it_is_used(eventually: Callable[..., Any]) -> None:
    place = parkable(9)
    place.new_session("a")
    contents = {id: filled(place, id) for id in (1, 2)}
    allocated = [d.allocated for d in place.devices]
    assert place.residence.park() >= 8 << 20
    slots = place.sessions["a"].storages
    assert all(slot.base is None for slot in slots.values())
    assert [d.allocated for d in place.devices] == allocated, "its limit still counts what it has"
    wanted = threading.Event()
    place.residence.gate.on_wanted = wanted.set
    read = threading.Thread(target=place.run, args=("a", codes.READ, 1, [[1 << 22], [1], 0, "uint8", 0]))
    read.start()
    assert wanted.wait(300), "a command that needs memory asks for it"
    place.residence.resume()
    read.join()
    assert place.answers[-1][2] == contents[1].numpy().tobytes()
    place.residence.until_resident()
    assert all(torch.equal(slots[id].base, contents[id]) for id in slots)


def test_a_frame_that_waits_asks_again_if_its_memory_has_gone_again() -> None:
    gate = Gate()
    asked = threading.Semaphore(0)
    gate.on_wanted = asked.release
    gate.open(parked=True)
    frame = threading.Thread(target=gate.enter)
    frame.start()
    asked.acquire()
    with gate._lock:  # here and gone before the frame could go in
        gate.parked = False
        gate._parks += 1
        gate.parked = True
        gate._changed.notify_all()
    asked.acquire()
    gate.open(parked=False)
    frame.join()


def test_a_question_that_comes_while_memory_is_let_go_wakes_nothing(eventually: Callable[..., Any]) -> None:
    gate = Gate()
    gate.on_wanted = lambda: pytest.fail("it needs no memory")
    assert gate.close(60)
    question = threading.Thread(target=gate.enter, args=([codes.FREE, 1],))
    question.start()
    eventually(lambda: gate._changed._waiters, "it waits")  # type: ignore[attr-defined]
    gate.open(parked=True)
    question.join()
    assert not gate.uses


def test_questions_do_not_wake_what_is_parked() -> None:
    place = parkable()
    place.new_session("a")
    filled(place, 1, 1 << 20)
    filled(place, 2, 1 << 20)
    place.residence.gate.on_wanted = lambda: pytest.fail("nothing needs memory")
    place.run("a", codes.EVENT, 5, 0)
    place.residence.park()
    place.run("a", codes.FREE, 2, codes.MEMORY, 0, codes.WAIT, -1, codes.READINGS, 0, codes.DONE, 5)
    place.run("a", codes.GET_RNG, -1)
    assert ("a", 1 << 20, None) in place.answers
    place.sessions.pop("a").close()
    assert [d.allocated for d in place.devices] == [0, 0]


def test_what_may_use_memory_wakes() -> None:
    harmless = {codes.FREE, codes.WAIT, codes.GET_RNG, codes.DONE, codes.AWAIT, codes.ELAPSED, codes.MEMORY}
    harmless |= {codes.PROPERTIES, codes.READINGS, codes.TRACE, codes.GRAPHS}
    for code, width in codes.FIELDS.items():
        assert needs_memory([code, *[0] * width]) == (code not in harmless)
    assert needs_memory([codes.FREE, 1, 0, 1, 2])
    assert needs_memory("nonsense")


def test_only_what_was_written_is_copied_again() -> None:
    place = parkable(chunks=6)
    place.new_session("a")
    for id in (1, 2, 3):
        filled(place, id, 1 << 20)
    assert place.residence.clean()
    assert place.residence.is_clean
    copies = {id: place.sessions["a"].storages[id].copy for id in (1, 2, 3)}
    place.run(
        "a",
        codes.DEFINE,
        0,
        definition("aten::bitwise_not_.default", [["t", 0, [[9], [1], 0, "uint8", 0]]], None, 1),
    )
    place.run("a", 0, 2)
    assert not place.residence.is_clean
    assert [copies[id].valid for id in (1, 2, 3)] == [True, False, True]
    place.residence.park()
    assert [place.sessions["a"].storages[id].copy is copies[id] for id in (1, 2, 3)] == [True, False, True]


def test_a_copy_that_is_out_of_date_makes_room_for_the_next() -> None:
    place = parkable(chunks=1)
    place.new_session("a")
    for _ in range(3):
        content = filled(place, 1, 1 << 20)
        place.residence.park()
        place.residence.resume()
        place.residence.until_resident()
        place.run("a", codes.WRITE, 1, [[1], [1], 0, "uint8", 0], bytes([7]))
        assert place.sessions["a"].storages[1].base[0] == 7
        assert torch.equal(place.sessions["a"].storages[1].base[1:], content[1:])
        place.residence.park()
        place.residence.resume()
        place.run("a", codes.FREE, 1)


def test_without_room_nothing_changes() -> None:
    place = parkable(chunks=1)
    place.new_session("a")
    content = filled(place, 1, 2 << 20)
    with pytest.raises(CannotPark, match="host memory for it does not suffice"):
        place.residence.park()
    assert torch.equal(place.sessions["a"].storages[1].base, content)
    place.run("a", codes.READ, 1, [[1], [1], 0, "uint8", 0])


def test_chunks_are_given_back_and_others_used_later() -> None:
    place = parkable(chunks=2)
    place.new_session("a")
    content = filled(place, 1, 1 << 20)
    assert place.residence.clean()
    place.residence.forget()
    assert place.residence.arena.total == 0
    assert not place.residence.is_clean
    place.residence.arena.add_chunk(chunk(2 << 20))
    place.residence.park()
    with pytest.raises(CannotPark):
        place.residence.forget()
    place.residence.resume()
    place.residence.until_resident()
    assert torch.equal(place.sessions["a"].storages[1].base, content)


class Computing:
    """An array that is being computed until it is ``done``; it keeps how long each caller would wait."""

    device, nbytes = 0, 3

    def __init__(self) -> None:
        self.done = False
        self.waits: list[float] = []
        self.elements: Any = numpy.arange(3, dtype=numpy.uint8)

    def content(self, timeout_s: float) -> Any:
        now = time.monotonic()
        self.waits.append(timeout_s)
        while time.monotonic() == now:
            pass
        if not self.done:
            raise TimeoutError
        return self.elements

    def let_go(self, fetch: Callable[[], None]) -> None:
        self.elements = None

    def bring(self, content: Any) -> None:
        self.elements = content


class Arrays:
    """What executes a session of another framework that only has arrays."""

    def __init__(self, *arrays: Computing) -> None:
        self.arrays = dict(enumerate(arrays))

    def buffers(self) -> dict[int, Computing]:
        return self.arrays

    def describe(self) -> Any:
        return None


def test_only_parking_waits_for_what_is_being_computed() -> None:
    place, array = parkable(), Computing()
    OtherSession("jax", Arrays(array), place.residence, {0: place.devices[0]})  # type: ignore[arg-type]
    with pytest.raises(CannotPark, match="it computes"):
        place.residence.clean()
    with pytest.raises(CannotPark, match="it computes"):
        SentAhead(place.residence).send(StateWriter(place.devices, lambda view: None))
    place.residence.forget()  # needs no elements
    assert array.waits and not any(array.waits)
    with pytest.raises(CannotPark, match="it computes"):
        place.residence.park()
    assert array.waits[-1] > 0
    array.done = True
    place.residence.arena.add_chunk(chunk(1 << 20))
    assert place.residence.clean()
    place.residence.park()
    assert array.elements is None
    place.residence.resume()
    place.residence.until_resident()
    assert array.elements.tolist() == [0, 1, 2]


def test_arrays_that_are_being_computed_share_one_deadline() -> None:
    place, arrays = parkable(), [Computing() for _ in range(3)]
    session = OtherSession("jax", Arrays(*arrays), place.residence, {0: place.devices[0]})  # type: ignore[arg-type]
    for array in arrays:
        array.done = True
    place.residence.park()
    first, second, third = [max(array.waits) for array in arrays]
    assert first > second > third
    place.residence.resume()
    place.residence.until_resident()
    for array in arrays:
        array.waits.clear()
    lease_state.take(place.devices, [], place.shared, others=[("a", session)])
    first, second, third = [max(array.waits) for array in arrays]
    assert first > second > third


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5000)), max_size=60))
def test_places_are_never_given_twice(steps: list[tuple[bool, int]]) -> None:
    extents = Extents()
    for _ in range(3):
        extents.add_chunk(4096)
    taken: list[Any] = []
    for take, n in steps:
        if take:
            try:
                taken.append(extents.take(n))
            except ArenaFull:
                assert -(-n // 512) * 512 > extents.free
        elif taken:
            extents.give(taken.pop(n % len(taken)))
        places = sorted(place for one in taken for place in one)
        assert all(a[0] < b[0] or a[1] + a[2] <= b[1] for a, b in zip(places, places[1:]))
        assert extents.free + sum(length for *_, length in places) == extents.total == 3 * 4096


def test_a_chunk_is_a_whole_number_of_pages() -> None:
    with pytest.raises(OSError, match="a chunk of 100 bytes"):
        ArenaMemory().add_chunk(chunk(100))


def test_an_operator_marks_what_it_writes() -> None:
    place = Workplace()
    session = place.new_session("a")
    geom = [[2, 2], [2, 1], 0, "float32", 0]
    tensor = lambda k: ["t", k, geom]  # noqa: E731

    def writes(op: str, args: list[Any], n: int, **kwargs: Any) -> tuple[int, ...]:
        return Template(session, definition(op, args, None, n, **kwargs)).writes

    assert writes("aten::add.Tensor", [tensor(0), tensor(1)], 2) == ()
    assert writes("aten::add_.Tensor", [tensor(0), tensor(1)], 2) == (0,)
    assert writes("aten::add.out", [tensor(0), tensor(1)], 3, out=tensor(2)) == (2,)
    lists = [["l", [tensor(0), tensor(1)]], ["l", [tensor(2), tensor(3)]]]
    assert writes("aten::_foreach_add_.List", lists, 4) == (0, 1)
    statistics = [tensor(0), None, None, tensor(1), tensor(2), True, 0, 0]
    assert set(writes("aten::native_batch_norm.default", statistics, 3)) >= {1, 2}


def test_what_is_parked_is_cleared_before_any_frame_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    place = parkable()
    place.new_session("a")
    cleared = []

    def clear_memory(only_unused: bool) -> None:
        cleared.append((only_unused, place.residence.gate.close(0.0)))

    monkeypatch.setattr(place.devices[0], "clear_memory", clear_memory)
    place.residence.park()
    assert cleared == [(True, False)], "the gate is closed meanwhile"
    place.residence.resume()


def test_memory_that_cannot_be_cleared_is_parked_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = parkable()
    place.new_session("a")

    def clear_memory(only_unused: bool) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(place.devices[0], "clear_memory", clear_memory)
    place.residence.park()
    assert place.residence.gate.parked and "is not cleared by its worker" in caplog.text
    place.residence.resume()


def test_at_its_end_a_worker_clears_all_once_no_frame_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    place = parkable()
    place.new_session("a")
    cleared: list[bool] = []
    monkeypatch.setattr(place.devices[0], "clear_memory", cleared.append)
    place.residence.gate.enter()
    assert not place.residence.clear(0.0) and not cleared, "a frame still uses it"
    place.residence.gate.leave()
    assert place.residence.clear(0.0) and cleared == [False]
    assert not place.residence.gate.close(0.0), "no frame runs any more"


def test_a_worker_whose_lease_has_moved_clears_all(monkeypatch: pytest.MonkeyPatch) -> None:
    place = parkable()
    place.new_session("a")
    cleared: list[bool] = []
    monkeypatch.setattr(place.devices[0], "clear_memory", cleared.append)
    place.residence.rest()
    assert place.residence.clear(0.0) and cleared == [False]


def test_nothing_is_cleared_while_a_graph_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    place = parkable()
    place.new_session("a")
    cleared: list[bool] = []
    monkeypatch.setattr(place.devices[0], "clear_memory", cleared.append)
    with while_nothing_is_compiled() as quiet:  # as a compilation holds it
        assert quiet and not place.residence.clear(0.0) and not cleared
