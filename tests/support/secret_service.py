"""A Secret Service of one's own: gnome-keyring on a D-Bus session of its own, with an empty keyring."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def missing() -> str:
    """What this machine lacks for it; empty if nothing."""
    lacking = [name for name in ("dbus-daemon", "gnome-keyring-daemon") if shutil.which(name) is None]
    return f"the system's keyring cannot be tried without {' and '.join(lacking)}" if lacking else ""


@contextlib.contextmanager
def secret_service(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run one whose files are in that folder, and have this process and its children use it; give its process."""
    pytest.importorskip("keyring", reason="the extra keyring is not installed")
    if reason := missing():
        pytest.skip(reason)
    folder.mkdir(mode=0o700)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as running:
        for name in ("XDG_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
            patch.setenv(name, str(folder))
        patch.delenv("PYTHON_KEYRING_BACKEND", raising=False)
        bus = running.enter_context(
            subprocess.Popen(
                ["dbus-daemon", "--session", "--nofork", "--print-address"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        running.callback(bus.kill)
        assert bus.stdout is not None
        patch.setenv("DBUS_SESSION_BUS_ADDRESS", bus.stdout.readline().strip())
        daemon = running.enter_context(
            subprocess.Popen(
                ["gnome-keyring-daemon", "--foreground", "--unlock", "--components=secrets"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        running.callback(daemon.kill)
        assert daemon.stdin is not None and daemon.stdout is not None
        daemon.stdin.write("of a test")
        daemon.stdin.close()
        daemon.stdout.readline()  # it says where its sockets are once it runs
        wait = ["gdbus", "wait", "--session", "org.freedesktop.secrets"]
        if shutil.which(wait[0]):
            subprocess.run(wait, check=True, timeout=60)
        yield daemon
