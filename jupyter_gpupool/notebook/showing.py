"""A widget that shows the pool for as long as it is open, and no longer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ipywidgets as widgets
from IPython import get_ipython
from traitlets import Instance, Unicode

from ..pool.models import Lease
from . import watching

#: Notebook cell → the run of it that made widgets, and those: running the cell again makes them anew.
_of_cells: dict[str, tuple[str, list[Showing]]] = {}


class Showing(widgets.VBox):
    """Hears of the pool once a second until it is closed.

    It is closed by :meth:`close`, by the frontend, and when the cell that made it is run again. Its state is the
    kernel's, so a page that is loaded again shows it as it is.
    """

    lease = Instance(Lease, allow_none=True, help="What this notebook has or waits for. None: nothing.")
    trouble = Unicode(help="Why the pool cannot be asked; empty if it can be.")

    def __init__(self, children: tuple[widgets.Widget, ...], **kwargs: Any) -> None:
        super().__init__(children, **kwargs)
        _replace_of_cell(self)
        if self.comm is not None:
            self.comm.on_close(lambda message: self.close())
        watching.watch(self)

    def close(self) -> None:
        watching.forget(self)
        for child in self.children:
            child.close()
        super().close()

    def hear(self, news: watching.News) -> None:
        """In the thread that looks."""
        self.trouble = news.trouble
        self.lease = without_age(news.lease) if news.lease is not None else None


def without_age(lease: Lease) -> Lease:
    """The same without its last heartbeat, so that who observes it hears of changes alone."""
    return replace(lease, heartbeat_at=0.0)


def _replace_of_cell(widget: Showing) -> None:
    shell = get_ipython()
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    cell = parent.get("metadata", {}).get("cellId")
    if not cell:
        return
    run = parent.get("header", {}).get("msg_id", "")
    before, made = _of_cells.get(cell, ("", []))
    if before != run:
        for old in made:
            old.close()
        made = []
    _of_cells[cell] = (run, [*made, widget])
