"""Steps of four programs over links of 0 to 10 ms and 1 to 10 Gbit/s, each beside the same step on the local machine.

``waiting`` is the control: the same step with a wait after every operator, like a client that requests each
result. Ratios are medians of alternating remote and local pairs, with one thread each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.dispatch.dispatcher import Dispatcher

from .far_worker import far_worker
from .link import Link
from .mnist_step import Trainer
from .networks import Decoder, ResNet50

#: (round trip in ms, Gbit/s); a rate of 0 means no limit.
LINKS = ((0.0, 0), (0.1, 10), (1.0, 10), (10.0, 10), (0.1, 1), (1.0, 1), (10.0, 1))
ROUNDS = 7
GOALS = {"mnist_at_1_ms": ("<=", 1.05), "mnist_at_10_ms": ("<=", 1.10)}


class Program:
    """``step()`` runs ``steps`` steps and waits once, at the end."""

    def __init__(self, device: str) -> None:
        self.device = device

    steps = 1
    #: Steps in the control.
    alone = 1

    def step(self) -> None:
        raise NotImplementedError


class Mnist(Program):
    """Train with batches of 64 from the host."""

    steps = alone = 12

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.trainer = Trainer(device)

    def step(self) -> None:
        self.trainer.run()


class ResNetTraining(Program):
    """ResNet-50, batches of 8 images of 64 × 64 from the host, SGD."""

    steps = 3

    def __init__(self, device: str) -> None:
        super().__init__(device)
        torch.manual_seed(1)
        self.model = ResNet50().to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        self.images, self.labels = torch.randn(8, 3, 64, 64), torch.randint(0, 1000, (8,))

    def step(self) -> None:
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.images.to(self.device)), self.labels.to(self.device))
            loss.backward()
            self.optimizer.step()
        loss.item()


class ResNetInference(Program):
    """ResNet-50: one image of 224 × 224 from the host and its class back, with one wait per image."""

    steps = 3

    def __init__(self, device: str) -> None:
        super().__init__(device)
        torch.manual_seed(1)
        self.model = ResNet50().to(device).eval()
        self.image = torch.randn(1, 3, 224, 224)

    @torch.no_grad()
    def step(self) -> None:
        for _ in range(self.steps):
            self.model(self.image.to(self.device)).argmax().item()


class Decoding(Program):
    """A decoder of GPT-2's size: 16 tokens after a prompt of 32, whose values are read at the end."""

    steps = 16

    def __init__(self, device: str) -> None:
        super().__init__(device)
        torch.manual_seed(1)
        self.model = Decoder().to(device)
        self.prompt = torch.randint(0, 50257, (1, 32))

    def step(self) -> None:
        self.model.decode(self.prompt.to(self.device), self.steps).cpu()


PROGRAMS: dict[str, type[Program]] = {
    "mnist": Mnist,
    "resnet50_training": ResNetTraining,
    "resnet50_inference": ResNetInference,
    "gpt2_decoding": Decoding,
}


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    try:
        with far_worker() as link:
            for name, program in PROGRAMS.items():
                link.shape(0, 0)
                local, remote = program("cpu"), program("cuda")
                local.step(), remote.step(), local.step(), remote.step()
                figures[name] = {
                    _name(rtt, rate): _compare(link, rtt, rate, local, remote) for rtt, rate in LINKS
                }
                del local, remote
    finally:
        torch.set_num_threads(threads)
    figures["mnist_at_1_ms"] = figures["mnist"][_name(1.0, 10)]["remote_to_local"]
    figures["mnist_at_10_ms"] = figures["mnist"][_name(10.0, 10)]["remote_to_local"]
    return figures


def _name(round_trip_ms: float, rate: float) -> str:
    return f"{round_trip_ms:g} ms, {f'{rate:g} Gbit/s' if rate else 'loopback'}"


def _compare(
    link: Link, round_trip_ms: float, rate: float, local: Program, remote: Program
) -> dict[str, Any]:
    link.shape(round_trip_ms, rate)
    d = attachment.dispatcher()
    link.measure()
    calls, questions = [0], d.stream.questions
    with _counted(calls):
        pairs = [(_seconds(local.step), _seconds(remote.step)) for _ in range(ROUNDS)]
    traffic, questions = link.measure(), d.stream.questions - questions
    n = ROUNDS * remote.steps
    with _waiting():
        remote.steps, steps = remote.alone, remote.steps  # it may take minutes
        waiting = _seconds(remote.step) / remote.steps
        remote.steps = steps
    return {
        "local_ms": round(1e3 * statistics.median(a for a, _ in pairs) / local.steps, 2),
        "remote_ms": round(1e3 * statistics.median(b for _, b in pairs) / remote.steps, 2),
        "remote_to_local": round(statistics.median(b / a for a, b in pairs), 3),
        "waiting_to_local": round(waiting / (statistics.median(a for a, _ in pairs) / local.steps), 2),
        "operators": round(calls[0] / n, 1),
        "synchronisations": round(questions / n, 2),
        "kib_up": round(traffic.bytes_up / n / 1024, 1),
        "kib_down": round(traffic.bytes_down / n / 1024, 1),
        "link_late_ms": [traffic.late_ms_p50, traffic.late_ms_p95],
    }


def _seconds(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


@contextmanager
def _counted(calls: list[int]) -> Iterator[None]:
    """Count operators by their records. Views send none."""
    stream = attachment.dispatcher().stream
    push = stream.push

    def count(record: tuple) -> None:
        if record[0] >= 0:
            calls[0] += 1
        push(record)

    stream.push = count  # type: ignore[method-assign]
    try:
        yield
    finally:
        del stream.push  # type: ignore[method-assign]


@contextmanager
def _waiting() -> Iterator[None]:
    """Wait after every operator."""
    call = Dispatcher.__call__

    def wait(self: Dispatcher, func: Any, args: tuple, kwargs: dict) -> Any:
        result = call(self, func, args, kwargs)
        if self.stream.buffer:
            self.stream.wait()
        return result

    Dispatcher.__call__ = wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        Dispatcher.__call__ = call  # type: ignore[method-assign]
