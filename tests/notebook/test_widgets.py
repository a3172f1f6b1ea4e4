"""Picker and Monitor in real kernels, driven by their traits as a notebook would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jupyter_gpupool.client.http import PoolClient

Kernel = Any
Start = Callable[..., Kernel]

IMPORT = "import jupyter_gpupool, time\nfrom jupyter_gpupool.notebook.widgets import poller"
#: Waits in the kernel until a condition holds.
UNTIL = """
def until(condition, deadline=300):
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, 'too late'
        time.sleep(0.01)
"""


def granted(pool: PoolClient) -> list[int]:
    return [gpu["granted_mib"] for server in pool.pool()["servers"] for gpu in server["gpus"]]


@pytest.fixture
def kernel(start_kernel: Start) -> Kernel:
    started = start_kernel()
    assert started.run(IMPORT + UNTIL) == ""
    return started


def test_a_picker_requests_resizes_and_releases(kernel: Kernel, pool: PoolClient) -> None:
    kernel.run("picker = jupyter_gpupool.Picker(num_gpus=2, partial=0.8); until(lambda: picker.grantable)")
    assert kernel.run("picker.memory_mib, picker.lease, picker.position") == "(26008, None, None)"
    kernel.run("picker.request(); picker.wait(); until(lambda: picker.lease)")
    assert "Attached: 2 × Tesla V100" in kernel.run("print(picker.message)")
    assert granted(pool) == [26008, 26008]
    assert kernel.run("[s.memory_mib for s in picker.lease.slices]") == "[26008, 26008]"
    assert "2.0" in kernel.run("import torch; x = torch.ones(2, device='cuda:1'); x.sum().item()")
    kernel.run("picker.partial = 0.5; picker.resize()")
    assert granted(pool) == [16255, 16255]
    kernel.run(
        "seen = []; picker.observe(lambda change: seen.append(change['new']), 'lease'); picker.release()"
    )
    assert granted(pool) == [0, 0]
    assert "moved to the CPU: 1 tensor, 8 bytes (x)" in kernel.run("print(picker.message)")
    assert kernel.run("until(lambda: picker.lease is None); seen[-1:], x.device.type") == "([None], 'cpu')"


def test_a_picker_waits_beside_the_notebook_and_leaves_the_queue(
    kernel: Kernel, start_kernel: Start, pool: PoolClient, eventually: Callable
) -> None:
    other = start_kernel()
    other.run("%gpupool request -n 2")
    kernel.run("picker = jupyter_gpupool.Picker(num_gpus=1, partial=0.5); picker.request()")
    assert kernel.run("until(lambda: picker.position); picker.position, picker.grantable") == "(1, False)"
    assert kernel.run("1 + 1") == "2", "the kernel goes on"
    kernel.run("picker.release(); picker.wait()")
    assert kernel.run("picker.message, picker.position") == "('Left the queue', None)"
    eventually(lambda: len(pool.leases()) == 1, "nothing is asked for any more")
    kernel.run("picker.request()")
    kernel.run("until(lambda: picker.position)")
    other.run("%gpupool release")
    kernel.run("picker.wait(); until(lambda: picker.lease)")
    assert granted(pool) == [16255, 0]
    assert kernel.run("import torch; torch.ones(2, device='cuda').sum().item()") == "2.0"


def test_buttons_say_what_is_wrong_in_one_line(kernel: Kernel, pool: PoolClient) -> None:
    kernel.run("picker = jupyter_gpupool.Picker(); until(lambda: picker.grantable)")
    press = "picker._buttons[{!r}].click(); picker.wait(); print(picker.message)"
    assert kernel.run(press.format("release")) == (
        "this notebook has no GPU slices and does not wait for any"
    )
    assert kernel.run(press.format("resize")) == (
        "this notebook has no GPU slices to resize; request some first"
    )
    assert "9 GPUs asked for, but the pool has 2" in kernel.run(
        "picker.num_gpus = 9; " + press.format("request")
    )
    assert kernel.run("picker._buttons['request'].disabled, picker.grantable") == "(True, False)"
    assert "No server has 9 GPUs; the largest has 2" in kernel.run("print(picker._means.value)")
    kernel.run("picker.num_gpus = 1; picker.partial = 0.25")
    assert "Attached" in kernel.run(press.format("request"))
    assert kernel.run("picker.num_gpus = 2; " + press.format("resize")).startswith(
        "a lease keeps its number of GPU slices (1"
    )
    assert "already" not in kernel.run(press.format("request"))
    assert granted(pool) == [8127, 0]
    assert pool.leases()[0].slices[0].memory_mib == 8127


def test_a_monitor_measures_the_lease_and_the_pool(kernel: Kernel, pool: PoolClient) -> None:
    kernel.run("monitor = jupyter_gpupool.Monitor(); until(lambda: monitor.samples)")
    assert (
        kernel.run("monitor.samples[-1]['lease_mib'], monitor.samples[-1]['pool_granted']") == "(None, 0.0)"
    )
    kernel.run("%gpupool request -m 1000")
    kernel.run("import torch; x = torch.ones(25 << 20, device='cuda'); x.sum().item()")
    kernel.run("until(lambda: monitor.samples[-1]['lease_used_mib'] == 100)")
    assert kernel.run("monitor.samples[-1]['lease_mib'], monitor.lease.state.value") == "(1000, 'ACTIVE')"
    kernel.run("for _ in range(20): x.mul_(1).sum().item()")
    kernel.run("until(lambda: any(s['lease_busy'] for s in monitor.samples))")
    assert "<polyline" in kernel.run("print(monitor._chart.value)")
    assert "100 of 1000 MiB used" in kernel.run(
        "until(lambda: monitor.samples[-1]['lease_used_mib'] == 100); print(monitor._figures.value)"
    )
    kernel.run("monitor.kept = 1; n = monitor.samples[-1]; until(lambda: monitor.samples[-1] != n)")
    assert kernel.run("len(monitor.samples)") == "1"


def test_no_timer_is_left_behind(kernel: Kernel) -> None:
    kernel.run("one, two = jupyter_gpupool.Picker(), jupyter_gpupool.Monitor()")
    assert kernel.run("until(lambda: two.samples); poller.running()") == "True"
    kernel.run("one.close()")
    assert kernel.run("poller.running()") == "True"
    kernel.run("two.close()")
    assert kernel.run("until(lambda: not poller.running()); len(poller._watchers)") == "0"
    assert (
        kernel.run("import threading; [t.name for t in threading.enumerate() if 'watch' in t.name]") == "[]"
    )


def test_a_cell_that_is_run_again_replaces_its_widgets(kernel: Kernel) -> None:
    code = "made = jupyter_gpupool.Monitor(), jupyter_gpupool.Monitor(); len(poller._watchers)"
    cell = {"cellId": "the-same-cell"}
    for _ in range(3):
        message = kernel.client.session.msg(
            "execute_request",
            {
                "code": code,
                "silent": False,
                "store_history": True,
                "user_expressions": {"n": "len(poller._watchers)"},
            },
            metadata=cell,
        )
        kernel.client.shell_channel.send(message)
        while True:
            reply = kernel.client.get_shell_msg(timeout=300)
            if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                break
        assert reply["content"]["user_expressions"]["n"]["data"]["text/plain"] == "2"


def test_a_page_that_is_loaded_again_finds_the_state(kernel: Kernel) -> None:
    """What a frontend does then: it asks for the comms, and each for its state."""
    kernel.run("picker = jupyter_gpupool.Picker(num_gpus=2, partial=0.8); until(lambda: picker.grantable)")
    client = kernel.client
    client.comm_info("jupyter.widget")
    while (reply := client.get_shell_msg(timeout=300))["header"]["msg_type"] != "comm_info_reply":
        pass
    id = kernel.run("print(picker._means.model_id)")
    assert id in reply["content"]["comms"]
    data = {"comm_id": id, "data": {"method": "request_state"}}
    client.shell_channel.send(client.session.msg("comm_msg", data))
    while True:
        message = client.get_iopub_msg(timeout=300)
        content = message["content"]
        if message["header"]["msg_type"] == "comm_msg" and content["comm_id"] == id:
            break
    assert "2 × 26008 MiB" in content["data"]["state"]["value"]


def test_without_a_pool_it_says_so_and_starts_none(
    jupyter_home: Any, start_kernel_without_pool: Callable[[], Kernel]
) -> None:
    kernel = start_kernel_without_pool()
    kernel.run(IMPORT + UNTIL + "\npicker = jupyter_gpupool.Picker(); until(lambda: picker.trouble)")
    assert kernel.run("print(picker.trouble)") == "no GPU pool is running yet; a request starts one"
