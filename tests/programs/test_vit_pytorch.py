"""Vision transformers of lucidrains/vit-pytorch compute on a slice what they compute on the CPU.

VIT_PYTORCH names a clone of the repository.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("einops", reason="einops is not installed; `make programs` does that")
pytestmark = pytest.mark.skipif(not os.environ.get("VIT_PYTORCH"), reason="VIT_PYTORCH names no clone")

_PLAIN = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "dim": 32,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 32,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit.ViT": ("image", _PLAIN),
    "simple_vit.SimpleViT": ("image", _PLAIN),
    "simple_vit_with_register_tokens.SimpleViT": ("image", _PLAIN),
    "simple_vit_with_qk_norm.SimpleViT": ("image", _PLAIN),
    "simple_vit_with_fft.SimpleViT": ("image", {**_PLAIN, "freq_patch_size": 8}),
    "deepvit.DeepViT": ("image", _PLAIN),
    "parallel_vit.ViT": ("image", {**_PLAIN, "num_parallel_branches": 2}),
    "vit_for_small_dataset.ViT": ("image", _PLAIN),
    "cait.CaiT": ("image", {**_PLAIN, "cls_depth": 1}),
    "vit_with_patch_merger.ViT": ("image", {**_PLAIN, "patch_merge_layer": 1, "patch_merge_num_tokens": 4}),
    "xcit.XCiT": ("image", {**_PLAIN, "cls_depth": 1, "local_patch_kernel_size": 3}),
    "cct.CCT": (
        "image",
        {
            "img_size": (32, 32),
            "embedding_dim": 32,
            "n_conv_layers": 1,
            "kernel_size": 7,
            "stride": 2,
            "padding": 3,
            "pooling_kernel_size": 3,
            "pooling_stride": 2,
            "pooling_padding": 1,
            "num_layers": 2,
            "num_heads": 2,
            "mlp_ratio": 2.0,
            "num_classes": 5,
            "positional_embedding": "learnable",
            "dropout_rate": 0.0,
            "attention_dropout": 0.0,
            "stochastic_depth_rate": 0.0,
        },
    ),
    "nest.NesT": (
        "image",
        {
            "image_size": 32,
            "patch_size": 4,
            "dim": 16,
            "heads": 2,
            "num_hierarchies": 2,
            "block_repeats": (1, 1),
            "num_classes": 5,
        },
    ),
    "vit_1d.ViT": (
        "sequence",
        {"seq_len": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 32},
    ),
    "vit_3d.ViT": (
        "video",
        {
            "image_size": 16,
            "image_patch_size": 8,
            "frames": 4,
            "frame_patch_size": 2,
            **{name: _PLAIN[name] for name in ("num_classes", "dim", "depth", "heads", "mlp_dim")},
        },
    ),
}
SHAPES = {"image": (2, 3, 32, 32), "sequence": (2, 3, 32), "video": (2, 3, 4, 16, 16)}
#: Differences that a slice may have to the CPU, relative and absolute.
RTOL, ATOL = 1e-5, 1e-6


@pytest.fixture(scope="module", autouse=True)
def clone() -> Iterator[None]:
    runpy.run_path(str(Path(__file__).parent / "beside" / "sitecustomize.py"))  # some models need torchvision
    sys.path.insert(0, os.environ["VIT_PYTORCH"])
    yield
    sys.path.remove(os.environ["VIT_PYTORCH"])


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_cpu_does(lease: object, name: str, record: Callable[..., None]) -> None:
    module, _, kind = name.partition(".")
    shape, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)(**options)
    picture = torch.randn(SHAPES[shape])

    def results(place: str) -> list[torch.Tensor]:
        model.to(place).zero_grad()
        out = model(picture.to(place))
        out.square().sum().backward()
        assert out.device.type == place
        return [out.detach().cpu(), *(p.grad.cpu().clone() for p in model.parameters() if p.grad is not None)]

    expected = results("cpu")
    found = results("cuda")
    assert len(found) == len(expected) > 1
    for here, there in zip(found, expected, strict=True):
        torch.testing.assert_close(here, there, rtol=RTOL, atol=ATOL)
    record(
        f"lucidrains/vit-pytorch: {name}",
        compared=f"output and {len(found) - 1} gradients",
        result=f"at most {RTOL:g} apart",
    )
