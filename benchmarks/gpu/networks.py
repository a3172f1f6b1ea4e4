"""The steps of `make gpu` that train networks, and compute with them, beside the native GPU."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .measuring import REMOTE, Setting, attached, beside, by_tls, figure, show


def mnist(setting: Setting) -> None:
    from benchmarks.mnist_step import Trainer

    def trained() -> tuple[float, float, float]:
        native, remote = Trainer(setting.native), Trainer(REMOTE)
        native.run(), remote.run(), remote.run()
        pairs = [(native.run(), remote.run()) for _ in range(setting.size(9, 2))]
        natives, remotes = zip(*pairs)
        return (
            statistics.median(natives),
            statistics.median(remotes),
            statistics.median(a / b for a, b in pairs),
        )

    with attached(setting):
        show("", trained())
    with by_tls(setting):
        show("tls", trained())


def _resnets(setting: Setting) -> tuple[Any, Any]:
    from benchmarks.networks import ResNet50

    torch.manual_seed(1)
    net = ResNet50()
    return copy.deepcopy(net).to(setting.native), net.to(REMOTE)


def training(setting: Setting) -> None:
    side = setting.size(224, 64)

    def trainer(net: Any, device: str, batch: int) -> Callable[[], Any]:
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(batch, 3, side, side, generator=generator).to(device)
        y = torch.randint(0, 1000, (batch,), generator=generator).to(device)

        def step() -> Any:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return step

    batch, one = ("", setting.size(256, 2), 5), ("one", 1, 20)
    for connected, prefix, sizes in ((attached, "", (batch, one)), (by_tls, "tls", (batch,))):
        with connected(setting):
            native, remote = _resnets(setting)
            for name, count, times in sizes:
                name = "_".join(filter(None, (prefix, name)))
                here, there = trainer(native, setting.native, count), trainer(remote, REMOTE, count)
                first = here().item(), there().item()
                figure(f"{name}_first_losses".lstrip("_"), [round(loss, 5) for loss in first])
                show(name, beside(setting, here, there, setting.size(times, 1), setting.size(4, 1)))


def inference(setting: Setting) -> None:
    side = setting.size(224, 64)
    for connected, prefix in ((attached, ""), (by_tls, "tls_")):
        with connected(setting), torch.no_grad():
            native, remote = (net.eval() for net in _resnets(setting))
            for name, batch, times in (("batch", setting.size(256, 4), 8), ("one", 1, 50)):
                x = torch.randn(batch, 3, side, side)
                here = functools.partial(native, x.to(setting.native))
                there = functools.partial(remote, x.to(REMOTE))
                difference = (here().cpu() - there().cpu()).abs().max().item()
                figure(f"{prefix}{name}_largest_difference", difference)
                found = beside(setting, here, there, setting.size(times, 1), setting.size(5, 1))
                show(f"{prefix}{name}", found)


def compiled(setting: Setting) -> None:
    from jupyter_gpupool.pytorch.client.compile.graphs import states
    from jupyter_gpupool.pytorch.worker.graph_replay import CALLS

    side = setting.size(224, 16)
    with attached(setting), torch.no_grad():
        # On two slow cores, ResNet-50 compiles for minutes.
        small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
        nets = (small, copy.deepcopy(small).to(REMOTE)) if setting.rehearse else _resnets(setting)
        native, remote = (net.eval() for net in nets)
        image = torch.randn(1, 3, side, side)
        here, there = image.to(setting.native), image.to(REMOTE)
        options = {"inductor": True, "cudagraphs": False}
        started = torch.compile(remote, backend="gpupool", options=options)
        began = time.perf_counter()
        started(there).cpu()
        _until_compiled(lambda: started(there).cpu())
        figure("remote_without_graphs_compile_s", time.perf_counter() - began)
        fast = torch.compile(remote, backend="gpupool", options={"inductor": True})
        began = time.perf_counter()
        fast(there).cpu()
        figure("remote_first_s", time.perf_counter() - began)
        _until_compiled(lambda: fast(there).cpu())
        for _ in range(2 * CALLS):  # then it is recorded, where that is possible
            fast(there).cpu()
        figure("remote_compile_s", time.perf_counter() - began)
        began = time.perf_counter()
        quick = torch.compile(native)
        quick(here).cpu()
        figure("native_compile_s", time.perf_counter() - began)
        torch.testing.assert_close(fast(there).cpu(), quick(here).cpu(), rtol=1e-2, atol=1e-2)
        figure("recorded_graphs", states().count("recorded"))  # of two, one of which must not be
        show("one", beside(setting, lambda: quick(here), lambda: fast(there), 50, 5))
        show("one_without_graphs", beside(setting, lambda: quick(here), lambda: started(there), 50, 5))


def _until_compiled(call: Callable[[], Any]) -> None:
    """Call the newest graph until the worker has compiled it. Ends the step where it cannot."""
    from jupyter_gpupool.pytorch.client.compile.graphs import states

    while (state := states()[-1]) not in ("compiled", "recorded"):
        if state not in ("", "compiling"):
            raise SystemExit(f"the worker did not compile the graph: {state}"[:500])
        call()


def gpt2(setting: Setting) -> None:
    with attached(setting):
        _gpt2(setting, "")
    with by_tls(setting):
        _gpt2(setting, "tls_")
    with attached(setting):
        native, remote = _decoders(setting)
        for net in (native, remote):
            net.compile(backend="gpupool" if net is remote else "inductor")
        here, there = _gpt2_step(setting, native, setting.native), _gpt2_step(setting, remote, REMOTE)
        began = time.perf_counter()
        there()
        setting.wait(REMOTE)
        figure("compiled_step_first_s", time.perf_counter() - began)
        show("compiled_step", beside(setting, here, there, setting.size(5, 1), setting.size(4, 1)))


def _gpt2(setting: Setting, prefix: str) -> None:
    native, remote = _decoders(setting)
    here, there = _gpt2_step(setting, native, setting.native), _gpt2_step(setting, remote, REMOTE)
    show(f"{prefix}step", beside(setting, here, there, setting.size(5, 1), setting.size(4, 1)))
    count = setting.size(64, 4)
    prompt = torch.randint(0, _words(setting), (1, 16))
    mine, its = prompt.to(setting.native), prompt.to(REMOTE)
    same = (native.decode(mine, count).cpu() == remote.decode(its, count).cpu()).float().mean().item()
    figure(f"{prefix}decoded_tokens_that_agree", same)
    found = beside(setting, lambda: native.decode(mine, count), lambda: remote.decode(its, count), 1, 3)
    show(f"{prefix}decode", found)


def _words(setting: Setting) -> int:
    return 500 if setting.rehearse else 50257


def _decoders(setting: Setting) -> tuple[Any, Any]:
    from benchmarks.networks import Decoder

    torch.manual_seed(1)
    net = Decoder(**({"vocabulary": 500, "width": 64, "layers": 2, "heads": 4} if setting.rehearse else {}))
    return copy.deepcopy(net).to(setting.native), net.to(REMOTE)


def _gpt2_step(setting: Setting, model: Any, device: str) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    shape = (setting.size(8, 2), setting.size(512, 16))
    tokens = torch.randint(0, _words(setting), shape, generator=torch.Generator().manual_seed(3)).to(device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens, []), tokens[:, -1]).backward()
        optimizer.step()

    return step
