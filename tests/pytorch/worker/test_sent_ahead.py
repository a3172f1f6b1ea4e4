"""Memory is sent while its sessions go on: what was written or freed meanwhile is sent again, and nothing else is."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.protocol import commands as codes  # noqa: E402
from jupyter_gpupool.pytorch.worker import lease_state, state_stream  # noqa: E402
from jupyter_gpupool.pytorch.worker.devices import create_devices  # noqa: E402
from jupyter_gpupool.pytorch.worker.sent_ahead import SentAhead  # noqa: E402

from .test_lease_state import Workplace  # noqa: E402
from .test_residence import filled, parkable  # noqa: E402

#: Of one storage: two parts and a bit.
NBYTES = (8 << 20) + 5


def moved(place: Workplace, at: int, meanwhile: Callable[[], object]) -> tuple[int, int]:
    """Move a lease, and do something while the large part of that number is sent. Return the bytes ahead, and in all.

    What has arrived must be what was there.
    """
    stream, written = io.BytesIO(), 0

    def write(view: memoryview) -> None:
        nonlocal written
        stream.write(view)
        if len(view) == state_stream.PIECE_BYTES:
            written += 1
            if written == at:
                meanwhile()

    writer = state_stream.StateWriter(place.devices, write)
    ahead = SentAhead(place.residence)
    ahead.send(writer)
    place.residence.rest()
    session = place.sessions["a"]
    state, memories = lease_state.take(place.devices, [("a", session)], place.shared)
    there = ahead.finish(writer)
    for key, memory in memories.items():
        if key not in there:
            writer.memory(key, memory)
    writer.state(state)
    nbytes = stream.tell()
    stream.seek(0)
    devices = create_devices([d.spec for d in place.devices])
    _, arrived = state_stream.read_state(devices, stream.readinto)
    assert arrived.keys() == memories.keys()
    assert all(torch.equal(arrived[key].bytes, memory.bytes) for key, memory in memories.items())
    ahead.forget()
    place.residence.go_on()
    assert all(slot.copy is None for slot in session.storages.values()), "nothing is marked any more"
    return ahead.nbytes, nbytes


def three_storages() -> Workplace:
    place = parkable(chunks=0, memory_mib=25)  # there is no room for a fourth
    place.new_session("a")
    for id in (1, 2, 3):
        filled(place, id, NBYTES)
    return place


def test_what_nobody_uses_is_sent_once_while_sessions_could_go_on() -> None:
    ahead, nbytes = moved(three_storages(), 0, lambda: None)
    assert ahead == 3 * NBYTES
    assert nbytes < 3 * NBYTES + 100_000


@pytest.mark.parametrize("at", range(1, 7))
def test_what_is_written_meanwhile_is_sent_again(at: int) -> None:
    place = three_storages()
    content = torch.randint(0, 256, (NBYTES,), dtype=torch.uint8).numpy().tobytes()
    write = [2, [[NBYTES], [1], 0, "uint8", 0], content]
    _, nbytes = moved(place, at, lambda: place.run("a", codes.WRITE, *write))
    assert nbytes < 4 * NBYTES + 100_000, "the one that was written, and no other"


@pytest.mark.parametrize("at", range(1, 7))
def test_what_is_freed_meanwhile_makes_room_for_what_comes(at: int) -> None:
    place = three_storages()

    def free_and_fill() -> None:
        place.run("a", codes.FREE, 2)
        filled(place, 4, 100)
        filled(place, 5, NBYTES - 1000)

    moved(place, at, free_and_fill)
