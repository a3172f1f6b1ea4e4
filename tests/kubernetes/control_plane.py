"""A Kubernetes control plane for tests, of the programs that tests/kubernetes/make_tools.sh makes."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from jupyter_gpupool.kubernetes.manifests import as_yaml

#: The folder that make_tools.sh filled.
VARIABLE = "GPUPOOL_KUBERNETES_TOOLS"
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
PATIENCE_S = 300.0


def missing() -> str:
    """Why there can be no control plane; empty if there can."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return f"needs an API server, which `make kubernetes` makes once and names in {VARIABLE}"
    lacking = [name for name in PROGRAMS if not os.access(Path(folder, "bin", name), os.X_OK)]
    if lacking:
        return f"{folder}/bin lacks {', '.join(lacking)}; `make kubernetes` makes them{_why(Path(folder))}"
    for program in ("unshare", "openssl"):
        if shutil.which(program) is None:
            return f"needs {program}"
    namespaces = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "mount", "--make-rprivate", "/"], stderr=-3
    )
    return (
        ""
        if namespaces.returncode == 0
        else "needs the right to make mount and PID namespaces, as root has it"
    )


def _why(folder: Path) -> str:
    """The last words of make_tools.sh, where .ci/run has kept them."""
    try:
        lines = (folder / "made.log").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return f" ({lines[-1][:200]})" if lines else ""


class ControlPlane:
    """The four processes, in a folder of their own, and kubectl as their administrator."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        self._folder, self._tools = folder, Path(os.environ[VARIABLE], "bin")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._token = secrets.token_hex(16)
        self.url = f"https://127.0.0.1:{ports[0]}"
        #: Signs the tokens of ServiceAccounts.
        self.account_key = folder / "accounts.key"
        self._etcd, self._peers = (f"http://127.0.0.1:{port}" for port in ports[1:])

    def start(self) -> None:
        """Returns when the API server is ready and the namespace `default` can have Pods."""
        folder = self._folder
        self._run(
            "etcd",
            f"--data-dir={folder}/etcd",
            f"--listen-client-urls={self._etcd}",
            f"--advertise-client-urls={self._etcd}",
            f"--listen-peer-urls={self._peers}",
            f"--initial-advertise-peer-urls={self._peers}",
            f"--initial-cluster=default={self._peers}",
            "--unsafe-no-fsync",
        )
        key = self.account_key
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        (folder / "tokens.csv").write_text(f"{self._token},admin,admin,system:masters\n")
        port = self.url.rpartition(":")[2]
        self._run(
            "kube-apiserver",
            f"--etcd-servers={self._etcd}",
            f"--cert-dir={folder}/certificates",
            f"--secure-port={port}",
            "--bind-address=127.0.0.1",
            f"--token-auth-file={folder}/tokens.csv",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={key}",
            f"--service-account-key-file={key}",
            "--service-cluster-ip-range=10.0.0.0/24",
            # The controller that would take this taint away watches nodes by the minute.
            "--disable-admission-plugins=TaintNodesByCondition",
        )
        self.ca = ca = folder / "certificates" / "apiserver.crt"
        self.wait(ca.exists, "the API server's certificate")
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(json.dumps(_kubeconfig(self.url, ca.read_bytes(), self._token)))
        context = ssl.create_default_context(cafile=str(ca))
        self.api = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self._token}"},
            verify=context,
            trust_env=False,
            timeout=60.0,
        )
        self.wait(self._ready, "the API server")
        self._run(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig}",
            f"--service-account-private-key-file={key}",
            "--controllers=*,-nodelifecycle,-nodeipam",
            "--leader-elect=false",
            "--port=0",
            "--secure-port=0",
        )
        self._run(
            "kube-scheduler",
            f"--kubeconfig={self.kubeconfig}",
            "--leader-elect=false",
            "--port=0",
            "--secure-port=0",
        )
        self.wait_for_namespace("default")

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            process.wait(60)

    def kubectl(
        self, *words: str, given: str | list[dict[str, Any]] = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl; ``given``: what it reads from its input, text or objects."""
        # A call may be repeated, which would create the first of several a second time.
        assert words[0] != "create" or isinstance(given, str) or len(given) == 1
        text = given if isinstance(given, str) else as_yaml(given)
        command = [str(self._tools / "kubectl"), f"--kubeconfig={self.kubeconfig}", *words]
        home = {**os.environ, "HOME": str(self._folder)}
        deadline = time.monotonic() + PATIENCE_S
        while True:
            done = subprocess.run(
                command, input=text, capture_output=True, text=True, env=home, timeout=PATIENCE_S
            )
            # kubectl gives a busy machine 10 seconds for that. A server that never answers is another matter.
            if "TLS handshake timeout" not in done.stderr or time.monotonic() > deadline:
                return done

    def create(self, *objects: dict[str, Any]) -> str:
        """Create or change objects by kubectl, which may find some of them done; what it says."""
        done = self.kubectl("apply", "-f", "-", given=list(objects))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def get(self, *words: str) -> dict[str, Any]:
        """An object or a list, as kubectl has it."""
        done = self.kubectl("get", *words, "-o", "json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def new_namespace(self, name: str) -> None:
        self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        self.wait_for_namespace(name)

    def wait_for_namespace(self, name: str) -> None:
        """Pods can be created as soon as there is an account for them, with its token."""

        def ready() -> bool:
            found = self.api.get(f"/api/v1/namespaces/{name}/serviceaccounts/default")
            return found.status_code == 200 and bool(found.json().get("secrets"))

        self.wait(ready, f"the namespace {name}")

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until a condition is true. Fails with the programs' last words when one ended or it takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            for process in self._processes:
                assert process.poll() is None, self._last_words()
            assert time.monotonic() < deadline, f"{what} is not ready: {self._last_words()}"
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            return self.api.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def _run(self, program: str, *options: str) -> None:
        with (self._folder / f"{program}.log").open("wb") as log:
            command = [str(self._tools / program), *options]
            self._processes.append(subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log))

    def _last_words(self) -> str:
        logs = sorted(self._folder.glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-600:]}" for log in logs)


def _kubeconfig(url: str, ca: bytes, token: str) -> dict[str, Any]:
    cluster = {"server": url, "certificate-authority-data": base64.b64encode(ca).decode()}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "tests", "cluster": cluster}],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "admin"}}],
        "current-context": "tests",
    }
