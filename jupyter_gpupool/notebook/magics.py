"""``%gpupool`` and ``%%gpupool``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments
from IPython.display import display

from .. import face, holder
from ..pool.errors import PoolError
from ..pool.models import Lease, LeaseState
from . import here, tables, tensors

_HELP = {"-h", "--help"}


def _words(line: str) -> list[str]:
    """As a shell would: IPython's own way leaves the quotation marks in."""
    try:
        return shlex.split(line)
    except ValueError as e:
        raise UsageError(f"%gpupool: {str(e).lower()} in {line.strip()[:60]}") from None


def _parse(command: Any, line: str) -> Any:
    return command.parser.parse_args(_words(line))


def _sized(function: Callable) -> Callable:
    """The options that say how much."""
    for add in (
        argument("-m", "--memory", type=int, metavar="MiB", help="memory of each GPU instead, in MiB"),
        argument(
            "-p", "--partial", type=float, metavar="F", help="share of each GPU's memory, above 0, at most 1"
        ),
        argument("-n", "--num-gpus", type=int, metavar="N", help="how many GPUs"),
    ):
        function = add(function)
    return function


@magic_arguments("gpupool request")
@_sized
@argument(
    "--filter", action="append", default=[], metavar="KEY=VALUE", help="name, server, uuid, index or emulated"
)
@argument("--spread", action="store_true", help="they may be of several servers, where none has room for all")
@argument("--no-wait", action="store_true", help="fail when the slices are not free now")
@argument("--timeout", type=float, metavar="S", help="wait at most so many seconds")
def request(magics: GPUPoolMagics, line: str) -> None:
    """Ask for slices and attach them to this kernel; nothing is lost that is there already."""
    args = _parse(request, line)
    magics.obtain(args)


@magic_arguments("gpupool status")
def status(magics: GPUPoolMagics, line: str) -> None:
    """Show what this notebook has or waits for."""
    _parse(status, line)
    client, pool = here.pool()
    try:
        lease = here.known(client)
    finally:
        client.close()
    if lease is None or lease.state.ended:
        ended = f"; its last lease has ended: {lease.reason}" if lease is not None else ""
        why = here.refusal()
        without = f"; it was started without one: {why}" if why else ""
        display(
            tables.Table(
                f"This notebook has no GPU{ended or without}. %gpupool request -n 1 -p 0.5 asks for one."
            )
        )
        return
    used = {
        gpu["uuid"]: piece.get("used_mib", 0) * 2**20
        for server in pool["servers"]
        for gpu in server["gpus"]
        for piece in gpu["slices"]
        if piece["lease"] == lease.id
    }
    display(tables.of_lease(lease, used or magics.allocated(lease)))


@magic_arguments("gpupool gpus")
def gpus(magics: GPUPoolMagics, line: str) -> None:
    """Show the pool's GPUs and who has which part of them."""
    _parse(gpus, line)
    client, pool = here.pool()
    client.close()
    display(tables.of_pool(pool, here.lease_id()))


@magic_arguments("gpupool resize")
@_sized
def resize(magics: GPUPoolMagics, line: str) -> None:
    """Change the memory of this notebook's slices where they are; tensors on them stay."""
    args = _parse(resize, line)
    found = here.spec()
    if found is None:
        raise UsageError("this notebook has no slices to resize; %gpupool request asks for some")
    count = len(found.devices)
    if args.num_gpus not in (None, count):
        raise UsageError(
            f"the number of GPUs of a lease stays ({count} here), only their memory changes; "
            f"%gpupool release, then %gpupool request -n {args.num_gpus}"
        )
    print(here.describe(here.resize(args.partial, args.memory)))


@magic_arguments("gpupool release")
@argument("--drop", action="store_true", help="do not move tensors to the CPU; they are lost")
@argument("--force", action="store_true", help="release even if some tensors cannot be moved")
def release(magics: GPUPoolMagics, line: str) -> None:
    """Give the slices back, or leave the queue. Tensors on them are moved to the CPU, in place."""
    args = _parse(release, line)
    if here.lease_id() is None:
        raise UsageError("this notebook has no slices and waits for none")
    attached = here.spec() is not None
    moved = magics.clear(args.drop, args.force) if attached else ""
    here.release()
    print(f"Released{moved}" if attached else "Left the queue")


@magic_arguments("gpupool history")
@argument("-n", "--newest", type=int, default=20, metavar="N", help="how many; default: 20")
def history(magics: GPUPoolMagics, line: str) -> None:
    """Show the leases you have and had."""
    args = _parse(history, line)
    client, _ = here.pool()
    try:
        leases = client.leases(True)
    finally:
        client.close()
    display(tables.of_history(sorted(leases, key=lambda lease: lease.created_at)[-max(0, args.newest) :]))


@magic_arguments("gpupool wait")
@argument("--timeout", type=float, metavar="S", help="at most so many seconds")
def wait(magics: GPUPoolMagics, line: str) -> None:
    """Wait until the slices that this kernel was started for are attached."""
    args = _parse(wait, line)
    holder.check_timeout(args.timeout)
    from . import extension

    found = here.spec()
    if found is not None:
        print(here.describe(found))
        return
    pending = extension.pending()
    if pending is None or not os.environ.get(here.PENDING):
        raise UsageError("this notebook waits for nothing; %gpupool request asks for slices")
    client, _ = here.pool()
    try:
        waited, shown = 0.0, None
        while not pending.attached.wait(0.5):
            waited += 0.5
            lease = here.known(client)
            if lease is not None and lease.state.ended:
                raise UsageError(f"the request has ended: {lease.reason}")
            if lease is not None and lease.position != shown:
                shown = lease.position
                print(f"Position {shown} in the queue")
            if args.timeout is not None and waited >= args.timeout:
                raise UsageError(
                    f"not granted within {args.timeout:g} s; it goes on waiting beside the notebook"
                )
    finally:
        client.close()


COMMANDS: dict[str, Any] = {f.__name__: f for f in (request, status, gpus, resize, release, history, wait)}
SUMMARIES = {
    "request": "Ask for slices and attach them to this kernel.",
    "status": "Show what this notebook has or waits for.",
    "gpus": "Show the pool's GPUs and who has which part of them.",
    "resize": "Change the memory of this notebook's slices where they are.",
    "release": "Give the slices back, or leave the queue; tensors are moved to the CPU.",
    "history": "Show the leases you have and had.",
    "wait": "Wait until the slices that this kernel was started for are attached.",
}


@magics_class
class GPUPoolMagics(Magics):
    """Slices of pooled GPUs in this notebook."""

    @line_cell_magic
    def gpupool(self, line: str, cell: str | None = None) -> None:
        """``%gpupool request -n 2 -p 0.8`` · status · gpus · resize · release · history · wait; each takes ``--help``.

        ``%%gpupool -n 1 -p 0.5`` holds a slice for the cell only.
        """
        try:
            if cell is not None:
                self._cell(line, cell)
                return
            name, rest = [*line.split(None, 1), "", ""][:2]
            if name in _HELP:
                print(_help())
                return
            command = COMMANDS.get(name or "status")
            if command is None:
                raise UsageError(f"%gpupool {name[:40]}: no such command; there are {', '.join(COMMANDS)}")
            if _HELP & set(_words(rest)):
                command.parser.print_help()
                return
            command(self, rest)
        except (PoolError, face.AlreadyAttached) as e:
            raise UsageError(str(e)) from None
        except RuntimeError as e:
            if isinstance(e, UsageError):
                raise
            raise UsageError(str(e).splitlines()[0]) from None

    # -- what the commands share

    def obtain(self, args: Any) -> face.Lease:
        """Ask, tell the position while it waits, attach."""
        shown: list[Any] = [None]

        def news(lease: Lease) -> None:
            if lease.state is LeaseState.QUEUED and lease.position != shown[0]:
                shown[0] = lease.position
                print(
                    f"Waiting: position {lease.position} in the queue (interrupt the kernel to leave it)",
                    flush=True,
                )

        if here.lease_id() is not None and not here.forget_ended():
            found = here.spec()
            what = f"has slices already ({here.describe(found)})" if found else "waits for slices already"
            raise UsageError(f"this notebook {what}; %gpupool release gives them up")
        try:
            lease = face.attach(
                args.num_gpus if args.num_gpus is not None else 1,
                args.partial,
                memory_mib=args.memory,
                filters=_filters(args.filter),
                spread=args.spread,
                wait=not args.no_wait,
                timeout=args.timeout,
                label=here.label(),
                news=news,
            )
        except KeyboardInterrupt:
            raise UsageError("left the queue") from None
        os.environ.pop(here.REFUSED, None)
        print(here.describe(lease.spec))
        return lease

    def clear(self, drop: bool, force: bool) -> str:
        told = tensors.clear(_shell(self).user_ns, drop=drop, force=force)
        return f"; {told}" if told else ""

    def allocated(self, lease: Lease) -> dict[str, int]:
        """Bytes that this process has allocated, by GPU."""
        connection = sys.modules.get("jupyter_gpupool.remote.connection")
        session = connection.current() if connection is not None else None
        if session is None or not session.connected:
            return {}
        devices = range(len(session.spec.devices))
        return {s.gpu_uuid: session.memory(k).allocated() for k, s in zip(devices, lease.slices)}

    def _cell(self, line: str, cell: str) -> None:
        words = _words(line)
        if _HELP & set(words):
            print(_help())
            return
        if words and words[0] in COMMANDS:
            raise UsageError(
                f"%%gpupool holds slices for its cell and takes the options of request alone, not {words[0]}: "
                "%%gpupool -n 1 -p 0.5"
            )
        lease = self.obtain(_parse(request, line))
        try:
            result = _shell(self).run_cell(cell)
        finally:
            if face.current() is lease:
                moved = self.clear(False, True)
                lease.release()
                print(f"Released{moved}")
        error = result.error_before_exec or result.error_in_exec
        if error is not None:
            # Its traceback is there already; whoever runs the notebook is to know that the cell failed.
            error._render_traceback_ = lambda: [f"{type(error).__name__}: {error}"]
            raise error


def _shell(magics: GPUPoolMagics) -> Any:
    return magics.shell


def _filters(given: list[str]) -> dict[str, str]:
    filters = {}
    for text in given:
        key, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"--filter {text[:40]}: write it as name=V100")
        filters[key] = value
    return filters


def _help() -> str:
    lines = [f"%gpupool {name:<8} {summary}" for name, summary in SUMMARIES.items()]
    return "\n".join(
        [*lines, "%%gpupool [options of request]: hold slices for one cell only. Each takes --help."]
    )
