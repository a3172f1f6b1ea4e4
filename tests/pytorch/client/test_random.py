"""Random numbers on a slice: generators, seeds, and state that is saved and restored."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch


@pytest.fixture
def device(attached: object) -> str:
    """test_device_names shows that the others are the same."""
    return "cuda:1"


def draw(generator: torch.Generator | None, device: str) -> list[float]:
    return torch.rand(3, device=device, generator=generator).tolist()


def test_a_generator_gives_the_cpus_numbers_for_the_cpus_seed(device: str) -> None:
    ours, theirs = torch.Generator(device).manual_seed(5), torch.Generator().manual_seed(5)
    assert isinstance(ours, torch.Generator)
    assert isinstance(theirs, torch.Generator)
    assert ours.device.type == device.split(":")[0]
    assert draw(ours, device) == draw(theirs, "cpu")
    assert torch.equal(
        torch.randperm(9, generator=ours, device=device).cpu(), torch.randperm(9, generator=theirs)
    )
    a, b = torch.empty(4, device=device), torch.empty(4)
    for method in ("normal_", "uniform_", "exponential_", "random_"):
        getattr(a, method)(generator=ours)
        getattr(b, method)(generator=theirs)
        assert a.tolist() == b.tolist(), method
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert (
        torch.multinomial(weights.to(device), 2, generator=ours).tolist()
        == torch.multinomial(weights, 2, generator=theirs).tolist()
    )
    assert (
        torch.bernoulli(weights.to(device) / 4, generator=ours).tolist()
        == torch.bernoulli(weights / 4, generator=theirs).tolist()
    )


def test_generators_do_not_disturb_each_other_nor_the_default(device: str) -> None:
    torch.manual_seed(1)
    expected = [draw(None, device) for _ in range(2)]
    first, second = torch.Generator(device).manual_seed(2), torch.Generator(device).manual_seed(2)
    torch.manual_seed(1)
    assert draw(None, device) == expected[0]
    a = [draw(first, device), draw(first, device)]
    assert draw(None, device) == expected[1]
    assert [draw(second, device), draw(second, device)] == a


def test_state_is_saved_restored_cloned_and_copied(device: str) -> None:
    generator = torch.Generator(device).manual_seed(3)
    draw(generator, device)
    state = generator.get_state()
    assert state.dtype is torch.uint8
    assert state.device.type == "cpu"
    clone, twin, thawed = (
        generator.clone_state(),
        copy.deepcopy(generator),
        pickle.loads(pickle.dumps(generator)),
    )
    wanted = draw(generator, device)
    for other in (clone, twin, thawed):
        assert other.device == generator.device
        assert draw(other, device) == wanted
    generator.set_state(state)
    assert draw(generator, device) == wanted
    assert generator.initial_seed() == 3
    with pytest.raises(TypeError, match="RNG state must be a torch.ByteTensor"):
        generator.set_state(torch.ones(3))


def test_a_seed_nobody_knows(device: str) -> None:
    generator = torch.Generator(device)
    assert generator.initial_seed() == torch.Generator().initial_seed()
    seed = generator.seed()
    assert generator.initial_seed() == seed
    first = draw(generator, device)
    assert draw(generator.manual_seed(seed), device) == first


def test_a_generator_of_another_device_is_refused_in_cudas_words(attached: object) -> None:
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.rand(2, generator=torch.Generator("cuda"))
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.empty(2).normal_(generator=torch.Generator("cuda"))
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(2, device="cuda", generator=torch.Generator())


def test_a_generator_with_a_default_device(attached: object) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.device("cuda"):
        inside = torch.rand(3, generator=generator)
    assert inside.is_cuda
    assert inside.tolist() == draw(torch.Generator().manual_seed(0), "cpu")


def test_dropped_generators_are_freed_in_the_worker(attached: object) -> None:
    """Else a program that makes one for each batch would be refused sooner or later."""
    from jupyter_gpupool.pytorch.worker.handles import MAX_GENERATORS

    for n in range(2 * MAX_GENERATORS):
        torch.Generator("cuda").manual_seed(n)
    gc.collect()
    kept = [torch.Generator("cuda") for _ in range(3)]
    assert draw(kept[0], "cuda") == draw(kept[1], "cuda")


def test_more_generators_than_anybody_needs_are_refused(attached: object) -> None:
    from jupyter_gpupool.pytorch.worker.handles import MAX_GENERATORS

    kept = []
    with pytest.raises(RuntimeError, match="generators at once; drop those that are not needed"):
        for _ in range(MAX_GENERATORS + 1):
            kept.append(torch.Generator("cuda"))
        torch.cuda.synchronize()
    del kept
    gc.collect()
    assert len(draw(torch.Generator("cuda"), "cuda")) == 3


def test_torch_cudas_functions(attached: object) -> None:
    torch.cuda.manual_seed_all(7)
    assert torch.cuda.initial_seed() == 7
    torch.cuda.manual_seed(8)
    assert torch.cuda.initial_seed() == 8
    with torch.cuda.device(1):
        assert torch.cuda.initial_seed() == 7
    states = torch.cuda.get_rng_state_all()
    wanted = draw(None, "cuda:0"), draw(None, "cuda:1")
    assert wanted[0] != wanted[1]
    torch.cuda.set_rng_state_all(states)
    assert (draw(None, "cuda:0"), draw(None, "cuda:1")) == wanted
    torch.cuda.set_rng_state(states[1], "cuda:0")
    assert draw(None, "cuda:0") == wanted[1]
    cpu = torch.get_rng_state()
    torch.cuda.seed()
    assert torch.equal(torch.get_rng_state(), cpu), "the CPU's numbers are no concern of torch.cuda's"
    torch.cuda.seed_all()
    assert draw(None, "cuda:0") == draw(None, "cuda:1")


def test_default_generators_are_those_that_operators_use(attached: object) -> None:
    default = torch.cuda.default_generators[1]
    default.manual_seed(4)
    first = draw(None, "cuda:1")
    default.manual_seed(4)
    assert draw(default, "cuda:1") == first
    assert draw(None, "cuda:1") != first


@pytest.mark.parametrize("device_type", ["cuda", "gpupool"])
def test_fork_rng_leaves_no_trace(attached: object, device_type: str) -> None:
    torch.manual_seed(0)
    with torch.random.fork_rng(devices=[0, 1], device_type=device_type):
        wanted = draw(None, f"{device_type}:0"), draw(None, f"{device_type}:1")
        torch.manual_seed(99)
        draw(None, f"{device_type}:1")
    assert (draw(None, f"{device_type}:0"), draw(None, f"{device_type}:1")) == wanted


def test_a_generator_of_an_ended_lease_says_so(attached: object, start_worker: object) -> None:
    from jupyter_gpupool.pytorch.client import session

    generator = torch.Generator("cuda")
    session.deactivate()
    assert torch.Generator is torch._C.Generator
    session.activate(start_worker().spec)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="lease that has ended"):
        draw(generator, "cuda")


def test_a_loader_that_shuffles_by_a_seed(attached: object) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(6))
    split = torch.utils.data.random_split(data, [4, 2], generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(split[0], shuffle=True, generator=torch.Generator().manual_seed(1))
    assert sorted(int(x) for (x,) in loader) == sorted(split[0].indices)
