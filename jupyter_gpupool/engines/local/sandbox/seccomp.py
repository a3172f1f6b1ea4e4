"""The layer of system calls: which of them a worker may make, by seccomp.

The filter refuses what is known to reach other processes, the kernel or the network, and leaves the rest: a driver's
calls differ from release to release. Calls that are newer than the filter do not exist for a worker.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from . import kernel, privileges
from .bpf import ALLOW, Instruction, Test, program
from .system_calls import ARCHITECTURES, NEWEST, NUMBERS

_SET_MODE_FILTER, _GET_ACTION_AVAIL = 1, 2
_AF_UNIX = 1
#: The kinds of pairs that have no way to anywhere but each other: SOCK_STREAM and SOCK_SEQPACKET, under any flags. A
#: message from a SOCK_DGRAM can be addressed to other sockets, in memory, where no filter can look.
_CONNECTED_KINDS, _KIND = (1, 5), 0xF
_MSG_FASTOPEN = 0x20000000
#: What puts bytes into a terminal's input.
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
#: What has the kernel signal another process about a file or socket, with a signal of the caller's choice. Before
#: Linux 6.12, Landlock does not govern that.
_FIOSETOWN, _SIOCSPGRP = 0x8901, 0x8902
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
#: The flags of clone that make namespaces; in a new user namespace a process has all capabilities.
_NEW_NAMESPACES = 0x7E020000

#: Other processes' memory, descriptors and time; the kernel itself; its keys; other views of the file system.
#: Containers refuse nearly all of these too, so programs that use a GPU do without.
_ALWAYS = (
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "process_mrelease"),
    *("pidfd_getfd", "pidfd_send_signal", "kcmp", "userfaultfd", "bpf", "perf_event_open"),
    *("keyctl", "add_key", "request_key", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "open_tree_attr", "fsopen"),
    *("fsconfig", "fsmount", "fspick", "mount_setattr", "unshare", "setns"),
    *("name_to_handle_at", "open_by_handle_at", "fanotify_init", "quotactl", "quotactl_fd", "acct"),
    *("swapon", "swapoff", "reboot", "kexec_load", "kexec_file_load", "init_module", "finit_module"),
    *("delete_module", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "sethostname"),
    *("setdomainname", "syslog", "vhangup", "lookup_dcookie", "migrate_pages"),
    *("modify_ldt", "iopl", "ioperm"),
)
#: What a driver might use, and a worker without one does not: sockets, memory and messages that all processes of a
#: user share, rights and dates of files that Landlock does not govern, other processes' place in the queue, and a
#: process group of its own, in which a process would outlive the worker.
_WITHOUT_DRIVER = (
    *("connect", "bind", "sendmmsg", "tkill", "personality"),
    *("shmget", "shmat", "shmctl", "semget", "semop", "semctl", "semtimedop", "msgget", "msgsnd", "msgrcv"),
    *("msgctl", "mq_open", "mq_unlink", "inotify_add_watch"),
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchown", "fchownat", "truncate"),
    *("setxattr", "lsetxattr", "fsetxattr", "setxattrat", "removexattr", "lremovexattr", "fremovexattr"),
    *("removexattrat", "file_setattr"),
    *("setpriority", "sched_setparam", "sched_setscheduler", "sched_setattr", "ioprio_set", "socket"),
    *("setpgid", "setsid"),
)


#: What compilers do with what they have made, and which needs none of it.
_MODES = ("chmod", "fchmod", "fchmodat", "fchmodat2")
#: Programs: a GPU's compilers among them, by which graphs are compiled for it.
_PROGRAMS = ("execve", "execveat")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def worker_filter(machine: str, pid: int, with_driver: bool, with_programs: bool) -> list[Instruction]:
    """Return the filter of a worker with that process id. Raises KeyError for a machine that has none.

    ``with_driver``: leave what a GPU's driver might need. ``with_programs``: let it start programs; without a driver,
    these are compilers, which fail if they cannot change the modes of files: that seems to work, and changes none.
    """
    numbers = NUMBERS[machine]
    refusals = [*_ALWAYS, *(() if with_driver else _WITHOUT_DRIVER), *(() if with_programs else _PROGRAMS)]
    own, itself = Test(0, (pid,), 0xFFFFFFFF), Test(0, (0, pid), 0xFFFFFFFF)
    tests: dict[str, Sequence[Test]] = {
        "clone": [Test(0, (0,), _NEW_NAMESPACES)],
        # A pid is an int: the kernel looks at 32 bits of it.
        "kill": [own],
        "tgkill": [own],
        "rt_sigqueueinfo": [own],
        "rt_tgsigqueueinfo": [own],
        "prlimit64": [itself],
        "ioctl": [Test(1, (_TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP), 0xFFFFFFFF, negated=True)],
        "fcntl": [Test(1, (_F_SETOWN, _F_SETSIG, _F_SETOWN_EX), 0xFFFFFFFF, negated=True)],
        "socketpair": [Test(0, (_AF_UNIX,), 0xFFFFFFFF), Test(1, _CONNECTED_KINDS, _KIND)],
    }
    if not with_driver:
        tests["sched_setaffinity"] = tests["move_pages"] = [itself]
        # To where it is connected, and nowhere else.
        tests["sendto"] = [Test(4, (0,)), Test(3, (0,), _MSG_FASTOPEN)]
        tests["sendmsg"] = [Test(2, (0,), _MSG_FASTOPEN)]
    else:
        tests["socket"] = [Test(0, (_AF_UNIX,), 0xFFFFFFFF)]
    return program(
        ARCHITECTURES[machine],
        [numbers[name] for name in refusals if name in numbers],
        {numbers[name]: checks for name, checks in tests.items()},
        without_effect=[
            numbers[name] for name in _MODES if name in numbers and with_programs and not with_driver
        ],
        missing=[numbers["clone3"]],  # its flags are in memory, where no filter can look
        newest=NEWEST,
    )


def missing(machine: str) -> str:
    """Why this kernel lacks the layer; empty if it has it."""
    if machine not in NUMBERS:
        return f"there is no filter of system calls for {machine}"
    try:
        action = ctypes.c_uint32(ALLOW)
        kernel.syscall(NUMBERS[machine]["seccomp"], _GET_ACTION_AVAIL, 0, ctypes.byref(action))
    except OSError as e:
        return f"the kernel has no seccomp filters, or does not let this process use them ({e.strerror})"
    return ""


def enter(machine: str, instructions: Sequence[Instruction]) -> None:
    """Filter the calls of this thread, and of those that it starts, for good. Raises OSError."""
    privileges.no_new()
    packed = b"".join(
        code.to_bytes(2, "little") + bytes((jt, jf)) + value.to_bytes(4, "little")
        for code, jt, jf, value in instructions
    )
    buffer = ctypes.create_string_buffer(packed, len(packed))
    filters = _Program(len(instructions), ctypes.addressof(buffer))
    kernel.syscall(NUMBERS[machine]["seccomp"], _SET_MODE_FILTER, 0, ctypes.byref(filters))
