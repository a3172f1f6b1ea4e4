"""How long the webhook of Kubernetes takes for a review, over TLS, and whether its memory grows."""

from __future__ import annotations

import json
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from jupyter_gpupool.server.daemon.certificates import new_authority, new_server

GOALS = {"review_p99_ms": ("<=", 20.0), "memory_growth_mib": ("<=", 2.0)}


def run(pods: int = 1000) -> dict[str, Any]:
    """``review_*_ms``: from the request to its answer, on one kept connection, as an API server keeps them."""
    with tempfile.TemporaryDirectory(prefix="gpupool-bench-") as folder:
        authority = new_authority("benchmark")
        pair = new_server(authority, ["127.0.0.1"])
        files = Path(folder, "tls.crt"), Path(folder, "tls.key")
        files[0].write_bytes(pair.certificate)
        files[1].write_bytes(pair.key)
        command = ["kubernetes", "webhook", "--host=127.0.0.1", "--port=0", "--leaving=0"]
        command += ["--certificate", str(files[0]), "--key", str(files[1])]
        log = Path(folder, "log")
        with log.open("w") as stderr:
            webhook = subprocess.Popen([sys.executable, "-m", "jupyter_gpupool", *command], stderr=stderr)
        try:
            while "\n" not in (text := log.read_text()):
                assert webhook.poll() is None, text
                time.sleep(0.05)
            port = json.loads(text.splitlines()[0])["port"]
            context = ssl.create_default_context(cadata=authority.certificate.decode())
            with httpx.Client(
                base_url=f"https://127.0.0.1:{port}", verify=context, trust_env=False
            ) as client:
                _admit(client, 100)
                before = _resident_mib(webhook.pid)
                began = time.perf_counter()
                times = sorted(_admit(client, pods))
                took_s = time.perf_counter() - began
                growth = _resident_mib(webhook.pid) - before
        finally:
            webhook.terminate()
            webhook.wait()
    return {
        "review_p50_ms": round(statistics.median(times) * 1000, 2),
        "review_p99_ms": round(times[int(len(times) * 0.99)] * 1000, 2),
        "reviews_per_s": round(pods / took_s),
        "memory_growth_mib": round(growth, 2),
    }


def _admit(client: httpx.Client, pods: int) -> list[float]:
    times = []
    for number in range(pods):
        body = json.dumps(_review(number)).encode()
        began = time.perf_counter()
        answer = client.post("/admit", content=body)
        times.append(time.perf_counter() - began)
        assert "patch" in answer.json()["response"]
    return times


def _review(number: int) -> dict[str, Any]:
    container = {
        "name": "train",
        "image": "train:1",
        "command": ["python", "train.py"],
        "env": [{"name": f"VARIABLE_{n}", "value": "x" * 50} for n in range(20)],
        "resources": {"limits": {"gpupool.io/gpu": "2", "gpupool.io/share-percent": "80"}},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"train-{number}", "namespace": "team"},
        "spec": {"containers": [container], "volumes": volumes},
    }
    request = {
        "uid": f"{number:08x}-6393-11e8-b7cc-42010a800002",
        "kind": {"group": "", "version": "v1", "kind": "Pod"},
        "namespace": "team",
        "name": f"train-{number}",
        "operation": "CREATE",
        "object": pod,
    }
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
