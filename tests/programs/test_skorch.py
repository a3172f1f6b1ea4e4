"""skorch, training in scikit-learn's style, with device="cuda"."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

skorch = pytest.importorskip("skorch", reason="skorch is not installed; `make programs` does that")


class Net(nn.Module):
    def __init__(self, hidden: int = 10) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 2), nn.Softmax(-1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((200, 8)).astype("float32")
    return x, (x.sum(1) > 0).astype("int64")


def fitted(device: str, data: tuple) -> Any:
    torch.manual_seed(0)
    net = skorch.NeuralNetClassifier(
        Net, max_epochs=8, lr=0.2, device=device, verbose=0, iterator_train__shuffle=True
    )
    return net.fit(*data)


def test_it_learns_what_it_learns_on_the_cpu(lease: object, data: tuple) -> None:
    net, local = fitted("cuda", data), fitted("cpu", data)
    assert net.history[:, "train_loss"] == pytest.approx(local.history[:, "train_loss"], rel=1e-4)
    assert net.score(*data) == local.score(*data) > 0.8
    assert next(net.module_.parameters()).is_cuda


def test_it_is_kept_and_searched_over(lease: object, data: tuple, tmp_path: Path) -> None:
    from sklearn.model_selection import GridSearchCV

    net = fitted("cuda", data)
    assert (pickle.loads(pickle.dumps(net)).predict(data[0]) == net.predict(data[0])).all()
    net.save_params(f_params=str(tmp_path / "weights.pt"))
    other = fitted("cuda", data)
    other.load_params(f_params=str(tmp_path / "weights.pt"))
    assert (other.predict_proba(data[0]) == net.predict_proba(data[0])).all()
    search = GridSearchCV(net, {"lr": [0.001, 0.2], "module__hidden": [4]}, cv=2, refit=False)
    assert search.fit(*data).best_params_["lr"] == 0.2
