"""A user's running pool that several tests share, so that each of them need not start one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import LeaseEnded, UnknownLease


class UserPool:
    """``gpupool server --emulate`` in a home of its own, with ``options``. A test finds it after :meth:`publish`."""

    def __init__(self, *options: str) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="gpupool-shared-"))
        for name in ("data", "runtime", "config"):
            (self._home / name).mkdir(mode=0o700)
        environment = {
            "JUPYTER_DATA_DIR": str(self._home / "data"),
            "JUPYTER_RUNTIME_DIR": str(self._home / "runtime"),
            "JUPYTER_CONFIG_DIR": str(self._home / "config"),
        }
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyter_gpupool", "server", "--port=0", "--emulate"),
                *("--LocalEngine.attach_timeout_s=60", *options),
            ],
            stderr=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
        self._address = self._home / "runtime" / "gpupool" / f"pool-{self._process.pid}.json"
        while not self._address.exists():
            assert self._process.poll() is None, "the pool did not start"
            time.sleep(0.02)

    def publish(self) -> PoolClient:
        """Return a client, and let the processes of this test find the pool in their runtime directory."""
        folder = Path(os.environ["JUPYTER_RUNTIME_DIR"]) / "gpupool"
        folder.mkdir(mode=0o700, exist_ok=True)
        shutil.copy2(self._address, folder)
        return self._client()

    def end_leases(self) -> None:
        """Release every lease, so that the next test finds the pool empty."""
        with self._client() as client:
            while leases := client.leases():
                for lease in leases:
                    with contextlib.suppress(UnknownLease, LeaseEnded):  # its holder has just ended it
                        client.release(lease.id)

    def _client(self) -> PoolClient:
        address = json.loads(self._address.read_text())
        return PoolClient(address["url"], address["token"], timeout_s=300.0)

    def stop(self) -> None:
        """End the pool, and remove its files."""
        self._process.terminate()
        self._process.wait(300)
        shutil.rmtree(self._home, ignore_errors=True)
