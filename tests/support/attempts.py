"""What somebody who has taken a worker over could try, as Python for :mod:`.hostile_operator`.

``given`` has: ``victim``, the process id of another worker; ``secret``, a file of the pool; ``folder``, one that
another worker may write to; ``own``, the worker's own; ``port``, at which somebody listens on the loopback; ``unix``,
the path of a Unix socket at which somebody listens; ``messages``, that of one which takes datagrams. An attempt that
raises an exception has failed.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The layers, as the sandbox calls them.
SPACES, MOUNTS, PRIVILEGES, FILES, CALLS = "namespaces", "mounts", "privileges", "files", "system calls"

PROLOGUE = """
import ctypes, mmap, os, resource, socket, struct, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def mapped():
    with open(f"/proc/{os.getpid()}/maps") as f:
        return int(f.readline().split("-")[0], 16)  # forks of one process have the same map
"""


@dataclass(frozen=True)
class Attempt:
    """``held_by``: the layers each of which refuses it, whatever the others do.

    ``needs``: what a machine may refuse by itself, such as one in a container; empty where every machine allows it.
    """

    code: str
    held_by: tuple[str, ...]
    needs: str = ""


#: The numbers of calls are those of x86-64.
ATTEMPTS = {
    "see the size of a file of the pool": Attempt("os.stat(secret)", (MOUNTS,)),
    "see the names of another worker's files": Attempt("os.listdir(folder)", (MOUNTS, FILES)),
    "read a file of the pool": Attempt("open(secret).read()", (MOUNTS, FILES)),
    "delete a file of the pool": Attempt(
        "os.replace(secret, secret + '.old'); os.replace(secret + '.old', secret)", (MOUNTS, FILES)
    ),
    "empty a file of the pool": Attempt("os.close(os.open(secret, 3 | os.O_TRUNC))", (MOUNTS, FILES)),
    "write where another worker does": Attempt("open(folder + '/x', 'w').close()", (MOUNTS, FILES)),
    "link to a file of the pool": Attempt(
        "os.symlink(secret, own + '/link'); os.unlink(own + '/link')", (FILES,)
    ),
    "change a file's mode": Attempt("os.chmod(secret, 0o644)", (MOUNTS, CALLS)),
    "run a file that it wrote": Attempt(
        "os.close(os.open(own + '/x', os.O_CREAT | os.O_WRONLY, 0o755))\n"
        "with open(own + '/x', 'w') as f: f.write('#!/bin/true\\n')\n"
        "assert subprocess.run([own + '/x']).returncode == 0",
        (FILES, CALLS),
    ),
    "start a program": Attempt(
        "assert subprocess.run([sys.executable, '-S', '-c', '']).returncode == 0", (CALLS,)
    ),
    "start a program from memory": Attempt(
        "with open('/bin/true', 'rb') as f: content = f.read()\n"
        "memory = os.memfd_create('x'); os.write(memory, content)\n"
        "def run():\n"
        "    try: os.execve(memory, ['x'], {})\n"
        "    except OSError as e: os._exit(e.errno)\n"
        "pid = os.fork()\n"
        "if not pid: run()\n"
        "code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "if code: raise OSError(code, os.strerror(code))",
        (CALLS,),
    ),
    "read another worker's environment": Attempt(
        "open(f'/proc/{victim}/environ', 'rb').read(1)", (SPACES, FILES)
    ),
    "open another worker's files": Attempt("os.readlink(f'/proc/{victim}/fd/0')", (SPACES, FILES)),
    "read another worker's memory as a file": Attempt(
        "f = open(f'/proc/{victim}/mem', 'rb'); f.seek(mapped()); assert f.read(1)",
        (SPACES, FILES),
        "tracing",
    ),
    "read another worker's memory": Attempt(
        "buffer = ctypes.create_string_buffer(1)\n"
        "here = struct.pack('QQ', ctypes.addressof(buffer), 1); there = struct.pack('QQ', mapped(), 1)\n"
        "assert call(310, victim, here, 1, there, 1, 0) == 1",
        (SPACES, FILES, CALLS),
        "tracing",
    ),
    "trace another worker": Attempt(
        "import threading\n"
        "def trace():\n"
        "    try: call(101, 0x4206, victim, 0, 0); done.append(0)\n"
        "    except OSError as e: done.append(e)\n"
        "done = []; t = threading.Thread(target=trace); t.start(); t.join()\n"  # the tracer ends, and lets it go
        "if done[0] != 0: raise done[0]",
        (SPACES, FILES, CALLS),
        "tracing",
    ),
    "take another worker's descriptor": Attempt(
        "call(438, os.pidfd_open(victim), 0, 0)", (SPACES, FILES, CALLS), "tracing"
    ),
    "signal another worker": Attempt("os.kill(victim, 0)", (FILES, CALLS)),
    "signal another worker by its files": Attempt(
        "import fcntl; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, victim)", (CALLS,)
    ),
    "signal another worker by its sockets": Attempt(
        "import fcntl; a, b = socket.socketpair(); fcntl.ioctl(a, 0x8902, struct.pack('i', victim))", (CALLS,)
    ),
    "start a program that outlives it": Attempt(
        "new = 'import os; os.setsid()'\n"
        "if subprocess.run([sys.executable, '-S', '-c', new]).returncode: raise PermissionError(new)",
        (CALLS,),
    ),
    "limit another worker": Attempt("resource.prlimit(victim, resource.RLIMIT_NOFILE)", (CALLS,)),
    "pin another worker to a processor": Attempt(
        "os.sched_setaffinity(victim, os.sched_getaffinity(victim))", (CALLS,)
    ),
    "connect by TCP": Attempt(
        "socket.create_connection(('127.0.0.1', port), 10).close()", (SPACES, FILES, CALLS)
    ),
    "listen on a port": Attempt("socket.create_server(('127.0.0.1', 0)).close()", (FILES, CALLS)),
    "send a datagram": Attempt(
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))", (SPACES, CALLS)
    ),
    "connect to a Unix socket": Attempt(
        "s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(unix); s.close()", (MOUNTS, CALLS)
    ),
    "send a message to a Unix socket": Attempt(
        "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a.settimeout(10); a.sendmsg([b'x'], [], 0, messages)",
        (MOUNTS, CALLS),
    ),
    "ask for a keyring": Attempt("call(250, 0, -3, 1)", (CALLS,), "keyrings"),
    "watch its page faults": Attempt("os.close(call(323, 1))", (CALLS,), "userfaultfd"),
    "submit calls through a ring": Attempt(
        "os.close(call(425, 1, ctypes.create_string_buffer(120)))", (CALLS,), "io_uring"
    ),
    "count events of the processor": Attempt(
        "event = struct.pack('IIQQQQQ', 1, 112, 1, 0, 0, 0, 1 << 5 | 1 << 6).ljust(112, b'\\0')\n"
        "os.close(call(298, event, 0, -1, -1, 0))",
        (CALLS,),
        "performance events",
    ),
    "have a namespace of its own": Attempt(
        "new = 'import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000))'\n"  # with one thread
        "if subprocess.run([sys.executable, '-S', '-c', new]).returncode: raise PermissionError(new)",
        (CALLS,),
        "namespaces",
    ),
    "share memory by a key": Attempt("call(31, call(29, 0, 4096, 0o600), 0, 0)", (CALLS,)),
    "change its groups": Attempt("os.setgroups(os.getgroups())", (SPACES, PRIVILEGES), "root"),
    "mount a file system": Attempt(
        "call(165, b'none', own.encode(), b'tmpfs', 0, None); call(166, own.encode(), 0)",
        (PRIVILEGES, FILES, CALLS),
        "root",
    ),
}
