"""What the plugin sends to the worker, and what comes back.

Each RECORDS frame has one command: ``[code, freed, ...]``. ``freed`` has the ids of buffers and programs that nobody
uses any more; they are freed first. The client chooses ids, so that only what asks has to wait for an answer. An
UPLOAD frame is ``[id, [freed, dtype, dims, device]]`` with the elements, in row-major order, as its payload. Arrays in
answers are in the same order.

An answer is ``[status code, message, ...]``; code 0 is success. A program that fails, and whose outputs are thus
missing, is reported where an output is used: ``[status code, message, id of the first output]`` of the program that
failed first, or the id of the array that could not be sent or copied.
"""

from __future__ import annotations

from typing import Any

#: ``[id, program, compile options, how many functions of the client it may call]`` → ``[.., facts]``, see :data:`FACTS`
COMPILE = 1
#: ``[program id, input ids, id of the first output, inputs that must not be donated]``; no answer. A program of several
#: devices has the inputs of its first device, then those of its second one, and so on; its outputs' ids likewise. The
#: id after the last output is that of the run, where the program calls functions of the client.
EXECUTE = 2
#: ``[id]`` → ``[..]`` with the elements as payload
READ = 3
#: ``[id]`` → ``[..]`` once the buffer is there
READY = 4
#: ``[id, id of the copy, device]``; no answer
COPY = 5
#: ``[]``; no answer
FREE = 6
#: ``[device]`` → ``[.., bytes in use, limit in bytes]``
MEMORY = 7
#: ``[seconds that a call may take]`` → ``[.., token]``: let the client's functions be called, from now on
#: by what takes calls with that token
SERVE = 8
#: ``[token, number of the call that has failed or 0, the reason]`` → ``[.., number, program id, function, operands]``
#: with the operands' elements as payload, or number 0 if there was no call for a while. A session that takes calls does
#: nothing else; its UPLOAD frames are results: ``[number of the call, results]``. Operands and results are a list of
#: ``[dtype, dims]`` each, None for a token.
TAKE = 9
#: ``[id of a run]`` → ``[..]`` once the run has ended, which is then forgotten
RAN = 10

#: How many fields follow ``freed`` in each command.
FIELDS = {
    **{COMPILE: 4, EXECUTE: 4, READ: 1, READY: 1, COPY: 3, FREE: 0, MEMORY: 1},
    **{SERVE: 1, TAKE: 3, RAN: 1},
}

#: What a compiled program's facts have: its name, its outputs as ``[dtype, dims]``, the numbers of the inputs that it
#: takes over, the devices of each of its replicas, a fingerprint, the bytes of its memory by XLA's names, and the
#: optimized program as HloModuleProtoWithConfig, and whether it calls functions of the client. Outputs and memory are
#: those of each device.
FACTS = ("name", "outputs", "donated", "devices", "fingerprint", "memory", "optimized", "calls")


def command(code: int, freed: list[int], *fields: Any) -> list[Any]:
    """Return the header of a command's frame."""
    return [code, freed, *fields]
