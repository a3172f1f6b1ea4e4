"""What answers to NCCL between leased GPUs, in two processes of a lease, against gloo between two of the CPU."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as checkpoint  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from .two_ranks import DTYPES, SHAPES, SIZE, compare, digits, elements, run  # noqa: E402

#: Why nobody makes NCCL's group by itself; PyTorch's own class, where it is built with NCCL, says it in its words.
REFUSAL_OF_NCCL: tuple[type[Exception], str] = (
    (ValueError, "only supported with GPUs")
    if hasattr(torch._C._distributed_c10d, "ProcessGroupNCCL")
    else (NotImplementedError, "with init_process_group or new_group")
)
OPERATIONS = ["SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"]


def every_collective(device: str, rank: int) -> dict[str, Any]:
    """What each collective leaves at this rank."""
    found: dict[str, Any] = {}

    def note(name: str, *tensors: Any) -> None:
        found[name] = [digits(t) for t in tensors]

    for shape, dtype in itertools.product(SHAPES, DTYPES):
        mine = elements(shape, dtype, rank).to(device)
        name = f"{shape} {dtype}"
        for operation in OPERATIONS:
            if operation.startswith("B") and dtype.is_floating_point:
                continue
            t = mine.clone()
            dist.all_reduce(t, getattr(dist.ReduceOp, operation))
            note(f"all_reduce {operation} {name}", t)
        t = mine.clone()
        dist.broadcast(t, 1)
        note(f"broadcast {name}", t)
        outs = [torch.empty_like(mine) for _ in range(SIZE)]
        dist.all_gather(outs, mine)
        note(f"all_gather {name}", *outs)
        if shape:  # gloo refuses numbers here
            whole = torch.empty((SIZE * shape[0], *shape[1:]), dtype=dtype, device=device)
            dist.all_gather_into_tensor(whole, mine)
            note(f"all_gather_into_tensor {name}", whole)
        t = mine.clone()
        dist.reduce(t, 0)
        if rank == 0:
            note(f"reduce {name}", t)
        dist.gather(mine, outs if rank == 0 else None, 0)
        if rank == 0:
            note(f"gather {name}", *outs)
        t = torch.empty_like(mine)
        dist.scatter(t, [mine, mine + 1] if rank == 1 else None, 1)
        note(f"scatter {name}", t)
    rows = torch.arange(6.0, device=device) + 10 * rank
    out = torch.empty_like(rows)
    dist.all_to_all_single(out, rows)
    note("all_to_all_single", out)
    sizes = [[1, 5], [2, 4]]
    out = torch.empty(sizes[0][rank] + sizes[1][rank], device=device)
    dist.all_to_all_single(out, rows, [sizes[r][rank] for r in range(SIZE)], sizes[rank])
    note("all_to_all_single of parts", out)
    out = torch.empty(3, device=device)
    dist.reduce_scatter_tensor(out, rows)
    note("reduce_scatter_tensor", out)
    dist.reduce_scatter(out, [rows[:3].contiguous(), rows[3:].contiguous()])
    note("reduce_scatter", out)
    # Both receive before they send.
    other, got = 1 - rank, torch.zeros(2, device=device)
    works = [dist.irecv(got, other), dist.isend(rows[:2].contiguous(), other)]
    for work in works:
        work.wait()
    note("send and receive", got)
    things: list[Any] = [None] * SIZE
    dist.all_gather_object(things, {"rank": rank})
    found["objects"] = things
    alone = [dist.new_group([r]) for r in range(SIZE)][rank]
    t = rows.clone()
    work = dist.all_reduce(t, group=alone, async_op=True)
    work.wait()
    note("a group of one", t)
    dist.barrier()
    return found


def training(device: str, rank: int) -> dict[str, Any]:
    """Losses and parameters of a model in DistributedDataParallel, with gradients that gather in several buckets."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).to(device)
    model = nn.parallel.DistributedDataParallel(layers, bucket_cap_mb=0.0005)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for step in range(6):
        batch = elements((10, 8), torch.float32, 2 * step + rank).to(device)
        optimizer.zero_grad()
        if step == 3:
            with model.no_sync():
                model(batch).square().mean().backward()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "parameters": [digits(p) for p in model.parameters()]}


def sharded(device: str, rank: int) -> dict[str, Any]:
    """Losses and a whole parameter of a model whose parameters are sharded, and of a product of sharded tensors."""
    mesh = init_device_mesh(device.partition(":")[0], (SIZE,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for step in range(3):
        batch = elements((4, 8), torch.float32, 2 * step + rank).to(device)
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    rows = distribute_tensor(torch.arange(8.0, device=device).reshape(4, 2), mesh, [Shard(0)])
    return {
        "losses": losses,
        "parameter": digits(model[0].weight.full_tensor()),
        "product": digits((rows @ rows.T).full_tensor()),
    }


def with_options(device: str, rank: int) -> dict[str, Any]:
    """Parameters after three steps with DistributedDataParallel's options, and with a hook that halves gradients."""
    found = {}
    for options in (
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
        {"hook": default_hooks.fp16_compress_hook},
    ):
        torch.manual_seed(0)
        hook = options.pop("hook", None)
        model = nn.ModuleDict({"used": nn.Linear(4, 2), "unused": nn.Linear(4, 2)}).to(device)
        if "find_unused_parameters" not in options:
            del model["unused"]
        model.forward = lambda x, used=model["used"]: used(x)
        parallel = nn.parallel.DistributedDataParallel(model, **options)
        if hook:
            parallel.register_comm_hook(None, hook)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
        for step in range(3):
            optimizer.zero_grad()
            parallel(elements((6, 4), torch.float32, 2 * step + rank).to(device)).square().mean().backward()
            optimizer.step()
        found[hook.__name__ if hook else str(options)] = [digits(p) for p in model.parameters()]
    return found


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: Any) -> Any:
        return self.second(torch.relu(self.first(x)))


def tensor_parallel(device: str, rank: int) -> dict[str, Any]:
    """Losses of a model whose matrices are split between the ranks, and what a checkpoint of it gives another one."""
    mesh = init_device_mesh(device.partition(":")[0], (SIZE,))
    plan = {
        "first": ColwiseParallel(input_layouts=Shard(0)),
        "second": RowwiseParallel(output_layouts=Shard(0)),
    }
    torch.manual_seed(0)
    model = parallelize_module(TwoLayers().to(device), mesh, plan)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    losses = []
    for step in range(3):
        loss = model(elements((4, 8), torch.float32, 2 * step + rank).to(device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    folder = [tempfile.mkdtemp(prefix="gpupool-test-") if rank == 0 else None]
    dist.broadcast_object_list(folder)
    checkpoint.save(model.state_dict(), checkpoint_id=folder[0])
    other = parallelize_module(TwoLayers().to(device), mesh, plan)
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=folder[0])
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])
    return {"losses": losses, "weight": digits(state["second.weight"].full_tensor())}


def normalized(device: str, rank: int) -> dict[str, Any]:
    """Outputs, gradients and statistics of normalization over the images of all ranks."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(layers).to(device))
    out = model(elements((2, 3, 8, 8), torch.float32, rank).to(device))
    out.square().mean().backward()
    return {
        "out": out.detach().cpu().numpy(),
        "gradients": [p.grad.cpu().numpy() for p in model.parameters()],
        "statistics": [b.cpu().numpy() for b in model.buffers()],
    }


PARTS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "collectives": every_collective,
    "training": training,
    "sharded": sharded,
    "options": with_options,
    "tensor parallel": tensor_parallel,
    "normalized": normalized,
}


def test_as_gloo_on_the_cpu(start_worker: Callable, tmp_path: Path) -> None:
    compare(
        start_worker().spec, tmp_path, {name: part for name, part in PARTS.items() if part is not normalized}
    )


def test_batches_are_normalized_over_all_ranks(start_worker: Callable, tmp_path: Path) -> None:
    """PyTorch has nn.SyncBatchNorm on GPUs only: as one process normalizes both ranks' images."""
    found = run(start_worker().spec, tmp_path / "store", {"normalized": normalized})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    out = model(torch.cat([elements((2, 3, 8, 8), torch.float32, rank) for rank in range(SIZE)]))
    out.square().mean().backward()
    for rank in range(SIZE):
        there = found[rank]["normalized"]
        torch.testing.assert_close(torch.from_numpy(there["out"]), out.detach()[2 * rank : 2 * rank + 2])
        for values, expected in (
            *zip(there["gradients"], [p.grad for p in model.parameters()], strict=True),
            *zip(there["statistics"], model.buffers(), strict=True),
        ):
            torch.testing.assert_close(torch.as_tensor(values), expected, atol=1e-5, rtol=1e-4)


def _met(spec: Any, store: str, rank: int, backend: str | None = "nccl", **options: Any) -> torch.Tensor:
    """Attach this rank, let it meet the others once, and return what they have summed up."""
    from jupyter_gpupool.pytorch.client import session

    session.activate(spec)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=SIZE, **options)
    x = torch.ones(3, device=f"cuda:{rank}")
    dist.all_reduce(x)
    torch.cuda.synchronize()
    return x


def _killed(spec: Any, store: str, rank: int, answers: Any) -> None:
    x = _met(spec, store, rank, backend=None, timeout=timedelta(minutes=5))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(x)
        torch.cuda.synchronize()
        answers.put("nobody was missed")
    except RuntimeError as e:
        answers.put(str(e))
    answers.put((x.new_ones(2) * 2).tolist())
    answers.close()
    answers.join_thread()
    os._exit(0)


def test_a_rank_that_is_killed_is_named_and_the_others_go_on(start_worker: Callable, tmp_path: Path) -> None:
    worker = start_worker()
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_killed, args=(worker.spec, str(tmp_path / "store"), rank, answers))
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    assert answers.get(timeout=600).startswith("rank 1 has ended or left the lease")
    assert answers.get(timeout=600) == [2, 2]
    for process in processes:
        process.join()


def _sets_its_timeout(spec: Any, store: str, rank: int, over: Any, answers: Any) -> None:
    x = _met(spec, store, rank)
    if rank == 1:
        over.wait()
        os._exit(0)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    dist.all_reduce(x)
    try:
        torch.cuda.synchronize()
    except RuntimeError as e:
        answers.put(str(e))
    answers.close()
    answers.join_thread()
    over.set()
    os._exit(0)


def test_a_timeout_that_is_set_later_holds_for_what_follows(start_worker: Callable, tmp_path: Path) -> None:
    worker = start_worker()
    context = multiprocessing.get_context("spawn")
    over, answers = context.Event(), context.Queue()
    processes = [
        context.Process(
            target=_sets_its_timeout, args=(worker.spec, str(tmp_path / "store"), rank, over, answers)
        )
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    try:
        assert answers.get(timeout=600).startswith("rank 0 waited 2 s in all_reduce(SUM) for rank 1")
        for process in processes:
            process.join()
    finally:  # also where rank 0 has failed, for which rank 1 waits
        for process in processes:
            process.kill()
            process.join()


def test_what_is_not_there_is_refused_in_one_line_and_the_rest_goes_on(
    attached: object, tmp_path: Path
) -> None:
    x = torch.ones(3, device="cuda")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert dist.is_nccl_available()
        with pytest.raises(NotImplementedError, match="give it as src"):
            dist.recv(x)
        with pytest.raises(NotImplementedError, match="multiply before you reduce"):
            dist.all_reduce(x, dist._make_nccl_premul_sum(2.0))
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=9))
        work = dist.all_reduce(x, async_op=True)
        assert work.wait(timedelta(seconds=60))
        assert x.tolist() == [1, 1, 1]
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.min_ctas = 4
        for group in (dist.new_group([0], pg_options=options), dist.new_group([0], None, "nccl", options)):
            dist.all_reduce(x, group=group)
        assert x.tolist() == [1, 1, 1]
        # Where PyTorch is built with NCCL, that is PyTorch's own class.
        with pytest.raises(REFUSAL_OF_NCCL[0], match=REFUSAL_OF_NCCL[1]):
            dist.ProcessGroupNCCL(None, 0, 1, options)
    finally:
        dist.destroy_process_group()


def _leaves(spec: Any, store: str, rank: int, left: Any, answers: Any) -> None:
    x = _met(spec, store, rank)
    if rank == 0:
        left.wait()
    dist.all_reduce(x)
    if rank == 1:
        left.set()
    else:
        answers.put(x.tolist())
        answers.close()
        answers.join_thread()
    dist.destroy_process_group()


def test_a_rank_that_is_done_first_waits_for_the_others(start_worker: Callable, tmp_path: Path) -> None:
    worker = start_worker()
    context = multiprocessing.get_context("spawn")
    left, answers = context.Event(), context.Queue()
    processes = [
        context.Process(target=_leaves, args=(worker.spec, str(tmp_path / "store"), rank, left, answers))
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    assert answers.get(timeout=600) == [4, 4, 4]
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_a_device_mesh_chooses_the_device_that_the_launcher_names(
    attached: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not torch.cuda.is_initialized()
    named = {
        "LOCAL_RANK": 1,
        "RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
    }
    for name, value in named.items():
        monkeypatch.setenv(name, str(value))
    mesh = init_device_mesh(torch.accelerator.current_accelerator().type, (1,))
    try:
        assert torch.cuda.is_initialized()
        assert torch.cuda.current_device() == 1
        assert dist.get_backend(mesh.get_group()) == "nccl"
    finally:
        dist.destroy_process_group()
