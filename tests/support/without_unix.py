"""Hides from this package what only Unix, or only Linux, has. Import it first: nothing else is affected.

``python -m tests.support.without_unix SPEC``: import every module of the client's side in such a process, print the
help of the command, and compute on the slice that SPEC, a pickled lease in base64, describes.
"""

from __future__ import annotations

import base64
import builtins
import contextlib
import importlib
import io
import pickle
import pkgutil
import sys
import types
from typing import Any

PACKAGE = "jupyter_gpupool"
MODULES = {"fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
NAMES = {
    "os": """
        EFD_CLOEXEC EFD_NONBLOCK O_CLOEXEC O_DIRECTORY O_NONBLOCK O_PATH WNOHANG chown eventfd eventfd_read
        eventfd_write fchmod fork getegid geteuid getgid getloadavg getpgid getpgrp getsid getuid killpg
        memfd_create mkfifo pidfd_open posix_spawn register_at_fork sched_getaffinity setsid statvfs sysconf
        uname waitid
    """,
    "select": "POLLERR POLLHUP POLLIN POLLNVAL POLLOUT POLLRDHUP epoll poll",
    "signal": """
        SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIG_BLOCK SIG_SETMASK
        SIG_UNBLOCK pidfd_send_signal pthread_kill pthread_sigmask setitimer sigtimedwait sigwait sigwaitinfo
    """,
    "socket": """
        AF_UNIX MSG_CMSG_CLOEXEC MSG_DONTWAIT MSG_NOSIGNAL SCM_CREDENTIALS SCM_RIGHTS SOCK_CLOEXEC SOCK_NONBLOCK
        SOCK_SEQPACKET SO_PASSCRED SO_PEERCRED SO_REUSEPORT TCP_KEEPIDLE TCP_USER_TIMEOUT recv_fds send_fds
    """,
}
#: The parts that run beside the user; others run on a GPU server, which is Linux.
CLIENT = (
    *("cli", "client", "core", "gpus", "hub", "jupyter", "lease", "notebook", "transport"),
    *("pytorch.client", "pytorch.protocol", "pytorch.torch_internals"),
)

_import = builtins.__import__


def _without(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    hidden = set(NAMES[name].split())
    for key, value in vars(importlib.import_module(name)).items():
        if key not in hidden:
            setattr(module, key, value)
    return module


_replaced = {name: _without(name) for name in NAMES}


def _importing(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    if level == 0 and str((globals or {}).get("__name__")).partition(".")[0] == PACKAGE:
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in _replaced:
            return _replaced[name]
    return _import(name, globals, locals, fromlist, level)


def main() -> None:
    """See above."""
    builtins.__import__ = _importing
    assert not any(name.startswith(PACKAGE) for name in sys.modules)
    package = importlib.import_module(PACKAGE)
    imported = 0
    for module in pkgutil.walk_packages(package.__path__, PACKAGE + "."):
        inside = module.name.removeprefix(PACKAGE + ".")
        if (
            any(inside == part or inside.startswith(part + ".") for part in CLIENT)
            and "__main__" not in inside
        ):
            importlib.import_module(module.name)
            imported += 1
    print(imported)

    from jupyter_gpupool.cli.app import main as gpupool

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        gpupool(["--help"])
    assert "run a command on GPU slices" in said.getvalue()

    from jupyter_gpupool.pytorch.client import session

    session.activate(pickle.loads(base64.b64decode(sys.argv[1])))
    import torch

    x = torch.arange(1e6, device="cuda", requires_grad=True)
    (x * 2).sum().backward()
    print(x.grad.mean().item())
    session.deactivate()


if __name__ == "__main__":
    main()
