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

from jupyter_gpupool.client import requests
from jupyter_gpupool.core.environment import PENDING, REFUSED
from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.models import Lease, LeaseState
from jupyter_gpupool.core.request_schema import FIELDS, SIZE
from jupyter_gpupool.core.validation import FILTERS
from jupyter_gpupool.lease import AlreadyAttached, attach, current
from jupyter_gpupool.lease import Lease as AttachedLease

from . import kernel_lease, release_tensors, tables

_HELP = {"-h", "--help"}


def _words(line: str) -> list[str]:
    """Split a line as a shell does. IPython's own split keeps the quotation marks."""
    try:
        return shlex.split(line)
    except ValueError as e:
        raise UsageError(f"%gpupool: {str(e).lower()} in {line.strip()[:60]}") from None


def _parse(command: Any, line: str) -> Any:
    return command.parser.parse_args(_words(line))


def _option(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option of a request's field."""
    field = FIELDS[name]
    assert field.option is not None
    option = field.option
    if field.kind is bool:
        return argument(*option.flags, action="store_true", help=option.help)
    if field.kind is dict:
        text = f"{option.help}; NAME is one of {', '.join(FILTERS)}"
        return argument(*option.flags, action="append", default=[], metavar=option.metavar, help=text)
    return argument(*option.flags, type=field.kind, metavar=option.metavar, help=option.help)


def _sized(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how much of how many GPUs."""
    for name in reversed(SIZE):
        function = _option(name)(function)
    return function


@magic_arguments("gpupool request")
@_sized
@_option("filters")
@_option("spread")
@_option("never_park")
@_option("wait")
@argument("--timeout", type=float, metavar="S", help="wait at most S seconds")
def request(magics: GPUPoolMagics, line: str) -> None:
    """Request GPU slices and attach them to this kernel. Its variables stay."""
    args = _parse(request, line)
    magics.obtain(args)


@magic_arguments("gpupool status")
def status(magics: GPUPoolMagics, line: str) -> None:
    """Show this notebook's GPU slices, or its position in the queue."""
    _parse(status, line)
    client, pool = kernel_lease.pool()
    try:
        lease = kernel_lease.known(client)
    finally:
        client.close()
    if lease is None or lease.state.ended:
        ended = f"; its last lease has ended: {lease.reason}" if lease is not None else ""
        why = kernel_lease.refusal()
        without = f"; its kernel started without one: {why}" if why else ""
        display(
            tables.Table(
                f"This notebook has no GPU slice{ended or without}. "
                "To request one: %gpupool request -n 1 -p 0.5"
            )
        )
        return
    mine = {
        gpu["uuid"]: piece
        for server in pool["servers"]
        for gpu in server["gpus"]
        for piece in gpu["slices"]
        if piece["lease"] == lease.id
    }
    used = {uuid: piece.get("used_mib", 0) * 2**20 for uuid, piece in mine.items()}
    frameworks = sorted({name for piece in mine.values() for name in piece.get("frameworks", ())})
    display(tables.of_lease(lease, used or magics.allocated(lease), frameworks))


@magic_arguments("gpupool gpus")
def gpus(magics: GPUPoolMagics, line: str) -> None:
    """Show the pool's GPUs and who holds which part of them."""
    _parse(gpus, line)
    client, pool = kernel_lease.pool()
    client.close()
    display(tables.of_pool(pool, kernel_lease.lease_id()))


@magic_arguments("gpupool resize")
@_sized
def resize(magics: GPUPoolMagics, line: str) -> None:
    """Change the memory of this notebook's GPU slices. Tensors on them stay."""
    args = _parse(resize, line)
    found = kernel_lease.spec()
    if found is None:
        raise UsageError("this notebook has no GPU slices to resize; request some with %gpupool request")
    count = len(found.devices)
    if args.num_gpus not in (None, count):
        raise UsageError(
            f"a lease keeps its number of GPU slices ({count} here), only their memory can change; "
            f"for another number: %gpupool release, then %gpupool request -n {args.num_gpus}"
        )
    print(kernel_lease.describe(kernel_lease.resize(args.partial, args.memory)))


@magic_arguments("gpupool release")
@argument(
    "--drop", action="store_true", help="lose the tensors on the slices instead of moving them to the CPU"
)
@argument("--force", action="store_true", help="release even if some tensors cannot be moved")
def release(magics: GPUPoolMagics, line: str) -> None:
    """Release the GPU slices, or leave the queue. Tensors on them are moved to the CPU, in place."""
    args = _parse(release, line)
    if kernel_lease.lease_id() is None:
        raise UsageError("this notebook has no GPU slices and does not wait for any")
    attached = kernel_lease.spec() is not None
    moved = magics.clear(args.drop, args.force) if attached else ""
    kernel_lease.release()
    print(f"Released{moved}" if attached else "Left the queue")


@magic_arguments("gpupool history")
@argument("-n", "--newest", type=int, default=20, metavar="N", help="number of leases; default: 20")
def history(magics: GPUPoolMagics, line: str) -> None:
    """Show your leases, the ended ones too."""
    args = _parse(history, line)
    client, _ = kernel_lease.pool()
    try:
        leases = client.leases(True)
    finally:
        client.close()
    display(tables.of_history(sorted(leases, key=lambda lease: lease.created_at)[-max(0, args.newest) :]))


@magic_arguments("gpupool keep")
def keep(magics: GPUPoolMagics, line: str) -> None:
    """Keep the GPU slices: restart their idle time, and decline requests to release them."""
    _parse(keep, line)
    lease_id = kernel_lease.lease_id()
    if lease_id is None or kernel_lease.spec() is None:
        raise UsageError("this notebook has no GPU slices to keep; request some with %gpupool request")
    client, _ = kernel_lease.pool()
    try:
        client.keep(lease_id)
    finally:
        client.close()
    print("Kept; its idle time starts again")


@magic_arguments("gpupool wait")
@argument("--timeout", type=float, metavar="S", help="wait at most S seconds")
def wait(magics: GPUPoolMagics, line: str) -> None:
    """Wait until the GPU slices requested at this kernel's start are attached."""
    args = _parse(wait, line)
    requests.check_timeout(args.timeout)
    found = kernel_lease.spec()
    if found is not None:
        print(kernel_lease.describe(found))
        return
    pending = kernel_lease.pending()
    if pending is None or not os.environ.get(PENDING):
        raise UsageError("this notebook does not wait for GPU slices; request some with %gpupool request")
    client, _ = kernel_lease.pool()
    try:
        waited, shown = 0.0, None
        while not pending.attached.wait(0.5):
            waited += 0.5
            lease = kernel_lease.known(client)
            if lease is not None and lease.state.ended:
                raise UsageError(f"the request has ended: {lease.reason}")
            if lease is not None and lease.position != shown:
                shown = lease.position
                print(f"Position {shown} in the queue")
            if args.timeout is not None and waited >= args.timeout:
                raise UsageError(f"not granted within {args.timeout:g} s; the request stays in the queue")
    finally:
        client.close()


COMMANDS: dict[str, Any] = {
    f.__name__: f for f in (request, status, gpus, resize, release, keep, history, wait)
}
SUMMARIES = {
    "request": "Request GPU slices and attach them to this kernel.",
    "status": "Show this notebook's GPU slices, or its position in the queue.",
    "gpus": "Show the pool's GPUs and who holds which part of them.",
    "resize": "Change the memory of this notebook's GPU slices; tensors stay.",
    "release": "Release the GPU slices, or leave the queue; tensors are moved to the CPU.",
    "keep": "Keep the GPU slices: restart their idle time.",
    "history": "Show your leases, the ended ones too.",
    "wait": "Wait until the GPU slices requested at this kernel's start are attached.",
}


@magics_class
class GPUPoolMagics(Magics):
    """GPU slices in this notebook."""

    @line_cell_magic
    def gpupool(self, line: str, cell: str | None = None) -> None:
        """``%gpupool request -n 2`` · status · gpus · resize · release · keep · history · wait, each with ``--help``.

        ``%%gpupool -n 1 -p 0.5`` holds a GPU slice for one cell.
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
                raise UsageError(
                    f"%gpupool {name[:40]}: no such command; the commands are {', '.join(COMMANDS)}"
                )
            if _HELP & set(_words(rest)):
                command.parser.print_help()
                return
            command(self, rest)
        except (PoolError, AlreadyAttached) as e:
            raise UsageError(str(e)) from None
        except RuntimeError as e:
            if isinstance(e, UsageError):
                raise
            raise UsageError(str(e).splitlines()[0]) from None

    # -- what the commands share

    def obtain(self, args: Any) -> AttachedLease:
        """Request slices, show the position in the queue while waiting, attach."""
        shown: list[Any] = [None]

        def show_position(lease: Lease) -> None:
            if lease.state is LeaseState.QUEUED and lease.position != shown[0]:
                shown[0] = lease.position
                print(
                    f"Waiting: position {lease.position} in the queue (interrupt the kernel to leave it)",
                    flush=True,
                )

        if kernel_lease.lease_id() is not None and not kernel_lease.forget_ended():
            found = kernel_lease.spec()
            what = (
                f"already has GPU slices ({kernel_lease.describe(found)})"
                if found
                else "already waits for GPU slices"
            )
            raise UsageError(f"this notebook {what}; release them first with %gpupool release")
        try:
            lease = attach(
                args.num_gpus if args.num_gpus is not None else 1,
                args.partial,
                memory_mib=args.memory,
                filters=_filters(args.filter),
                spread=args.spread,
                never_park=args.never_park,
                wait=not args.no_wait,
                timeout=args.timeout,
                label=kernel_lease.label(),
                on_update=show_position,
            )
        except KeyboardInterrupt:
            raise UsageError("interrupted; left the queue") from None
        os.environ.pop(REFUSED, None)
        print(kernel_lease.describe(lease.spec))
        return lease

    def clear(self, drop: bool, force: bool) -> str:
        """Move the tensors to the CPU; return what happened to them, for the end of a message."""
        moved = release_tensors.clear(_shell(self).user_ns, drop=drop, force=force)
        return f"; {moved}" if moved else ""

    def allocated(self, lease: Lease) -> dict[str, int]:
        """Return the bytes that this process has allocated, by GPU UUID."""
        connection = sys.modules.get("jupyter_gpupool.pytorch.client.dispatch.attachment")
        session = connection.current() if connection is not None else None
        if session is None or not session.connected:
            return {}
        return {d.uuid: session.memory(d.index).allocated() for d in session.spec.devices}

    def _cell(self, line: str, cell: str) -> None:
        words = _words(line)
        if _HELP & set(words):
            print(_help())
            return
        if words and words[0] in COMMANDS:
            raise UsageError(
                f"%%gpupool holds GPU slices for its cell: it takes the options of request, not {words[0]}; "
                "write %%gpupool -n 1 -p 0.5"
            )
        lease = self.obtain(_parse(request, line))
        try:
            result = _shell(self).run_cell(cell)
        finally:
            if current() is lease:
                moved = self.clear(False, True)
                lease.release()
                print(f"Released{moved}")
        error = result.error_before_exec or result.error_in_exec
        if error is not None:
            # The traceback has been shown; raise again so that running all cells stops here.
            shown = [f"{type(error).__name__}: {error}"]
            error._render_traceback_ = lambda: shown
            try:
                raise error
            finally:
                # Its traceback has this frame: a cycle would keep the tensors of the failed cell.
                del error, result


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
        [*lines, "%%gpupool [options of request]: hold GPU slices for one cell. Each takes --help."]
    )
