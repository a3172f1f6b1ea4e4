"""``jupyter_gpupool.Picker()``: ask for slices, resize them and give them back, with the mouse or by traits."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
from IPython import get_ipython
from traitlets import Bool, Float, Int, Unicode, observe

from .. import face
from ..pool.errors import LeaseEnded, PoolError
from ..pool.models import Lease, LeaseState
from . import here, tensors, watching
from .showing import Showing, without_age
from .watching import News


class Picker(Showing):
    """Chooses a number of GPUs and a share of each one's memory.

    ``num_gpus`` and ``partial`` are what is chosen, ``memory_mib`` what that means on this pool, ``grantable`` whether
    it is free now. :meth:`request`, :meth:`resize` and :meth:`release` are what the buttons do. ``lease`` is what
    the notebook has or waits for, ``position`` its place in the queue, ``message`` what the last one came to.
    """

    num_gpus = Int(1, min=1, help="How many GPUs.")
    partial = Float(0.5, min=0.01, max=1.0, help="Share of each GPU's memory.")
    memory_mib = Int(0, help="The MiB that this share is of this pool's smallest GPU. 0: not known yet.")
    grantable = Bool(False, help="Whether a request would be granted now.")
    position = Int(None, allow_none=True, help="Place in the queue, from 1. None: it is not waiting.")
    message = Unicode(help="What the last request, resize or release came to, one line.")

    def __init__(self, **kwargs: Any) -> None:
        self._pool: dict[str, Any] | None = None
        self._asking: threading.Thread | None = None
        self._given_up = threading.Event()
        self._farthest = 1
        self._count = widgets.BoundedIntText(1, min=1, max=1, description="GPUs")
        self._share = widgets.FloatSlider(
            0.5, min=0.05, max=1.0, step=0.05, description="of each", readout_format=".0%"
        )
        self._means = widgets.HTML()
        self._has = widgets.HTML()
        self._said = widgets.HTML()
        self._queue = widgets.IntProgress(0, min=0, max=1, description="queue")
        self._queue.layout.display = "none"
        self._buttons = {
            "request": self._button("Request", self.request),
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
        self._weigh()

    # -- what it does

    def request(self) -> None:
        """Ask for what is chosen and attach it when it is granted, beside what the notebook does.

        Raises PoolError, also when there is something to give back first.
        """
        if self._asking is not None or (here.lease_id() is not None and not here.forget_ended()):
            raise PoolError("this notebook has slices, or waits for some; release them first")
        # PyTorch is imported here, in the notebook's own thread; other threads only wait and attach.
        face.check_torch()
        self._given_up.clear()
        self.message = "Asking…"
        arguments = (self.num_gpus, self.partial)
        self._asking = threading.Thread(target=self._ask, args=arguments, name="gpupool-picker", daemon=True)
        self._asking.start()

    def resize(self) -> None:
        """Give the slices that are attached the share that is chosen. Raises PoolError."""
        found = here.spec()
        if found is None:
            raise PoolError("this notebook has no slices to resize")
        if len(found.devices) != self.num_gpus:
            raise PoolError(
                f"the number of GPUs of a lease stays ({len(found.devices)} here); release it, and request another"
            )
        self._tell(f"Resized: {here.describe(here.resize(self.partial, None))}")

    def release(self, force: bool = False) -> None:
        """Give back what there is, its tensors moved to the CPU, or leave the queue. Raises PoolError."""
        if self._asking is not None:
            self._given_up.set()
            self.message = "Leaving the queue…"
            return
        if here.lease_id() is None:
            raise PoolError("this notebook has no slices and waits for none")
        attached = here.spec() is not None
        shell = get_ipython()
        told = tensors.clear(shell.user_ns if shell else {}, force=force) if attached else ""
        here.release()
        self._tell(("Released" if attached else "Left the queue") + (f"; {told}" if told else ""))

    def wait(self, timeout: float | None = None) -> None:
        """Wait until what was requested is attached or has come to nothing (see ``message``)."""
        asking = self._asking
        if asking is not None:
            asking.join(timeout)

    def close(self) -> None:
        self._given_up.set()
        super().close()

    # -- how

    def _ask(self, num_gpus: int, partial: float) -> None:
        try:
            lease = face.attach(num_gpus, partial, label="notebook", news=self._news)
            said = f"Attached: {here.describe(lease.spec)}"
        except (PoolError, RuntimeError) as e:
            said = "Left the queue" if self._given_up.is_set() else str(e).splitlines()[0]
        self._asking = None
        self._tell(said)

    def _news(self, lease: Lease) -> None:
        """While it waits, about once a second."""
        if self._given_up.is_set():
            raise LeaseEnded("it was given up")
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
            self._tell(str(e).splitlines()[0])

    def _tell(self, line: str) -> None:
        self.message = line
        watching.look_now()

    # -- what it shows

    def hear(self, news: News) -> None:
        self._pool = news.pool
        super().hear(news if self._asking is None else replace(news, lease=self.lease))
        if news.lease is not None:
            self._show_place(news.lease)
        elif self._asking is None:
            self.position = None
            self._queue.layout.display = "none"
        self._has.value = html.escape(self._what_there_is(news))
        self._weigh()

    def _what_there_is(self, news: News) -> str:
        if news.trouble:
            return news.trouble
        found = here.spec()
        if found is not None:
            return f"This notebook has {here.describe(found)}"
        if self.position is not None:
            return f"Waiting: position {self.position} in the queue"
        return here.refusal() or "This notebook has no slices"

    def _show_place(self, lease: Lease) -> None:
        waits = lease.state is LeaseState.QUEUED and lease.position is not None
        self.position = lease.position if waits else None
        self._queue.layout.display = "" if waits else "none"
        if lease.position is not None:
            self._farthest = max(self._farthest, lease.position) if waits else 1
            self._queue.max = self._farthest
            self._queue.value = self._farthest - lease.position
            self._queue.description = f"place {lease.position}"

    @observe("message")
    def _show_message(self, change: Any) -> None:
        self._said.value = html.escape(change["new"])

    @observe("num_gpus", "partial")
    def _weigh(self, change: Any = None) -> None:
        """What the choice means on this pool, and what can be done about it."""
        if not hasattr(self, "_said"):
            return  # the traits are set before there is anything to show them
        if self._count.value != self.num_gpus or self._share.value != self.partial:
            self._count.max = max(self._count.max, self.num_gpus)
            self._count.value, self._share.value = self.num_gpus, self.partial
        servers = [s["gpus"] for s in self._pool["servers"]] if self._pool else []
        most = max((len(gpus) for gpus in servers), default=0)
        self._count.max = max(1, most, self.num_gpus)
        possible = 0 < self.num_gpus <= most
        here_now = here.spec() is not None
        busy = self._asking is not None or here.lease_id() is not None
        self.grantable = possible and any(
            sum(_free(gpu) >= _share(gpu, self.partial) for gpu in gpus) >= self.num_gpus for gpus in servers
        )
        sizes = [_share(gpu, self.partial) for gpus in servers for gpu in gpus]
        self.memory_mib = min(sizes, default=0)
        self._means.value = html.escape(self._meaning(servers, most))
        self._buttons["request"].disabled = busy or not possible
        self._buttons["request"].description = "Request" if self.grantable else "Queue"
        self._buttons["resize"].disabled = not here_now
        self._buttons["release"].disabled = not busy

    def _meaning(self, servers: list[list[dict[str, Any]]], most: int) -> str:
        gpus = [gpu for group in servers for gpu in group]
        if not gpus:
            return ""
        if self.num_gpus > most:
            return f"No server has {self.num_gpus} GPUs; the largest has {most}"
        emulated = ", emulated" if all(gpu["emulated"] for gpu in gpus) else ""
        free = sum(_free(gpu) >= _share(gpu, self.partial) for gpu in gpus)
        now = "free now" if self.grantable else "not free now: the request would wait"
        return f"{self.num_gpus} × {self.memory_mib} MiB{emulated}: {now} ({free} of {len(gpus)} GPUs have as much)"


def _free(gpu: dict[str, Any]) -> int:
    return gpu["memory_mib"] - gpu["granted_mib"]


def _share(gpu: dict[str, Any], partial: float) -> int:
    return int(partial * gpu["memory_mib"] + 1e-6)
