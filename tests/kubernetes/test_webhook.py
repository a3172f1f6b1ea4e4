"""`gpupool kubernetes webhook` as a process, over TLS."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jupyter_gpupool.kubernetes.names import SLICE
from jupyter_gpupool.server.daemon.certificates import Pair, new_authority, new_server

from .pods import figure_12, pod, review


class RunningWebhook:
    """The process, its certificate's files, and a client that trusts its authority."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.authority = new_authority("tests")
        self.files = folder / "tls.crt", folder / "tls.key"
        self.certify(self.authority)
        self.context = ssl.create_default_context(cadata=self.authority.certificate.decode())
        command = ["kubernetes", "webhook", "--host", "127.0.0.1", "--port", "0"]
        command += ["--certificate", str(self.files[0]), "--key", str(self.files[1])]
        command += options
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_gpupool", *command], stderr=subprocess.PIPE, text=True
        )
        self.url = f"https://127.0.0.1:{self.said('Answering')['port']}"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def certify(self, authority: Pair) -> None:
        pair = new_server(authority, ["127.0.0.1"])
        self.files[1].write_bytes(pair.key)
        self.files[0].write_bytes(pair.certificate)

    def said(self, words: str) -> dict[str, Any]:
        """The next line of the log that begins with these words."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            record: dict[str, Any] = json.loads(line)
            if record["message"].startswith(words):
                return record
        raise AssertionError(f"it ended with {self.process.wait()}")

    def call(self, method: str, path: str, **content: Any) -> httpx.Response:
        with httpx.Client(verify=self.context, trust_env=False, timeout=300) as client:
            return client.request(method, f"{self.url}{path}", **content)


@pytest.fixture(scope="module")
def webhook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWebhook]:
    running = RunningWebhook(tmp_path_factory.mktemp("tls"))
    yield running
    running.stop()


def test_it_answers_reviews_and_logs_what_it_did(webhook: RunningWebhook) -> None:
    assert webhook.call("GET", "/readyz").status_code == 200
    asked = review(figure_12(), namespace="cnasg", name="pod-pytorch-mock-bitfusion")
    answer = webhook.call("POST", "/admit?timeout=5s", json=asked)
    assert answer.status_code == 200
    assert answer.json()["response"]["patchType"] == "JSONPatch"
    record = webhook.said("Gave a Pod its GPUs")
    assert (record["namespace"], record["pod"]) == ("cnasg", "pod-pytorch-mock-bitfusion")
    refused = webhook.call("POST", "/admit", json=review(pod({SLICE: "1"}))).json()["response"]
    assert refused["status"]["message"] in webhook.said("Refused a Pod")["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"kind": "AdmissionReview"}']
)
def test_what_is_no_review_gets_a_line(webhook: RunningWebhook, body: bytes) -> None:
    answer = webhook.call("POST", "/admit", content=body)
    assert answer.status_code == 400
    assert "AdmissionReview" in answer.json()["message"]


def test_a_renewed_certificate_is_used_without_a_restart(
    webhook: RunningWebhook, eventually: Callable[..., Any]
) -> None:
    def served() -> str:
        host, port = webhook.url.removeprefix("https://").split(":")
        return ssl.get_server_certificate((host, int(port)))

    before = served()
    webhook.files[1].write_text("no key")
    webhook.said("Kept the former certificate")
    assert served() == before
    webhook.certify(webhook.authority)
    eventually(lambda: served() != before, "the new certificate")
    assert webhook.call("GET", "/readyz").status_code == 200


def test_a_server_that_leaves_still_answers(tmp_path: Path, eventually: Callable[..., Any]) -> None:
    webhook = RunningWebhook(tmp_path, "--leaving", "300")
    try:
        with httpx.Client(
            base_url=webhook.url, verify=webhook.context, trust_env=False, timeout=300
        ) as client:
            client.get("/readyz").raise_for_status()
            webhook.process.send_signal(signal.SIGTERM)
            eventually(lambda: client.get("/readyz").status_code == 503, "that it leaves")
            assert client.post("/admit", json=review(figure_12())).json()["response"]["allowed"]
        webhook.process.send_signal(signal.SIGTERM)
        assert webhook.process.wait() == 0
    finally:
        webhook.stop()


def test_files_that_are_no_certificate_end_it_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "tls.crt").write_text("no")
    command = [
        "kubernetes",
        "webhook",
        "--certificate",
        str(tmp_path / "tls.crt"),
        "--key",
        str(tmp_path / "tls.crt"),
    ]
    done = subprocess.run([sys.executable, "-m", "jupyter_gpupool", *command], capture_output=True, text=True)
    assert done.returncode == 1
    assert "are no certificate and its key" in done.stderr
    assert done.stderr.count("\n") == 1
