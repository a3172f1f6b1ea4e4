"""`gpupool kubernetes controller` as processes, with the rights of its manifests and no more."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

from jupyter_gpupool.kubernetes.controller_manifests import NAME, controller_manifests

from .cluster import Cluster, options

SYSTEM = "gpupool-system"
#: What precedes the names of the cluster's accounts in the pool.
PREFIX = "cluster-01:"


class RunningController:
    """The process, as its account of the cluster. ``bundle``: of a pool's administrator; else of the cluster's pool."""

    def __init__(self, cluster: Cluster, folder: Path, bundle: Path | None = None) -> None:
        plane = cluster.plane
        plane.new_namespace(SYSTEM)
        *rights, deployment = controller_manifests(options(cluster.webhook))
        plane.create(*rights)
        done = plane.kubectl("apply", "--dry-run=server", "-f", "-", given=[deployment])
        assert done.returncode == 0, done.stderr
        self._plane, self._folder = plane, folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **os.environ,
            "GPUPOOL_CONFIG_DIR": str(bundle or cluster.server.folder / "admin"),
        }

    def has_token(self) -> bool:
        """Whether the cluster has made the account's token by now."""
        account = self._plane.get("serviceaccount", NAME, "-n", SYSTEM)
        for secret in account.get("secrets", []):
            data = self._plane.get("secret", secret["name"], "-n", SYSTEM)["data"]
            (self._folder / "token").write_bytes(base64.b64decode(data["token"]))
            return True
        return False

    def start(self) -> None:
        """One more: the first one leads."""
        # Only changes wake it up: nothing below would pass if it had to look by itself.
        command = ["kubernetes", "controller", "--interval", "3600", "--api-server", self._plane.url]
        command += ["--user-prefix", PREFIX]
        command += ["--api-token", str(self._folder / "token"), "--api-ca", str(self._plane.ca)]
        with (self._folder / "log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "jupyter_gpupool", *command], stderr=log, env=self._environment
                )
            )

    def kill(self) -> None:
        """Kill all of them."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()

    def stop(self) -> int:
        """Stop the oldest one; its exit code."""
        process = self._processes.pop(0)
        process.terminate()
        return process.wait()

    def holder(self) -> str:
        """Who leads."""
        found = self._plane.kubectl(
            "get", "lease", NAME, "-n", SYSTEM, "-o", "jsonpath={.spec.holderIdentity}"
        )
        return found.stdout

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()
