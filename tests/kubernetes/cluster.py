"""A control plane with a node, a secured pool and the webhook, for the tests of a module."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.kubernetes.manifests import TLS, Options, manifests

from ..server.daemon.conftest import Server, initialised
from ..support.ports import free_ports
from .control_plane import ControlPlane, missing
from .kubelet import Kubelet
from .test_webhook import RunningWebhook

_MISSING = missing()
needs_api_server = pytest.mark.skipif(bool(_MISSING), reason=_MISSING)

#: What the case study's image holds, as far as its figures say.
RUN_PYTORCH = """\
#!/bin/sh
cd /workspace/dlbs
exec python -m jupyter_gpupool.examples.mnist --batch-size "$BATCH_SIZE" --output-path "$OUTPUT_PATH" --save-model \\
  --epochs 1 --num-workers 0
"""


@dataclass
class Cluster:
    """The control plane with its node, the pool, and the webhook."""

    plane: ControlPlane
    server: Server
    webhook: RunningWebhook
    administrator: PoolClient
    kubelet: Kubelet

    def open_namespace(self, name: str) -> None:
        """A namespace of both, with the Secret that its Pods use."""
        self.plane.new_namespace(name)
        self.administrator.create_namespace(name, {})
        made = self.server.token(namespace=name)
        data = {file: base64.b64encode(text.encode()).decode() for file, text in made["files"].items()}
        metadata = {"name": "gpupool", "namespace": name}
        self.plane.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})

    def phase(self, namespace: str, name: str) -> str:
        return str(self.plane.get("pod", name, "-n", namespace)["status"].get("phase"))

    def log(self, namespace: str, name: str) -> str:
        return self.plane.kubectl("logs", name, "-n", namespace).stdout

    def leases(self) -> list[Any]:
        return self.administrator.leases()


def options(webhook: RunningWebhook) -> Options:
    certificate, key = (file.read_bytes() for file in webhook.files)
    return Options("gpupool:1", version=(1, 20), tls=TLS(certificate, key, webhook.authority.certificate))


def configuration(webhook: RunningWebhook) -> dict[str, Any]:
    """As it is printed, but for the address: no network leads from this API server to a Service."""
    made = manifests(options(webhook))[-1]
    client = made["webhooks"][0]["clientConfig"]
    del client["service"]
    client["url"] = f"{webhook.url}/admit"
    return made


def running_cluster(
    tmp_path_factory: pytest.TempPathFactory, project_root: Path, visible: Sequence[Path] = ()
) -> Iterator[Cluster]:
    """What the fixture `cluster` yields. ``visible``: further folders that containers see."""
    folder = tmp_path_factory.mktemp("cluster")
    plane = ControlPlane(folder, free_ports(3))
    server = initialised(tmp_path_factory.mktemp("pool"))
    seen = [project_root, Path(sys.prefix), Path(sys.base_prefix), *visible]
    files = {"/workspace/dlbs/run_pytorch.sh": RUN_PYTORCH}
    stop: list[Callable[[], Any]] = []
    try:
        stop.append(plane.stop)
        plane.start()
        kubelet = Kubelet(plane, folder, slices=800, files=files, visible=seen)
        stop.append(kubelet.stop)
        kubelet.start()
        stop.append(server.end)
        server.start()
        webhook = RunningWebhook(tmp_path_factory.mktemp("tls"), "--client-image", "gpupool:1")
        stop.append(webhook.stop)
        plane.create(configuration(webhook))
        yield Cluster(plane, server, webhook, server.administrator(), kubelet)
    finally:
        for last in reversed(stop):
            last()
