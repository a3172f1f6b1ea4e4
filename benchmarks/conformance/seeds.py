"""The seed of every case and use, so that both devices draw the same numbers."""

from __future__ import annotations

import torch

SEED = 7


def seed(device: str = "cpu") -> None:
    """Seed the generators of the CPU and of a device.

    ``torch.manual_seed`` also writes down the stack for each backend that is not there: half the time of a case.
    """
    torch.default_generator.manual_seed(SEED)
    if device != "cpu":
        torch.get_device_module(device).manual_seed_all(SEED)
