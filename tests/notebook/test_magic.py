"""%gpupool in a real kernel: slices without a restart, and one readable line for every mistake."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.notebook import magics

Kernel = Any
Start = Callable[..., Kernel]
PREPARE = "import torch\nnet = torch.nn.Linear(3, 2)\nbefore = net.weight.detach().clone()"


def granted(pool: PoolClient) -> list[int]:
    """MiB of each GPU."""
    return [gpu["granted_mib"] for server in pool.pool()["servers"] for gpu in server["gpus"]]


def test_a_running_kernel_gets_slices_and_gives_them_back_without_losing_anything(
    start_kernel: Start, pool: PoolClient
) -> None:
    kernel = start_kernel()
    kernel.run(PREPARE)
    assert "no GPU" in kernel.run("%gpupool")
    said = kernel.run("%gpupool request -n 2 -p 0.8 --spread --never-park")
    assert said == "2 × Tesla V100-PCIE-32GB (emulated), 26008 MiB each: cuda:0, cuda:1"
    assert granted(pool) == [26008, 26008]
    (lease,) = pool.leases()
    assert lease.request.never_park
    assert kernel.run("%gpupool keep") == "Kept; its idle time starts again"
    assert kernel.run("torch.cuda.device_count(), torch.equal(net.weight, before)") == "(2, True)"
    kernel.run(
        "net = net.cuda(); optimizer = torch.optim.Adam(net.parameters())\n"
        "x = torch.ones(4, 3, device='cuda:1'); row = x[1]\n"
        "net(x.to('cuda:0')).sum().backward(); optimizer.step()"
    )
    status = kernel.run("%gpupool status")
    assert "Active" in status
    assert "26008" in status
    assert "cuda:1" in status
    assert "this notebook 26008 MiB" in kernel.run("%gpupool gpus")
    child = "!{__import__('sys').executable} -c 'import torch; print(torch.cuda.device_count())'"
    assert kernel.run(child).strip() == "2", "programs that the notebook starts have the slices too"
    said = kernel.run("%gpupool release")
    assert kernel.run(child).strip() == "0"
    assert said.startswith("Released; moved to the CPU: ")
    assert "net" in said
    assert "x" in said
    assert granted(pool) == [0, 0]
    assert kernel.run("torch.cuda.is_available(), net.weight.device.type, row.device.type") == (
        "(False, 'cpu', 'cpu')"
    )
    assert kernel.run("x.fill_(3); row.tolist()") == "[3.0, 3.0, 3.0]", "a view still is one"
    assert (
        kernel.run("net(x).sum().backward(); optimizer.step(); torch.isfinite(net.weight).all().item()")
        == "True"
    )
    assert "26008" not in kernel.run("%gpupool request -m 100")
    assert granted(pool) == [100, 0]
    assert "RELEASED" in kernel.run("%gpupool history")


def test_what_cannot_be_moved_is_named_and_nothing_is_lost_without_force(start_kernel: Start) -> None:
    kernel = start_kernel()
    kernel.run("import torch")
    kernel.run("%gpupool request -p 0.1")
    kernel.run("w = torch.ones(3, device='cuda', requires_grad=True); y = w * w; free = y.detach() + 1")
    kernel.run("recorded = y.grad_fn")
    said = kernel.run("%gpupool release")
    assert said.startswith("UsageError: ")
    assert "(w)" in said
    assert "--force" in said
    assert "\n" not in said
    assert kernel.run("w.tolist(), free.tolist(), torch.cuda.is_available()") == (
        "([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], True)"
    )
    kernel.run("del recorded")
    assert "Released; moved to the CPU" in kernel.run("%gpupool release")
    assert kernel.run("w.tolist(), w.device.type") == "([1.0, 1.0, 1.0], 'cpu')"
    kernel.run("%gpupool request -p 0.1")
    kernel.run("w = torch.ones(3, device='cuda', requires_grad=True); recorded = (w * w).grad_fn")
    assert "lost of it: 1 tensor, 12 bytes (w)" in kernel.run("%gpupool release --force")


def test_tensors_of_a_lease_that_has_ended_do_not_harm_the_next(start_kernel: Start) -> None:
    kernel = start_kernel()
    kernel.run("import torch")
    kernel.run("%gpupool request -p 0.1")
    kernel.run("old = torch.ones(3, device='cuda')")
    assert "lost with it: 1 tensor, 12 bytes (old)" in kernel.run("%gpupool release --drop")
    kernel.run("%gpupool request -p 0.1")
    assert "a lease that has ended" in kernel.run("(old + torch.ones(3, device='cuda')).sum().item()")
    assert kernel.run("torch.ones(2, device='cuda').sum().item()") == "2.0"


def test_slices_grow_and_shrink_with_tensors_on_them(start_kernel: Start, pool: PoolClient) -> None:
    kernel = start_kernel()
    kernel.run("import torch")
    kernel.run("%gpupool request -m 100")
    kernel.run("x = torch.ones(10 << 20, device='cuda')")
    assert "Tried to allocate 120.00 MiB" in kernel.run("y = torch.ones(30 << 20, device='cuda')")
    assert kernel.run("%gpupool resize -m 300") == "1 × Tesla V100-PCIE-32GB (emulated), 300 MiB: cuda:0"
    kernel.run("y = torch.ones(30 << 20, device='cuda')")
    assert kernel.run("%gpupool resize -m 100") == (
        "UsageError: cuda:0 has 160 MiB in use and cannot be made smaller than that; "
        "delete tensors, or move them to the CPU"
    )
    assert kernel.run("%gpupool resize -n 2").startswith(
        "UsageError: a lease keeps its number of GPU slices (1"
    )
    assert kernel.run("%gpupool resize") == (
        "UsageError: give a fraction of each GPU (1 for whole ones) or its memory in MiB"
    )
    assert granted(pool) == [300, 0]
    kernel.run("del y")
    assert "100 MiB" in kernel.run("%gpupool resize -m 100")
    assert granted(pool) == [100, 0]
    assert kernel.run("x.sum().item() == 10 << 20") == "True"


def test_slices_from_the_provisioner_are_resized_too(start_kernel: Start, pool: PoolClient) -> None:
    kernel = start_kernel(num_gpus=1, memory_mib=100)
    kernel.run("import torch; x = torch.ones(10 << 20, device='cuda')")
    assert "40 MiB in use" in kernel.run("%gpupool resize -m 20")
    assert "300 MiB" in kernel.run("%gpupool resize -m 300")
    assert granted(pool) == [300, 0]
    assert kernel.run("torch.cuda.mem_get_info()[1] >> 20") == "300"
    kernel.manager.restart_kernel()
    kernel.client.wait_for_ready(timeout=300)
    assert kernel.run("import torch; torch.cuda.mem_get_info()[1] >> 20") == "300", "through a restart"


def test_slices_that_somebody_else_resizes_are_so_for_the_kernel_and_its_children(
    start_kernel: Start, pool: PoolClient, eventually: Callable
) -> None:
    kernel = start_kernel(num_gpus=1, memory_mib=100)
    size = "import torch; print(torch.cuda.mem_get_info()[1] >> 20)"
    kernel.run(f"import subprocess, sys, torch\nx = torch.ones(3, device='cuda')\n{size}")
    pool.resize(pool.leases()[0].id, None, 300)
    eventually(lambda: kernel.run(size) == "300", "the kernel knows it")
    child = f"print(subprocess.run([sys.executable, '-c', {size!r}], capture_output=True, text=True).stdout)"
    assert kernel.run(child) == "300"
    assert kernel.run("y = torch.ones(50 << 20, device='cuda'); y.sum().item() == 50 << 20") == "True"


def test_a_cell_that_holds_its_own_slice(start_kernel: Start, pool: PoolClient) -> None:
    kernel = start_kernel()
    said = kernel.run(
        "%%gpupool -n 1 -p 0.25\nimport torch\nz = torch.ones(2, device='cuda') * 2\n"
        "print(torch.cuda.get_device_name())\nz"
    )
    assert "V100-PCIE-32GB (emulated), 8127 MiB: cuda:0" in said
    assert "tensor([2., 2.], device='cuda:0')" in said
    assert "Released; moved to the CPU" in said
    assert granted(pool) == [0, 0]
    assert kernel.run("z.device.type, z.tolist()") == "('cpu', [2.0, 2.0])"
    said = kernel.run("%%gpupool -p 0.25\n1 / 0")
    assert said.count("Traceback") == 1
    assert "Released" in said
    assert granted(pool) == [0, 0]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("request -n 9", "9 GPUs asked for, but the pool has 2"),
        ("request -n 0", "must be 1 or more"),
        ("request -p 1.5", "above 0 and at most 1"),
        ("request -p nan", "above 0 and at most 1"),
        ("request -p 0.5 -m 100", "not both"),
        ("request -m 99999999", "99999999 MiB"),
        ("request -n two", "invalid int value: 'two'"),
        ("request --filter V100", "write it as name=V100"),
        ("request --filter name=H999", "H999"),
        ('request --filter "name=Tesla H999"', "with name=Tesla H999 asked for"),
        ('request --filter "name=V100', 'no closing quotation in --filter "name=V100'),
        ("request --timeout -1", "seconds from 0 up"),
        ("request\t-n\t0", "must be 1 or more"),
        ("request --frobnicate", "unrecognized arguments: --frobnicate"),
        ("frobnicate", "no such command; the commands are request"),
        ("release", "has no GPU slices and does not wait for any"),
        ("keep", "has no GPU slices to keep"),
        ("wait", "does not wait for GPU slices"),
        ("wait --timeout nan", "seconds from 0 up"),
        ("history -n many", "invalid int value"),
        ("resize -p 0.5", "has no GPU slices to resize"),
        ("resize -m lots", "invalid int value"),
    ],
)
def test_mistakes(one_kernel: Kernel, pool_of_module: PoolClient, line: str, answer: str) -> None:
    said = one_kernel.run(f"%gpupool {line}")
    assert said.startswith("UsageError: ")
    assert answer in said
    assert "\n" not in said
    assert "Traceback" not in said
    assert pool_of_module.leases() == []


def test_the_error_of_a_cell_is_freed_without_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed(Exception):
        pass

    def fail() -> Exception:
        try:
            raise Failed
        except Failed as e:
            return e

    def run_cell(cell: str) -> SimpleNamespace:
        return SimpleNamespace(error_before_exec=None, error_in_exec=fail())

    def run() -> weakref.ref | None:
        try:
            magics.GPUPoolMagics(shell=None)._cell("", "")
        except Failed as e:
            return weakref.ref(e)
        return None

    monkeypatch.setattr(magics, "_shell", lambda self: SimpleNamespace(run_cell=run_cell))
    monkeypatch.setattr(magics.GPUPoolMagics, "obtain", lambda self, args: None)
    monkeypatch.setattr(magics, "current", lambda: object())
    gc.disable()
    try:
        error = run()
        assert error is not None
        assert error() is None
    finally:
        gc.enable()


def test_help_and_completion(one_kernel: Kernel) -> None:
    assert "%gpupool request" in one_kernel.run("%gpupool --help")
    assert "%gpupool request [-n N]" in one_kernel.run("%gpupool request -n 1 --help").replace("%%", "?")
    assert "%gpupool request" in one_kernel.run("%%gpupool --help\nprint('never')")
    assert "options of request" in one_kernel.run("%%gpupool request -p 0.1\nprint('never')")

    def completed(text: str) -> list[str]:
        id = one_kernel.client.complete(text)
        while True:
            reply = one_kernel.client.get_shell_msg(timeout=300)
            if reply["parent_header"].get("msg_id") == id:
                return reply["content"]["matches"]

    assert "request" in completed("%gpupool re")
    assert "release" in completed("%gpupool re")
    assert "--partial" in completed("%gpupool request --pa")


def test_it_waits_for_its_turn_and_an_interrupt_leaves_the_queue(
    start_kernel: Start, pool: PoolClient, eventually: Callable
) -> None:
    first, second = start_kernel(), start_kernel()
    first.run("%gpupool request -n 2")
    cell = second.start("%gpupool request -p 0.5")
    eventually(lambda: [x.position for x in pool.leases() if x.position], "it waits")
    second.manager.interrupt_kernel()
    second.finish(cell)
    assert len(pool.leases()) == 1, "it has left the queue"
    second.start("%gpupool request -p 0.5")
    eventually(lambda: [x.position for x in pool.leases() if x.position], "it waits again")
    first.run("%gpupool release")
    eventually(lambda: granted(pool)[0] == 16255, "its turn has come")
    assert "UsageError: 2 GPUs" in first.run("%gpupool request -n 2 --no-wait")
    assert "no GPUs within 1 s: position 1" in first.run("%gpupool request -n 2 --timeout 1")


def test_the_provisioner_lends_a_kernel_its_slices_for_all_restarts(
    start_kernel: Start, pool: PoolClient
) -> None:
    kernel = start_kernel(num_gpus=1, partial=0.5)
    lease = pool.leases()[0].id
    assert "cuda:0" in kernel.run("%gpupool status"), "the magic is there"
    assert kernel.run("import torch; torch.ones(2, device='cuda').sum().item()") == "2.0"
    kernel.manager.restart_kernel()
    kernel.client.wait_for_ready(timeout=300)
    assert [x.id for x in pool.leases()] == [lease]
    assert kernel.run("import torch; torch.ones(2, device='cuda').sum().item()") == "2.0"
    assert "UsageError: this notebook already has GPU slices" in kernel.run("%gpupool request")
    assert "Released" in kernel.run("%gpupool release")
    assert granted(pool) == [0, 0]
    kernel.run("%gpupool request -p 0.25")
    assert granted(pool) == [8127, 0]
    assert kernel.run("torch.ones(2, device='cuda').sum().item()") == "2.0"


def test_after_a_lease_from_the_provisioner_is_lost_another_can_be_had(
    start_kernel: Start, pool: PoolClient, eventually: Callable
) -> None:
    kernel = start_kernel(num_gpus=1, partial=0.5)
    kernel.run("import torch; x = torch.ones(2, device='cuda'); x.sum().item()")
    (lease,) = pool.leases()
    assert lease.worker is not None
    os.kill(lease.worker.pid, signal.SIGKILL)
    eventually(lambda: not pool.leases(), "the pool knows it")
    assert "its last lease has ended: its worker was killed by SIGKILL" in kernel.run("%gpupool")
    assert "8127 MiB: cuda:0" in kernel.run("%gpupool request -p 0.25")
    assert kernel.run("torch.ones(2, device='cuda').sum().item()") == "2.0"


TRAIN = """
import torch
torch.manual_seed(5)
device = "cuda" if torch.cuda.is_available() else "cpu"
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).to(device)
x = torch.randn(64, 8); y = x.sum(1, keepdim=True).sin()
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
losses = []
for _ in range(20):
    loss = torch.nn.functional.mse_loss(net(x.to(device)), y.to(device))
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
print(net[0].weight.device.type, *losses)
"""


def test_a_seed_gives_the_same_numbers_with_and_without_the_pool(
    start_kernel: Start, pool: PoolClient
) -> None:
    kernel, lent = start_kernel(), start_kernel(num_gpus=1, partial=0.25)
    here = kernel.run(TRAIN).split()
    kernel.run("%gpupool request -p 0.25")
    there, lent_there = kernel.run(TRAIN).split(), lent.run(TRAIN).split()
    assert [here[0], there[0], lent_there[0]] == ["cpu", "cuda", "cuda"]
    assert len(here) == 21
    assert here[1:] == there[1:] == lent_there[1:]


@pytest.mark.parametrize("imported", [False, True])
def test_a_kernel_whose_slices_are_not_free_gets_them_in_its_turn(
    start_kernel: Start, pool: PoolClient, imported: bool
) -> None:
    first = start_kernel(num_gpus=2)
    second = start_kernel(num_gpus=1, partial=0.5)
    if imported:
        second.run("import torch")
    assert "position 1 in the queue" in second.run("%gpupool status")
    first.stop()
    said = second.run("%gpupool wait --timeout 300")
    assert "1 × Tesla V100-PCIE-32GB (emulated), 16255 MiB: cuda:0" in said
    assert second.run("import torch; torch.ones(2, device='cuda').sum().item()") == "2.0"
    assert granted(pool) == [16255, 0]


def test_a_kernel_can_leave_the_queue(start_kernel: Start, pool: PoolClient) -> None:
    start_kernel(num_gpus=2)
    second = start_kernel(num_gpus=1)
    assert second.run("%gpupool release") == "Left the queue"
    assert len(pool.leases()) == 1
    assert "no GPU" in second.run("%gpupool")


def test_a_kernel_that_was_started_without_its_slices_says_why(start_kernel: Start, pool: PoolClient) -> None:
    kernel = start_kernel()
    kernel.run("import os; os.environ['GPUPOOL_REFUSED'] = 'the GPUs are on holiday'")
    assert "without a GPU: the GPUs are on holiday" in kernel.run("%reload_ext jupyter_gpupool")
    assert "without one: the GPUs are on holiday" in kernel.run("%gpupool")
    assert "cuda:0" in kernel.run("%gpupool request -p 0.1")
    assert "holiday" not in kernel.run("%gpupool")


def test_an_error_names_the_cell_and_the_line_that_called_the_operator(start_kernel: Start) -> None:
    kernel = start_kernel()
    kernel.run("import torch")
    kernel.run("%gpupool request -p 0.1")
    kernel.run(
        "table = torch.nn.Embedding(3, 2).cuda()\nrows = torch.tensor([5], device='cuda')\nfound = table(rows)"
    )
    said = kernel.run("found.sum().item()")
    assert "aten::embedding.default(float32[3, 2], int64[1]) on the gpupool device, called at" in said
    assert "Cell In[4], line 3, in <module>\n    found = table(rows)" in said
