"""The commands that a client sends to its worker, many in a frame.

The header of a RECORDS frame is one flat list of commands, one after another. A command starts with an
integer:

- Zero or more: a call of the template with that number. Then follow the ids of its input storages, its float
  scalars, and the ids of its new storages, as many of each as the template defines.
- Negative: one of the codes below, followed by the fields that are named beside it.

The client chooses storage ids from 1 up. Ids below zero are storages of the results of RUN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

#: [code, template id, definition]: define a template, see Definition in prediction.py
DEFINE = -1
#: [code, storage id]: free the storage; the client has no tensor on it any more
FREE = -2
#: [code, storage id, bytes, device index]: create a storage with arbitrary content
ALLOCATE = -3
#: [code, storage id, layout, elements as bytes]: a small host-to-device copy
WRITE = -4
#: [code, seed, device index or -1 for all]: seed the generators that operators use by default
SEED = -5
SEED_BITS = 0xFFFF_FFFF_FFFF_FFFF
#: The seed of a generator that no program has seeded; the same as torch.default_generator's.
DEFAULT_SEED = 67280421310721
#: [code]: forget all templates but those defined since the previous reset
RESET = -6
#: [code, storage id, layout]: read elements; the answer is None with a payload
READ = -7
#: [code, definition, input storage ids, scalars, number]: run a call whose results are not predicted; the
#: answer describes each result, and new storages get the ids -4096 × number - 0, 1, 2, …
RUN = -8
#: [code, device index or -1]: the answer is None, once everything before has run
WAIT = -9
#: GET_RNG [code, generator]: the answer is {"state": bytes, "seed": its last seed}.
#: SET_RNG [code, generator, bytes]: set the state.
#: A generator is an id, or -1 - device index for the one that operators use by default.
GET_RNG = -10
SET_RNG = -11
#: [code, generator, device index, seed]: seed a generator; a new id creates one, which FREE frees
GENERATOR = -12
#: [code, event id, device index]: record this moment as an event, which FREE frees
EVENT = -13
#: [code, event id or -1 - device index]: the answer is whether everything before the event, or everything on
#: the device, has run
DONE = -14
#: [code, event id]: the answer is None, once everything before the event has run
AWAIT = -15
#: [code, event id, event id]: the answer is the milliseconds from the first event to the second
ELAPSED = -16
#: [code, device index]: the answer is the bytes that all processes of the lease use there, CUDA's own included
MEMORY = -17
#: [code, device index]: the answer has the properties of a real GPU, by PyTorch's names of them
PROPERTIES = -18
#: [code, graph, definition]: define a graph, many operators that are called as one, see graphs.py
DEFINE_GRAPH = -19
#: [code, graph, input storage ids, ids of its new storages]: call a graph
CALL_GRAPH = -20
#: [code, graph]: forget the graph
FREE_GRAPH = -21
#: [code, storage id, name of 16 bytes]: keep the storage for another process of the lease; the answer is None
SEND_STORAGE = -22
#: [code, name, new storage id]: open a storage that a process of the lease has sent; the answer has its "nbytes"
OPEN_STORAGE = -23
#: [code, device index]: the answer has what the GPU's sensors report now, by the names of torch.cuda's functions
READINGS = -24
#: [code, on]: record the time of each call from now on, or no more. The answer is {"now": seconds of the worker's
#: clock, "calls": [[operator, device index, start, duration in seconds], …]} with those recorded so far
TRACE = -25
#: [code, {operator: digest of its schema}]: the answer has "operators", the worker's schema of each that differs and
#: None for each that it lacks, see schemas.py, and "dtypes". Sent if the two ends have two releases of PyTorch.
SCHEMAS = -26
#: [code]: the answer has the state of each graph: "" (its operators run one by one), "compiling", "compiled",
#: "recorded" (the device replays it), or why it could not be compiled
GRAPHS = -27
#: [code, place, call, inputs, outputs, timeout in seconds]: take part in a collective of the worker's sessions.
#: place: group of 16 bytes, its size, the rank, the number of the collective in its group; call: kind, operation and
#: root, see collectives.py; inputs and outputs: pairs of a storage id and a layout.
MEET = -28
#: [code, box]: this session is the rank with that id of 16 bytes, so that others hear of its end. The answer has
#: the names of the lease's other workers that this one is linked to, or None.
#: What nobody has taken is freed when the last rank has ended.
JOIN = -29
#: [code, box, name of 16 bytes, storage id, layout]: send a copy of a tensor to whatever rank takes that name
POST = -30
#: [code, box, name, storage id, layout, [source rank, own rank], timeout in seconds]: wait for what a rank has
#: sent, and copy it to the tensor
TAKE = -31
#: [code, box, name]: the answer is whether TAKE would not wait
ARRIVED = -32
#: [code, box, name]: free what this rank has sent under that name, unless it has been taken
WITHDRAW = -33
#: [code, group of 16 bytes, the name of each rank's worker, own rank]: the worker is to meet the group's ranks at these
#: workers of the lease. The answer is why it cannot, or an empty string.
LINK = -34
#: [code, worker, box, name, storage id, layout, [source rank, own rank], timeout in seconds]: as TAKE, of a rank at
#: the lease's worker of that name
FETCH = -35
#: [code, worker, box, name]: as ARRIVED, of a rank at the lease's worker of that name
IS_THERE = -36

#: The number of fields after each code.
FIELDS = {
    DEFINE: 2,
    FREE: 1,
    ALLOCATE: 3,
    WRITE: 3,
    SEED: 2,
    RESET: 0,
    READ: 2,
    RUN: 4,
    WAIT: 1,
    GET_RNG: 1,
    SET_RNG: 2,
    GENERATOR: 3,
    EVENT: 2,
    DONE: 1,
    AWAIT: 1,
    ELAPSED: 2,
    MEMORY: 1,
    PROPERTIES: 1,
    DEFINE_GRAPH: 2,
    CALL_GRAPH: 3,
    FREE_GRAPH: 1,
    SEND_STORAGE: 2,
    OPEN_STORAGE: 2,
    READINGS: 1,
    TRACE: 1,
    SCHEMAS: 1,
    GRAPHS: 0,
    MEET: 5,
    JOIN: 1,
    POST: 4,
    TAKE: 6,
    ARRIVED: 2,
    WITHDRAW: 2,
    LINK: 3,
    FETCH: 7,
    IS_THERE: 3,
}


def split(commands: list[Any], size_of: Callable[[int], int]) -> Iterator[tuple[int, list[Any]]]:
    """Yield each command's code and fields. ``size_of`` is the number of fields of a call of a template.

    Ends where ``size_of`` raises KeyError: the template is not known.
    """
    i = 0
    while i < len(commands):
        code = commands[i]
        try:
            end = i + 1 + (FIELDS[code] if code < 0 else size_of(code))
        except KeyError:
            return
        yield code, commands[i + 1 : end]
        i = end
