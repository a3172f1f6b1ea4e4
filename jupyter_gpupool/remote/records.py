"""The records that a session streams to its worker, packed many to a frame.

A RECORDS frame's header is one flat list. A record starts with an integer: zero or more is the
number of a template and the record a call of it, followed by the ids of its input storages, its
float scalars and the ids that its new storages get, as many of each as the template says. A
negative integer is one of the codes below, with the fields named beside it. Storage ids from 1 up
are chosen by the client; those below zero name the results of RUN.
"""

from __future__ import annotations

#: [code, template id, definition]: what calls of that template mean, see signature.py
DEFINE = -1
#: [code, storage id]: no tensor of the client's is left on that storage
FREE = -2
#: [code, storage id, bytes, device index]: a new storage with arbitrary content
ALLOCATE = -3
#: [code, storage id, geometry, elements as bytes]: a small host-to-device copy
WRITE = -4
#: [code, seed, device index or -1 for all]
SEED = -5
SEED_BITS = 0xFFFF_FFFF_FFFF_FFFF
#: [code]: forget all templates but those defined since the previous reset
RESET = -6
#: [code, storage id, geometry]: asks for elements; the answer is None with a payload
READ = -7
#: [code, definition, input storage ids, scalars, number]: run at once; the answer describes each
#: result, and new storages get the ids -4096 × number - 0, 1, 2, …
RUN = -8
#: [code, device index or -1]: answers None when everything before it is done
WAIT = -9
#: [code, generator]: answers {"state": bytes, "seed": what it was seeded with}; [code, generator, bytes]:
#: sets it. A generator is an id, or -1 - device index for the one that operators use by themselves.
GET_RNG = -10
SET_RNG = -11
#: [code, generator, device index, seed]: seeds it; a new id is a new generator, which FREE frees
GENERATOR = -12
#: [code, event id, device index]: remember this moment; FREE frees it
EVENT = -13
#: [code, event id or -1 - device index]: answers whether everything before that moment, or everything, is done
DONE = -14
#: [code, event id]: answers None once everything before that moment is done
AWAIT = -15
#: [code, event id, event id]: answers the milliseconds from one to the other
ELAPSED = -16
#: [code, device index]: answers the bytes that all processes of the lease have allocated there
MEMORY = -17
#: [code, device index]: answers what a real GPU says of itself, by the names of PyTorch's device properties
PROPERTIES = -18
#: [code, graph, definition]: many operators to be called as one, see graphs.py
DEFINE_GRAPH = -19
#: [code, graph, input storage ids, ids that its new storages get]
CALL_GRAPH = -20
#: [code, graph]: nobody will call it again
FREE_GRAPH = -21

#: How many fields follow each code.
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
}
