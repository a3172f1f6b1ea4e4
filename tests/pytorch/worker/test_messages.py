"""Tensors that wait in a worker until another rank takes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from jupyter_gpupool.pytorch.protocol.commands import (  # noqa: E402
    ALLOCATE,
    ARRIVED,
    FREE,
    JOIN,
    POST,
    READ,
    TAKE,
    WITHDRAW,
    WRITE,
)
from jupyter_gpupool.pytorch.worker.emulated_device import EmulatedDevice  # noqa: E402
from jupyter_gpupool.pytorch.worker.executor import WorkerSession  # noqa: E402
from jupyter_gpupool.pytorch.worker.messages import Messages  # noqa: E402
from jupyter_gpupool.pytorch.worker.shared_storages import SharedStorages  # noqa: E402
from jupyter_gpupool.pytorch.worker.templates import BadRecord  # noqa: E402
from jupyter_gpupool.transport.specs import DeviceSpec  # noqa: E402

from .test_lease_state import elsewhere  # noqa: E402
from .test_residence import parkable  # noqa: E402

BOX, NAME = b"b" * 16, b"n" * 16
FOUR = [[4], [1], 0, "float32", 0]


class Rank:
    """A session with a storage of four floats, numbered 1."""

    def __init__(
        self, device: EmulatedDevice, shared: SharedStorages, messages: Messages, **elsewhere: Any
    ) -> None:
        self.answers: list[Any] = []
        self.complaints: list[dict[str, Any]] = []
        self.session = WorkerSession(
            [device],
            lambda header, copy: self.answers.append(copy.wait().tobytes() if copy else header),
            self.complaints.append,
            shared,
            messages=messages,
            **elsewhere,
        )
        self.session.run([ALLOCATE, 1, 16, 0])

    def write(self, *values: float) -> None:
        self.session.run([WRITE, 1, FOUR, torch.tensor(values, dtype=torch.float32).numpy().tobytes()])

    def join(self, box: bytes) -> None:
        self.session.run([JOIN, box])
        assert self.answers.pop() is None

    def post(self, name: bytes = NAME, box: bytes = BOX) -> None:
        self.session.run([POST, box, name, 1, FOUR])

    def take(self, timeout_s: float = 300.0, layout: Any = FOUR) -> None:
        self.session.run([TAKE, BOX, NAME, 1, layout, [0, 1], timeout_s])

    def values(self) -> list[float]:
        self.session.run([READ, 1, FOUR])
        return torch.frombuffer(bytearray(self.answers.pop()), dtype=torch.float32).tolist()

    def hears(self) -> str:
        return str(self.complaints.pop()["message"])


@pytest.fixture
def device() -> EmulatedDevice:
    return EmulatedDevice(DeviceSpec(0, "GPU-0", "emulated", 1, 1, True))


@pytest.fixture
def ranks(device: EmulatedDevice) -> tuple[Rank, Rank]:
    shared = SharedStorages()
    messages = Messages(shared)
    device.reclaim = lambda: shared.reclaim(device)
    return Rank(device, shared, messages), Rank(device, shared, messages)


def test_what_is_taken_is_what_was_sent_and_leaves_no_memory(ranks: Any, device: EmulatedDevice) -> None:
    sender, taker = ranks
    before = device.allocated
    sender.write(1, 2, 3, 4)
    sender.post()
    sender.write(5, 6, 7, 8)
    assert device.allocated > before
    taker.session.run([ARRIVED, BOX, NAME])
    assert taker.answers.pop() is True
    taker.take()
    assert taker.values() == [1, 2, 3, 4]
    assert device.allocated == before
    taker.session.run([ARRIVED, BOX, NAME])
    assert taker.answers.pop() is False


def test_what_its_sender_withdraws_leaves_no_memory(ranks: Any, device: EmulatedDevice) -> None:
    sender, other = ranks
    before = device.allocated
    sender.post()
    sender.post(name=b"m" * 16)
    with pytest.raises(BadRecord, match="another rank"):
        other.session.run([WITHDRAW, BOX, NAME])
    other.session.run([WITHDRAW, b"c" * 16, NAME])
    other.session.run([ARRIVED, BOX, NAME])
    assert other.answers.pop() is True, "nobody else withdraws it"
    sender.session.run([WITHDRAW, BOX, NAME, WITHDRAW, BOX, b"m" * 16, WITHDRAW, BOX, NAME])
    assert device.allocated == before
    other.session.run([ARRIVED, BOX, NAME])
    assert other.answers.pop() is False


def test_who_takes_waits_until_it_is_sent(ranks: Any) -> None:
    sender, taker = ranks
    sender.write(1, 2, 3, 4)
    waiting = threading.Thread(target=taker.take)
    waiting.start()
    sender.post()
    waiting.join()
    assert taker.values() == [1, 2, 3, 4]
    assert not taker.complaints


def test_who_sends_nothing_is_named(ranks: Any) -> None:
    taker = ranks[1]
    taker.take(timeout_s=0)
    assert taker.hears() == "rank 1 waited 0 s in recv for rank 0"


def test_who_has_ended_is_named_and_what_it_sent_before_arrives(
    ranks: Any, eventually: Callable[..., Any]
) -> None:
    sender, taker = ranks
    taker.join(b"c" * 16)
    sender.write(1, 2, 3, 4)
    sender.post()
    waiting = threading.Thread(
        target=taker.session.run, args=([TAKE, BOX, b"m" * 16, 1, FOUR, [0, 1], 600.0],)
    )
    waiting.start()
    sender.session.close()
    waiting.join()
    assert taker.hears() == "rank 0 has ended or left the lease"
    taker.take()
    assert taker.values() == [1, 2, 3, 4]


def test_what_nobody_takes_goes_with_the_last_rank(ranks: Any, device: EmulatedDevice) -> None:
    sender, other = ranks
    sender.post()
    other.post(box=b"c" * 16, name=b"m" * 16)
    sender.session.close()
    assert device.allocated == 3 * 512, "the other one may still take it"
    other.session.close()
    assert device.allocated == 0


def test_ranks_that_came_with_a_lease_take_what_others_sent_before_they_ended(
    device: EmulatedDevice,
) -> None:
    shared = SharedStorages()
    messages = Messages(shared)
    sender, taker = Rank(device, shared, messages), Rank(device, shared, messages)
    messages.come_from_elsewhere()
    sender.write(1, 2, 3, 4)
    sender.post()
    sender.session.close()
    taker.take()
    assert taker.values() == [1, 2, 3, 4]


def test_what_cannot_be_sent_fails_at_both_ranks(ranks: Any, device: EmulatedDevice) -> None:
    sender, taker = ranks
    before = device.allocated
    sender.session.run([FREE, 1, ALLOCATE, 2, 1 << 19, 0, ALLOCATE, 3, 1 << 18, 0])
    sender.session.run([POST, BOX, NAME, 2, [[1 << 17], [1], 0, "float32", 0]])
    assert "out of memory" in sender.hears()
    taker.take()
    assert taker.hears().startswith("rank 0 cannot send: CUDA out of memory")
    sender.session.run([FREE, 2, FREE, 3, ALLOCATE, 1, 16, 0])
    assert device.allocated == before


def test_a_tensor_that_does_not_fit_is_refused(ranks: Any) -> None:
    sender, taker = ranks
    sender.post()
    taker.take(layout=[[2], [1], 0, "float64", 0])
    assert taker.hears() == ("rank 0 sends 4 elements of torch.float32 to a tensor of 2 of torch.float64")


def test_nobody_sends_in_anothers_name(ranks: Any) -> None:
    sender, taker = ranks
    sender.post()
    with pytest.raises(BadRecord, match="another rank"):
        taker.post(name=b"m" * 16)
    for wrong in (
        [POST, b"short", NAME, 1, FOUR],
        [POST, b"c" * 16, "name", 1, FOUR],
        [ARRIVED, 1, 2],
        [WITHDRAW, BOX, 7],
    ):
        with pytest.raises(BadRecord):
            (sender if wrong[0] == WITHDRAW else taker).session.run(wrong)
    with pytest.raises(BadRecord):
        taker.session.run([TAKE, BOX, NAME, 1, FOUR, 7, 1.0])


@pytest.mark.parametrize("what", ["parked", "moved"])
def test_a_message_outlasts_that_its_lease_is_parked_or_moved(what: str) -> None:
    place = parkable()
    for who in "ab":
        place.new_session(who)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    place.run("a", ALLOCATE, 1, 16, 0, WRITE, 1, FOUR, values.numpy().tobytes(), POST, BOX, NAME, 1, FOUR)
    place.run("a", FREE, 1)
    if what == "parked":
        place.residence.park()
        place.residence.resume()
    else:
        place = elsewhere(place)
    place.run("b", ALLOCATE, 1, 16, 0, TAKE, BOX, NAME, 1, FOUR, [0, 1], 60.0, READ, 1, FOUR)
    assert place.answers == [("b", None, values.numpy().tobytes())]
    place.run("b", FREE, 1)
    assert place.devices[0].allocated == 0
