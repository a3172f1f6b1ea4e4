"""The placer's answers are placement's own, whatever happened before."""

from __future__ import annotations

import random
from collections.abc import Callable

from jupyter_gpupool.devices import emulated_gpus
from jupyter_gpupool.pool import placement
from jupyter_gpupool.pool.models import Request, Server
from jupyter_gpupool.pool.placing import Granted, Placer


def test_it_answers_as_placement_does(ask: Callable[..., Request]) -> None:
    chance = random.Random(5)
    sizes = [1000, 1000, 700, 2000]
    servers = [
        Server(f"s{n}", "127.0.0.1", emulated_gpus(f"s{n}", count=1 + n % 4, memory_mib=sizes[n % 4]))
        for n in range(12)
    ]
    servers[3] = Server(servers[3].name, servers[3].host, servers[3].gpus, draining=True)
    used, placer = Granted({}), Placer(servers)
    held: list[tuple] = []
    granted = refused = spread = 0
    for _ in range(4000):
        if held and chance.random() < 0.45:
            for piece in held.pop(chance.randrange(len(held))):
                used.use(piece.gpu_uuid, -piece.memory_mib)
            continue
        request = ask(
            num_gpus=chance.choice([1, 1, 2, 3, 5]),
            spread=chance.random() < 0.3,
            filters=chance.choice([{}, {}, {"server": f"s{chance.randrange(12)}"}, {"index": "0"}]),
            **chance.choice([{"partial": p} for p in (0.1, 0.29, 0.5, 1.0)] + [{"memory_mib": 650}]),
        )
        expected = placement.place(request, servers, dict(used))
        assert placer.place(request, used) == expected
        assert placer.impossible(request) == placement.impossible(request, servers)
        if expected is None:
            refused += 1
            continue
        granted += 1
        spread += len({piece.server for piece in expected}) > 1
        for piece in expected:
            used.use(piece.gpu_uuid, piece.memory_mib)
        held.append(expected)
    assert granted > 500 and refused > 100 and spread > 50, "all of it happened"
