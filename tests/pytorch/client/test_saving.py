"""Checkpoints written on a slice can be read anywhere, and the reverse."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import torch


def roundtrip(value: object, **options: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)  # type: ignore[arg-type]


def test_tensors_come_back_where_they_were(attached: object) -> None:
    values = {
        "float": torch.randn(3, 4, device="cuda:1"),
        "half": torch.ones(2, device="cuda:0").bfloat16(),
        "transposed": torch.arange(6, device="gpupool:1").view(2, 3).t(),
        "empty": torch.empty(0, 3, device="cuda:0"),
        "parameter": torch.nn.Parameter(torch.randn(2, device="cuda:1")),
    }
    for name, loaded in roundtrip(values).items():
        original = values[name]
        assert str(loaded.device) == f"cuda:{original.get_device()}", name
        assert loaded.stride() == original.stride(), name
        assert torch.equal(loaded.cpu(), original.cpu()), name
        assert type(loaded) is type(original)
        assert loaded.requires_grad == original.requires_grad


def test_tensors_that_share_memory_still_do(attached: object) -> None:
    base = torch.zeros(4, device="cuda")
    loaded_base, loaded_view = roundtrip([base, base[1:3]])
    loaded_view.fill_(5)
    assert loaded_base.tolist() == [0, 5, 5, 0]


def test_map_location(attached: object) -> None:
    x = torch.arange(3.0, device="cuda:1")
    assert roundtrip(x, map_location="cpu").device.type == "cpu"
    assert str(roundtrip(x, map_location="cuda:0").device) == "cuda:0"
    assert str(roundtrip(x, map_location={"cuda:1": "cuda:0"}).device) == "cuda:0"
    assert str(roundtrip(torch.arange(3.0), map_location="cuda").device) == "cuda:0"


def test_training_goes_on_from_a_checkpoint(attached: object) -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3, device="cuda")).pow(2).sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    model = torch.nn.Linear(3, 3).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    saved_model, saved_optimizer = roundtrip([model.state_dict(), optimizer.state_dict()])
    expected = [step(model, optimizer) for _ in range(3)]
    twin = torch.nn.Linear(3, 3).cuda()
    twin.load_state_dict(saved_model)
    resumed = torch.optim.Adam(twin.parameters())
    resumed.load_state_dict(saved_optimizer)
    assert [step(twin, resumed) for _ in range(3)] == expected


def test_a_process_without_any_lease_reads_the_file(attached: object, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2).cuda()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "state = torch.load(sys.argv[1], map_location='cpu')\n"
        "assert 'jupyter_gpupool.pytorch.client.session' not in sys.modules\n"
        "print(state['weight'].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.pt"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(model.weight.tolist())
