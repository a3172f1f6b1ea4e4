"""torchmetrics has the same results on a slice as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

tm = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed; `make programs` does that")

pytestmark = pytest.mark.filterwarnings("ignore")

_random = torch.Generator().manual_seed(0)
CHANCES = torch.rand(50, 4, generator=_random).softmax(1)
CLASSES = torch.randint(0, 4, (50,), generator=_random)
PICTURES = torch.rand(4, 1, 16, 16, generator=_random)
MANY = {"task": "multiclass", "num_classes": 4}


@pytest.mark.parametrize(
    ("name", "options", "data"),
    [
        ("Accuracy", MANY, (CHANCES, CLASSES)),
        ("F1Score", {**MANY, "average": "macro"}, (CHANCES, CLASSES)),
        ("AUROC", MANY, (CHANCES, CLASSES)),
        ("AveragePrecision", MANY, (CHANCES, CLASSES)),
        ("ConfusionMatrix", MANY, (CHANCES, CLASSES)),
        ("MeanSquaredError", {}, (CHANCES[:, 0], CHANCES[:, 1])),
        ("R2Score", {}, (CHANCES[:, 0], CHANCES[:, 1])),
        ("PearsonCorrCoef", {}, (CHANCES[:, 0], CHANCES[:, 1])),
        ("SpearmanCorrCoef", {}, (CHANCES[:, 0], CHANCES[:, 1])),
        ("KLDivergence", {}, (CHANCES, CHANCES.flip(0))),
        ("CosineSimilarity", {}, (CHANCES, CHANCES.flip(0))),
        ("MeanMetric", {}, (CHANCES[:, 0],)),
        ("image.StructuralSimilarityIndexMeasure", {}, (PICTURES, PICTURES.flip(0))),
        ("image.PeakSignalNoiseRatio", {"data_range": 1.0}, (PICTURES, PICTURES.flip(0))),
    ],
)
def test_results_are_the_cpus(lease: object, name: str, options: dict, data: tuple) -> None:
    kind: Any = tm
    for part in name.split("."):
        kind = getattr(kind, part)
    found = []
    for place in ("cuda:1", "cpu"):
        metric = kind(**options).to(place)
        for halves in zip(*(d.chunk(2) for d in data)):
            metric.update(*(h.to(place) for h in halves))
        found.append(metric.compute())
        assert found[-1].device.type == place.split(":")[0]
    torch.testing.assert_close(found[0].cpu(), found[1])


def test_collections_and_resets(lease: object) -> None:
    metrics = tm.MetricCollection([tm.Accuracy(**MANY), tm.Precision(**MANY)]).to("cuda")
    first = {k: v.item() for k, v in metrics(CHANCES.cuda(), CLASSES.cuda()).items()}
    metrics.reset()
    metrics.update(CHANCES.cuda(), CLASSES.cuda())
    assert {k: v.item() for k, v in metrics.compute().items()} == first
