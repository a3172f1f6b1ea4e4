"""Which devices of a lease CUDA_VISIBLE_DEVICES leaves, as CUDA reads it."""

from __future__ import annotations

import pytest

from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec, visible_devices

DEVICES = tuple(DeviceSpec(k, uuid, "GPU", 64, 64, True) for k, uuid in enumerate(["GPU-aa1", "GPU-ab2"]))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (None, (0, 1)),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("0", (0,)),
        ("1", (1,)),
        ("7", ()),
        ("1,0", (1, 0)),
        (" 1 , 0 ", (1, 0)),
        ("0,7,1", (0,)),
        ("1,-1,0", (1,)),
        ("0,,1", (0,)),
        ("0,0", ()),
        ("0,GPU-aa1", ()),
        ("GPU-ab2", (1,)),
        ("GPU-ab", (1,)),
        ("GPU-a", ()),
        ("GPU-ab2,GPU-aa1", (1, 0)),
        ("GPU-ab2,1", ()),
        ("GPU-aa1,GPU-zz,GPU-ab2", (0,)),
        ("MIG-GPU-aa1/1/0", ()),
    ],
)
def test_visible_devices(text: str | None, left: tuple[int, ...]) -> None:
    assert visible_devices(DEVICES, text) == left


def test_what_is_left_is_numbered_anew_and_keeps_its_worker() -> None:
    addresses = (("one", 1), ("two", 2))
    spec = AttachSpec("lease", "one", 1, "secret", DEVICES, addresses=addresses)
    assert spec.visible(None) == spec
    turned = spec.visible("1,0")
    assert [(d.index, d.uuid) for d in turned.devices] == [(0, "GPU-ab2"), (1, "GPU-aa1")]
    assert turned.addresses == (("two", 2), ("one", 1))
    (part,) = spec.visible("1").parts()
    assert (part.host, part.devices[0].index, part.devices[0].uuid) == ("two", 0, "GPU-ab2")
