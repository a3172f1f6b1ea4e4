"""A small kubelet for tests: one node, whose Pods' containers are processes (container.py), and their logs."""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.server
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from jupyter_gpupool.core.files import write_atomically
from jupyter_gpupool.server.daemon.certificates import new_authority, new_server

from .control_plane import ControlPlane

CONTAINER = Path(__file__).with_name("container.py")
MERGE = {"Content-Type": "application/merge-patch+json"}
_INTERVAL_S = 0.1
#: Whose Pods' containers are started again when they end; those of others never are.
_RESTARTED = ("StatefulSet", "DaemonSet")
#: Seconds between two looks at the Secrets of running Pods.
_REFRESH_S = 1.0


class Kubelet:
    """``files``: what every image contains, by path. ``visible``: folders of this machine that it sees, too.

    An image named ``bare:…`` contains a Python without any packages, and no command of ours.
    """

    def __init__(
        self, plane: ControlPlane, folder: Path, *, slices: int, files: dict[str, str], visible: list[Path]
    ) -> None:
        self.name = "node-1"
        self._api, self._folder, self._slices = plane.api, folder, slices
        self._image = {"files": files, "visible": [str(path) for path in visible]}
        self._pods: dict[str, RunningPod] = {}
        self._forgotten: set[tuple[str, str]] = set()
        self._addresses: dict[tuple[str, str], str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._server = self._serve_logs()

    def start(self) -> None:
        self._register()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(60)
        for pod in self._pods.values():
            pod.kill()
        self._server.shutdown()

    def address(self, namespace: str, name: str) -> str:
        """The address of a Pod, which one of the same name gets, too. All share this machine's ports."""
        return self._addresses.setdefault((namespace, name), f"127.0.1.{len(self._addresses) + 1}")

    def folder(self, namespace: str, name: str, volume: str) -> Path:
        """Where a volume of a Pod is."""
        (pod,) = [pod for pod in self._pods.values() if pod.names == (namespace, name) and not pod.is_deleted]
        return pod.folder(volume)

    def forget(self, namespace: str, name: str) -> None:
        """Neither report on a Pod nor end it from now on: the API server has lost this node."""
        self._forgotten.add((namespace, name))

    def kill(self, namespace: str, name: str) -> None:
        """Kill the containers of a Pod, as `kill -9` of their first processes does."""
        for pod in self._pods.values():
            if pod.names == (namespace, name):
                pod.kill()

    def mounted(self, namespace: str, name: str, volume: str, file: str) -> str:
        """What a Pod sees in a file of a volume now."""
        (pod,) = [pod for pod in self._pods.values() if pod.names == (namespace, name)]
        return pod.mounted(volume, file)

    def write(self, namespace: str, name: str, volume: str, file: str, text: str) -> None:
        """Put a file into a volume of a Pod, as another program on its node could."""
        (pod,) = [pod for pod in self._pods.values() if pod.names == (namespace, name)]
        pod.write(volume, file, text)

    def _register(self) -> None:
        labels = {"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux"}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.name, "labels": labels}}
        self._api.post("/api/v1/nodes", json=node).raise_for_status()
        capacity = {"cpu": "16", "memory": "64Gi", "pods": "110", "gpupool.io/slice": str(self._slices)}
        status = {
            "capacity": capacity,
            "allocatable": capacity,
            "conditions": [{"type": "Ready", "status": "True", "reason": "Ready", "message": "for tests"}],
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.server_address[1]}},
        }
        path = f"/api/v1/nodes/{self.name}/status"
        self._api.patch(path, content=json.dumps({"status": status}), headers=MERGE).raise_for_status()

    def _run(self) -> None:
        selector = {"fieldSelector": f"spec.nodeName={self.name}"}
        while not self._stopping.wait(_INTERVAL_S):
            with contextlib.suppress(httpx.TransportError):
                found = self._api.get("/api/v1/pods", params=selector)
                for pod in found.json().get("items", []):
                    self._attend_to(pod)

    def _attend_to(self, pod: dict[str, Any]) -> None:
        uid, names = pod["metadata"]["uid"], (pod["metadata"]["namespace"], pod["metadata"]["name"])
        if names in self._forgotten:
            return
        if uid not in self._pods:
            self._pods[uid] = RunningPod(
                self._api, pod, self._folder / uid, self._image, self.address(*names)
            )
        self._pods[uid].advance(pod)

    def _serve_logs(self) -> http.server.ThreadingHTTPServer:
        kubelet = self

        class Logs(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                match = re.fullmatch(r"/containerLogs/([^/]+)/([^/]+)/([^/?]+)(\?.*)?", self.path)
                pods = [p for p in kubelet._pods.values() if match and p.names == (match[1], match[2])]
                self.send_response(200 if pods else 404)
                self.end_headers()
                if pods:
                    self.wfile.write(pods[-1].log(match[3] if match else ""))

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Logs)
        pair = new_server(new_authority("kubelet"), ["127.0.0.1"])
        certificate = self._folder / "kubelet.pem"
        certificate.write_bytes(pair.certificate + pair.key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


class _NotYet(Exception):
    """A volume is not there yet."""


class RunningPod:
    """A Pod on the node: its volumes, the processes of its containers, and the state that the API server has of it."""

    def __init__(
        self, api: httpx.Client, pod: dict[str, Any], folder: Path, image: dict[str, Any], address: str
    ) -> None:
        self._api, self._folder, self._image, self._address = api, folder, image, address
        metadata = pod["metadata"]
        self._uid, self._account = metadata["uid"], pod["spec"].get("serviceAccountName", "default")
        self.names: tuple[str, str] = (metadata["namespace"], metadata["name"])
        self._path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._initial: dict[str, subprocess.Popen[bytes]] = {}
        self._sources: dict[str, str] = {}
        self._refreshed_at = time.monotonic()
        self._failed = False  # because an init container has
        self._reported: Any = None
        self._waiting = ""
        self._kill_at: float | None = None
        self.is_deleted = False
        folder.mkdir()

    def log(self, container: str) -> bytes:
        path = self._folder / f"{container}.log"
        return path.read_bytes() if path.exists() else b""

    def advance(self, pod: dict[str, Any]) -> None:
        """Do what is next: start its containers, report how they are, or end them."""
        if pod["metadata"].get("deletionTimestamp"):
            self._end(pod["metadata"].get("deletionGracePeriodSeconds", 30))
            return
        if not self._processes and not self._failed:
            if not self._initial:
                volumes = pod["spec"].get("volumes", [])
                try:
                    self._sources = {volume["name"]: self._source(volume) for volume in volumes}
                except _NotYet as e:
                    if str(e) != self._waiting:
                        self._waiting = str(e)
                        self._event(pod, "FailedMount", str(e))
                    return
            if not self._is_initialised(pod):
                return
            for container in pod["spec"]["containers"] if not self._failed else []:
                self._processes[container["name"]] = self._start(pod, container)
        if any(owner["kind"] in _RESTARTED for owner in pod["metadata"].get("ownerReferences", [])):
            self._start_again(pod)
        if time.monotonic() > self._refreshed_at + _REFRESH_S:
            self._refreshed_at = time.monotonic()
            with contextlib.suppress(_NotYet):  # what has been mounted stays
                for volume in pod["spec"].get("volumes", []):
                    if "secret" in volume:
                        self._source(volume)
        self._report(pod)

    def mounted(self, volume: str, file: str) -> str:
        return (self._folder / "volumes" / volume / file).read_text()

    def folder(self, volume: str) -> Path:
        return Path(self._sources[volume])

    def write(self, volume: str, file: str, text: str) -> None:
        write_atomically(self._folder / "volumes" / volume / file, text, 0o644)

    def _is_initialised(self, pod: dict[str, Any]) -> bool:
        """Run the init containers one after the other; whether all have ended, or one has failed."""
        for container in pod["spec"].get("initContainers", []):
            process = self._initial.get(container["name"])
            if process is None:
                process = self._initial[container["name"]] = self._start(pod, container)
            if process.poll() is None:
                return False
            if process.returncode:
                self._failed = True
                break
        return True

    def _start_again(self, pod: dict[str, Any]) -> None:
        """Start the containers again that have ended."""
        for container in pod["spec"]["containers"]:
            if self._processes[container["name"]].poll() is not None:
                self._processes[container["name"]] = self._start(pod, container)

    def kill(self) -> None:
        for process in [*self._initial.values(), *self._processes.values()]:
            process.kill()  # unshare --kill-child takes the container with it
            process.wait()

    def _source(self, volume: dict[str, Any]) -> str:
        folder = self._folder / "volumes" / volume["name"]
        namespace = f"/api/v1/namespaces/{self.names[0]}"
        if "persistentVolumeClaim" in volume:
            name = volume["persistentVolumeClaim"]["claimName"]
            claim = self._api.get(f"{namespace}/persistentvolumeclaims/{name}").json()
            if claim.get("status", {}).get("phase") != "Bound":
                raise _NotYet(f'persistentvolumeclaim "{name}" is not bound')
            found = self._api.get(f"/api/v1/persistentvolumes/{claim['spec']['volumeName']}").json()
            return str(found["spec"]["hostPath"]["path"])
        folder.mkdir(parents=True, exist_ok=True)
        if "secret" in volume:
            name = volume["secret"]["secretName"]
            secret = self._api.get(f"{namespace}/secrets/{name}")
            if secret.status_code == 404:
                raise _NotYet(
                    f'MountVolume.SetUp failed for volume "{volume["name"]}" : secret "{name}" not found'
                )
            data = secret.json().get("data", {})
            for item in volume["secret"].get("items") or [{"key": key, "path": key} for key in data]:
                content = base64.b64decode(data[item["key"]])
                write_atomically(folder / item["path"], content, volume["secret"].get("defaultMode", 0o644))
        elif "configMap" in volume:
            found = self._api.get(f"{namespace}/configmaps/{volume['configMap']['name']}")
            for key, text in found.json()["data"].items():
                (folder / key).write_text(text)
        elif "projected" in volume:
            for source in volume["projected"]["sources"]:
                self._project(folder, source)
        elif "emptyDir" not in volume:
            raise AssertionError(f"this kubelet knows no volume such as {volume}")
        return str(folder)

    def _project(self, folder: Path, source: dict[str, Any]) -> None:
        namespace = f"/api/v1/namespaces/{self.names[0]}"
        if "serviceAccountToken" in source:
            of = source["serviceAccountToken"]
            about = {"apiVersion": "v1", "kind": "Pod", "name": self.names[1], "uid": self._uid}
            spec = {
                "audiences": [of["audience"]],
                "expirationSeconds": of["expirationSeconds"],
                "boundObjectRef": about,
            }
            made = self._api.post(f"{namespace}/serviceaccounts/{self._account}/token", json={"spec": spec})
            (folder / of["path"]).write_text(made.json()["status"]["token"])
            return
        name = source["configMap"]["name"]
        found = self._api.get(f"{namespace}/configmaps/{name}")
        if found.status_code == 404:
            raise _NotYet(f'configmap "{name}" not found')
        for item in source["configMap"]["items"]:
            (folder / item["path"]).write_text(found.json()["data"][item["key"]])

    def _start(self, pod: dict[str, Any], container: dict[str, Any]) -> subprocess.Popen[bytes]:
        root = self._folder / f"{container['name']}.root"
        root.mkdir(exist_ok=True)
        mounts = [
            {
                "source": self._sources[m["name"]],
                "path": m["mountPath"],
                "read_only": m.get("readOnly", False),
            }
            for m in container.get("volumeMounts", [])
        ]
        environment = self._environment(pod, container)
        words = [*container.get("command", []), *container.get("args", [])]
        spec = {
            **self._image,
            "root": str(root),
            "mounts": mounts,
            "command": [
                re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), word)
                for word in words
            ],
            "env": environment,
        }
        file = self._folder / f"{container['name']}.json"
        file.write_text(json.dumps(spec))
        command = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            sys.executable,
            str(CONTAINER),
            str(file),
        ]
        with (self._folder / f"{container['name']}.log").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _environment(self, pod: dict[str, Any], container: dict[str, Any]) -> dict[str, str]:
        kept = ("PATH", "PYTHONPATH", "LANG")
        environment = {"HOME": "/tmp", **{name: os.environ[name] for name in kept if name in os.environ}}
        if container["image"].startswith("bare:"):
            environment = {"HOME": "/tmp", "PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin"}
        for variable in container.get("env", []):
            source = variable.get("valueFrom")
            environment[variable["name"]] = self._value(pod, source) if source else variable.get("value", "")
        return environment

    def _value(self, pod: dict[str, Any], source: dict[str, Any]) -> str:
        if "secretKeyRef" in source:
            of = source["secretKeyRef"]
            secret = self._api.get(f"/api/v1/namespaces/{self.names[0]}/secrets/{of['name']}").json()
            return base64.b64decode(secret["data"][of["key"]]).decode()
        path = source["fieldRef"]["fieldPath"]
        if path == "status.podIP":
            return self._address
        place: Any = pod
        for step in path.split("."):
            place = place[step]
        return str(place)

    def _report(self, pod: dict[str, Any]) -> None:
        codes = {name: process.poll() for name, process in self._processes.items()}
        if (codes, self._failed) == self._reported:
            return
        self._reported = codes, self._failed
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        if any(code is None for code in codes.values()):
            phase = "Running"
        else:
            phase = "Failed" if any(codes.values()) or self._failed else "Succeeded"
        statuses = [
            {
                "name": name,
                "image": "image",
                "imageID": "image",
                "restartCount": 0,
                "ready": code is None,
                "started": code is None,
                "state": {"running": {"startedAt": now}}
                if code is None
                else {"terminated": {"exitCode": code % 256, "finishedAt": now}},
            }
            for name, code in codes.items()
        ]
        status = {
            "phase": phase,
            "startTime": now,
            "podIP": self._address,
            "podIPs": [{"ip": self._address}],
            "containerStatuses": statuses,
        }
        self._api.patch(f"{self._path}/status", content=json.dumps({"status": status}), headers=MERGE)

    def _end(self, grace_s: float) -> None:
        processes = [*self._initial.values(), *self._processes.values()]
        alive = [process for process in processes if process.poll() is None]
        if alive and self._kill_at is None:
            self._kill_at = time.monotonic() + grace_s
            for process in alive:
                _terminate(process)
        if alive and self._kill_at is not None and time.monotonic() > self._kill_at:
            self.kill()
            alive = []
        if not alive and not self.is_deleted:
            self.is_deleted = True
            self._api.request("DELETE", self._path, params={"gracePeriodSeconds": 0})

    def _event(self, pod: dict[str, Any], reason: str, message: str) -> None:
        about = {key: pod["metadata"][key] for key in ("namespace", "name", "uid")}
        event = {
            "metadata": {"generateName": f"{about['name']}.", "namespace": about["namespace"]},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", **about},
            "reason": reason,
            "message": message,
            "type": "Warning",
        }
        self._api.post(f"/api/v1/namespaces/{about['namespace']}/events", json=event)


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """Ask the first process of the container, which is the child of `unshare`, to end."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with contextlib.suppress(OSError):
        for child in children.read_text().split():
            os.kill(int(child), signal.SIGTERM)
