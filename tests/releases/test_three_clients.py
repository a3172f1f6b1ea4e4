"""One server with two environments, and three clients of different releases of PyTorch at once.

`make torch-matrix` runs it, with the interpreters that it has made: it needs two releases besides the tests' own, one
of them with torchvision.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.core import torch_release

from ..cli.conftest import COMMAND, Pool

ROOT = Path(__file__).parents[2]

#: Trains a small network and prints its losses; with torchvision also what nms keeps. Waits in the middle.
PROGRAM = """
import json, sys
import torch
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
device = sys.argv[1]
net, x, y = net.to(device), x.to(device), y.to(device)
optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
losses = []
for step in range(8):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step == 3 and device == "cuda":
        print("waits", flush=True)
        sys.stdin.readline()
kept = None
if "nms" in sys.argv:
    from torchvision.ops import nms
    corner = torch.rand(200, 2, generator=torch.Generator().manual_seed(1)) * 100
    boxes, scores = torch.cat([corner, corner + 20], 1), torch.arange(200.0).sin()
    kept = nms(boxes.to(device), scores.to(device), 0.3).cpu().tolist()
print(json.dumps({"torch": torch.__version__, "losses": losses, "kept": kept}))
"""


def interpreters() -> dict[str, Path]:
    """The releases that the matrix has made, without the tests' own."""
    found = {
        folder.name: folder / "bin" / "python"
        for folder in (ROOT / ".torch-matrix").glob("*")
        if (folder / ".ready").exists()
    }
    return {name: python for name, python in found.items() if name != torch_release.installed()}


def has_torchvision(python: Path) -> bool:
    return subprocess.run([str(python), "-c", "import torchvision"], capture_output=True).returncode == 0


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = Pool(tmp_path)
    yield pool
    pool.stop()


@pytest.mark.skipif(len(interpreters()) < 2, reason="needs two more releases of PyTorch: make torch-matrix")
def test_three_clients_of_different_releases_at_once(pool: Pool, eventually: Callable[..., Any]) -> None:
    releases = interpreters()
    vision = next((name for name, python in releases.items() if has_torchvision(python)), None)
    if vision is None:
        pytest.skip("none of the releases has torchvision")
    third = next(name for name in releases if name != vision)
    add = (*COMMAND, "server", "environment", "add", "vision", str(releases[vision]))
    home = {**os.environ, **pool.environment}
    subprocess.run([*add, "--operators", "torchvision::nms"], env=home, check=True, timeout=300)

    pythons = {"own": Path(sys.executable), "vision": releases[vision], "third": releases[third]}
    there = {"GPUPOOL_URL": pool.address.url, "GPUPOOL_TOKEN": pool.address.token, "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **there}
    clients = {
        name: subprocess.Popen(
            [str(python), "-m", "jupyter_gpupool", "run", "-p", "0.4", "--"]
            + [str(python), "-c", PROGRAM, "cuda", *(["nms"] if name == "vision" else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name, python in pythons.items()
    }
    for client in clients.values():
        assert client.stdout is not None and client.stdout.readline() == "waits\n"
    leases = pool.client.leases()
    shown = {lease.request.client.partition("torch:")[2].split()[0]: lease.to_json() for lease in leases}
    said = {name: json.loads(client.communicate("\n", 600)[0]) for name, client in clients.items()}

    assert len({one["torch"] for one in said.values()}) == 3, "three releases"
    # The third one's release is not on the server: it gets the newest.
    places = {lease["torch"]: lease["environment"] for lease in shown.values()}
    assert len(shown) == 3 and set(places.values()) == {"default", "vision"}
    assert shown[vision]["environment"] == "vision"
    alone = {
        name: json.loads(
            subprocess.run(
                [str(pythons[name]), "-c", PROGRAM, "cpu", *(["nms"] if name == "vision" else [])],
                capture_output=True,
                text=True,
                check=True,
                timeout=600,
                env={**os.environ, "PYTHONPATH": ""},
            ).stdout
        )
        for name in ("own", "vision")
    }
    assert said["vision"]["kept"] == alone["vision"]["kept"] and 20 < len(said["vision"]["kept"]) < 200
    for name in clients:
        computed_by = "own" if name == "own" else "vision"
        assert said[name]["losses"] == pytest.approx(alone[computed_by]["losses"], rel=1e-5)
