"""The warm parent: a process that has imported PyTorch and forks a worker for each lease.

Started by :class:`~.local.LocalEngine` as ``python -m jupyter_gpupool.engines.zygote FD [--persistent]``.
It speaks JSON over a SOCK_SEQPACKET socket, one message a packet. It never starts a thread and never
touches CUDA, so that its forks are whole.

In: ``{"start": WorkerSpec, "host": where to listen, "state": file}``. Out: ``{"ready": pid}`` or
``{"unusable": why}`` once; ``{"started": lease, "pid", "created", "port"}`` or ``{"failed": lease, "why"}``;
``{"ended": lease, "code": exit code, or minus the signal}``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
from typing import Any

import psutil

from ..remote.specs import WorkerSpec

_PR_SET_PDEATHSIG = 1


class Zygote:
    def __init__(self, control: socket.socket, persistent: bool) -> None:
        self._control = control
        self._persistent = persistent
        self._children: dict[int, str] = {}
        self._wake, waker = socket.socketpair()
        self._wake.setblocking(False)
        waker.setblocking(False)
        self._waker = waker
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
                self._tell({"ended": lease, "code": os.waitstatus_to_exitcode(status)})

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:
            pass  # the pool is gone; its successor finds the workers' state files

    def _start(self, message: dict[str, Any]) -> None:
        spec = WorkerSpec.from_json(message["start"])
        try:
            listener = _listen(message["host"])
            pid = os.fork()
        except OSError as e:
            self._tell({"failed": spec.lease_id, "why": e.strerror or str(e)})
            return
        if pid == 0:
            self._become_worker(spec, listener, message["state"])
        self._children[pid] = spec.lease_id
        port = listener.getsockname()[1]
        listener.close()
        created = psutil.Process(pid).create_time()
        self._tell({"started": spec.lease_id, "pid": pid, "created": created, "port": port})

    def _become_worker(self, spec: WorkerSpec, listener: socket.socket, state: str) -> None:
        code = 1
        try:
            parent = os.getppid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for sock in (self._control, self._wake, self._waker):
                sock.close()
            if not self._persistent and not die_with_parent(parent):
                return
            code = _work(spec, listener, state)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)


def die_with_parent(parent: int) -> bool:
    """Ask the kernel (Linux) to kill this process when its parent ends; False if it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


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


def _work(spec: WorkerSpec, listener: socket.socket, state_file: str) -> int:
    real = [d.uuid for d in spec.devices if not d.emulated]
    if real:
        # PyTorch counts the slices from 0, as the lease does. Set before CUDA is first touched.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(real)
    from ..remote import worker

    me = psutil.Process()
    identity = {
        "lease": spec.lease_id,
        "pid": me.pid,
        "created": me.create_time(),
        "port": listener.getsockname()[1],
    }

    def write(**more: Any) -> None:
        _replace(state_file, json.dumps({**identity, **more}))

    write()
    code = worker.serve(spec, listener, lambda usage: write(usage=usage))
    write(code=code)
    return code


def _replace(path: str, text: str) -> None:
    """Write a file that nobody ever sees half-written, readable by its owner alone."""
    try:
        fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as f:
            f.write(text)
        os.replace(f"{path}.new", path)
    except OSError as e:
        print(f"gpupool worker: cannot write {path}: {e.strerror}", file=sys.stderr)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    zygote = Zygote(control, "--persistent" in sys.argv[2:])
    try:
        import torch

        from ..remote import worker  # noqa: F401  the import is what its forks are spared

        _warm_up(torch)
    except ImportError as e:
        zygote._tell({"unusable": f"PyTorch cannot be imported where the pool runs ({e})"})
        return
    gc.collect()
    gc.freeze()  # what is shared with the forks now stays shared
    zygote._tell({"ready": os.getpid()})
    zygote.run()


def _warm_up(torch: Any) -> None:
    """Spare the first client what PyTorch does once. One thread: others would not survive a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.ones(4, 4)
    (x @ x).sum().item()
    torch.nn.functional.conv2d(x.view(1, 1, 4, 4), x.view(1, 1, 4, 4))
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
