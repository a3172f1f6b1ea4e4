"""The base class of widgets that show the pool while they are open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ipywidgets as widgets
from IPython import get_ipython
from traitlets import Instance, Unicode

from jupyter_gpupool.core.models import Lease

from . import poller

#: By notebook cell: its last run, and the widgets which that run made. Running the cell again replaces them.
_of_cells: dict[str, tuple[str, list[PoolWidget]]] = {}


class PoolWidget(widgets.VBox):
    """A widget that is updated once a second until it is closed.

    It is closed by :meth:`close`, by the frontend, and when the cell that made it runs again. Its state is in the
    kernel, so a page that is loaded again shows it unchanged.
    """

    lease = Instance(
        Lease, allow_none=True, help="The lease that this notebook has or waits for. None: no lease."
    )
    trouble = Unicode(help="Why the pool cannot be reached; empty if it can.")

    def __init__(self, children: tuple[widgets.Widget, ...], **kwargs: Any) -> None:
        super().__init__(children, **kwargs)
        _replace_of_cell(self)
        if self.comm is not None:
            self.comm.on_close(lambda message: self.close())
        poller.watch(self)

    def close(self) -> None:
        """Close the widget and stop its updates."""
        poller.forget(self)
        for child in self.children:
            child.close()
        super().close()

    def update_pool(self, news: poller.News) -> None:
        """Show the pool's new state. Called from the poller's thread."""
        self.trouble = news.trouble
        self.lease = without_age(news.lease) if news.lease is not None else None


def without_age(lease: Lease) -> Lease:
    """Return the lease without the time of its heartbeat, so that observers are notified of changes only."""
    return replace(lease, heartbeat_at=0.0)


def _replace_of_cell(widget: PoolWidget) -> None:
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
