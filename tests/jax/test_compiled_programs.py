"""A program that was compiled once is looked up by all processes of its lease."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LOOK_UP = """
import jax, jax.export, jax.numpy as jnp
from jupyter_gpupool.jax.jax_internals import worker as internals
from jupyter_gpupool.jax.worker.programs import compiled
one, two = internals.prepare(2)
def program(f, lines=0):
    code = compile("\\n" * lines + "def g(x): return f(x)", f"/tmp/kernel_{lines}/cell.py", "exec")
    exec(code, found := {"f": f})
    return jax.export.export(jax.jit(found["g"]))(jnp.ones(3)).mlir_module_serialized
def look_up(code, device=one, effort=0.0):
    options = internals.xla_client.CompileOptions()
    options.executable_build_options.exec_time_optimization_effort = effort
    return compiled(code, options.SerializeAsString(), [[device]], 0, None).executable
add, other = program(lambda x: x + 1), program(lambda x: x + 1, lines=40)
first = look_up(add)
print(add != other, look_up(other) is first, look_up(add, two) is first, look_up(add, effort=0.5) is first)
print(look_up(program(lambda x: x + 2)) is first)
"""


def test_the_same_program_is_looked_up_wherever_its_lines_are(run_program: Callable[..., Any]) -> None:
    done = run_program(LOOK_UP, None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True True False False", "False"]
