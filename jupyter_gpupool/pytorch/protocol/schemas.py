"""The schemas of PyTorch's operators, as a client and a worker of two releases compare them.

A release adds operators, adds arguments with defaults and renames some. Most stay as they were, so the client sends
a digest of each, and the worker answers with the schemas that differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

#: One more than a release has, by far.
MOST = 50_000
_DIGEST_BYTES = 6

#: An argument: its name, its type, the text of its default ("" without one), and whether it is passed by name only.
Argument = list[Any]
#: The arguments, and the types of the results.
Description = list[list[Any]]


def name_of(schema: Any) -> str:
    """``"aten::add.Tensor"``, ``"aten::relu.default"``."""
    return f"{schema.name}.{schema.overload_name or 'default'}"


def describe(schema: Any) -> Description:
    """What the two ends compare of an operator."""
    arguments = [
        [
            *(a.name, str(a.type), repr(a.default_value) if a.has_default_value() else "", a.kwarg_only),
        ]
        for a in schema.arguments
    ]
    return [arguments, [str(result.type) for result in schema.returns]]


def digests(schemas: Iterable[Any]) -> dict[str, str]:
    """A digest of each operator of PyTorch's core, by its name. ``schemas``: those of all operators."""
    return {
        name_of(schema): hashlib.blake2b(str(schema).encode(), digest_size=_DIGEST_BYTES).hexdigest()
        for schema in schemas
        if schema.name.startswith("aten::")
    }


def dtypes(torch: Any) -> set[str]:
    """The names of this release's dtypes, without the aliases such as ``float``."""
    return {str(v)[6:] for v in vars(torch).values() if isinstance(v, torch.dtype)}
