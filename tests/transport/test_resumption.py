"""Each frame is acted on once and in order, however connections are lost, held up and overtaken."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jupyter_gpupool.transport import resumption
from jupyter_gpupool.transport.resumption import BadNumbers, ClientEnd, Frame, Numbers, WorkerEnd

from ..conftest import often

WINDOW = 1000


@dataclass
class Wire:
    """A connection: what is under way in each direction. The client may have given it up already."""

    generation: int
    received: int
    up: list[Frame] = field(default_factory=list)
    down: list[Frame | int] = field(default_factory=list)
    #: whether the worker has accepted it, and reads it
    admitted: bool = False
    welcome: dict[str, int] | None = None


class Sessions(RuleBasedStateMachine):
    """A client that sends numbered work, and a worker that answers each piece, over connections that fail."""

    @initialize()
    def start(self) -> None:
        self.client, self.worker = ClientEnd("0" * 32), WorkerEnd("0" * 32)
        self.wires: list[Wire] = []
        self.current: Wire | None = None
        self.inbox: list[bytes] = []
        self.executed: list[bytes] = []
        self.answered: list[bytes] = []
        self.asked = 0

    # -- the client

    @precondition(lambda self: self.client.has_room(WINDOW))
    @rule()
    def ask(self) -> None:
        self.asked += 1
        frame = Frame(b"%d" % self.asked)
        self.client.keep(frame)
        self.client.keep(frame)  # an interrupted call sends it again
        if self.current is not None and self.current.welcome is not None:
            self.current.up.append(frame)

    @rule()
    def connect(self) -> None:
        fields = self.client.hello()
        self.current = Wire(fields["generation"], fields["received"])
        self.wires.append(self.current)

    @precondition(lambda self: self.current is not None)
    @rule()
    def give_up(self) -> None:
        self.current = None  # what is under way may still arrive

    @precondition(lambda self: self.current and self.current.welcome is None and self.current.admitted)
    @rule()
    def hear_the_welcome(self) -> None:
        wire = self.current
        welcome = wire.down.pop(0)
        wire.welcome = welcome
        wire.up.extend(self.client.welcomed(welcome))

    @precondition(lambda self: self.current and self.current.welcome is not None and self.current.down)
    @rule()
    def hear(self) -> None:
        thing = self.current.down.pop(0)
        if isinstance(thing, Frame):
            self.answered.append(thing.head)
            self.client.take(thing.nbytes)
        else:
            self.client.acknowledge(thing)

    @precondition(lambda self: self.current and self.current.welcome is not None and self.client.owes)
    @rule()
    def acknowledge(self) -> None:
        self.client.acknowledged_up_to(self.client.done)
        self.current.up.append(self.client.done)

    # -- the worker

    @precondition(lambda self: any(not wire.admitted for wire in self.wires))
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        """Hellos may overtake each other."""
        wire = data.draw(st.sampled_from([wire for wire in self.wires if not wire.admitted]))
        before = self.worker.numbers()
        try:
            welcome = self.worker.resume(wire.generation, wire.received)
        except BadNumbers:
            assert wire.generation <= before.generation
            assert self.worker.numbers() == before
            self.wires.remove(wire)
            if self.current is wire:
                self.current = None
            return
        wire.admitted = True
        wire.down = [welcome, *self.worker.after(wire.received)]
        self.wires = [one for one in self.wires if one is wire or not one.admitted]

    def served(self) -> Wire | None:
        return next((wire for wire in self.wires if wire.admitted), None)

    @precondition(lambda self: self.served() and self.served().up)
    @rule()
    def arrive(self) -> None:
        thing = self.served().up.pop(0)
        if isinstance(thing, Frame):
            self.inbox.append(thing.head)
            self.worker.received += 1
        else:
            self.worker.acknowledge(thing)

    @precondition(lambda self: self.inbox)
    @rule(tells=st.booleans())
    def execute(self, tells: bool) -> None:
        work = self.inbox.pop(0)
        self.executed.append(work)
        answer = Frame(work)
        self.worker.keep(answer)
        self.worker.finish(answer.nbytes)
        wire = self.served()
        if wire is not None:
            wire.down.append(answer)
            if tells:
                self.worker.acknowledged_up_to(self.worker.done)
                wire.down.append(self.worker.done)

    @precondition(lambda self: self.served())
    @rule(kept_up=st.integers(0, 3), kept_down=st.integers(0, 3))
    def cut(self, kept_up: int, kept_down: int) -> None:
        """A part of what is under way arrives, the rest does not."""
        wire = self.served()
        del wire.up[kept_up:], wire.down[kept_down:]
        for _ in range(len(wire.up)):
            self.arrive()
        self.wires.remove(wire)
        if wire is self.current:
            while wire.down:
                self.hear() if wire.welcome is not None else self.hear_the_welcome()
            self.current = None

    @rule()
    def restart_both_ends_from_their_numbers(self) -> None:
        """As a session that was parked, or moved to another worker, goes on."""
        self.wires, self.current = [], None
        kept = list(self.worker.kept)
        self.worker.received -= len(self.inbox)  # a worker stops between two frames, and reads the rest again
        self.inbox = []
        numbers = Numbers.from_json(self.worker.numbers().to_json())
        self.worker = WorkerEnd(self.worker.id, numbers, kept)

    # -- what must hold

    @invariant()
    def once_and_in_order(self) -> None:
        assert self.executed == [b"%d" % n for n in range(1, len(self.executed) + 1)]
        assert self.answered == [b"%d" % n for n in range(1, len(self.answered) + 1)]
        assert self.client.kept_bytes == sum(frame.nbytes for frame in self.client.kept) <= WINDOW + 10

    def teardown(self) -> None:
        """However it went: one undisturbed connection brings everything home."""
        if not hasattr(self, "client"):
            return
        self.connect()
        wire = self.current
        self.wires = [wire]
        wire.down = [self.worker.resume(wire.generation, wire.received)]
        wire.down += self.worker.after(wire.received)
        wire.admitted = True
        self.hear_the_welcome()
        while wire.up or wire.down or self.inbox:
            if wire.up:
                self.arrive()
            elif self.inbox:
                self.execute(tells=True)
            else:
                self.hear()
        assert len(self.executed) == len(self.answered) == self.asked
        assert not self.client.kept


Sessions.TestCase.settings = settings(
    max_examples=often(60, 3000), stateful_step_count=often(40, 100), deadline=None
)
TestSessions = pytest.mark.soak(Sessions.TestCase)


anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4)
)


@pytest.mark.soak
@settings(max_examples=often(200, 5000), deadline=None)
@given(generation=anything | st.integers(-1, 5), received=anything | st.integers(-1, 9))
def test_no_hello_brings_a_worker_out_of_step(generation: object, received: object) -> None:
    """Six answers were sent, of which the client has acknowledged four."""
    kept = [Frame(b"x") for _ in range(2)]
    for number, frame in enumerate(kept, 5):
        frame.number = number
    end = WorkerEnd("0" * 32, Numbers(generation=2, sent=6, acknowledged=4, received=9, done=8), kept)
    before = end.numbers()
    valid = (
        type(generation) is int and 2 < generation < 1 << 63 and type(received) is int and 4 <= received <= 6
    )
    if valid:
        assert end.resume(generation, received) == {"received": 9, "done": 8}
        assert [frame.number for frame in end.after(received)] == list(range(received + 1, 7))
        return
    with pytest.raises(BadNumbers, match=r"\w+ \w+ \w+"):
        end.resume(generation, received)
    assert end.numbers() == before


@pytest.mark.parametrize(
    ("welcome", "reason"),
    [
        ({}, "'received' must be a number, and is None"),
        ({"received": 4, "done": 0}, "has received 4 frames, and of 3"),
        ({"received": 0, "done": 0}, "it has acknowledged 1"),
        ({"received": 2, "done": 3}, "acted on 3 frames, and received 2"),
        ({"received": True, "done": 0}, "must be a number"),
    ],
)
def test_a_client_believes_no_welcome_that_cannot_be(welcome: dict, reason: str) -> None:
    end = ClientEnd()
    for _ in range(3):
        end.keep(Frame(b"x"))
    end.acknowledge(1)
    with pytest.raises(BadNumbers, match=reason):
        end.welcomed(welcome)
    assert [frame.number for frame in end.welcomed({"received": 2, "done": 1})] == [3]


def test_what_is_acknowledged_was_sent() -> None:
    end = ClientEnd()
    end.keep(Frame(b"x"))
    with pytest.raises(BadNumbers, match="frame 2 is acknowledged, and 1 were sent"):
        end.acknowledge(2)


def test_the_window_bounds_bytes_and_frames_but_takes_any_one_frame() -> None:
    end = ClientEnd()
    end.keep(Frame(b"x" * (WINDOW - 1)))
    assert end.has_room(WINDOW)
    end.keep(Frame(b"x" * 5 * WINDOW))
    assert not end.has_room(WINDOW)
    end.acknowledge(2)
    for _ in range(resumption.MAX_KEPT_FRAMES):
        assert end.has_room(WINDOW)
        end.keep(Frame(b""))
    assert not end.has_room(WINDOW)
    end.acknowledge(3)
    assert end.has_room(WINDOW)


def test_an_end_acknowledges_after_so_many_frames_or_bytes() -> None:
    end = WorkerEnd()
    for _ in range(resumption.ACKNOWLEDGE_FRAMES - 1):
        end.finish(1)
    assert end.owes
    assert not end.must_acknowledge
    end.finish(1)
    assert end.must_acknowledge
    end.acknowledged_up_to(end.done)
    assert not end.owes
    end.finish(resumption.ACKNOWLEDGE_BYTES)
    assert end.must_acknowledge


@pytest.mark.parametrize(
    "numbers", [{"sent": 1, "acknowledged": 2}, {"done": 1}, {"sent": -1}, {"sent": "1"}, {"wrong": 1}]
)
def test_numbers_that_no_session_has_reached(numbers: dict) -> None:
    with pytest.raises(BadNumbers):
        Numbers.from_json(numbers)
