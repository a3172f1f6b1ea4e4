"""What ranks at several workers have to agree on before they exchange elements, and which elements go where.

Pure: every worker comes to the same answer from the same cards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .templates import BadRecord, dtype_named

#: The most elements of a tensor, and the most tensors of a rank, that are accepted.
_MAX_ELEMENTS = 1 << 48
_MAX_TENSORS = 1 << 20


class Call(NamedTuple):
    """What all ranks of a collective have to agree on. ``operation``: of collectives.py; ``root``: a rank, or -1."""

    kind: str
    operation: str
    root: int


class Elements(NamedTuple):
    """What of a tensor has to fit that of another rank."""

    dtype: torch.dtype
    length: int

    @property
    def nbytes(self) -> int:
        """How long they are, in bytes."""
        return self.length * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.length} elements of {self.dtype}"


class Card(NamedTuple):
    """What a rank brings to a collective, and where it takes the result."""

    inputs: tuple[Elements, ...]
    outputs: tuple[Elements, ...]


#: The kinds in which one rank's tensors go to the others.
_FROM_ROOT = ("broadcast", "scatter", "copy")

#: Of a tensor that one rank brings: the rank, and its position among that rank's.
Key = tuple[int, int]


def card_of(inputs: Iterable[torch.Tensor], outputs: Iterable[torch.Tensor]) -> Card:
    """The card of a rank with these tensors."""
    return Card(*(tuple(Elements(t.dtype, t.numel()) for t in some) for some in (inputs, outputs)))


def packed(cards: Mapping[int, Card]) -> list[Any]:
    """Cards by rank as plain values."""
    return [
        [rank, *([[str(e.dtype)[6:], e.length] for e in some] for some in card)]
        for rank, card in cards.items()
    ]


def unpacked(given: Any) -> dict[int, Card]:
    """What :func:`packed` returned. Raises BadRecord for anything else."""
    try:
        return {_rank(rank): Card(_elements(inputs), _elements(outputs)) for rank, inputs, outputs in given}
    except (TypeError, ValueError) as e:
        raise BadRecord(f"cards of ranks: {e}") from None


def _rank(given: Any) -> int:
    if type(given) is not int:
        raise ValueError(f"a rank {given!r:.40}")
    return given


def _elements(given: Any) -> tuple[Elements, ...]:
    if not isinstance(given, list) or len(given) > _MAX_TENSORS:
        raise ValueError("no tensors")
    for _, count in given:
        if type(count) is not int or not 0 <= count <= _MAX_ELEMENTS:
            raise ValueError(f"{count!r:.40} elements")
    return tuple(Elements(dtype_named(name), count) for name, count in given)


def check(call: Call, size: int, cards: Mapping[int, Card]) -> None:
    """Raise ValueError where the ranks with these cards, of ``size``, cannot take part together."""
    if call.kind in _FROM_ROOT and call.root < 0:
        raise ValueError(f"a {call.kind} without a rank that it comes from")
    _CHECKS.get(call.kind, _unknown)(call, size, cards)


def _unknown(call: Call, size: int, cards: Mapping[int, Card]) -> None:
    raise BadRecord(f"a collective named {call.kind!r:.40}")


def _receives(call: Call, rank: int) -> bool:
    return call.root < 0 or rank == call.root


def _same(rank: int, found: Sequence[Elements], other: int, expected: Sequence[Elements]) -> None:
    if len(found) != len(expected):
        raise ValueError(f"rank {rank} has {len(found)} tensors where rank {other} has {len(expected)}")
    for one, two in zip(found, expected):
        if one != two:
            raise ValueError(f"rank {rank} has {one} where rank {other} has {two}")


def _check_reduced(call: Call, size: int, cards: Mapping[int, Card]) -> None:
    first, example = next(iter(sorted(cards.items())))
    for rank, card in cards.items():
        _same(rank, card.inputs, first, example.inputs)
        _same(rank, card.outputs, first, example.inputs if _receives(call, rank) else ())


def _check_broadcast(call: Call, size: int, cards: Mapping[int, Card]) -> None:
    first, example = next(iter(sorted(cards.items())))
    for rank, card in cards.items():
        _same(rank, card.outputs, first, example.outputs)
        _same(rank, card.inputs, rank, card.outputs if rank == call.root else ())


def _check_copied(call: Call, size: int, cards: Mapping[int, Card]) -> None:
    root = cards.get(call.root)
    for rank, card in cards.items():
        _number(rank, card.outputs if rank == call.root else card.inputs, 0)
        if root is not None and rank != call.root:
            _same(rank, card.outputs, call.root, root.inputs)


def _check_gathered(call: Call, size: int, cards: Mapping[int, Card]) -> None:
    for rank, card in cards.items():
        _number(rank, card.inputs, 1)
        _number(rank, card.outputs, size if _receives(call, rank) else 0)
        if _receives(call, rank):
            for other, theirs in cards.items():
                _same(rank, card.outputs[other : other + 1], other, theirs.inputs)


def _check_scattered(call: Call, size: int, cards: Mapping[int, Card]) -> None:
    root = cards.get(call.root)
    for rank, card in cards.items():
        _number(rank, card.inputs, size if rank == call.root else 0)
        _number(rank, card.outputs, 1)
        if root is not None:
            _same(rank, card.outputs, call.root, root.inputs[rank : rank + 1])


def _check_reduced_parts(call: Call, size: int, cards: Mapping[int, Card]) -> None:
    first, example = next(iter(sorted(cards.items())))
    for rank, card in cards.items():
        _number(rank, card.inputs, size)
        _same(rank, card.inputs, first, example.inputs)
        _same(rank, card.outputs, first, example.inputs[rank : rank + 1])


def _check_swapped(call: Call, size: int, cards: Mapping[int, Card]) -> None:
    for rank, card in cards.items():
        _number(rank, card.inputs, size)
        _number(rank, card.outputs, size)
    for rank, card in cards.items():
        for other, theirs in cards.items():
            _same(rank, card.outputs[other : other + 1], other, theirs.inputs[rank : rank + 1])


def _number(rank: int, found: Sequence[Elements], expected: int) -> None:
    if len(found) != expected:
        raise ValueError(f"rank {rank} has {len(found)} tensors where it needs {expected}")


_CHECKS = {
    "all_reduce": _check_reduced,
    "broadcast": _check_broadcast,
    "copy": _check_copied,
    "gather": _check_gathered,
    "scatter": _check_scattered,
    "reduce_scatter": _check_reduced_parts,
    "all_to_all": _check_swapped,
}


def crossing(
    call: Call, cards: Mapping[int, Card], here: Collection[int], there: Collection[int]
) -> list[Key]:
    """The tensors that go from the worker of the ranks ``here`` to that of the ranks ``there``, in order.

    ``cards`` has those of the ranks ``here``, which have been checked.
    """
    senders = sorted(here)
    if call.kind in _FROM_ROOT:
        senders = [rank for rank in senders if rank == call.root]
    if call.kind in ("all_reduce", "gather") and call.root >= 0 and call.root not in there:
        senders = []
    if call.kind in ("scatter", "reduce_scatter", "all_to_all"):
        return [(rank, to) for rank in senders for to in sorted(there)]
    return [(rank, k) for rank in senders for k in range(len(cards[rank].inputs))]
