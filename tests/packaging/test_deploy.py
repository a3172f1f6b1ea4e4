"""The files for administrators' systems, checked as far as can be without the systems themselves."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jupyter_gpupool.client.bundle import DEFAULT_PORT
from jupyter_gpupool.server.daemon.directory import ADMINISTRATOR, DATA_PORT


@pytest.fixture(scope="module")
def unit(project_root: Path) -> str:
    return (project_root / "docs" / "deploy" / "gpupool.service").read_text()


@pytest.fixture(scope="module")
def containerfile(project_root: Path) -> str:
    return (project_root / "docs" / "deploy" / "Containerfile").read_text()


def settings(unit: str) -> dict[str, str]:
    lines = (line for line in unit.splitlines() if "=" in line and not line.startswith(("#", "[")))
    return dict(line.split("=", 1) for line in lines)


def help_of(*words: str) -> str:
    command = [sys.executable, "-m", "jupyter_gpupool", *words, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
def test_systemd_understands_the_unit(unit: str, tmp_path: Path) -> None:
    file = tmp_path / "gpupool.service"
    # It also looks for the program, which is not in its place here.
    file.write_text(unit.replace("/opt/gpupool/bin/gpupool", shutil.which("true") or "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "gpupool.service" in line]
    version = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True).stdout
    if int(version.split()[1]) < 254:  # which ignores one word, as the unit says
        complaints = [line for line in complaints if "Unknown key 'DelegateSubgroup'" not in line]
    assert not complaints


def test_the_unit_keeps_what_computes_and_gives_away_nothing(unit: str) -> None:
    said = settings(unit)
    # Workers outlive a restart: neither they, nor their user, nor where they write may be taken away.
    assert said["KillMode"] == "process" and said["OOMPolicy"] == "continue"
    assert "DynamicUser" not in said and said["User"] == "gpupool" and "PrivateTmp" not in said
    assert said["Type"] == "notify" and said["Restart"] == "always" and int(said["LimitNOFILE"]) >= 65536
    assert said["NoNewPrivileges"] == "yes" and said["ProtectSystem"] == "strict"
    assert said["CapabilityBoundingSet"] == "" and "PrivateDevices" not in said, "GPUs are devices"


def test_the_unit_starts_what_there_is(unit: str) -> None:
    _, *words = shlex.split(settings(unit)["ExecStart"])
    assert words == ["server", "/var/lib/gpupool/server"]
    assert "DIRECTORY" in help_of("server") and "--address" in help_of("server", "init")


def instructions(containerfile: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", containerfile, flags=re.M))
    return [
        (word, rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def test_the_containerfile_is_one(containerfile: str) -> None:
    """Read by its grammar; no engine has built it here."""
    import json

    found = instructions(containerfile)
    known = {
        "FROM",
        "RUN",
        "ARG",
        "COPY",
        "ENV",
        "USER",
        "VOLUME",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {word for word, _ in found} <= known and found[0][0] == "FROM"
    (base,) = [rest for word, rest in found if word == "FROM"]
    assert re.fullmatch(r"[\w./-]+:3\.\d+-slim-\w+", base), "a version, never whatever is the latest"
    by_word = dict(found)
    assert by_word["USER"] not in ("root", "0")
    assert by_word["EXPOSE"].split() == [str(DEFAULT_PORT), str(DATA_PORT)]
    assert json.loads(by_word["ENTRYPOINT"]) == ["gpupool"] and json.loads(by_word["CMD"])[0] == "server"
    assert json.loads(by_word["VOLUME"]) == ["/var/lib/gpupool"]
    probe = json.loads(by_word["HEALTHCHECK"].partition("CMD")[2])
    assert f"GPUPOOL_CONFIG_DIR={json.loads(by_word['CMD'])[1]}/{ADMINISTRATOR}" in probe
    order = [word for word, _ in found]
    assert order.index("USER") > max(i for i, word in enumerate(order) if word in ("RUN", "COPY"))
    for command in (rest for word, rest in found if word == "RUN"):
        assert subprocess.run(["sh", "-n", "-c", command]).returncode == 0, command
