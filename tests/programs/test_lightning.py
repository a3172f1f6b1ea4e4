"""Lightning's Trainer and Fabric find the slice and train on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

L = pytest.importorskip("lightning", reason="lightning is not installed; `make programs` does that")

pytestmark = pytest.mark.filterwarnings("ignore")


def loader() -> DataLoader:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


class Net(L.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        self.seen: set[str] = set()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        self.seen.add(str(x.device))
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def module() -> Net:
    L.seed_everything(0)
    return Net()


def trainer(folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"accelerator": "auto", "devices": 1, **options}
    return L.Trainer(
        max_epochs=3, default_root_dir=folder, logger=False, enable_progress_bar=False, **settings
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "16-mixed"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "deterministic": True},
        {"accelerator": "gpu", "devices": [1]},
    ],
    ids=str,
)
def test_it_trains_validates_and_predicts(lease: object, tmp_path: Path, options: dict) -> None:
    net, run = module(), trainer(tmp_path, **options)
    before = run.validate(net, loader(), verbose=False)[0]["val_loss"]
    run.fit(net, loader(), loader())
    assert net.seen == {"cuda:1" if options.get("devices") == [1] else "cuda:0"}
    assert run.callback_metrics["val_loss"].item() < before
    assert len(torch.cat(run.predict(net, loader()))) == 64
    saved = torch.load(run.checkpoint_callback.best_model_path, map_location="cpu", weights_only=True)
    assert torch.equal(saved["state_dict"]["net.0.weight"], net.net[0].weight.detach().cpu())


def test_the_cpu_gives_the_same(lease: object, tmp_path: Path) -> None:
    losses = []
    for accelerator in ("auto", "cpu"):
        net, run = module(), trainer(tmp_path / accelerator, accelerator=accelerator)
        run.fit(net, loader(), loader())
        losses.append(run.callback_metrics["val_loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_fabric(lease: object) -> None:
    fabric = L.Fabric(accelerator="auto", devices=1, precision="bf16-mixed")
    fabric.launch()
    net = nn.Linear(4, 2)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    out = model(torch.ones(2, 4, device=fabric.device))
    fabric.backward(out.sum())
    before = net.weight.detach().clone()
    optimizer.step()
    assert fabric.device.type == "cuda"
    assert not torch.equal(net.weight, before)


def fit_on_two(folder: Path, accelerator: str, **strategy: str) -> tuple[Net, Any]:
    """What two processes train, each on a device of its own."""
    from lightning.pytorch.strategies import DDPStrategy

    net = module()
    run = trainer(
        folder, accelerator=accelerator, devices=2, strategy=DDPStrategy(start_method="spawn", **strategy)
    )
    run.fit(net, loader(), loader())
    return net, run


@pytest.fixture
def spawning(leased: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the test starts hold its lease."""
    for name, value in leased.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_two_slices_train_what_two_cpu_processes_train(
    spawning: None, tmp_path: Path, backend: str, record: Callable[..., None]
) -> None:
    net, run = fit_on_two(tmp_path / "gpu", "gpu", process_group_backend=backend)
    local, _ = fit_on_two(tmp_path / "cpu", "cpu", process_group_backend="gloo")
    found = torch.cat([p.detach().cpu().flatten() for p in net.parameters()])
    expected = torch.cat([p.detach().flatten() for p in local.parameters()])
    torch.testing.assert_close(found, expected)
    assert run.num_devices == 2
    largest = (found - expected).abs().max().item()
    record(
        f"lightning: DistributedDataParallel over {backend} on two slices",
        compared=f"{len(found)} weights after 12 steps",
        result=f"at most {largest:.0e} apart" if largest else "the same digits",
    )
