"""The names of operators that an administrator allows besides PyTorch's own, such as ``torchvision::nms``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from .errors import InvalidRequest

_NAME = re.compile(
    r"(?:(?P<module>[A-Za-z_]\w*(?:\.\w+)*)/)?(?P<operator>(?P<library>[A-Za-z_]\w*)::[A-Za-z_]\w*)"
)


class ExtraOperator(NamedTuple):
    """An operator, and the Python module whose import makes it known."""

    operator: str
    module: str


def extra_operator(text: str) -> ExtraOperator:
    """Parse ``LIBRARY::OPERATOR``, or ``MODULE/LIBRARY::OPERATOR`` where the module has another name than the library.

    Raises InvalidRequest.
    """
    found = _NAME.fullmatch(text)
    if found is None:
        raise InvalidRequest(
            f"{text[:80]!r} is not the name of an operator: write LIBRARY::OPERATOR, such as torchvision::nms, or "
            "MODULE/LIBRARY::OPERATOR where the Python module has another name than the library"
        )
    if found["library"] == "aten":
        raise InvalidRequest(
            f"{text} is one of PyTorch's own operators, and which of them run is not configured"
        )
    return ExtraOperator(found["operator"], found["module"] or found["library"])


def extra_operators(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the names without repetition, in order. Raises InvalidRequest."""
    names = sorted(set(texts))
    for name in names:
        extra_operator(name)
    return tuple(names)
