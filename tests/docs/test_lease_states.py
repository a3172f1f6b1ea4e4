"""The page on the life of a lease names every state and exactly the transitions that the manager makes."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from jupyter_gpupool.core.engine import WorkerState
from jupyter_gpupool.core.models import Change, Lease, LeaseState, Reclaim, Request, Server, WorkerAddress
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.reclaim import ReclaimPolicy

DOCS = Path(__file__).parents[2] / "docs"
Transition = tuple[LeaseState | None, LeaseState]


class RecordedManager:
    """A manager over two GPUs, and the transitions that it has made."""

    def __init__(self, path: Path) -> None:
        self.now = 1_000_000.0
        self.ledger = Ledger(f"sqlite:///{path}")
        self.manager = Manager(
            self.ledger,
            lambda: self.now,
            reclaim=ReclaimPolicy(Reclaim.IDLE, after_s=1.0, min_resident_s=0.0),
        )
        self.manager.set_servers([Server("one", "127.0.0.1", emulated_gpus("one"))])
        self.made: set[Transition] = set()
        self._states: dict[str, LeaseState] = {}

    def note(self, change: Change) -> Lease | None:
        for lease in change.changed:
            self.made.add((self._states.get(lease.id), lease.state))
            self._states[lease.id] = lease.state
        return change.lease

    def request(self) -> str:
        request = Request(str(uuid.uuid4()), "ada", num_gpus=2, partial=1.0, secret_sha256="ab" * 32)
        self.note(self.manager.request(request))
        return request.id

    def active(self) -> str:
        lease = self.request()
        self.note(self.manager.worker_started(lease, WorkerAddress("127.0.0.1", 1, 2, 3.0)))
        return lease

    def parked(self) -> str:
        """A lease that was parked for another one, which is over."""
        lease = self.active()
        other = self.request()
        self.now += 2
        parks = self.manager.find_parks({lease: WorkerState(1)}, {"one": 1})
        assert parks is not None
        self.note(self.manager.park(parks, {lease: 1}))
        self.release(other)
        return lease

    def release(self, lease: str) -> None:
        self.note(self.manager.release(lease))

    def exit(self, lease: str, state: LeaseState) -> None:
        self.note(self.manager.worker_exited(lease, state, "its worker ended"))

    def wait(self) -> None:
        self.now += 1000
        self.note(self.manager.tick())


def queue_and_withdraw(pool: RecordedManager) -> None:
    pool.request()
    pool.release(pool.request())


def queue_and_be_granted(pool: RecordedManager) -> None:
    first = pool.request()
    pool.request()
    pool.release(first)


def never_get_a_worker(pool: RecordedManager) -> None:
    pool.request()
    pool.wait()


def fall_silent(pool: RecordedManager) -> None:
    pool.active()
    pool.wait()


def wake(pool: RecordedManager) -> None:
    pool.note(pool.manager.wake(pool.parked()))


STORIES: list[Callable[[RecordedManager], None]] = [
    queue_and_withdraw,
    queue_and_be_granted,
    never_get_a_worker,
    fall_silent,
    lambda pool: pool.release(pool.active()),
    wake,
    *(
        lambda pool, start=start, end=end: pool.exit(getattr(pool, start)(), end)
        for start in ("request", "active", "parked")
        for end in (LeaseState.RELEASED, LeaseState.EXPIRED, LeaseState.LOST)
    ),
]


def documented() -> set[Transition]:
    """The rows of the page's table."""
    page = (DOCS / "explanation" / "life-of-a-lease.md").read_text()
    rows = re.findall(r"^\| (?:`([A-Z]+)`|—) \| `([A-Z]+)` \|", page, re.M)
    return {(LeaseState[before] if before else None, LeaseState[after]) for before, after in rows}


def test_the_page_has_the_transitions_that_the_manager_makes(tmp_path: Path) -> None:
    made: set[Transition] = set()
    for number, story in enumerate(STORIES):
        pool = RecordedManager(tmp_path / f"{number}.sqlite")
        story(pool)
        made |= pool.made
        pool.ledger.close()
    assert made == documented()


def test_the_page_and_the_drawing_have_every_state() -> None:
    named = {state for transition in documented() for state in transition if state is not None}
    assert named == set(LeaseState)
    drawing = (DOCS / "_static" / "lease-states.svg").read_text()
    assert set(re.findall(r'class="state"[^>]*>(\w+)<', drawing)) == {state.value for state in named}


@pytest.mark.parametrize("state", [state for state in LeaseState if state.ended])
def test_an_end_is_final(state: LeaseState) -> None:
    assert not [transition for transition in documented() if transition[0] is state]
