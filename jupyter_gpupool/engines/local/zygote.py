"""The warm parent: a process that has imported PyTorch and forks a worker for each lease.

Started by :class:`~.warm_parent.WarmParent` as ``python -m jupyter_gpupool.engines.local.zygote FD POOL FOLDER
[--persistent] [--environment=NAME] [--operators=NAME,…] [--sandbox=auto|require|off]``: the descriptor of its control
socket, the pool's process id, the folder of the state files, the name of the environment that it runs in, the
operators of other libraries that are allowed there, as :mod:`jupyter_gpupool.core.operator_names` writes them, and
whether workers are shut in.
Messages are JSON on a SOCK_SEQPACKET socket, one in each packet. It never starts a thread and never uses CUDA: forks
would inherit neither intact.

In: ``{"start": WorkerSpec without its secrets, "host": where to listen, "port": 0 for any, "bounds": what the worker
enters, see bounds/own_limits.py}``, and with it the secrets' descriptors, see worker_secrets.py. Out: ``{"ready": pid,
"torch", "abi": of its Python, "gpupool": version, "operators": {name: why it cannot be used, empty if it can},
"sandbox": {"emulated": {layer: why workers lack it, empty if they have it}, "real": the same with real GPUs}}`` or
``{"unusable": why, "advice": what to do, if not to install PyTorch}`` once; ``{"started": lease, "pid", "created",
"port", "environment", "torch"}`` or ``{"failed": lease, "why"}``; ``{"ended": lease, "code": exit code, or minus the
signal}``. A worker that speaks TLS has a socket file for the data port, not a port.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jupyter_gpupool._version import __version__
from jupyter_gpupool.core import processes
from jupyter_gpupool.core.operator_names import ExtraOperator, extra_operator
from jupyter_gpupool.core.torch_release import release_of
from jupyter_gpupool.gpus.mps import mps_limits, mps_runs
from jupyter_gpupool.transport import control
from jupyter_gpupool.transport.specs import EXIT_NOT_BOUND, EXIT_NOT_SHUT_IN, EXIT_UNRECORDED, WorkerSpec

from . import compile_helpers, worker_files, worker_secrets
from .bounds import own_limits
from .sandbox import layers, surroundings
from .sandbox.sandbox import NotShutIn, Sandbox, prepare


class Zygote:
    """Forks workers on request, and reports their ends."""

    def __init__(self, control: socket.socket, folder: str, persistent: bool, environment: str) -> None:
        self._control = control
        self._folder = folder
        self._persistent = persistent
        #: what every worker from here says of itself: the environment, and its release of PyTorch
        self.runs_in = {"environment": environment, "torch": ""}
        self.sandbox = Sandbox()
        self._children: dict[int, str] = {}
        self._helpers = compile_helpers.CompileHelpers(folder)
        self._wake, waker = socket.socketpair()
        self._wake.setblocking(False)
        waker.setblocking(False)
        self._waker = waker
        self._hangup = select.poll()
        self._hangup.register(control, 0)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve until the pool is gone; then end the workers, or outlive them if they are persistent."""
        waiting = [self._control, self._wake]
        while self._control in waiting or self._children:
            ready = _readable([*waiting, *self._helpers.sockets()])
            for sock in set(self._helpers.sockets()).intersection(ready):
                self._helpers.start(sock, self.sandbox, self._leave)
            if self._wake in ready:
                self._drain()
                self._reap()
            if self._control in ready:
                packet, descriptors = self._receive()
                if packet:
                    try:
                        self._start(json.loads(packet), descriptors)
                    finally:
                        worker_secrets.close(descriptors)
                    continue
                waiting.remove(self._control)
                if not self._persistent:
                    for pid in self._children:
                        os.kill(pid, signal.SIGKILL)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the pool, if it is there."""
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:
            pass  # the pool is gone; its successor finds the workers' state files

    def _receive(self) -> tuple[bytes, list[int]]:
        try:
            packet, descriptors, _, _ = socket.recv_fds(
                self._control, 1 << 20, worker_secrets.MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return b"", []
        return packet, descriptors

    def _drain(self) -> None:
        try:
            while self._wake.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            processes.kill_group(pid, None)  # what it has started must not outlive its lease
            self._helpers.forget(pid)
            _, status = os.waitpid(pid, 0)
            lease = self._children.pop(pid, None)
            if lease is not None:
                self.send({"ended": lease, "code": os.waitstatus_to_exitcode(status)})

    def _start(self, message: dict[str, Any], descriptors: Sequence[int]) -> None:
        spec = WorkerSpec.from_json(message["start"])
        try:
            listener = (
                _door(self._folder, spec.lease_id)
                if worker_secrets.speaks_tls(descriptors)
                else _listen(message["host"], message.get("port", 0))
            )
        except OSError as e:
            self.send({"failed": spec.lease_id, "why": f"{message['host']}: {e.strerror or e}"})
            return
        asked_at = _control(self._folder, spec.lease_id)  # before it is reported: it may be asked at once
        real = any(not device.emulated for device in spec.devices)
        ours, theirs = compile_helpers.pair(self.sandbox, real)
        me = os.getpid()
        try:
            lock = worker_files.lock(self._folder)
            try:
                if self._hangup.poll(0):
                    return  # the pool is gone, and its successor may have counted the workers already
                pid = os.fork()
                if pid == 0:
                    if ours is not None:
                        ours.close()
                    self._become_worker(
                        spec, descriptors, listener, asked_at, theirs, me, lock, message.get("bounds", {})
                    )
                if ours is not None:
                    self._helpers.add(ours, pid, spec, message.get("bounds", {}))
            finally:
                os.close(lock)
        except OSError as e:
            worker_files.remove(worker_files.path(self._folder, spec.lease_id))
            self.send({"failed": spec.lease_id, "why": e.strerror or str(e)})
            return
        finally:
            port = _port(listener)
            listener.close()
            for sock in (asked_at, theirs):
                if sock is not None:
                    sock.close()
        self._children[pid] = spec.lease_id
        # It is not reaped yet, so that even a dead worker has a creation time; its end follows.
        created = processes.birth(pid) or 0.0
        self.send({"started": spec.lease_id, "pid": pid, "created": created, "port": port, **self.runs_in})

    def _leave(self) -> None:
        """In a fork: let go what is this process's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for sock in (self._control, self._wake, self._waker):
            sock.close()
        self._helpers.close()

    def _become_worker(
        self,
        spec: WorkerSpec,
        descriptors: Sequence[int],
        listener: socket.socket,
        asked_at: socket.socket | None,
        helper: socket.socket | None,
        parent: int,
        lock: int,
        bounds: Mapping[str, Any],
    ) -> None:
        """Never returns. Closes the pool's sockets first."""
        code = 1
        try:
            self._leave()
            os.setpgid(0, 0)  # what it starts belongs to it, and ends with it
            if not _enter_bounds(spec.lease_id, bounds):
                code = EXIT_NOT_BOUND
            elif self._persistent or processes.die_with_parent(parent):
                spec = worker_secrets.take(spec, descriptors)
                code = _work(spec, listener, asked_at, helper, self._folder, lock, self.runs_in, self.sandbox)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)


def _readable(sockets: Sequence[socket.socket]) -> list[socket.socket]:
    """Wait until any of these can be read, or is at its end."""
    poll = select.poll()  # select takes no descriptor above 1023
    for sock in sockets:
        poll.register(sock, select.POLLIN)
    found = {descriptor for descriptor, _ in poll.poll()}
    return [sock for sock in sockets if sock.fileno() in found]


def _enter_bounds(lease_id: str, bounds: Mapping[str, Any]) -> bool:
    try:
        own_limits.enter(bounds)
    except OSError as e:
        print(f"gpupool worker: lease {lease_id} cannot be bounded: {e.strerror}", file=sys.stderr)
        return False
    return True


def _listen(host: str, port: int) -> socket.socket:
    """``port`` 0: any; else that of a worker that has ended, whose clients come back there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        # A successor takes the port over while connections of this worker are not quite closed.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    return listener


def _door(folder: str, lease_id: str) -> socket.socket:
    """The socket at which the acceptor hands over this lease's connections."""
    door = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    parent = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # The folder's own path may be longer than that of a Unix socket can be.
        door.bind(f"/proc/self/fd/{parent}/{lease_id}{worker_files.DOOR}")
    except OSError:
        door.close()
        raise
    finally:
        os.close(parent)
    return door


def _control(folder: str, lease_id: str) -> socket.socket | None:
    """The socket at which the engine asks the worker to park its memory; None if there can be none."""
    try:
        return control.listen(folder, lease_id + worker_files.CONTROL)
    except OSError as e:
        print(f"gpupool worker: lease {lease_id} cannot be parked: {e.strerror or e}", file=sys.stderr)
        return None


def _port(listener: socket.socket) -> int:
    """The port's number; 0 for a Unix socket."""
    return 0 if listener.family == socket.AF_UNIX else int(listener.getsockname()[1])


def _work(
    spec: WorkerSpec,
    listener: socket.socket,
    asked_at: socket.socket | None,
    helper: socket.socket | None,
    folder: str,
    lock: int,
    runs_in: Mapping[str, str],
    sandbox: Sandbox,
) -> int:
    file = worker_files.path(folder, spec.lease_id)
    me = os.getpid()
    identity = {
        **{"lease": spec.lease_id, "pid": me, "created": processes.birth(me), "port": _port(listener)},
        **runs_in,
    }
    try:
        own = worker_files.make_own_directory(file)
        worker_files.write(file, identity)
    except OSError as e:
        print(f"gpupool worker: cannot write {file}: {e.strerror}", file=sys.stderr)
        return EXIT_UNRECORDED
    os.close(lock)

    if mps_runs():
        os.environ.update(mps_limits(spec.devices))
    from jupyter_gpupool.engines.frameworks import FRAMEWORKS
    from jupyter_gpupool.pytorch.worker import worker

    known: dict[str, Any] = {}

    def note(**more: Any) -> None:
        known.update(more)
        try:
            worker_files.report(file, known)
        except OSError:
            pass  # a full disk: the worker is recorded, only its state is not updated

    def look(limit: worker.Limit) -> None:
        order = worker_files.read_order(file)
        if order is not None and order["order"] != known.get("obeyed", {}).get("order"):
            note(obeyed={"order": order["order"], "in_use": limit(order["limits"])})

    def shut_in() -> None:
        with_programs = not sandbox.refuses_programs(real)
        surroundings.prepare(own, listener, sandbox.missing(real), with_programs, helper)
        sandbox.enter(own, real)

    real = any(not device.emulated for device in spec.devices)
    try:
        code = worker.serve(
            spec, listener, lambda usage: note(usage=usage), look, asked_at, FRAMEWORKS, shut_in
        )
    except NotShutIn as e:
        print(f"gpupool worker: lease {spec.lease_id} cannot be shut in its sandbox: {e}", file=sys.stderr)
        code = EXIT_NOT_SHUT_IN
    note(code=code)
    return code


def main() -> None:
    """Run the warm parent until the pool is gone."""
    persistent = "--persistent" in sys.argv[4:]
    options = dict(word[2:].split("=", 1) for word in sys.argv[4:] if "=" in word)
    environment = options.get("environment", "")
    operators = [extra_operator(name) for name in options.get("operators", "").split(",") if name]
    if not persistent and not processes.die_with_parent(int(sys.argv[2])):
        return
    zygote = Zygote(socket.socket(fileno=int(sys.argv[1])), sys.argv[3], persistent, environment)
    try:
        import torch

        from jupyter_gpupool.engines import frameworks
        from jupyter_gpupool.pytorch.worker import worker  # noqa: F401  imported once here, before the forks

        frameworks.preload()
        usable = _allow(operators, environment)
        _warm_up(torch)
        mode = cast("layers.Mode", options.get("sandbox", "off"))
        zygote.sandbox = prepare(mode, Path(sys.argv[3]))
    except ImportError as e:
        zygote.send({"unusable": f"PyTorch cannot be imported where the pool runs ({e})"})
        return
    if zygote.sandbox.objection:
        why = f"sandbox is set to 'require', and workers here cannot have all of it ({zygote.sandbox.objection})"
        zygote.send({"unusable": why, "advice": "set it to 'auto'"})
        return
    gc.collect()
    gc.freeze()  # keeps the pages shared with the forks
    zygote.runs_in["torch"] = release_of(torch.__version__)
    zygote.send(
        {
            **{
                "ready": os.getpid(),
                "torch": torch.__version__,
                "abi": sysconfig.get_config_var("SOABI") or "",
            },
            **{"gpupool": __version__, "operators": usable},
            "sandbox": {
                "emulated": zygote.sandbox.missing(real=False),
                "real": zygote.sandbox.missing(real=True),
            },
        }
    )
    zygote.run()


def _allow(operators: Sequence[ExtraOperator], environment: str) -> dict[str, str]:
    """Import the libraries of these operators and let workers run them.

    Return each with why it cannot be used, empty if it can.
    """
    import torch

    from jupyter_gpupool.pytorch.worker import allowed_operators

    missing: dict[str, str] = {}
    for module in dict.fromkeys(extra.module for extra in operators):
        try:
            importlib.import_module(module)
        except Exception as e:  # a library's own mistakes are of many kinds
            why = " ".join(str(e).split())
            missing[module] = f"{module} cannot be imported ({type(e).__name__}: {why})"
    usable = {}
    for operator, module in operators:
        library, _, name = operator.partition("::")
        is_there = hasattr(getattr(torch.ops, library), name)
        usable[operator] = "" if is_there else missing.get(module, f"{module} has no such operator")
    where = f": gpupool server environment add {environment} --operators NAME,…"
    if environment == "default":
        where = " to c.LocalEngine.operators"
    allowed_operators.allow(usable, where)
    return usable


def _warm_up(torch: Any) -> None:
    """Do once what PyTorch does at first use, before forking. On one thread: others would not survive a fork.

    Kernels for the CPU are compiled when they are first used: an LSTM's take as long as ten of its steps. Matrices of
    less than 64 rows have others, and so has inference. No backward pass runs, for that may start threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    nn = torch.nn
    with torch.random.fork_rng(devices=[]):
        x = torch.ones(64, 64)
        (x @ x).sum().item()
        for dtype in (torch.float32, torch.bfloat16):
            nn.functional.linear(x.to(dtype), x.to(dtype), x[0].to(dtype))
        for channels in (1, 8):
            nn.Conv2d(channels, 8, 3)(torch.ones(1, channels, 16, 16))
        for network in (nn.LSTM(64, 64), nn.GRU(64, 64)):
            network(x.view(4, 16, 64))
        nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True)(x.view(4, 16, 64))
        nn.functional.embedding(torch.zeros(4, dtype=torch.int64), x)
        torch.randn(64, 64).exp().sum()
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
