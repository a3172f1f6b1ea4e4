"""How an API server writes quantities, whatever a Pod's author wrote."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

_QUANTITY = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]+)|([numkKMGTPE]?)(i?))")
#: Of thousands, from the third below 0 to the sixth above it; and of 1024, from 0 up.
_DECIMAL, _BINARY = ("n", "u", "m", "", "k", "M", "G", "T", "P", "E"), ("", *"KMGTPE")


def canonical(written: object) -> str:
    """The text by which everything after the decoding of an object sees a quantity.

    The suffix is as large as possible without a fraction. What was written stays where it is canonical: by the test of
    Kubernetes' own ``ParseQuantity``, which wants digits that do not end in three zeros.
    """
    text = str(written)
    match = _QUANTITY.fullmatch(text)
    assert match is not None, text
    sign, whole, part, exponent, suffix, binary = match.groups(default="")
    digits = (whole.lstrip("0") or "0") + part
    number = Fraction(int(f"{whole}{part}" or "0")) / 10 ** len(part)
    if not number:
        return "0"
    if binary:
        number *= 1024 ** _BINARY.index(suffix)
        if number >= 1024 and number.denominator == 1:
            power = max(n for n in range(len(_BINARY)) if number % 1024**n == 0)
            return f"{sign.strip('+')}{number / 1024**power}{_BINARY[power]}{'i' if power else ''}"
        power = 0
    else:
        power = int(exponent) if exponent else 3 * (_DECIMAL.index(suffix) - 3)
        number *= Fraction(10) ** power
        is_short = len(digits) <= 18 and (power - len(part)) % 3 == 0
        if is_short and not digits.endswith("000") and not digits.startswith("0"):
            return text
    power = max(n for n in range(-3, 7) if (number / Fraction(1000) ** n).denominator == 1)
    shown = (f"e{3 * power}" if power else "") if exponent else _DECIMAL[power + 3]
    return f"{sign.strip('+')}{number / Fraction(1000) ** power}{shown}"


def decoded(pod: Mapping[str, Any]) -> dict[str, Any]:
    """A Pod as an API server has it, with its quantities rewritten."""
    after = copy.deepcopy(dict(pod))
    spec = after["spec"]
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        both = container.get("resources", {})
        for kind in set(both) & {"limits", "requests"}:
            both[kind] = {name: canonical(quantity) for name, quantity in both[kind].items()}
    return after
