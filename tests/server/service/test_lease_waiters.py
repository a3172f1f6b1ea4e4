"""Who waits for a lease is woken by what happens to that one alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from jupyter_gpupool.core.models import Change, Lease, LeaseState, Request
from jupyter_gpupool.server.service.lease_waiters import Waiters


def test_nobody_is_woken_for_another_lease() -> None:
    async def play() -> None:
        waiters = Waiters()
        mine = Lease(Request("mine", "ada"), LeaseState.ACTIVE)
        with waiters.of("mine") as first, waiters.of("mine") as second, waiters.of("other") as other:

            def woken(by: Callable[[], None]) -> tuple[bool, ...]:
                by()
                states = first.is_set(), second.is_set(), other.is_set()
                for event in (first, second, other):
                    event.clear()
                return states

            assert woken(lambda: waiters.notify(Change(changed=(mine,)))) == (True, True, False)
            assert woken(lambda: waiters.notify(Change(mine))) == (False, False, False)
            assert woken(lambda: waiters.notify(Change(positions={"mine": 1, "other": 2}))) == (
                True,
                True,
                True,
            )
            assert woken(lambda: waiters.notify(Change())) == (False, False, False)
            assert woken(lambda: waiters.notify(Change(positions={"mine": 1, "other": 3}))) == (
                False,
                False,
                True,
            )
            assert woken(lambda: waiters.notify(Change(positions={"other": 3}))) == (True, True, False)
            assert woken(waiters.wake_all) == (True, True, True)
        assert not waiters._events, "who has left is forgotten"

    asyncio.run(play())
