"""Compares this release's operators with those of a client of another release."""

from __future__ import annotations

import functools
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol import schemas
from jupyter_gpupool.pytorch.torch_internals.worker import all_schemas

from .templates import BadRecord


@functools.cache
def _own() -> tuple[dict[str, Any], dict[str, str]]:
    every = all_schemas()
    return {schemas.name_of(schema): schema for schema in every}, schemas.digests(every)


def differing(theirs: Any) -> tuple[dict[str, Any], None]:
    """Answer SCHEMAS: this worker's schema of each operator that differs, None for one that it lacks, and its dtypes.

    Raises :class:`BadRecord`.
    """
    if not isinstance(theirs, dict) or len(theirs) > schemas.MOST:
        raise BadRecord("schemas that are no table of digests")
    by_name, digests = _own()
    found = {
        name: schemas.describe(by_name[name]) if name in digests else None
        for name, digest in theirs.items()
        if digests.get(name) != digest
    }
    return {"operators": found, "dtypes": sorted(schemas.dtypes(torch))}, None
