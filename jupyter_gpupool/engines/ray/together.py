"""The workers of a lease that spans servers, as one: held between two exchanges, parked, resumed and moved.

A worker that stopped in the middle of a collective would keep the others waiting, which could then not stop. So all are
held first: a session goes on only while another one waits for it, until none does. The same is done where one of them
moves to another server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import Lease, Slice

from .node import Node

#: How long sessions may take to come between two exchanges, and the pause between two looks, in seconds.
_REST_TIMEOUT_S = 10.0
_LOOK_S = 0.02
#: How long a worker that has arrived may take to be linked to the others, in seconds.
_LINK_TIMEOUT_S = 20.0

_T = TypeVar("_T")


class Torn(EngineError):
    """Some of a lease's workers cannot go on, so that none can."""


def by_server(pieces: Sequence[Slice]) -> dict[str, list[Slice]]:
    """Slices by the servers that have them, in order."""
    found: dict[str, list[Slice]] = {}
    for piece in pieces:
        found.setdefault(piece.server, []).append(piece)
    return found


@contextlib.asynccontextmanager
async def held(lease_id: str, nodes: Collection[Node]) -> AsyncIterator[None]:
    """Let no worker of a lease execute anything during this block, after what others wait for. Raises EngineError."""
    try:
        await _all(node.tell(lease_id, "hold") for node in nodes)
        deadline = asyncio.get_running_loop().time() + _REST_TIMEOUT_S
        before: list[int | None] = []
        while True:
            looks = await _all(node.tell(lease_id, "rest") for node in nodes)
            now = [look["uses"] if look["resting"] else None for look in looks]
            # Where nothing has happened between two looks, all were at rest at one moment; and who rests then has
            # nothing to do for the others any more.
            if None not in now and now == before:
                break
            if asyncio.get_running_loop().time() > deadline:
                raise EngineError("its programs compute, or wait for each other, for too long")
            before = now
            await asyncio.sleep(_LOOK_S)
        yield
    finally:
        await release(lease_id, nodes)


async def release(lease_id: str, nodes: Collection[Node]) -> None:
    """Let the workers of a lease go on, those that can be reached."""
    await asyncio.gather(*(node.tell(lease_id, "release") for node in nodes), return_exceptions=True)


async def park(lease: Lease, nodes: Mapping[str, Node]) -> int:
    """Park all workers of a lease; the MiB that are kept for it. Raises EngineError; then none is parked.

    Raises :class:`Torn` where some are, and could not be brought back.
    """
    pieces = by_server(lease.slices)
    async with held(lease.id, nodes.values()):
        kept = await asyncio.gather(
            *(node.parking.park(lease.id, pieces[name]) for name, node in nodes.items()),
            return_exceptions=True,
        )
        failures = [mib for mib in kept if isinstance(mib, BaseException)]
        if failures:
            done = {
                name: node
                for (name, node), mib in zip(nodes.items(), kept, strict=True)
                if isinstance(mib, int)
            }
            try:
                await resume(lease, done)
            except EngineError as e:
                raise Torn(f"a part of it was parked, and could not be brought back: {e}") from None
            raise failures[0]
    return sum(mib for mib in kept if isinstance(mib, int))


async def resume(lease: Lease, nodes: Mapping[str, Node]) -> None:
    """Bring a lease back on these servers. Raises EngineError."""
    pieces = by_server(lease.slices)
    await _all(
        node.parking.resume(lease.id, pieces[name], lease.slices.index(pieces[name][0]))
        for name, node in nodes.items()
    )


async def move(lease: Lease, source: Node, target: Node, others: Sequence[Node]) -> None:
    """Let what a lease has on ``source`` go on at ``target``, where its next worker waits; ``others`` stay.

    ``lease`` has the slices that it is to have. The workers are linked anew before anything is decided. Raises
    EngineError; then the lease can go on as it was, once ``source`` stays. Raises :class:`Torn` where it cannot.
    """
    names = {node.name: str((await node.tell(lease.id, "name"))["name"]) for node in (source, *others)}
    addresses = {names[node.name]: node.workers[lease.id] for node in others}
    parked = {node.name: node for node in others if lease.id in node.parking.parked}
    pieces, is_done = by_server(lease.slices), False
    try:
        await target.introduce(lease.id, addresses)
        await _all(node.tell(lease.id, "expect", peer=names[source.name]) for node in others)
        await _all(node.claim(lease.id, pieces[name]) for name, node in parked.items())
        if (worker := target.workers.get(lease.id)) is None:
            raise EngineError(f"its next worker, on {target.name}, has ended")
        await source.send_ahead(lease.id, worker)
        async with held(lease.id, (source, *others)):
            await source.tell(lease.id, "send_rest")
            await _until_linked(lease.id, target)
            await target.serve(lease.id)
            is_done = True
            try:
                await _all(node.tell(lease.id, "replace", done=True) for node in others)
                await resume(lease, parked)
            except EngineError as e:
                raise Torn(
                    f"a part of it was moved to {target.name}, and another one cannot go on: {e}"
                ) from None
    finally:
        if not is_done:
            await target.stop(lease.id)
            await end_move(lease.id, others, is_done=False)
            for node in parked.values():
                await node.claims.give_back(lease.id)
    await introduce(lease.id, (target, *others))


async def introduce(lease_id: str, nodes: Collection[Node]) -> None:
    """Let the workers of a lease find each other where they are now. Where that cannot be, clients do without."""
    try:
        names = {node.name: str((await node.tell(lease_id, "name"))["name"]) for node in nodes}
    except EngineError:  # one has ended
        return
    addresses = {names[node.name]: node.workers[lease_id] for node in nodes if lease_id in node.workers}
    for node in nodes:
        others = {name: address for name, address in addresses.items() if name != names[node.name]}
        await node.introduce_if_possible(lease_id, others)


async def end_move(lease_id: str, others: Collection[Node], is_done: bool) -> None:
    """Let the other workers of a lease use the links to the one that has moved, or to the one that stays."""
    calls = (node.tell(lease_id, "replace", done=is_done) for node in others)
    await asyncio.gather(*calls, return_exceptions=True)


async def _until_linked(lease_id: str, node: Node) -> None:
    deadline = asyncio.get_running_loop().time() + _LINK_TIMEOUT_S
    while (await node.tell(lease_id, "linked"))["missing"]:
        if asyncio.get_running_loop().time() > deadline:
            raise EngineError(f"the worker on {node.name} is not linked to the lease's others in time")
        await asyncio.sleep(_LOOK_S)


async def _all(calls: Iterable[Awaitable[_T]]) -> list[_T]:
    """What they return, once all are over. Raises the first error."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if not isinstance(one, BaseException)]
