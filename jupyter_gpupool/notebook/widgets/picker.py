"""``jupyter_gpupool.Picker()``: request, resize and release GPU slices with buttons or by traits."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
from IPython import get_ipython
from traitlets import Bool, Float, Int, Unicode, observe

from jupyter_gpupool.core.errors import LeaseEnded, PoolError
from jupyter_gpupool.core.models import Lease, LeaseState
from jupyter_gpupool.lease import attach, check_torch
from jupyter_gpupool.notebook import kernel_lease, release_tensors

from . import poller
from .poller import News
from .pool_widget import PoolWidget, without_age


class Picker(PoolWidget):
    """A form for a number of GPU slices and the share of each GPU's memory.

    ``num_gpus`` and ``partial`` are the choice, ``memory_mib`` is its size on this pool, and ``grantable`` says
    whether it is free now. The buttons call :meth:`request`, :meth:`resize` and :meth:`release`. ``lease`` is the
    lease that the notebook has or waits for, ``position`` its position in the queue, and ``message`` the outcome of
    the last call.
    """

    num_gpus = Int(1, min=1, help="Number of GPU slices.")
    partial = Float(0.5, min=0.01, max=1.0, help="Share of each GPU's memory.")
    memory_mib = Int(0, help="The size of this share on this pool's smallest GPU, in MiB. 0: not known yet.")
    grantable = Bool(False, help="Whether a request would be granted now.")
    position = Int(None, allow_none=True, help="Position in the queue, from 1. None: no request waits.")
    message = Unicode(help="The outcome of the last request, resize or release, in one line.")

    def __init__(self, **kwargs: Any) -> None:
        self._pool: dict[str, Any] | None = None
        self._asking: threading.Thread | None = None
        self._given_up = threading.Event()
        self._farthest = 1
        self._count = widgets.BoundedIntText(1, min=1, max=1, description="GPU slices")
        self._share = widgets.FloatSlider(
            0.5, min=0.05, max=1.0, step=0.05, description="of each", readout_format=".0%"
        )
        self._means = widgets.HTML()
        self._has = widgets.HTML()
        self._said = widgets.HTML()
        self._queue = widgets.IntProgress(0, min=0, max=1, description="queue")
        self._queue.layout.display = "none"
        self._buttons = {
            "request": self._button("Request GPUs", self.request),
            "resize": self._button("Resize", self.resize),
            "release": self._button("Release", self.release),
        }
        rows = (
            widgets.HBox((self._count, self._share)),
            self._means,
            widgets.HBox(tuple(self._buttons.values())),
            self._has,
            self._queue,
            self._said,
        )
        super().__init__(rows, **kwargs)
        self._count.max = max(1, self.num_gpus)
        self._count.value, self._share.value = self.num_gpus, self.partial
        self._count.observe(lambda change: setattr(self, "num_gpus", change["new"]), "value")
        self._share.observe(lambda change: setattr(self, "partial", round(change["new"], 4)), "value")
        self._update_choice()

    # -- what it does

    def request(self) -> None:
        """Request the chosen slices, and attach them when they are granted, while the notebook goes on.

        Raises PoolError, also if the notebook already has slices or waits for some.
        """
        if self._asking is not None or (
            kernel_lease.lease_id() is not None and not kernel_lease.forget_ended()
        ):
            raise PoolError("this notebook has GPU slices or waits for some; release them first")
        # Import PyTorch in the notebook's own thread; other threads only wait and attach.
        check_torch()
        self._given_up.clear()
        self.message = "Requesting…"
        arguments = (self.num_gpus, self.partial)
        self._asking = threading.Thread(target=self._ask, args=arguments, name="gpupool-picker", daemon=True)
        self._asking.start()

    def resize(self) -> None:
        """Give the attached slices the chosen share. Raises PoolError."""
        found = kernel_lease.spec()
        if found is None:
            raise PoolError("this notebook has no GPU slices to resize; request some first")
        if len(found.devices) != self.num_gpus:
            raise PoolError(
                f"a lease keeps its number of GPU slices ({len(found.devices)} here); to change it, release them first"
            )
        self._report(f"Resized: {kernel_lease.describe(kernel_lease.resize(self.partial, None))}")

    def release(self, force: bool = False) -> None:
        """Release the slices and move their tensors to the CPU, or leave the queue. Raises PoolError."""
        if self._asking is not None:
            self._given_up.set()
            self.message = "Leaving the queue…"
            return
        if kernel_lease.lease_id() is None:
            raise PoolError("this notebook has no GPU slices and does not wait for any")
        attached = kernel_lease.spec() is not None
        shell = get_ipython()
        moved = release_tensors.clear(shell.user_ns if shell else {}, force=force) if attached else ""
        kernel_lease.release()
        self._report(("Released" if attached else "Left the queue") + (f"; {moved}" if moved else ""))

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the request is attached or has failed (see ``message``)."""
        asking = self._asking
        if asking is not None:
            asking.join(timeout)

    def close(self) -> None:
        """Close the widget, and leave the queue."""
        self._given_up.set()
        super().close()

    # -- how

    def _ask(self, num_gpus: int, partial: float) -> None:
        try:
            lease = attach(num_gpus, partial, label="notebook", on_update=self._news)
            said = f"Attached: {kernel_lease.describe(lease.spec)}"
        except (PoolError, RuntimeError) as e:
            said = "Left the queue" if self._given_up.is_set() else str(e).splitlines()[0]
            self.lease = None
        self._hide_position()
        self._asking = None
        self._report(said)

    def _news(self, lease: Lease) -> None:
        """Show the position in the queue. Called about once a second while the request waits."""
        if self._given_up.is_set():
            raise LeaseEnded("the request was withdrawn")
        self.lease = without_age(lease)
        self._show_place(lease)

    def _button(self, label: str, act: Callable[[], None]) -> widgets.Button:
        button = widgets.Button(description=label, disabled=True)
        button.on_click(lambda _: self._try(act))
        return button

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (PoolError, RuntimeError) as e:
            self._report(str(e).splitlines()[0])

    def _report(self, line: str) -> None:
        self.message = line
        poller.look_now()

    # -- what it shows

    def update_pool(self, news: News) -> None:
        self._pool = news.pool
        super().update_pool(news if self._asking is None else replace(news, lease=self.lease))
        if news.lease is not None:
            self._show_place(news.lease)
        elif self._asking is None:
            self._hide_position()
        self._has.value = html.escape(self._holding(news))
        self._update_choice()

    def _holding(self, news: News) -> str:
        if news.trouble:
            return news.trouble
        found = kernel_lease.spec()
        if found is not None:
            return f"This notebook has {kernel_lease.describe(found)}"
        if self.position is not None:
            return f"Waiting: position {self.position} in the queue"
        return kernel_lease.refusal() or "This notebook has no GPU slices"

    def _show_place(self, lease: Lease) -> None:
        waits = lease.state is LeaseState.QUEUED and lease.position is not None
        self.position = lease.position if waits else None
        self._queue.layout.display = "" if waits else "none"
        if lease.position is not None:
            self._farthest = max(self._farthest, lease.position) if waits else 1
            self._queue.max = self._farthest
            self._queue.value = self._farthest - lease.position
            self._queue.description = f"position {lease.position}"

    def _hide_position(self) -> None:
        self.position = None
        self._queue.layout.display = "none"

    @observe("message")
    def _show_message(self, change: Any) -> None:
        self._said.value = html.escape(change["new"])

    @observe("num_gpus", "partial")
    def _update_choice(self, change: Any = None) -> None:
        """Update the choice's size, whether it is free, and which buttons are enabled."""
        if not hasattr(self, "_said"):
            return  # traits are set before the controls exist
        if self._count.value != self.num_gpus or self._share.value != self.partial:
            self._count.max = max(self._count.max, self.num_gpus)
            self._count.value, self._share.value = self.num_gpus, self.partial
        servers = [s["gpus"] for s in self._pool["servers"]] if self._pool else []
        most = max((len(gpus) for gpus in servers), default=0)
        self._count.max = max(1, most, self.num_gpus)
        possible = 0 < self.num_gpus <= most
        here_now = kernel_lease.spec() is not None
        busy = self._asking is not None or kernel_lease.lease_id() is not None
        self.grantable = possible and any(
            sum(_free(gpu) >= _share(gpu, self.partial) for gpu in gpus) >= self.num_gpus for gpus in servers
        )
        sizes = [_share(gpu, self.partial) for gpus in servers for gpu in gpus]
        self.memory_mib = min(sizes, default=0)
        self._means.value = html.escape(self._meaning(servers, most))
        self._buttons["request"].disabled = busy or not possible
        self._buttons["resize"].disabled = not here_now
        self._buttons["release"].disabled = not busy

    def _meaning(self, servers: list[list[dict[str, Any]]], most: int) -> str:
        gpus = [gpu for group in servers for gpu in group]
        if not gpus:
            return ""
        if self.num_gpus > most:
            return f"No server has {self.num_gpus} GPUs; the largest has {most}. Choose fewer."
        emulated = ", emulated" if all(gpu["emulated"] for gpu in gpus) else ""
        free = sum(_free(gpu) >= _share(gpu, self.partial) for gpu in gpus)
        now = "free now" if self.grantable else "not free now, the request would wait in the queue"
        count = f"{free} of {len(gpus)} GPUs have that much free"
        return f"{self.num_gpus} × {self.memory_mib} MiB{emulated}: {now} ({count})"


def _free(gpu: dict[str, Any]) -> int:
    return int(gpu["memory_mib"]) - int(gpu["granted_mib"])


def _share(gpu: dict[str, Any], partial: float) -> int:
    return int(partial * gpu["memory_mib"] + 1e-6)
