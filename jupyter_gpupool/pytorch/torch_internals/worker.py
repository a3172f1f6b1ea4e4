"""The names of PyTorch that a worker uses and that PyTorch does not promise to keep; see client.py."""

from __future__ import annotations

import torch

from .names import Names

NAMES = Names()
_value, _attribute, _later = NAMES.value, NAMES.attribute, NAMES.later

OpOverload = _value("torch._ops.OpOverload", "recognize an operator in a graph")
_attribute(
    "torch._ops.OpOverload._schema", "check the arguments of an operator", of=torch.ops.aten.add.Tensor
)
_attribute(
    "torch._ops.OpOverload._overloadname", "read the name of an operator", of=torch.ops.aten.add.Tensor
)
all_schemas = _value("torch._C._jit_get_all_schemas", "compare the operators of two releases")
functions = _value(
    "torch._C._VariableFunctions", "call an operator by PyTorch's own binding, which is faster"
)
set_conj = _value("torch._C._set_conj", "conjugate a result in memory")
is_alias_of = _value("torch._C._is_alias_of", "notice a result on the memory of an input")
storage_at = _value("torch._C._construct_storage_from_data_pointer", "clear memory that no tensor is on")
run_backward = _value("torch.autograd.graph._engine_run_backward", "differentiate a recurrent network")
#: None in a build for the CPU, and in one without NCCL.
architecture_flags = _value(
    "torch._C._cuda_getArchFlags", "list the architectures of a CUDA build", optional=True
)
nccl_version = _value("torch._C._nccl_version", "report the version of NCCL", optional=True)
#: None in a build for the CPU; without them no CUDA graph is captured.
end_allocate_to_pool = _value(
    "torch._C._cuda_endAllocateToPool", "use a GPU's memory after a capture that failed", optional=True
)
release_pool = _value(
    "torch._C._cuda_releasePool", "free a GPU's memory after a capture that failed", optional=True
)
inductor_settings = _later(
    "torch._inductor.config", "compile a graph without processes that outlive the worker"
)
aot_compile = _later("torch._inductor.aot_compile", "compile a graph into a shared object")
FakeTensorMode = _later(
    "torch._subclasses.fake_tensor.FakeTensorMode", "compile a graph for tensors that have no memory"
)
cpu_runner = _later("torch._C._aoti.AOTIModelContainerRunnerCpu", "load a graph that was compiled elsewhere")
#: A build for the CPU has none.
cuda_runner = _later(
    "torch._C._aoti.AOTIModelContainerRunnerCuda",
    "load a graph that was compiled elsewhere for a GPU",
    optional=True,
)

NAMES.check()
