"""What a frontend asks of a kernel, in the way it does: by evaluating, not by executing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.client.http import PoolClient

Kernel = Any
Start = Callable[..., Kernel]


def evaluate(kernel: Kernel, expression: str) -> dict[str, Any]:
    message = kernel.client.execute(
        "", silent=True, store_history=False, user_expressions={"answer": expression}
    )
    while (reply := kernel.client.get_shell_msg(timeout=300))["parent_header"].get("msg_id") != message:
        pass
    return reply["content"]["user_expressions"]["answer"]["data"]["application/json"]


def ask(kernel: Kernel, name: str, *arguments: Any) -> dict[str, Any]:
    call = f"_jupyter_gpupool_call({json.dumps(name)}, {json.dumps(json.dumps(arguments))})"
    return evaluate(kernel, f'__import__("jupyter_gpupool").{call}')


def wish(**fields: Any) -> dict[str, Any]:
    return fields


def granted(pool: PoolClient) -> list[int]:
    return [gpu["granted_mib"] for server in pool.pool()["servers"] for gpu in server["gpus"]]


@pytest.fixture
def kernel(start_kernel: Start) -> Kernel:
    return start_kernel()


def test_slices_for_a_running_kernel_and_back(kernel: Kernel, pool: PoolClient) -> None:
    kernel.run("x = 1")
    answer = ask(kernel, "request", wish(num_gpus=2, partial=0.8))
    assert answer["error"] == "" and answer["said"].startswith("2 × Tesla V100"), answer
    (lease,) = pool.leases()
    assert lease.id == answer["lease"]
    assert granted(pool) == [26008, 26008]
    # Jupyter Server calls it kernel-<id>.json.
    kernel_id = Path(kernel.manager.connection_file).stem.removeprefix("kernel-")
    assert lease.request.client.endswith(f" kernel:{kernel_id}")
    assert "already" not in kernel.run("import torch; t = torch.ones(3, device='cuda'); print(x)")
    assert "first" in ask(kernel, "request", wish(num_gpus=1, partial=0.1))["said"]
    assert "16255 MiB" in ask(kernel, "resize", {"partial": 0.5})["said"]
    assert granted(pool) == [16255, 16255]
    assert "moved to the CPU: 1 tensor" in ask(kernel, "release")["said"]
    assert granted(pool) == [0, 0]
    assert kernel.run("t.device.type, x") == "('cpu', 1)"
    assert ask(kernel, "release")["error"] == ""
    # The notebook's own history and names are as they were.
    assert kernel.run("print([n for n in dir() if 'asked' in n or 'gpupool' in n])") == "[]"


def test_what_is_queued_is_attached_in_its_turn_and_can_be_left(
    kernel: Kernel, start_kernel: Start, pool: PoolClient, eventually: Callable
) -> None:
    other = start_kernel()
    assert ask(other, "request", wish(num_gpus=2, partial=0.8))["error"] == ""
    answer = ask(kernel, "request", wish(num_gpus=1, partial=0.5))
    assert (answer["state"], answer["position"]) == ("QUEUED", 1)
    assert kernel.run("1 + 1") == "2"  # it waits beside the notebook
    pool.release(answer["lease"])
    eventually(
        lambda: ask(kernel, "request", wish(num_gpus=1, partial=0.5)).get("state") == "QUEUED",
        "it may ask again",
    )
    ask(other, "release")
    eventually(lambda: sum(granted(pool)) == 16255, "it is granted")
    eventually(lambda: "16255" in ask(kernel, "resize", {"partial": 0.5})["said"], "it is attached")
    ask(kernel, "release")


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (("request", wish(num_gpus=9, partial=0.5)), "9 GPUs asked for, but the pool has 2"),
        (("request", wish(num_gpus=1, partial=7)), "above 0 and at most 1"),
        (("request", wish(gpus=1)), "unknown field 'gpus'"),
        (("resize", {"partial": 0.5}), "no GPU slices to resize"),
    ],
)
def test_a_refusal_is_one_line(one_kernel: Kernel, call: tuple[Any, ...], line: str) -> None:
    answer = ask(one_kernel, *call)
    assert line in answer["said"]
    assert "\n" not in answer["said"]
    assert answer["error"]


def test_a_frontend_of_before_is_answered(one_kernel: Kernel) -> None:
    before = '__import__("jupyter_gpupool.notebook.asked", fromlist=["asked"])'
    assert "no GPU slices to resize" in evaluate(one_kernel, before + '.resize({"partial": 0.5})')["said"]
