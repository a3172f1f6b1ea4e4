"""``torch.compile``: the results of the program itself, and one command for each call of a graph on a slice."""

from __future__ import annotations

import base64
import copy
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from jupyter_gpupool.pytorch.client.compile.graphs import states  # noqa: E402
from jupyter_gpupool.pytorch.client.dispatch import attachment  # noqa: E402
from jupyter_gpupool.pytorch.protocol import commands  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(program: Callable, **kwargs: Any) -> Callable:
    return torch.compile(program, backend="gpupool", fullgraph=True, **kwargs)


class Sent:
    """What is pushed to the worker in a ``with`` block, by its first field."""

    def __enter__(self) -> Sent:
        self.codes: list[int] = []
        self._stream = attachment.dispatcher().stream
        push = self._stream.push

        def spy(record: tuple) -> None:
            self.codes.append(record[0])
            push(record)

        self._stream.push = spy  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        del self._stream.push  # type: ignore[method-assign]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        y, _ = self.attention(y, y, y, need_weights=False)
        return torch.log_softmax(self.out(y.mean(1)), 1)


def test_training_gives_the_numbers_of_the_program_itself(attached: object) -> None:
    torch.manual_seed(1)
    plain = Net().cuda()
    net = copy.deepcopy(plain)
    fast = compiled(net)
    optimizers = [torch.optim.SGD(n.parameters(), 0.1, momentum=0.9) for n in (plain, net)]
    for step in range(3):
        x = torch.randn(5, 1, 6, 6).cuda()
        losses = []
        for model, optimizer in zip((plain, fast), optimizers):
            optimizer.zero_grad()
            loss = -model(x)[:, step].mean()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        assert losses[1].device.type == "cuda"
        torch.testing.assert_close(losses[1].cpu(), losses[0].cpu())
    for (name, a), b in zip(plain.state_dict().items(), net.state_dict().values()):
        torch.testing.assert_close(b.cpu(), a.cpu(), msg=name, atol=1e-5, rtol=1e-4)


def test_a_call_is_one_message_forward_and_one_backward(attached: object) -> None:
    net = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(30)]).cuda()
    fast = compiled(net)
    x = torch.randn(2, 4, device="cuda")
    fast(x).sum().backward()
    for p in net.parameters():
        p.grad = None
    with Sent() as sent:
        y = fast(x)
    assert sent.codes == [commands.CALL_GRAPH]
    loss = y.sum()
    with Sent() as sent:
        loss.backward()
    assert sent.codes.count(commands.CALL_GRAPH) == 1
    assert len(sent.codes) <= 4, "beside it the gradient of the loss itself"


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_shapes_that_change(attached: object, dynamic: bool | None) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return (x.view(-1, 2) * x.shape[0]).cumsum(0).reshape(x.shape)

    fast = compiled(program, dynamic=dynamic)
    for n in (2, 4, 6, 8, 2):
        x = torch.randn(n, 3)
        torch.testing.assert_close(fast(x.cuda()).cpu(), program(x))


def test_results_that_are_views_or_the_inputs_themselves(attached: object) -> None:
    def program(x: torch.Tensor, y: torch.Tensor) -> tuple:
        z = x + y
        return z, z.t(), z[0], x, y.t(), (z * 2).split(1)

    x, y = torch.randn(3, 3).cuda(), torch.randn(3, 3).cuda()
    z, transposed, row, same, view, parts = compiled(program)(x, y)
    z.zero_()
    y.fill_(5)
    assert transposed.sum().item() == 0
    assert row.sum().item() == 0
    assert same is x
    assert view.tolist() == [[5.0] * 3] * 3
    assert len(parts) == 3


def test_inputs_that_are_changed(attached: object) -> None:
    def program(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        total.add_(x.sum())
        x[0] = 7
        return x * 2

    fast = compiled(program)
    x, total = torch.ones(2, 2, device="cuda"), torch.zeros((), device="cuda")
    for k in (1, 2):
        result = fast(x, total)
        assert x.tolist() == [[7.0, 7.0], [1.0, 1.0]]
        assert result.tolist() == [[14.0, 14.0], [2.0, 2.0]]
        assert total.item() == (4 if k == 1 else 20)


def test_random_numbers_follow_the_seed(attached: object) -> None:
    fast = compiled(lambda x: torch.nn.functional.dropout(x, 0.5) + torch.randn_like(x))
    x = torch.ones(100, device="cuda")
    torch.manual_seed(3)
    first, second = fast(x), fast(x)
    torch.manual_seed(3)
    assert torch.equal(fast(x), first)
    assert not torch.equal(first, second)


def test_devices_named_in_the_program(attached: object) -> None:
    def program(n: torch.Tensor) -> torch.Tensor:
        places = torch.arange(4, device="cuda")
        mask = torch.ones(4, 4, dtype=torch.bool, device=n.device).tril()
        return torch.where(mask, n + places, torch.zeros((), device="cuda:0"))

    n = torch.randn(4, 4)
    torch.testing.assert_close(
        compiled(program)(n.cuda()).cpu(), torch.where(torch.ones(4, 4).tril().bool(), n + torch.arange(4), 0)
    )


def test_autocast(attached: object) -> None:
    layer = torch.nn.Linear(4, 4).cuda()

    def program(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return layer(x)

    x = torch.randn(2, 4, device="cuda")
    result = compiled(program)(x)
    assert result.dtype is torch.bfloat16
    torch.testing.assert_close(result.cpu(), program(x).cpu())


def test_what_cannot_be_one_message_still_runs(attached: object) -> None:
    limits = torch.tensor([0.0, 1.0])  # on the CPU, and stays there

    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, limits + 1

    doubled, moved = compiled(program)(torch.ones(2, device="cuda"))
    assert doubled.tolist() == [2.0, 2.0]
    assert moved.device.type == "cpu"
    assert moved.tolist() == [1.0, 2.0]


def test_values_the_program_looks_at_break_the_graph(attached: object) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return x[x > 0] * 2 if x.sum().item() > 0 else x

    fast = torch.compile(program, backend="gpupool")
    assert fast(torch.tensor([1.0, -0.5, 2.0], device="cuda")).tolist() == [2.0, 4.0]


def test_too_large_for_the_slice(start_worker: Callable) -> None:
    from jupyter_gpupool.pytorch.client import session

    session.activate(start_worker(memory_mib=8).spec)
    try:
        fast = compiled(lambda x: (x.repeat(4) + 1).sum())  # 4 MiB between two small ones
        small, large = torch.ones(1 << 10, device="cuda"), torch.ones(1 << 19, device="cuda")
        assert fast(small).item() == 8 << 10
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate (8|16)\.00 MiB"):
            fast(large)
        assert fast(small).item() == 8 << 10
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() < 3 << 20
    finally:
        session.deactivate()


def test_an_operator_that_fails_within_a_graph(attached: object) -> None:
    table = torch.nn.Embedding(3, 2).cuda()
    fast = compiled(lambda rows: table(rows) * 2)
    assert fast(torch.tensor([2], device="cuda")).shape == (1, 2)
    with pytest.raises(IndexError, match="aten::embedding") as error:
        fast(torch.tensor([3], device="cuda"))
        torch.cuda.synchronize()
    assert "fast = compiled(lambda rows: table(rows) * 2)" in str(error.value)
    assert fast(torch.tensor([0], device="cuda")).shape == (1, 2)


def test_graphs_are_forgotten_with_their_programs(attached: object) -> None:
    fast = compiled(lambda x: x + 1)
    x = torch.ones(2, device="cuda")
    fast(x)
    buffer = attachment.dispatcher().stream.buffer
    with Sent():
        torch._dynamo.reset()
        del fast
        import gc

        gc.collect()
    torch.cuda.synchronize()
    assert commands.FREE_GRAPH not in buffer  # it has been sent


def unconfined(listener: socket.socket, spec: Any) -> None:
    from jupyter_gpupool.pytorch.worker import worker

    os._exit(worker.serve(spec, listener, lambda usage: None))


@pytest.mark.parametrize("shut_in", [True, False])
def test_with_inductor_in_the_worker(
    start_worker: Callable, shut_in: bool, tmp_path: Path, eventually: Callable
) -> None:
    """Whether it can start a compiler or not, before it is done and after: the numbers are right."""
    from jupyter_gpupool.engines.local.sandbox.layers import SYSTEM_CALLS
    from jupyter_gpupool.engines.local.sandbox.sandbox import prepare
    from jupyter_gpupool.pytorch.client import session

    session.activate(start_worker(serve=None if shut_in else unconfined).spec)
    try:
        compile_and_compute()
        if shut_in and not prepare("auto", tmp_path).lacks[SYSTEM_CALLS]:
            eventually(lambda: states() != ["compiling"], "it gives up")
            assert states() == ["the worker's sandbox starts no compiler"]
    finally:
        session.deactivate()


def compile_and_compute() -> None:
    layer = torch.nn.Linear(4, 4).cuda()
    fast = compiled(lambda x: torch.tanh(layer(x)) * 2, options={"inductor": True})
    x = torch.randn(3, 4, device="cuda")
    expected = torch.tanh(layer(x)) * 2
    assert fast(x).shape == (3, 4) and states() == [""], "its operators run one by one"
    for _ in range(10):
        torch.testing.assert_close(fast(x).cpu(), expected.cpu())
    assert states() != [""]


def test_the_next_lease(start_worker: Callable) -> None:
    from jupyter_gpupool.pytorch.client import session

    fast = compiled(lambda x: x * 3)
    for _ in range(2):
        session.activate(start_worker().spec)
        try:
            assert fast(torch.ones(2, device="cuda")).tolist() == [3.0, 3.0]
        finally:
            session.deactivate()


def test_without_a_lease(attached: object) -> None:
    from jupyter_gpupool.pytorch.client import session

    session.deactivate()
    assert compiled(lambda x: x * 3)(torch.ones(2)).tolist() == [3.0, 3.0]


def test_an_option_that_is_none(attached: object) -> None:
    fast = compiled(lambda x: x * 3, options={"inducter": True})
    with pytest.raises(Exception, match="no option 'inducter'; it has inductor"):
        fast(torch.ones(2, device="cuda"))


IMPORTED_DURING_A_LEASE = """
import base64, pickle, sys
import torch
from jupyter_gpupool.pytorch.client import session

session.activate(pickle.loads(base64.b64decode(sys.argv[1])))
assert "torch._dynamo" not in sys.modules

def program(x):
    with torch.cuda.device(1), torch.accelerator.device_index(1):
        if not torch.cuda.is_available() or torch.cuda.device_count() != 2:
            return x
        if torch.cuda.get_device_capability() < (7, 0) or not torch.cuda.is_bf16_supported():
            return x
        if torch.is_autocast_enabled("cuda") or torch.accelerator.current_accelerator().type != "cuda":
            return x
        return x + torch.ones_like(x) + torch.full((2,), 1.0).to("cpu") * torch.cuda.current_device()

print(torch.compile(program, backend="eager", fullgraph=True)(torch.zeros(2)).tolist(), torch.cuda.current_device())
"""


def test_functions_of_cuda_in_a_program_whose_compiler_is_imported_during_the_lease(worker: Any) -> None:
    spec = base64.b64encode(pickle.dumps(worker.spec)).decode()
    command = [sys.executable, "-W", "ignore", "-c", IMPORTED_DURING_A_LEASE, spec]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.stdout == "[2.0, 2.0] 0\n", ended.stderr


# -- without backend=: inductor is the default


MODES = ["default", "reduce-overhead", "max-autotune-no-cudagraphs"]


@pytest.mark.parametrize("mode", MODES)
def test_the_default_sends_graphs_of_a_slice_whole(attached: object, mode: str) -> None:
    layer = torch.nn.Linear(4, 4).cuda()
    fast = torch.compile(lambda x: torch.relu(layer(x)) * 3, fullgraph=True, mode=mode)
    x = torch.randn(3, 4, device="cuda")
    torch.testing.assert_close(fast(x).cpu(), (torch.relu(layer(x)) * 3).cpu())
    with Sent() as sent:
        fast(x)
    assert sent.codes == [commands.CALL_GRAPH]


class Language(torch.nn.Module):
    """A small language model, trained as public scripts train theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = torch.nn.Embedding(11, 8), torch.nn.Embedding(6, 8)
        self.block = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = torch.nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        length = text.shape[1]
        place = torch.arange(length - 1, device=text.device)
        mask = torch.full((length - 1, length - 1), float("-inf"), device="cuda").triu(1)
        x = self.block(self.tokens(text[:, :-1]) + self.places(place), src_mask=mask)
        return torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), text[:, 1:].flatten())


@pytest.mark.parametrize("autocast", [False, True])
def test_a_program_that_compiles_by_default_trains(attached: object, autocast: bool) -> None:
    torch.manual_seed(2)
    plain = Language().cuda()
    net = copy.deepcopy(plain)
    found = []
    for model, program in ((plain, plain), (net, torch.compile(net))):
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cuda", enabled=autocast)
        drawn = torch.Generator().manual_seed(4)
        for length in (5, 5, 7, 6):  # another length makes the shapes dynamic
            text = torch.randint(11, (3, length), generator=drawn).cuda()
            with torch.autocast("cuda", torch.float16, enabled=autocast):
                loss = program(text)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            found.append(loss.item())
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if autocast else {}
    torch.testing.assert_close(found[4:], found[:4], **tolerance)


def test_tensors_made_on_a_slice_inside_a_program_of_the_cpu(attached: object) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return (torch.arange(3.0, device="cuda") + x.sum().cuda()).cpu()

    assert torch.compile(program, fullgraph=True)(torch.ones(2)).tolist() == [2.0, 3.0, 4.0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for the CPU")
@pytest.mark.parametrize("mode", MODES)
def test_programs_of_the_cpu_are_compiled_by_inductor_as_without_a_lease(attached: object, mode: str) -> None:
    from torch._inductor import metrics

    metrics.reset()
    layer = torch.nn.Linear(4, 4)

    def program(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):  # of no effect on the CPU
            return torch.tanh(layer(x)) * 2 + 1

    x = torch.randn(3, 4)
    with torch._inductor.config.patch(force_disable_caches=True):
        found = torch.compile(program, fullgraph=True, mode=mode)(x)
        forward = metrics.generated_kernel_count
        found.sum().backward()  # compiled only now
    torch.testing.assert_close(found, program(x))
    assert 0 < forward < metrics.generated_kernel_count
    assert torch.cuda.is_available()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_backends_trace_leased_tensors(attached: object, backend: str) -> None:
    fast = torch.compile(lambda x: (x * 4).sum(), backend=backend, fullgraph=True)
    x = torch.ones(2, device="cuda", requires_grad=True)
    fast(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [4.0, 4.0]
