"""A worker's whole state is taken out of it, travels as bytes, and goes on in a fresh worker as if nothing had been."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.protocol import commands as codes  # noqa: E402
from jupyter_gpupool.pytorch.worker import state_stream  # noqa: E402
from jupyter_gpupool.pytorch.worker.lease_state import BadState, LeaseState, Unparkable, put, take  # noqa: E402
from jupyter_gpupool.pytorch.worker.plain_form import checked, plain  # noqa: E402

from ...support.worker_programs import definitions, graph, program  # noqa: E402
from ...support.workplace import Workplace, restore  # noqa: E402


def elsewhere(place: Workplace) -> Workplace:
    """A fresh workplace that goes on from the stream of another one."""
    there = Workplace()
    there.answers = place.answers
    restore(place.stream(), there)
    return there


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32))
def test_a_program_goes_on_in_a_fresh_worker_after_any_command(seed: int) -> None:
    first, commands = program(random.Random(seed), 25)
    undisturbed, moved = Workplace(), Workplace()
    for place in (undisturbed, moved):
        for who in "ab":
            place.new_session(who)
        for command in first:
            place.run(*command)
    for command in commands:
        undisturbed.run(*command)
        moved.run(*command)
        moved = elsewhere(moved)
        assert moved.content() == undisturbed.content()
    assert moved.answers == undisturbed.answers
    refused = [a["message"] for a in undisturbed.answers if isinstance(a, dict) and "aten" in a["message"]]
    assert not refused, "every operator of the program exists"


def test_memory_that_two_storages_share_stays_shared() -> None:
    place = Workplace()
    place.new_session("a")
    place.run("a", codes.DEFINE_GRAPH, 0, graph(0))
    place.run("a", codes.ALLOCATE, 1, 24, 0)
    place.run("a", codes.CALL_GRAPH, 0, [1], [2, 3])
    there = elsewhere(place)
    one, two = (there.sessions["a"].storages[id].base for id in (2, 3))
    assert one.data_ptr() == two.data_ptr()
    place.run("a", codes.SEND_STORAGE, 1, b"n" * 16)
    there = elsewhere(place)
    there.new_session("b")
    there.run("b", codes.OPEN_STORAGE, b"n" * 16, 7)
    assert there.sessions["b"].storages[7].base.data_ptr() == there.sessions["a"].storages[1].base.data_ptr()
    for who, ids in (("a", (1, 2, 3)), ("b", (7,))):
        for id in ids:
            there.run(who, codes.FREE, id)
    assert [d.allocated for d in there.devices] == [0, 0]


def test_what_a_session_sent_before_it_ended_is_kept() -> None:
    place = Workplace()
    place.new_session("a")
    place.run("a", codes.ALLOCATE, 1, 24, 1)
    place.run("a", codes.SEND_STORAGE, 1, b"n" * 16)
    place.sessions.pop("a").close()
    there = elsewhere(place)
    assert [d.allocated for d in there.devices] == [0, 512]
    assert there.shared.reclaim(there.devices[1]), "nobody is left who could want it"
    assert [d.allocated for d in there.devices] == [0, 0]


def test_a_state_that_is_too_long_to_be_accepted_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Workplace()
    place.new_session("a")
    monkeypatch.setattr(state_stream, "MAX_DESCRIPTION_BYTES", 100)
    with pytest.raises(Unparkable, match="of which 100 could move"):
        place.stream()


def test_events_keep_their_times() -> None:
    place = Workplace()
    place.new_session("a")
    for id in (1, 2):
        place.run("a", codes.EVENT, id, 0)
    place.run("a", codes.ELAPSED, 1, 2)
    there = elsewhere(place)
    there.run("a", codes.ELAPSED, 1, 2)
    there.run("a", codes.EVENT, 3, 0)
    there.run("a", codes.ELAPSED, 2, 3)
    before, after, later = (header for _, header, _ in there.answers)
    assert after == pytest.approx(before, abs=1e-6)
    assert later > 0


def test_templates_before_the_last_reset_are_kept_with_the_others() -> None:
    place = Workplace()
    place.new_session("a")
    place.run("a", codes.ALLOCATE, 1, 24, 0)
    place.run("a", codes.DEFINE, 0, definitions(0)[2])
    place.run("a", codes.RESET)
    there = elsewhere(place)
    there.run("a", codes.DEFINE, 1, definitions(0)[2])
    there.run("a", 0, 1)
    there.run("a", 1, 1)


def test_a_stream_that_is_damaged_is_refused_before_it_is_trusted() -> None:
    place = Workplace()
    place.new_session("a")
    place.run("a", codes.ALLOCATE, 1, 24, 0)
    place.run("a", codes.SEND_STORAGE, 1, b"n" * 16)
    place.run("a", codes.GENERATOR, 2, 0, 1)
    whole_stream = place.stream()
    rng = random.Random(1)
    for k in range(300):
        damaged = bytearray(whole_stream)
        damaged[k % 60 if k < 60 else rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        there = Workplace()
        try:
            restore(bytes(damaged), there)
        except BadState:
            continue
        there.content()
    for length in range(0, len(whole_stream), 97):
        with pytest.raises(BadState):
            restore(whole_stream[:length], Workplace())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 1}, "version 1"),
        ({"torch": "1.0"}, "PyTorch 1.0"),
        ({"generators": []}, "0 devices"),
        ({"sessions": [["a", [[0, 7]], [], [], [], [], [], None]]}, "device 7 of 2"),
        ({"sessions": [["a", [[0, 0]], [[1, 0, 24, 5, [[6], [1], 0, "uint8"], None, None]], [], [], [], [], None]]},
         "was not sent"),
        ({"sessions": [["a", [[0, 0]], [[1, 0, 1 << 40, None, None, {}, None]], [], [], [], [], None]]},
         "out of memory"),
        ({"sessions": [["a", [[0, 0]], [], [[0, False, {"op": "aten::add"}]], [], [], [], None]]}, "definition"),
        ({"others": [["a", "jax", [[0, 0]], [], None]]}, "session of jax, which is not served"),
    ],
)  # fmt: skip
def test_a_description_is_checked(change: dict[str, Any], why: str) -> None:
    place = Workplace()
    state, _ = take(place.devices, [], place.shared)
    fields = dict(zip(LeaseState.__dataclass_fields__, plain(state)), **change)
    with pytest.raises(BadState, match=f"(?i){why}"):
        put(list(fields.values()), {}, place.devices, place.shared, place.new_session)


def test_another_frameworks_session_is_on_devices_that_there_are() -> None:
    place = Workplace()
    state, _ = take(place.devices, [], place.shared)
    others = [["a", "jax", [[0, 7]], [], None]]
    fields = dict(zip(LeaseState.__dataclass_fields__, plain(state)), others=others)
    made: list[object] = []
    with pytest.raises(BadState, match="device 7 of 2"):
        put(list(fields.values()), {}, place.devices, place.shared, place.new_session, made.append)
    assert not made


def test_a_layout_outside_of_its_memory_is_refused() -> None:
    place = Workplace()
    place.new_session("a")
    place.run("a", codes.ALLOCATE, 1, 24, 0)
    state, memories = take(place.devices, [("a", place.sessions["a"])], place.shared)
    fields = msgpack.unpackb(msgpack.packb(plain(state)))
    fields[[*LeaseState.__dataclass_fields__].index("sessions")][0][2][0][4] = [[7], [4], 0, "uint8"]
    there = Workplace()
    with pytest.raises(BadState, match="on 24 bytes"):
        put(fields, memories, there.devices, there.shared, there.new_session)


def test_more_memory_than_a_slice_has_is_refused_before_it_is_allocated() -> None:
    place = Workplace()
    place.new_session("a")
    place.run("a", codes.ALLOCATE, 1, 32 << 20, 0)
    with pytest.raises(BadState, match="bytes more than device 0 has"):
        restore(place.stream(), Workplace(memory_mib=16))


def test_values_come_back_as_they_were() -> None:
    place = Workplace()
    state, _ = take(place.devices, [], place.shared)
    assert checked(LeaseState, msgpack.unpackb(msgpack.packb(plain(state)))) == state


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bool, torch.complex64, torch.bfloat16, torch.float8_e4m3fn]
)
def test_an_answer_keeps_its_memory(dtype: Any) -> None:
    """It is sent again when a connection breaks, and what was read may be gone by then."""
    place = Workplace()
    for make in (lambda x: x, lambda x: x.view(5, 8).t(), lambda x: x[:0]):
        source = make(torch.arange(40.0).to(dtype))
        expected = source.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        view = place.devices[0].download(source).wait()
        del source
        scratch = [torch.full((64,), 255, dtype=torch.uint8) for _ in range(200)]
        assert bytes(view) == expected
        del scratch
