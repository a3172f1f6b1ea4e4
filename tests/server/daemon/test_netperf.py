"""The way to a secured server, measured with a client's bundle."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Server, gpupool


def test_it_goes_over_tls(server: Server, tmp_path: Path) -> None:
    server.bundle(tmp_path / "bundle", description="measures")
    here = {"GPUPOOL_CONFIG_DIR": str(tmp_path / "bundle")}
    done = gpupool("netperf", "--seconds", 0.1, "--size", 4, "--json", **here)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    (measured,) = said["servers"]
    assert said["tls"] is True and measured["tls"] is True and measured["port"] == server.data_port
    assert measured["round_trip_us"]["p50"] > 0 and measured["to_device_gbit_s"] > 0
    assert not server.administrator().leases()
