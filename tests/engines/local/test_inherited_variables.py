"""What workers inherit of their pool's environment."""

from __future__ import annotations

import pytest

from jupyter_gpupool.engines.local.inherited_variables import without_secrets


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JUPYTERHUB_API_TOKEN", "x"),
        ("JUPYTERHUB_COOKIE_SECRET", "x"),
        ("GPUPOOL_TOKEN", "x"),
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("PGPASSWORD", "x"),
        ("PGPASSFILE", "/root/.pgpass"),
        ("OPENAI_API_KEY", "x"),
        ("SSH_AUTH_SOCK", "/tmp/agent"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/google.json"),
        ("LEDGER", "postgresql+psycopg://pool:word@db/ledger"),
        ("http_proxy", "http://me:word@proxy:3128"),
        ("MY_PEM", "-----BEGIN EC PRIVATE KEY-----"),
        ("GPUPOOL_LEASE", "/run/lease"),
    ],
)
def test_what_may_be_a_secret_is_withheld(name: str, value: str) -> None:
    assert without_secrets({name: value, "HOME": "/root"}) == {"HOME": "/root"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATH", "/usr/bin:/bin"),
        ("LD_LIBRARY_PATH", "/opt/cuda/lib64"),
        ("CUDA_VISIBLE_DEVICES", "0,1"),
        ("CUDA_MPS_PIPE_DIRECTORY", "/tmp/mps"),
        ("NVIDIA_DRIVER_CAPABILITIES", "compute,utility"),
        ("OMP_NUM_THREADS", "4"),
        ("TORCHINDUCTOR_CACHE_DIR", "/tmp/cache"),
        ("XLA_FLAGS", "--xla_dump_to=/tmp"),
        ("GPUPOOL_URL", "https://gpus.example:56001"),
        ("PYTHONPATH", "/opt/a:/opt/b"),
        ("KEYBOARD", "us"),
        ("AUTHOR", "me"),
    ],
)
def test_what_programs_need_is_passed_on(name: str, value: str) -> None:
    assert without_secrets({name: value}) == {name: value}
