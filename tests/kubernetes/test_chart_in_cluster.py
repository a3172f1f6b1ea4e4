"""Helm installs and upgrades the chart on a real API server."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography import x509

from jupyter_gpupool.kubernetes.manifests import dns_names
from jupyter_gpupool.server.daemon.certificates import new_authority, new_server

from ..support.ports import free_ports
from .chart import CHART, helm
from .cluster import needs_api_server
from .control_plane import ControlPlane

pytestmark = needs_api_server

SYSTEM = "gpus"
NAME = "gpupool-webhook"
VALUES: dict[str, Any] = {"image": "gpupool:1", "pool": {"enabled": True}, "monitoring": {"dashboard": True}}


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server without a node: no Pod starts."""
    made = ControlPlane(tmp_path_factory.mktemp("plane"), free_ports(3))
    try:
        made.start()
        made.new_namespace(SYSTEM)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def releases(plane: ControlPlane) -> Iterator[Any]:
    with helm.Config(kubeconfig_path=plane.kubeconfig, namespace=SYSTEM) as made:
        yield made


def certified(plane: ControlPlane) -> tuple[bytes, list[bytes]]:
    """The webhook's authority, and those that the API server trusts."""
    data = plane.get("secret", NAME, "-n", SYSTEM)["data"]
    authority, served = (
        x509.load_pem_x509_certificate(base64.b64decode(data[name])) for name in ("ca.crt", "tls.crt")
    )
    served.verify_directly_issued_by(authority)
    webhook = plane.get("mutatingwebhookconfiguration", NAME)["webhooks"][0]
    trusted = x509.load_pem_x509_certificates(base64.b64decode(webhook["clientConfig"]["caBundle"]))
    return _raw(authority), [_raw(one) for one in trusted]


def _raw(certificate: x509.Certificate) -> bytes:
    return certificate.fingerprint(certificate.signature_hash_algorithm)  # type: ignore[arg-type]


def test_the_certificate_stays_until_it_is_old_and_both_authorities_are_trusted_then(
    plane: ControlPlane, releases: Any
) -> None:
    releases.install(CHART, "gpupool", VALUES)
    for kind in ("deployment", "service", "networkpolicy"):
        assert plane.kubectl("get", kind, NAME, "-n", SYSTEM).returncode == 0, kind
    assert plane.kubectl("get", "slices", "-n", SYSTEM).returncode == 0
    first, trusted = certified(plane)
    assert trusted == [first]

    releases.upgrade(CHART, "gpupool", {**VALUES, "replicas": 3})
    assert plane.get("deployment", NAME, "-n", SYSTEM)["spec"]["replicas"] == 3
    assert certified(plane) == (first, [first])

    secret = ("secret", NAME, "-n", SYSTEM)
    owned = plane.get(*secret)["metadata"]["managedFields"]
    # As if nobody but Helm had ever written it.
    for changed in ({"annotations": {"gpupool.io/renew-at": "1"}}, {"managedFields": owned}):
        patch = ("--type=merge", "-p", json.dumps({"metadata": changed}))
        assert plane.kubectl("patch", *secret, *patch).returncode == 0
    releases.upgrade(CHART, "gpupool", VALUES)
    second, trusted = certified(plane)
    assert second != first
    assert trusted == [second, first]

    # Pods may still serve the former certificate, however soon the next upgrade comes.
    releases.upgrade(CHART, "gpupool", VALUES)
    assert certified(plane) == (second, [second, first])

    before = second
    for values in (own_files(), own_files(), None):
        both = {**VALUES, "webhook": {"tls": values}} if values else VALUES
        for _ in range(2):
            releases.upgrade(CHART, "gpupool", both)
            now, trusted = certified(plane)
            assert trusted == [now, before]
        before = now


def own_files() -> dict[str, str]:
    """Values of `webhook.tls`, of a new authority."""
    authority = new_authority(NAME)
    made = new_server(authority, dns_names(SYSTEM))
    files = {"ca": authority.certificate, "certificate": made.certificate, "key": made.key}
    return {name: content.decode() for name, content in files.items()}


def test_what_is_uninstalled_leaves_the_ledger(plane: ControlPlane, releases: Any) -> None:
    releases.uninstall("gpupool")
    assert plane.kubectl("get", "deployment", NAME, "-n", SYSTEM).returncode == 1
    assert plane.kubectl("get", "pvc", "gpupool", "-n", SYSTEM).returncode == 0
