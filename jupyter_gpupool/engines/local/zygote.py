"""The warm parent: a process that has imported PyTorch and forks a worker for each lease.

Started by :class:`~.warm_parent.WarmParent` as ``python -m jupyter_gpupool.engines.local.zygote FD POOL FOLDER
[--persistent]``: the descriptor of its control socket, the pool's process id, and the folder of the state files.
Messages are JSON on a SOCK_SEQPACKET socket, one in each packet. It never starts a thread and never uses CUDA: forks
would inherit neither intact.

In: ``{"start": WorkerSpec, "host": where to listen}``. Out: ``{"ready": pid}`` or ``{"unusable": why}``
once; ``{"started": lease, "pid", "created", "port"}`` or ``{"failed": lease, "why"}``;
``{"ended": lease, "code": exit code, or minus the signal}``. A worker with a certificate
has a socket file for the data port, not a port.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
from typing import Any

from jupyter_gpupool.core import processes
from jupyter_gpupool.gpus.mps import mps_limits, mps_runs
from jupyter_gpupool.transport import control
from jupyter_gpupool.transport.specs import EXIT_UNRECORDED, WorkerSpec

from . import worker_files


class Zygote:
    """Forks workers on request, and reports their ends."""

    def __init__(self, control: socket.socket, folder: str, persistent: bool) -> None:
        self._control = control
        self._folder = folder
        self._persistent = persistent
        self._children: dict[int, str] = {}
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
            ready, _, _ = select.select(waiting, [], [])
            if self._wake in ready:
                self._drain()
                self._reap()
            if self._control in ready:
                packet = self._receive()
                if packet:
                    self._start(json.loads(packet))
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

    def _receive(self) -> bytes:
        try:
            return self._control.recv(1 << 20)
        except ConnectionError:
            return b""

    def _drain(self) -> None:
        try:
            while self._wake.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _reap(self) -> None:
        while self._children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            lease = self._children.pop(pid, None)
            if lease is not None:
                self.send({"ended": lease, "code": os.waitstatus_to_exitcode(status)})

    def _start(self, message: dict[str, Any]) -> None:
        spec = WorkerSpec.from_json(message["start"])
        try:
            listener = _door(self._folder, spec.lease_id) if spec.certfile else _listen(message["host"])
        except OSError as e:
            self.send({"failed": spec.lease_id, "why": f"{message['host']}: {e.strerror or e}"})
            return
        asked_at = _control(self._folder, spec.lease_id)  # before it is reported: it may be asked at once
        me = os.getpid()
        try:
            lock = worker_files.lock(self._folder)
            try:
                if self._hangup.poll(0):
                    return  # the pool is gone, and its successor may have counted the workers already
                pid = os.fork()
                if pid == 0:
                    self._become_worker(spec, listener, asked_at, me, lock)
            finally:
                os.close(lock)
        except OSError as e:
            worker_files.remove(worker_files.path(self._folder, spec.lease_id))
            self.send({"failed": spec.lease_id, "why": e.strerror or str(e)})
            return
        finally:
            port = _port(listener)
            listener.close()
            if asked_at is not None:
                asked_at.close()
        self._children[pid] = spec.lease_id
        # It is not reaped yet, so that even a dead worker has a creation time; its end follows.
        created = processes.birth(pid) or 0.0
        self.send({"started": spec.lease_id, "pid": pid, "created": created, "port": port})

    def _become_worker(
        self,
        spec: WorkerSpec,
        listener: socket.socket,
        asked_at: socket.socket | None,
        parent: int,
        lock: int,
    ) -> None:
        """Never returns. Closes the pool's sockets first."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for sock in (self._control, self._wake, self._waker):
                sock.close()
            if self._persistent or processes.die_with_parent(parent):
                code = _work(spec, listener, asked_at, self._folder, lock)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)


def _listen(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.bind((host, 0))
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
    spec: WorkerSpec, listener: socket.socket, asked_at: socket.socket | None, folder: str, lock: int
) -> int:
    file = worker_files.path(folder, spec.lease_id)
    me = os.getpid()
    identity = {"lease": spec.lease_id, "pid": me, "created": processes.birth(me), "port": _port(listener)}
    try:
        worker_files.write(file, identity)
    except OSError as e:
        print(f"gpupool worker: cannot write {file}: {e.strerror}", file=sys.stderr)
        return EXIT_UNRECORDED
    os.close(lock)

    if mps_runs():
        os.environ.update(mps_limits(spec.devices))
    from jupyter_gpupool.pytorch.worker import worker

    known: dict[str, Any] = dict(identity)

    def note(**more: Any) -> None:
        known.update(more)
        try:
            worker_files.write(file, known)
        except OSError:
            pass  # a full disk: the worker is recorded, only its state is not updated

    def look(limit: worker.Limit) -> None:
        order = worker_files.read_order(file)
        if order is not None and order["order"] != known.get("obeyed", {}).get("order"):
            note(obeyed={"order": order["order"], "in_use": limit(order["limits"])})

    code = worker.serve(spec, listener, lambda usage: note(usage=usage), look, asked_at)
    note(code=code)
    return code


def main() -> None:
    """Run the warm parent until the pool is gone."""
    persistent = "--persistent" in sys.argv[4:]
    if not persistent and not processes.die_with_parent(int(sys.argv[2])):
        return
    zygote = Zygote(socket.socket(fileno=int(sys.argv[1])), sys.argv[3], persistent)
    try:
        import torch

        from jupyter_gpupool.pytorch.worker import worker  # noqa: F401  imported once here, before the forks

        _warm_up(torch)
    except ImportError as e:
        zygote.send({"unusable": f"PyTorch cannot be imported where the pool runs ({e})"})
        return
    gc.collect()
    gc.freeze()  # keeps the pages shared with the forks
    zygote.send({"ready": os.getpid()})
    zygote.run()


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
