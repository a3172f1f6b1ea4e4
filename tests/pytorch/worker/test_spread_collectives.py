"""Ranks of two and three workers: what each gets, and what becomes of a worker that sends what none sends."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from jupyter_gpupool.pytorch.worker import spread_collectives  # noqa: E402
from jupyter_gpupool.pytorch.worker.collectives import Call, Meetings, Part, compute  # noqa: E402
from jupyter_gpupool.pytorch.worker.exchange_plan import card_of, check, packed, unpacked  # noqa: E402
from jupyter_gpupool.pytorch.worker.peer_links import PeerLink  # noqa: E402
from jupyter_gpupool.pytorch.worker.spread_collectives import SpreadMeetings  # noqa: E402
from jupyter_gpupool.pytorch.worker.templates import BadRecord  # noqa: E402
from jupyter_gpupool.transport import frames  # noqa: E402

from ...conftest import often  # noqa: E402

GROUP = hashlib.sha256(b"a group").digest()[:16]
PATIENCE_S = 300.0


class Farm:
    """Workers that are linked to each other, as far as their ranks meet. ``where``: the worker of each rank."""

    def __init__(self, where: Sequence[int]) -> None:
        self.where = where
        self.workers = [SpreadMeetings() for _ in range(max(where) + 1)]
        self.links: dict[tuple[int, int], PeerLink] = {}
        self.lost: dict[tuple[int, int], str] = {}
        self.sessions = [object() for _ in where]
        self._threads: list[threading.Thread] = []
        for one, two in itertools.combinations(range(len(self.workers)), 2):
            ends = socket.socketpair()
            for (here, there), sock in zip(((one, two), (two, one)), ends):
                self.link(here, there, sock)
        for rank in range(len(where)):
            self.join(rank)

    def link(self, here: int, there: int, sock: socket.socket) -> None:
        meetings = self.workers[here]
        link = self.links[here, there] = PeerLink(f"worker {there}", sock, meetings.wake)

        def read() -> None:
            why = link.read(meetings.hear)
            self.lost[here, there] = why
            meetings.lose(link, why)

        self._threads.append(threading.Thread(target=read))
        self._threads[-1].start()

    def join(self, rank: int, group: bytes = GROUP) -> None:
        here = self.where[rank]
        links = [self.links.get((here, there)) for there in self.where]
        assert self.workers[here].spread(self.sessions[rank], group, rank, links) == ""

    def together(
        self,
        call: Call | Sequence[Call],
        parts: Sequence[Any],
        number: int = 0,
        timeouts_s: Sequence[float] = (),
        only: Sequence[int] | None = None,
    ) -> dict[int, Exception]:
        """What the ranks ``only`` (None: all) hear that take part at the same time, where they fail."""
        failures: dict[int, Exception] = {}

        def rank(r: int) -> None:
            called = call if isinstance(call, Call) else call[r]
            timeout_s = timeouts_s[r] if timeouts_s else PATIENCE_S
            place = (GROUP, len(self.where), r, number)
            try:
                self.workers[self.where[r]].meet(self.sessions[r], place, called, parts[r], timeout_s)
            except Exception as e:
                failures[r] = e

        ranks = range(len(self.where)) if only is None else only
        threads = [threading.Thread(target=rank, args=(r,)) for r in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return failures

    def close(self) -> None:
        for link in self.links.values():
            link.close("the test is over")
        self.until_lost()

    def until_lost(self) -> None:
        """Wait until every link has ended."""
        for thread in self._threads:
            thread.join()


@pytest.fixture
def farm(request: pytest.FixtureRequest) -> Iterator[Any]:
    with contextlib.ExitStack() as closing:

        def start(*where: int) -> Farm:
            made = Farm(where)
            closing.callback(made.close)
            return made

        yield start


def brought(kind: str, size: int, root: int, dtype: Any) -> list[Part]:
    """What each rank brings to a collective of that kind."""

    def values(rank: int, k: int = 0) -> Any:
        made = torch.rand(5, generator=torch.Generator().manual_seed(100 * rank + k)) * 9 + 1
        return made.to(dtype)

    blank = torch.zeros(5, dtype=dtype)
    parts = []
    for r in range(size):
        here = root < 0 or r == root
        if kind == "all_reduce":
            mine = values(r)
            parts.append(Part([mine], [mine] if here else []))
        elif kind == "broadcast":
            parts.append(Part([values(r)] if here else [], [blank.clone()]))
        elif kind == "copy":
            parts.append(Part([values(r)] if here else [], [] if here else [blank.clone()]))
        elif kind == "gather":
            parts.append(Part([values(r)], [blank.clone() for _ in range(size if here else 0)]))
        elif kind == "scatter":
            parts.append(Part([values(r, k) for k in range(size if here else 0)], [blank.clone()]))
        else:
            outs = 1 if kind == "reduce_scatter" else size
            parts.append(Part([values(r, k) for k in range(size)], [blank.clone() for _ in range(outs)]))
    return parts


COLLECTIVES = [
    *(("all_reduce", operation, root) for operation in ("SUM", "PRODUCT", "MAX") for root in (-1, 2)),
    *(("broadcast", "", root) for root in (0, 2)),
    *(("gather", "", root) for root in (-1, 1)),
    ("copy", "", 1),
    ("scatter", "", 1),
    ("reduce_scatter", "SUM", -1),
    ("all_to_all", "", -1),
]


@pytest.mark.parametrize("where", [(0, 1, 1), (0, 1, 0), (0, 1, 2), (1, 0, 2, 0)], ids=str)
def test_every_collective_is_that_of_ranks_in_one_worker(farm: Any, where: tuple[int, ...]) -> None:
    spread = farm(*where)
    kinds = itertools.product(COLLECTIVES, (torch.float32, torch.bfloat16, torch.int64))
    for number, ((kind, operation, root), dtype) in enumerate(kinds):
        call, size = Call(kind, operation, root), len(where)
        expected, found = brought(kind, size, root, dtype), brought(kind, size, root, dtype)
        compute(call, expected)
        assert spread.together(call, found, number) == {}
        for r in range(size):
            for one, two in zip(
                (*expected[r].outputs, *expected[r].inputs), (*found[r].outputs, *found[r].inputs)
            ):
                assert torch.equal(one, two), f"{call} at rank {r}"
    assert spread.lost == {}


def test_a_mean_of_whole_numbers_is_refused_at_all_ranks(farm: Any) -> None:
    parts = [Part([torch.tensor([r])], [torch.tensor([r])]) for r in range(3)]
    failures = farm(0, 1, 1).together(Call("all_reduce", "AVG", -1), parts)
    assert all("reduce with SUM" in str(failures[r]) for r in range(3))


def test_ranks_that_do_not_fit_together_all_hear_it_and_go_on(farm: Any) -> None:
    spread, reduce = farm(0, 0, 1, 2), Call("all_reduce", "SUM", -1)

    def ones(*lengths: int) -> list[Part]:
        return [Part([t], [t]) for t in (torch.ones(n) for n in lengths)]

    failures = spread.together(reduce, ones(3, 3, 3, 4), 0)
    assert sorted(failures) == [0, 1, 2, 3]
    assert "4 elements of torch.float32 where rank 0 has 3" in str(failures[3])
    failures = spread.together([reduce, reduce, reduce, Call("all_reduce", "MAX", -1)], ones(3, 3, 3, 3), 1)
    assert sorted(failures) == [0, 1, 2, 3]
    assert all("all_reduce(MAX)" in str(e) and "all_reduce(SUM)" in str(e) for e in failures.values())
    parts: list[Any] = ones(3, 3, 3, 3)
    parts[1] = RuntimeError("its tensor is lost")
    failures = spread.together(reduce, parts, 2)
    assert sorted(failures) == [0, 1, 2, 3]
    assert all("rank 1 cannot take part: its tensor is lost" in str(e) for e in failures.values())
    parts = ones(3, 3, 3, 3)
    assert spread.together(reduce, parts, 3) == {}
    assert all(part.outputs[0].tolist() == [4, 4, 4] for part in parts)
    assert spread.lost == {}


def test_ranks_name_those_for_which_they_have_waited(farm: Any) -> None:
    spread, reduce = farm(0, 0, 1), Call("all_reduce", "SUM", -1)
    parts = [Part([t], [t]) for t in (torch.ones(2) for _ in range(3))]
    failures = spread.together(reduce, parts, timeouts_s=(0.2, 0.2, 0), only=(0, 1))
    assert "waited 0.2 s in all_reduce(SUM) for rank 2" in str(failures[0])
    late = spread.together(reduce, parts, only=(2,))
    assert "for rank 2" in str(late[2]), "who comes afterwards hears it at once"
    failures = spread.together(reduce, parts, 1, timeouts_s=(0, 0, 0.2), only=(2,))
    assert "waited 0.2 s in all_reduce(SUM) for ranks 0, 1" in str(failures[2])


def test_ranks_that_leave_are_named_at_the_other_worker(farm: Any) -> None:
    spread, reduce = farm(0, 1), Call("all_reduce", "SUM", -1)
    parts = [Part([t], [t]) for t in (torch.ones(2) for _ in range(2))]
    assert spread.together(reduce, parts) == {}
    spread.workers[1].leave(spread.sessions[1])
    failures = spread.together(reduce, parts, 1, only=(0,))
    assert str(failures[0]) == "rank 1 has ended or left the lease"


def test_a_link_that_is_lost_ends_what_waits_for_it_and_nothing_else(farm: Any) -> None:
    spread, reduce = farm(0, 0, 1, 2), Call("all_reduce", "SUM", -1)
    parts = [Part([t], [t]) for t in (torch.ones(2) for _ in range(4))]
    assert spread.together(reduce, parts) == {}
    waiting = threading.Timer(0.2, lambda: spread.links[1, 0].close("its machine has gone"))
    waiting.start()
    failures = spread.together(reduce, parts, 1, only=(0, 1))
    waiting.join()
    assert all("the connection to the GPU server of rank 2 is lost" in str(e) for e in failures.values())
    inside = b"i" * 16
    near = [Part([torch.ones(1)], [torch.zeros(1)]) for _ in range(2)]
    threads = [
        threading.Thread(
            target=spread.workers[0].meet,
            args=(spread.sessions[r], (inside, 2, r, 0), reduce, near[r], PATIENCE_S),
        )
        for r in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [part.outputs[0].item() for part in near] == [2, 2]


def test_a_worker_that_takes_nothing_holds_nobody_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has sent its cards, and reads no elements."""
    monkeypatch.setattr(spread_collectives, "_SETTLE_S", 0.5)
    spread = Farm((0, 1))
    spread.close()
    ours, theirs = socket.socketpair()
    meetings = spread.workers[0] = SpreadMeetings()
    spread.link(0, 1, ours)
    spread.join(0)
    big = torch.ones(1 << 22)
    call = Call("all_reduce", "SUM", -1)
    frames.send(theirs, frames.Kind.PEER, [1, GROUP, 0, *call, packed({1: card_of([big], [big])})])
    place = (GROUP, 2, 0, 0)
    with pytest.raises(RuntimeError, match="for rank 1"):
        meetings.meet(spread.sessions[0], place, call, Part([big], [big]), 0.5)
    with pytest.raises(RuntimeError, match="the connection to the GPU server of rank 1 is lost"):
        meetings.meet(spread.sessions[0], (GROUP, 2, 0, 1), call, Part([big], [big]), PATIENCE_S)
    theirs.close()
    spread.close()


# -- a worker that sends what none sends

TENSOR = torch.ones(3)
SUM = Call("all_reduce", "SUM", -1)
CARDS = [1, GROUP, 0, *SUM, packed({1: card_of([TENSOR], [TENSOR])})]


class Stranger:
    """At the other end of a worker's only link; the worker has rank 0, and this has rank 1."""

    def __init__(self) -> None:
        self.farm = Farm((0, 1))
        self.farm.close()
        ours, self.sock = socket.socketpair()
        self.meetings = self.farm.workers[0] = SpreadMeetings()
        self.farm.link(0, 1, ours)
        self.farm.join(0)
        self.failures: list[Exception] = []
        self._rank = threading.Thread(target=self._meet)
        self._rank.start()

    def _meet(self) -> None:
        mine = TENSOR.clone()
        try:
            self.meetings.meet(self.farm.sessions[0], (GROUP, 2, 0, 0), SUM, Part([mine], [mine]), PATIENCE_S)
        except Exception as e:
            self.failures.append(e)

    def heard(self) -> list[Any]:
        """The header of what the worker sends next. After its cards its rank waits."""
        _, header, length = frames.receive(self.sock)
        frames.receive_into(self.sock, memoryview(bytearray(length)))
        return header

    def join(self) -> None:
        """Wait until the worker's rank goes on."""
        self._rank.join()

    def end(self) -> str:
        """Why the link was lost, after which the worker's rank has gone on."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self.farm.until_lost()
        self._rank.join()
        self.farm.close()
        self.sock.close()
        return self.farm.lost[0, 1]


def pack(header: Any, payload: bytes = b"", kind: frames.Kind = frames.Kind.PEER) -> bytes:
    return frames.pack(kind, header, len(payload)) + payload


DATA = bytes(12)
BAD = {
    "another kind of frame": [pack([], kind=frames.Kind.RECORDS)],
    "no list": [pack({"what": 1})],
    "nothing": [pack([])],
    "a kind that is none": [pack([9, GROUP])],
    "bytes that belong to nothing": [pack(CARDS, b"12")],
    "cards of another rank": [pack([*CARDS[:-1], packed({0: card_of([TENSOR], [TENSOR])})])],
    "cards that came before": [pack(CARDS), pack(CARDS)],
    "cards of strange elements": [pack([*CARDS[:-1], [[1, [["load", 3]], []]]])],
    "cards of too many elements": [pack([*CARDS[:-1], [[1, [["float32", 1 << 60]], []]]])],
    "cards of fewer than no elements": [pack([*CARDS[:-1], [[1, [["float32", -1]], []]]])],
    "a collective without a number": [pack([1, GROUP, "0", *SUM, CARDS[-1]])],
    "a root that is no rank": [pack([1, GROUP, 0, "all_reduce", "SUM", 2, CARDS[-1]])],
    "elements before cards": [pack([2, GROUP, 0, 1, 0], DATA)],
    "elements of another rank": [pack(CARDS), pack([2, GROUP, 0, 0, 0], DATA)],
    "elements of no tensor": [pack(CARDS), pack([2, GROUP, 0, 1, 1], DATA)],
    "too few elements": [pack(CARDS), pack([2, GROUP, 0, 1, 0], DATA[:-4])],
    "too many elements": [pack(CARDS), pack([2, GROUP, 0, 1, 0], DATA + DATA)],
    "a failure without a reason": [pack([3, GROUP, 0, *SUM, 7])],
    "another's end": [pack([4, GROUP, [0]])],
    "an end of nobody": [pack([4, GROUP, []])],
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_worker_sends_ends_the_link_with_one_line_and_nothing_else(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Stranger()
    assert stranger.heard()[0] == 1
    stranger.sock.sendall(b"".join(BAD[name]))
    why = stranger.end()
    assert why.startswith("it sent what no worker sends ("), why
    assert "\n" not in why
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert [str(e) for e in stranger.failures] == [
        f"the connection to the GPU server of rank 1 is lost: {why}"
    ]
    own = b"o" * 16
    mine = TENSOR.clone()
    stranger.meetings.meet(object(), (own, 1, 0, 0), SUM, Part([mine], [mine]), PATIENCE_S)
    assert torch.equal(mine, TENSOR)


def test_elements_of_what_is_over_or_has_not_begun_are_nobodys() -> None:
    stranger = Stranger()
    assert stranger.heard()[0] == 1
    stranger.sock.sendall(pack(CARDS) + pack([2, GROUP, 0, 1, 0], DATA))
    assert stranger.heard()[0] == 2, "the elements of the rank here"
    stranger.join()
    stranger.sock.sendall(b"".join(pack([2, GROUP, number, 1, 0], DATA) for number in (0, 0, 1)))
    assert stranger.end() == "the other end closed the connection"
    assert stranger.failures == []


scalars = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.binary(max_size=8)
trees = st.recursive(scalars | st.text(max_size=6), lambda t: st.lists(t, max_size=4), max_leaves=8)
headers = st.builds(
    lambda what, fields, n, changed: [what, GROUP, *([*fields[:n], changed, *fields[n + 1 :]])],
    st.integers(0, 5),
    st.sampled_from([CARDS[2:], [0, 1, 0], [0, *SUM, "why"], [[1]]]),
    st.integers(0, 5),
    trees,
)


@pytest.mark.soak
@settings(
    max_examples=often(40, 2000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(headers | trees, st.binary(max_size=20)), max_size=4), st.booleans())
def test_whatever_a_worker_sends_a_rank_here_comes_to_an_end(
    sent: list[tuple[Any, bytes]], has_cards: bool
) -> None:
    stranger = Stranger()
    stranger.heard()
    with contextlib.suppress(OSError):
        stranger.sock.sendall(
            (pack(CARDS) if has_cards else b"") + b"".join(pack(header, payload) for header, payload in sent)
        )
    stranger.end()
    assert len(stranger.failures) <= 1


def test_cards_are_what_they_were() -> None:
    cards = {3: card_of([torch.ones(2, dtype=torch.bfloat16)], []), 5: card_of([], [torch.ones(())])}
    assert unpacked(packed(cards)) == cards
    with pytest.raises(BadRecord):
        check(Call("guess", "", -1), 2, cards)
    with pytest.raises(ValueError, match="comes from"):
        check(Call("broadcast", "", -1), 2, cards)


def test_a_group_of_one_worker_is_not_spread() -> None:
    meetings, mine = SpreadMeetings(), torch.ones(2)
    meetings.meet(object(), (GROUP, 1, 0, 0), SUM, Part([mine], [mine]), PATIENCE_S)
    with pytest.raises(BadRecord):
        meetings.spread(object(), GROUP, 0, [None])
    assert isinstance(meetings, Meetings)
