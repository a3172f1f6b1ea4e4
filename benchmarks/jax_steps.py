"""Calls of JAX programs, tiny ones and training steps, on a leased slice and on JAX's own CPU client; and copies.

A program's dispatch ends when the call returns, and is that of one in a row of 20; the whole ends when its result is
there. Copies to the slice are measured beside a bare connection.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from jupyter_client.manager import start_new_kernel

import jupyter_gpupool

from .echo import MOST_BYTES, Echo
from .missing import Missing

GOALS = {
    "tiny_dispatch_us": ("<=", 30.0),
    "step_dispatch_to_local": ("<=", 2.0),
    "long_step_to_local": ("<=", 1.05),
    "to_slice_to_socket": (">=", 0.9),
    "first_result_in_a_notebook_s": ("<=", 1.5),
}
KERNELS = 7
ROUNDS = 300
LONG_ROUNDS = 15
IN_A_ROW = 20
COPIES = 7

Call = Callable[[], Any]


def run() -> dict[str, Any]:
    try:
        import jax
    except ImportError:
        raise Missing('JAX is not installed; pip install "jupyter_gpupool[jax]"') from None
    with jupyter_gpupool.attach(partial=0.5):
        slice_, cpu = jax.devices()[0], jax.devices("cpu")[0]
        if slice_ is cpu:
            raise Missing("the JAX plugin's C part is not built, because there is no C compiler")
        figures: dict[str, Any] = {}
        tiny = [_tiny(device) for device in (cpu, slice_)]
        local, remote = _pairs(*tiny, rounds=ROUNDS, in_a_row=IN_A_ROW)
        figures["tiny_dispatch_us"], figures["local_tiny_dispatch_us"] = _us(remote), _us(local)
        local, remote = _pairs(*map(_blocking, tiny), rounds=ROUNDS)
        figures["tiny_whole_us"], figures["local_tiny_whole_us"] = _us(remote), _us(local)
        steps = [_step(device, 64, 32) for device in (cpu, slice_)]
        local, remote = _pairs(*steps, rounds=ROUNDS, in_a_row=IN_A_ROW)
        figures["step_dispatch_us"], figures["local_step_dispatch_us"] = _us(remote), _us(local)
        figures["step_dispatch_to_local"] = _ratio(local, remote)
        local, remote = _pairs(*map(_blocking, steps), rounds=ROUNDS)
        figures["step_whole_us"], figures["local_step_whole_us"] = _us(remote), _us(local)
        local, remote = _pairs(
            *(_blocking(_step(device, 512, 1024)) for device in (cpu, slice_)), rounds=LONG_ROUNDS
        )
        figures["long_step_ms"] = round(statistics.median(remote) * 1e3, 1)
        figures["long_step_to_local"] = _ratio(local, remote)
        figures |= _copies(slice_)
    figures["first_result_in_a_notebook_s"] = round(
        statistics.median(_first_result() for _ in range(KERNELS)), 2
    )
    return figures


def _copies(slice_: Any) -> dict[str, float]:
    """Copy 256 MiB to the slice, and use one of its numbers."""
    import jax
    import numpy as np

    host = np.zeros(MOST_BYTES, np.uint8)
    first = jax.jit(lambda x: x[0])

    def up() -> None:
        first(jax.device_put(host, slice_)).item()

    def timed(function: Callable[[], None]) -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    with Echo() as echo:
        rounds = [(timed(up), timed(lambda: echo.up(host.data))) for _ in range(COPIES + 1)][1:]
    ours = statistics.median(ours for ours, _ in rounds)
    return {
        "to_slice_gb_per_s": round(MOST_BYTES / ours / 1e9, 2),
        "to_slice_to_socket": round(statistics.median(bare / ours for ours, bare in rounds), 3),
    }


def _first_result() -> float:
    """The seconds from sending a cell that requests a slice to its reply with a number that JAX computed there.

    The kernel is new, for a process uses one lease by JAX, and has imported JAX.
    """
    manager, client = start_new_kernel(kernel_name="python3")
    said: list[str] = []

    def run(code: str) -> float:
        began = time.perf_counter()
        client.execute_interactive(code, timeout=120, output_hook=lambda m: said.append(str(m["content"])))
        return time.perf_counter() - began

    try:
        run("%load_ext jupyter_gpupool\nimport jax.numpy as jnp")
        took = run("%gpupool request -n 1 -p 0.5\nx = jnp.ones(2) + 1\nprint(x.sum().item(), x.devices())")
        assert "4.0 {CudaDevice(id=0)}" in "".join(said), said
        return took
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def _tiny(device: Any) -> Call:
    """An addition to 8 numbers."""
    import jax
    import numpy as np

    function = jax.jit(lambda x: x + 1)
    x = jax.device_put(np.ones(8, np.float32), device)
    return lambda: function(x)


def _step(device: Any, batch: int, width: int) -> Call:
    """A training step of a network of three layers: 8 inputs, 7 outputs, the parameters donated."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def loss(parameters: Any, x: Any, y: Any) -> Any:
        for w, b in parameters[:-1]:
            x = jnp.tanh(x @ w + b)
        w, b = parameters[-1]
        return jnp.mean((x @ w + b - y) ** 2)

    def step(parameters: Any, x: Any, y: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(parameters, x, y)
        return jax.tree.map(lambda p, g: p - 0.01 * g, parameters, grads), value

    compiled = jax.jit(step, donate_argnums=0)
    rng = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return jax.device_put(rng.normal(size=shape).astype(np.float32) * 0.1, device)

    state = [(array(width, width), array(width)) for _ in range(3)]
    x, y = array(batch, width), array(batch, width)

    def call() -> Any:
        nonlocal state
        state, value = compiled(state, x, y)
        return value

    return call


def _blocking(call: Call) -> Call:
    return lambda: call().block_until_ready()


def _pairs(local: Call, remote: Call, rounds: int, in_a_row: int = 1) -> tuple[list[float], list[float]]:
    """The seconds of each call on both sides, in turns; each begins when everything before it has run."""
    import jax

    times: tuple[list[float], list[float]] = ([], [])
    for k in range(rounds + 10):
        for call, found in zip((local, remote), times):
            began = time.perf_counter()
            for _ in range(in_a_row):
                result = call()
            seconds = (time.perf_counter() - began) / in_a_row
            jax.block_until_ready(result)
            if k >= 10:
                found.append(seconds)
    return times


def _us(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e6, 1)


def _ratio(local: list[float], remote: list[float]) -> float:
    return round(statistics.median(remote) / statistics.median(local), 2)
