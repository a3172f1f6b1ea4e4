"""Programs of random commands for a worker, of the kinds that clients send, on two devices."""

from __future__ import annotations

import random
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol import commands as codes

#: Names that a command may have in place of its operator: all that PyTorch has there, allowed or not.
OPERATORS = tuple(
    name if "." in name else f"{name}.default"
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith(("aten::", "prim::", "profiler::"))
)

GEOM = [[2, 3], [3, 1], 0, "float32", 0]
PART = [[2, 2], [3, 1], 1, "float32", 0]
BITS = [[6], [1], 0, "int32", 0]


def on(geometry: list[Any], device: int) -> list[Any]:
    return [*geometry[:4], device]


def definition(op: str, args: list[Any], results: Any, tensors: int, scalars: int = 0, **kwargs: Any) -> Any:
    return {
        **{"op": op, "tensors": tensors, "scalars": scalars},
        **{"args": args, "kwargs": kwargs, "results": results},
    }


def definitions(device: int) -> list[Any]:
    geom, part, bits = on(GEOM, device), on(PART, device), on(BITS, device)
    return [
        definition("aten::add.Tensor", [["t", 0, geom], ["t", 1, geom]], geom, 2),
        definition("aten::mul_.Tensor", [["t", 0, part], ["t", 1, part]], None, 2),
        definition("aten::bitwise_not_.default", [["t", 0, bits]], None, 1),
        definition("aten::normal_.default", [["t", 0, geom], ["s", 0], 1], None, 1, 1),
        definition("aten::normal_.default", [["t", 0, part]], None, 1, 1, generator=["g", 0]),
        definition("aten::inverse.default", [["t", 0, geom]], geom, 1),  # fails: its result is poisoned
        definition(
            "aten::sort.default", [["t", 0, geom]], ["l", [geom, on([*GEOM[:3], "int64"], device)]], 1
        ),
    ]


#: Two ids that one graph returns on the same storage, and a step that writes to its input.
def graph(device: int) -> Any:
    geom = on(GEOM, device)
    return {
        **{"inputs": [geom], "held": 1, "inductor": False},
        "steps": [
            [["aten::add_.Tensor", [["n", 0], ["n", 0]], {}], ["t", 0, geom]],
            [["aten::clone.default", [["n", 0]], {}], ["t", 1, geom]],
            [["aten::t.default", [["n", 2]], {}], ["t", 1, [[3, 2], [1, 3], 0, "float32", device]]],
        ],
        "returned": [[2, geom, 24], [3, [[3, 2], [1, 3], 0, "float32", device], 24]],
    }


Commands = list[tuple[Any, ...]]


def program(rng: random.Random, length: int) -> tuple[Commands, Commands]:
    """Commands of two sessions that use two devices: (session, code, field, …); the first ones, and the others."""
    commands: Commands = []
    live: dict[tuple[str, int], list[int]] = {}
    names: dict[int, bytes] = {}
    fresh = iter(range(1, 10_000))
    for who in "ab":
        for device in (0, 1):
            commands += [(who, codes.DEFINE, 10 * device + k, d) for k, d in enumerate(definitions(device))]
            commands.append((who, codes.DEFINE_GRAPH, device, graph(device)))
            commands.append((who, codes.GENERATOR, 9000 + device, device, 5))
            id = next(fresh)
            live[who, device] = [id]
            content = torch.arange(6.0).add(id).numpy().tobytes()
            filled = (codes.WRITE, id, on(GEOM, device), content)  # at once: new memory may contain anything
            commands.append((who, codes.ALLOCATE, id, 24, device, *filled))
    first, commands = commands, []
    for k in range(length):
        who, device = rng.choice("ab"), rng.choice((0, 1))
        ids, base = live[who, device], 10 * device
        a, b = rng.choice(ids), rng.choice(ids)
        new = [next(fresh) for _ in range(2)]
        kind = rng.randrange(15)
        if kind == 0:
            commands.append((who, base, a, b, new[0]))
            ids.append(new[0])
        elif kind in (1, 2, 3, 4):
            fields: list[tuple[Any, ...]] = [(a, b), (a,), (a, 0.5), (a, 9000 + device)]
            commands.append((who, base + kind, *fields[kind - 1]))
        elif kind == 5:
            commands.append((who, base + 5, a, new[0]))
            ids.append(new[0])
        elif kind == 6:
            commands.append((who, base + 6, a, *new))
            ids.append(new[0])
        elif kind == 7:
            commands.append((who, codes.CALL_GRAPH, device, [a], new))
            ids.append(new[0])
        elif kind == 8 and len(ids) > 1:
            ids.remove(a)
            commands.append((who, codes.FREE, a))
        elif kind == 9:
            names[new[0]] = name = names.setdefault(a, k.to_bytes(16, "big"))
            other = "b" if who == "a" else "a"
            commands += [(who, codes.SEND_STORAGE, a, name), (other, codes.OPEN_STORAGE, name, new[0])]
            live[other, device].append(new[0])
        elif kind == 10:
            commands.append((who, codes.SEED, k, rng.choice((-1, device))))
        elif kind == 11:
            commands += [(who, codes.EVENT, 8000 + k, device), (who, codes.DONE, 8000 + k)]
        elif kind == 12:
            commands.append((who, codes.GET_RNG, rng.choice((9000 + device, -1 - device))))
        elif kind == 13:
            run = definition("aten::nonzero.default", [["t", 0, on(GEOM, device)]], None, 1)
            commands.append((who, codes.RUN, run, [a], [], k))
        else:
            commands.append((who, codes.READ, a, on(PART, device)))
    return first, commands
