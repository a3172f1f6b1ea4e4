"""Many rows in one statement for PostgreSQL: each column is passed as an array.

One statement for each row would cost the database several times as much as the rows themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import (
    Column,
    Executable,
    Insert,
    String,
    Table,
    Text,
    bindparam,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY

from . import queries as sql
from .tables import gpus, leases


def of_rows(
    statement: Executable, rows: Sequence[Mapping[str, Any]]
) -> tuple[Executable, dict[str, list[Any]]] | None:
    """One statement, with its values, that does what ``statement`` does to each row in order; None if there is none."""
    names = tuple(rows[0])
    found = _UPDATES[statement](names) if statement in _UPDATES else None
    if found is None and isinstance(statement, Insert):
        found = _insert(statement.table, names)
    return None if found is None else (found, {name: [row[name] for row in rows] for name in names})


@cache
def _insert(table: Table, names: tuple[str, ...]) -> Executable:
    rows = _rows(names, [table.c[name] for name in names])
    wanted = select(*(rows.c[name] for name in names)).order_by(rows.c.place)
    return insert(table).from_select(list(names), wanted)


@cache
def _change_leases(names: tuple[str, ...]) -> Executable:
    meant = {"of_seq": leases.c.seq, "from_state": leases.c.state}
    to = {name: leases.c[name.removeprefix("to_")] for name in names if name not in meant}
    rows = _rows(names, [{**meant, **to}[name] for name in names])
    return (
        update(leases)
        .where(leases.c.seq == rows.c.of_seq, leases.c.state == rows.c.from_state)
        .values({column: rows.c[name] for name, column in to.items()})
    )


@cache
def _use_gpus(names: tuple[str, ...]) -> Executable:
    rows = _rows(names, [{"gpu": gpus.c.uuid, "more_mib": gpus.c.used_mib}[name] for name in names])
    return update(gpus).where(gpus.c.uuid == rows.c.gpu).values(used_mib=gpus.c.used_mib + rows.c.more_mib)


#: Each row of these is about another lease, or another GPU.
_UPDATES = {sql.CHANGE_LEASES: _change_leases, sql.USE_GPU: _use_gpus}


def _rows(names: Sequence[str], columns: Sequence[Column[Any]]) -> Any:
    """A table of parameters that are arrays, with the ``place`` of each row."""
    # Text: a cast to String(36)[] would cut what is too long, instead of refusing it.
    types = [Text() if isinstance(column.type, String) else column.type for column in columns]
    arrays = [bindparam(name, type_=ARRAY(kind)) for name, kind in zip(names, types, strict=True)]
    typed = [Column(name, kind) for name, kind in zip(names, types, strict=True)]
    return func.unnest(*arrays).table_valued(*typed, with_ordinality="place", name="given").render_derived()
