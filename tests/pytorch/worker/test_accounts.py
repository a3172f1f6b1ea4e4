"""Accounts of a slice's memory: exact however sessions take turns, and without a lock where one is alone."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.worker import accounts  # noqa: E402
from jupyter_gpupool.pytorch.worker.emulated_device import EmulatedDevice  # noqa: E402
from jupyter_gpupool.transport.specs import DeviceSpec  # noqa: E402

from ...support.watched_lock import WatchedLock  # noqa: E402

GRAIN = 512


def a_device(limit: int) -> EmulatedDevice:
    """A slice of so many grains."""
    device = EmulatedDevice(DeviceSpec(0, "GPU-0", "emulated", 1, 1000, True))
    device.limit = limit * GRAIN
    return device


class NoLock:
    def __enter__(self) -> None:
        pytest.fail("the lock was taken")

    def __exit__(self, *args: object) -> None:
        pass


def test_a_session_takes_and_gives_without_the_lock() -> None:
    device = a_device(100)
    account = device.join()
    account.take(GRAIN)
    device.lock = NoLock()  # type: ignore[assignment]
    for _ in range(5):
        account.take(10 * GRAIN)
    account.give(50 * GRAIN)
    account.give(GRAIN - 1)
    assert device.allocated == 0


@pytest.fixture(params=[1, 3, accounts.BLOCK_BYTES // GRAIN])
def block(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    from jupyter_gpupool.pytorch.worker import device

    monkeypatch.setattr(device, "BLOCK_BYTES", request.param * GRAIN)
    return int(request.param)


#: Who acts (two sessions, or the device itself), and how many grains it takes; a negative number gives.
ACTIONS = st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(-12, 12)), max_size=60)


@given(actions=ACTIONS, limit=st.integers(1, 30), size=st.sampled_from([1, 3, 1000]))
def test_a_slice_is_full_exactly_when_its_tensors_fill_it(actions: Any, limit: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        from jupyter_gpupool.pytorch.worker import device as module

        patch.setattr(module, "BLOCK_BYTES", size * GRAIN)
        device = a_device(limit)
        ends = [device.join(), device.join(), device]
        held = [0, 0, 0]
        for who, grains in actions:
            if grains <= 0:
                grains = min(-grains, held[who])
                ends[who].give(grains * GRAIN)
                held[who] -= grains
            elif sum(held) + grains <= limit:
                ends[who].take(grains * GRAIN)
                held[who] += grains
            else:
                with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
                    ends[who].take(grains * GRAIN)
            assert device.allocated == sum(held) * GRAIN
        device.leave(ends[0])  # type: ignore[arg-type]
        assert device._granted - ends[1].left == sum(held) * GRAIN  # type: ignore[union-attr]


def test_what_was_called_in_at_the_last_moment_is_not_taken_again() -> None:
    device = a_device(100)

    class CalledIn(accounts.Account):
        """Another thread, which began before ``inside`` was set, is done just when this one looks."""

        @property
        def closed(self) -> bool:
            device._granted -= self.left
            self.left = 0
            return False

        @closed.setter
        def closed(self, closed: bool) -> None:
            pass

    account = CalledIn(device)
    device._accounts.append(account)
    device.refill(account, GRAIN)
    assert account.left == 99 * GRAIN
    account.take(GRAIN)
    account.give(GRAIN)
    assert device.allocated == GRAIN


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("in_order", [True, False])
def test_threads_never_have_more_than_there_is(
    block: int, restless: None, monkeypatch: pytest.MonkeyPatch, in_order: bool
) -> None:
    monkeypatch.setattr(accounts, "_IN_ORDER", in_order)
    limit, rounds = 40, 3000
    device = a_device(limit)
    held, refused = [0] * 4, [0] * 4
    failures: list[str] = []

    def use(who: int) -> None:
        draw = random.Random(who)
        end: Any = device.join() if who < 3 else device
        for _ in range(rounds):
            grains = draw.randint(1, 20)
            try:
                end.take(grains * GRAIN)
            except torch.OutOfMemoryError:
                refused[who] += 1
                if held[who]:
                    gone, held[who] = held[who], 0
                    end.give(gone * GRAIN)
                continue
            held[who] += grains  # after it was taken, and less before it is given: never more than is taken
            if sum(held) > limit:
                failures.append(f"{held} of {limit}")
            if draw.random() < 0.5:
                held[who] -= grains
                end.give(grains * GRAIN)
        gone, held[who] = held[who], 0
        end.give(gone * GRAIN)
        if who < 3:
            device.leave(end)

    def look() -> None:
        while not done.is_set():
            with device.settled():
                before = device.allocated
                if before > limit * GRAIN:
                    failures.append(f"{before} bytes are taken")

    done = threading.Event()
    threads = [threading.Thread(target=use, args=(who,)) for who in range(4)]
    looking = threading.Thread(target=look)
    for thread in (*threads, looking):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    looking.join()
    assert not failures and device.allocated == device._granted == 0
    assert all(refused), "it was full at times, for everybody"


def test_while_a_slice_is_settled_nothing_is_taken(restless: None) -> None:
    device = a_device(1 << 20)
    account, stop = device.join(), threading.Event()

    def use() -> None:
        while not stop.is_set():
            account.take(GRAIN)
        device.leave(account)

    thread = threading.Thread(target=use)
    thread.start()
    for _ in range(50):
        with device.settled():
            before = device.in_use
            for _ in range(100):
                assert device.in_use == before
    stop.set()
    thread.join()


def test_what_is_used_is_read_while_no_session_gets_more_in_advance() -> None:
    device, lock = a_device(100), WatchedLock()
    account = device.join()

    def refill() -> None:
        device.refill(account, GRAIN)
        lock.asked.set()

    thread = threading.Thread(target=refill)

    class Accounts(list[Any]):
        """Another thread begins while they are added up."""

        def __iter__(self) -> Iterator[Any]:
            if not lock.asked.is_set():
                thread.start()
                assert lock.asked.wait(60)
            return super().__iter__()

    device.lock = lock  # type: ignore[assignment]
    device._accounts = Accounts(device._accounts)
    assert device.used() == 0
    thread.join(60)
    assert device.used() == GRAIN
