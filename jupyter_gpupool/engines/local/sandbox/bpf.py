"""Assembles filters of system calls, in the classic BPF that seccomp runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

#: An instruction: code, jump if true, jump if false, constant.
Instruction = tuple[int, int, int, int]

_LOAD, _AND, _JUMP, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x54, 0x05, 0x15, 0x35, 0x06
#: Offsets in struct seccomp_data.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

KILL_PROCESS = 0x80000000
ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
EPERM, ENOSYS = 1, 38


def refused(errno: int) -> int:
    """Return what a filter returns so that the call fails with that error."""
    return _ERRNO | errno


@dataclass(frozen=True)
class Test:
    """Whether ``argument & mask`` is one of ``values``, or none of them if ``negated``; 64 bits each."""

    argument: int
    values: tuple[int, ...]
    mask: int = (1 << 64) - 1
    negated: bool = False


def program(
    architecture: int,
    refusals: Iterable[int],
    tests: Mapping[int, Sequence[Test]],
    *,
    missing: Iterable[int] = (),
    without_effect: Iterable[int] = (),
    newest: int,
) -> list[Instruction]:
    """Return the filter for one architecture; calls of another one end the process.

    ``refusals``: the numbers of calls that fail with EPERM. ``tests``: numbers of calls that fail unless every one of
    their tests holds. ``missing``: numbers of calls that the filter says do not exist, so that libraries use older
    ones; the same is said of calls above ``newest``, which nobody has judged. ``without_effect``: numbers of calls that
    do nothing and return 0.
    """
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        # Also the calls of x86-64's x32, whose numbers have bit 30.
        (_JUMP_IF_AT_LEAST, 0, 1, newest + 1),
        (_RETURN, 0, 0, refused(ENOSYS)),
    ]
    for number in sorted(set(missing)):
        code += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, refused(ENOSYS))]
    for number in sorted(set(without_effect)):
        code += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, refused(0))]
    for number in sorted(set(refusals)):
        code += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, refused(EPERM))]
    for number in sorted(tests):
        checks = [instruction for test in tests[number] for instruction in _checks(test)]
        checks.append((_RETURN, 0, 0, ALLOW))
        # Not this call: over its checks. A jump is at most 255 instructions long.
        assert len(checks) < 256, "too many tests of one call"
        code += [(_JUMP_IF_EQUAL, 0, len(checks), number), *checks]
    return [*code, (_RETURN, 0, 0, ALLOW)]


def _checks(test: Test) -> list[Instruction]:
    """Go on behind these instructions if the test holds, else return EPERM."""
    low, high = _ARGUMENTS + 8 * test.argument, _ARGUMENTS + 8 * test.argument + 4  # little endian
    code: list[Instruction] = []
    for k, value in enumerate(test.values):
        # Over the other values, and over the refusal; if negated, over the jump that leads over it.
        behind = 6 * (len(test.values) - 1 - k) + 1
        code += [
            (_LOAD, 0, 0, low),
            (_AND, 0, 0, test.mask & 0xFFFFFFFF),
            (_JUMP_IF_EQUAL, 0, 3, value & 0xFFFFFFFF),
            (_LOAD, 0, 0, high),
            (_AND, 0, 0, test.mask >> 32),
            (_JUMP_IF_EQUAL, behind, 0, value >> 32),
        ]
    if test.negated:
        code.append((_JUMP, 0, 0, 1))
    return [*code, (_RETURN, 0, 0, refused(EPERM))]
