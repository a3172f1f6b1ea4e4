"""Scripted modules on a slice, compared with the CPU."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated")


def scripted() -> Any:
    torch.manual_seed(0)
    return torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)))


def trained(model: Any, place: str) -> torch.Tensor:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(8.0, device=place).view(4, 2)).pow(2).sum().backward()
        optimizer.step()
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


def test_scripted_modules_move_and_train(attached: object) -> None:
    expected = trained(scripted(), "cpu")
    torch.testing.assert_close(trained(scripted().cuda(1), "cuda:1"), expected)
    torch.testing.assert_close(trained(scripted().to("cuda").cpu(), "cpu"), expected)


def test_files_are_loaded_on_a_slice(attached: object) -> None:
    expected = trained(scripted(), "cpu")
    for where in ("cuda", "cuda:1", torch.device("cuda", 0)):
        file = io.BytesIO()
        torch.jit.save(scripted(), file)
        file.seek(0)
        model = torch.jit.load(file, map_location=where)
        place = next(model.parameters()).device
        assert place == torch.device("cuda", torch.device(where).index or 0)
        torch.testing.assert_close(trained(model, str(place)), expected)


def test_traced_modules_move(attached: object) -> None:
    layer = torch.nn.Linear(2, 3)
    traced = torch.jit.trace(layer, torch.ones(4, 2))
    expected = traced(torch.ones(4, 2))
    moved = traced.cuda()
    assert moved.weight.device == torch.device("cuda", 0)
    torch.testing.assert_close(moved(torch.ones(4, 2, device="cuda")).cpu(), expected)


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_modules_on_a_slice_are_saved_whole(attached: object, tmp_path: Path, kind: str) -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).cuda().eval()
    model[0].bias.requires_grad_(False)
    example = torch.ones(4, 2, device="cuda")
    model = torch.jit.script(model) if kind == "scripted" else torch.jit.trace(model, example)
    expected = model(torch.ones(4, 2, device="cuda")).cpu()
    places = [p.device for p in model.parameters()]
    torch.jit.save(model, tmp_path / "model.pt", _extra_files={"notes": b"kept"})
    assert [p.device for p in model.parameters()] == places, "saving leaves it where it is"
    notes = {"notes": ""}
    loaded = torch.jit.load(tmp_path / "model.pt", _extra_files=notes)
    torch.testing.assert_close(loaded(torch.ones(4, 2)), expected)
    assert notes == {"notes": b"kept"}
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def saved_on_cuda(model: Any) -> io.BytesIO:
    """A file as a machine with CUDA writes it: each storage's device is in its pickle."""
    file = io.BytesIO()
    torch.jit.save(model, file)
    named, there = b"X\x03\x00\x00\x00cpu", io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(there, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("/data.pkl"):
                assert content.count(named) == 1, "the others refer to it"
                content = content.replace(named, b"X\x06\x00\x00\x00cuda:1")
            new.writestr(name, content)
    there.seek(0)
    return there


def test_a_file_from_cuda_is_loaded_where_it_was(attached: object, tmp_path: Path) -> None:
    expected = trained(scripted(), "cpu")
    file = saved_on_cuda(scripted())
    (tmp_path / "model.pt").write_bytes(file.getvalue())
    for f in (file, tmp_path / "model.pt", str(tmp_path / "model.pt")):
        model = torch.jit.load(f)
        assert {p.device for p in model.parameters()} == {torch.device("cuda", 1)}
        torch.testing.assert_close(trained(model, "cuda:1"), expected)
    file.seek(0)
    assert next(torch.jit.load(file, map_location="cpu").parameters()).device.type == "cpu"


def sign(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.is_cuda else x - 1


class Sign(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        if y.is_cuda:
            for _ in range(2):
                if y.is_cuda:
                    y = y + 1
        return y


def test_scripted_code_sees_that_a_slice_is_cuda(attached: object) -> None:
    for place, value in (("cuda", 2.0), ("cpu", 0.0)):
        assert torch.jit.script(sign)(torch.ones(1, device=place)).item() == value
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Sign()), file)
    file.seek(0)
    for model in (torch.jit.script(Sign()), torch.jit.load(file)):
        assert model(torch.zeros(1, device="cuda")).item() == 2
        assert model(torch.zeros(1)).item() == 0
