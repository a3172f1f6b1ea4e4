"""Storages of a slice, compared with those of the CPU."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


def numbers(place: str, count: int = 4) -> torch.Tensor:
    return torch.arange(float(count), device=place)


def filled(place: str) -> Any:
    x = numbers(place)
    x.untyped_storage().fill_(0)
    return x.tolist()


def copied(place: str) -> Any:
    x, y = numbers(place), numbers(place)
    x.untyped_storage().copy_((y + 1).untyped_storage())
    y.untyped_storage().copy_(numbers("cpu").add(3).untyped_storage())
    host = numbers("cpu")
    host.untyped_storage().copy_(y.untyped_storage())
    return x.tolist(), y.tolist(), host.tolist()


def grown(place: str) -> Any:
    x = numbers(place)
    view, storage = x[1:3], x.untyped_storage()
    storage.resize_(64)
    storage[0:8] = 0
    return x.tolist(), view.tolist(), view.untyped_storage().nbytes(), len(storage)


def shrunk(place: str) -> Any:
    x = numbers(place)
    x.untyped_storage().resize_(8)
    return x.untyped_storage().nbytes(), torch.empty(0, device=place).set_(x.untyped_storage()).tolist()


def emptied_and_grown_again(place: str) -> Any:
    x = numbers(place)
    x.untyped_storage().resize_(0)
    before = x.untyped_storage().size()
    x.untyped_storage().resize_(16)
    return before, x.fill_(3).tolist()


def resized_tensor(place: str) -> Any:
    x = numbers(place)
    view = x[:2]
    x.resize_(10).fill_(5)
    return view.tolist()


def elements(place: str) -> Any:
    storage = numbers(place).untyped_storage()
    found = [storage[7], storage[-1]]
    storage[3] = 7
    storage[0:2] = 9
    return found, storage.tolist(), list(storage), repr(storage).replace("cuda:1", "cpu")


def swapped(place: str) -> Any:
    storage = numbers(place).untyped_storage()
    storage.byteswap(torch.float32)
    return storage.tolist()


def copies(place: str) -> Any:
    storage = numbers(place).untyped_storage()
    twins = [
        storage.clone(),
        copy.copy(storage),
        copy.deepcopy(storage),
        storage.to(device="cuda:0"),
        storage.new(),
    ]
    at_home = storage.cpu(), storage.to(device="cpu")
    assert [t.device.type for t in at_home] == ["cpu", "cpu"]
    found = [t.tolist() for t in at_home]
    storage.fill_(0)
    return found, [t.tolist() for t in twins]


def made(place: str) -> Any:
    assert torch.UntypedStorage(16, device=place).device == torch.device(place)
    return (
        torch.UntypedStorage(16, device=torch.device(place)).nbytes(),
        torch.UntypedStorage([1, 2, 3], device=place).tolist(),
        torch.TypedStorage([4, 5], dtype=torch.float32, device=place).tolist(),
        torch.TypedStorage(2, dtype=torch.int64, device=place).fill_(2).tolist(),
    )


def cast(place: str) -> Any:
    names = ("float", "double", "half", "long", "int", "short", "char", "byte", "bool", "bfloat16")
    return [getattr(numbers(place, 2).untyped_storage(), name)().tolist() for name in names]


def typed(place: str) -> Any:
    storage = numbers(place).storage()
    storage[1] = 9
    storage[2:4] = 7
    storage.resize_(6)
    twins = [storage.double(), storage.clone(), copy.deepcopy(storage), storage.cpu()]
    facts = storage.size(), storage.nbytes(), storage.dtype, storage.element_size(), storage.type()
    return [t.tolist()[:4] for t in twins], str(facts).replace("torch.cuda.", "torch.")


def put(place: str) -> Any:
    storage = numbers(place).untyped_storage()
    empty = torch.empty(0, device=place)
    return (
        torch.empty(0, dtype=torch.int32, device=place).set_(storage).tolist(),
        empty.set_(storage, 1, (2,), (1,)).tolist(),
        empty.set_(source=storage, storage_offset=2, size=(2,), stride=(1,)).tolist(),
        empty.set_(numbers(place).storage(), 1, (2,)).tolist(),
        empty.set_(storage, 0, (6,)).tolist()[:4],
    )


def facts(place: str) -> Any:
    x = numbers(place)
    storage = x.untyped_storage()
    return (
        x[1:].untyped_storage() is storage,
        x.clone().untyped_storage()._cdata == storage._cdata,
        storage.data_ptr() == x.data_ptr(),
        isinstance(storage, torch.UntypedStorage),
        torch.is_storage(storage),
        storage.type(),
        storage.element_size(),
        storage.resizable(),
        storage.is_pinned(),
        storage.share_memory_().is_shared(),
        storage.filename,
    )


def through_files(place: str) -> Any:
    x = numbers(place)
    found = []
    for zipped in (True, False):
        file = io.BytesIO()
        # PyTorch cannot load untyped storages from the older format.
        other = numbers(place)
        values = [x.storage(), x, other.untyped_storage() if zipped else other]
        torch.save(values, file, _use_new_zipfile_serialization=zipped)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert all(v.device.type == torch.device(place).type for v in loaded)
        loaded[0].fill_(0)
        found.append([v.tolist() for v in loaded])
    return found, pickle.loads(pickle.dumps(x.storage())).tolist()


@pytest.mark.parametrize(
    "program",
    [
        filled,
        copied,
        grown,
        shrunk,
        emptied_and_grown_again,
        resized_tensor,
        elements,
        swapped,
        copies,
        made,
        cast,
        typed,
        put,
        facts,
        through_files,
    ],
    ids=lambda f: f.__name__,
)
def test_as_on_the_cpu(attached: object, program: Callable[[str], Any]) -> None:
    assert program("cuda:1") == program("cpu")


def test_resizing_frees_memory(attached: object) -> None:
    x = torch.zeros(1 << 20, device="cuda")
    before = torch.cuda.memory_allocated()
    x.untyped_storage().resize_(0)
    assert before - torch.cuda.memory_allocated() == 4 << 20
    with pytest.raises(RuntimeError, match="resized to 0 bytes; resize it"):
        x + 1
    del x
    assert torch.cuda.memory_allocated() == before - (4 << 20)
    assert torch.ones(1, device="cuda").item() == 1


def test_shrinking_frees_memory_in_the_worker_too(attached: object) -> None:
    x = torch.arange(1 << 20, device="cuda", dtype=torch.float32)
    storage = x.untyped_storage()
    before, address = torch.cuda.memory_allocated(), storage.data_ptr()
    storage.resize_(1 << 20)
    for used in (torch.cuda.memory_allocated, torch.cuda.device_memory_used):
        assert before - used() == 3 << 20
    assert storage.data_ptr() != address
    assert x[: 1 << 18].sum().item() == sum(range(1 << 18))
    with pytest.raises(RuntimeError, match="needs 4194304 bytes, but its storage has 1048576; resize it"):
        x.sum().item()
    with pytest.raises(RuntimeError, match="needs 4194304 bytes"):
        x.copy_(torch.zeros(1 << 20))
        torch.cuda.synchronize()
    storage.resize_(4 << 20)
    assert x.fill_(1).sum().item() == 1 << 20
    assert torch.cuda.memory_allocated() == before


def test_what_is_refused(attached: object) -> None:
    here, there = numbers("cpu"), numbers("cuda")
    for t, storage in ((here, there.untyped_storage()), (there, here.untyped_storage())):
        with pytest.raises(RuntimeError, match="Attempted to set the storage.*the devices must match"):
            t.set_(storage)
    with pytest.raises(RuntimeError, match="devices must match"):
        torch.Tensor(there.storage())
    with pytest.raises(TypeError, match="use a tensor instead"):
        there.untyped_storage()[1:3]
    with pytest.raises(IndexError, match="index 99 out of range for storage of size 16"):
        there.untyped_storage()[99]
    with pytest.raises(RuntimeError, match="self was 16 bytes but src was 8 bytes"):
        there.untyped_storage().copy_(numbers("cpu", 2).untyped_storage())
    with pytest.raises(TypeError, match="only CPU memory can be pinned"):
        there.untyped_storage().pin_memory()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("where", "from_cpu", "from_slice"),
    [
        (lambda storage, place: storage.cuda(0), "cuda:0", "cuda:0"),
        (lambda storage, place: storage.cuda(1), "cuda:1", "cuda:1"),
        (lambda storage, place: storage, "cpu", "cpu"),
        (lambda storage, place: None, "cpu", "cuda:0"),
        ("cpu", "cpu", "cpu"),
        ("cuda", "cuda:0", "cuda:0"),
        (torch.device("cuda", 1), "cuda:1", "cuda:1"),
        ({"cuda:0": "cuda:1"}, "cpu", "cuda:1"),
        ({"cuda:0": "cpu", "cpu": "cuda:1"}, "cuda:1", "cpu"),
        ("meta", "meta", "meta"),
    ],
)
def test_every_map_location(
    attached: object, where: Any, from_cpu: str, from_slice: str, zipped: bool
) -> None:
    for place, expected in (("cpu", from_cpu), ("cuda:0", from_slice)):
        base = numbers(place)
        file = io.BytesIO()
        torch.save([base, base[1:3]], file, _use_new_zipfile_serialization=zipped)
        file.seek(0)
        loaded, view = torch.load(file, map_location=where)
        assert str(loaded.device) == str(view.device) == expected
        if expected != "meta":
            view.zero_()
            assert loaded.tolist() == [0, 0, 0, 3]


def test_loading_from_a_mapped_file(attached: object, tmp_path: Path) -> None:
    torch.save(numbers("cuda"), tmp_path / "x.pt")
    for where, expected in ((None, "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        loaded = torch.load(tmp_path / "x.pt", mmap=True, map_location=where)
        assert str(loaded.device) == expected
        assert loaded.tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:torch.set_default_tensor_type")
def test_default_tensor_types(attached: object) -> None:
    try:
        for kind in (torch.cuda.DoubleTensor, "torch.cuda.DoubleTensor"):
            torch.set_default_tensor_type(kind)
            for made in (torch.zeros(2), torch.tensor([1.0]), torch.nn.Linear(1, 1).weight):
                assert str(made.device) == "cuda:0"
                assert made.dtype is torch.float64
            torch.set_default_tensor_type(torch.FloatTensor)
            assert torch.zeros(2).device.type == "cpu"
            assert torch.zeros(2).dtype is torch.float32
        with pytest.raises(TypeError, match="only floating-point types"):
            torch.set_default_tensor_type(torch.cuda.LongTensor)
    finally:
        torch.set_default_tensor_type(torch.FloatTensor)
    assert torch.cuda.FloatTensor(numbers("cuda").storage()).tolist() == [0, 1, 2, 3]
