"""The names of PyTorch that the client uses and that PyTorch does not promise to keep.

Each has a line about what it is needed for. Where a public name does the same, that one is used instead, and it
is not here. Import names from here into the module that uses them: they are looked up once.
"""

from __future__ import annotations

from typing import Any

import torch

from .names import Names

NAMES = Names()
_value, _attribute, _later = NAMES.value, NAMES.attribute, NAMES.later

# -- tensors

make_wrapper_subclass = _value(
    "torch.Tensor._make_wrapper_subclass", "make a tensor without memory of its own"
)
MAKE_WRAPPER_SUBCLASS = _attribute("torch.Tensor._make_wrapper_subclass", "trace tensors on cuda")
make_subclass = _value("torch.Tensor._make_subclass", "make a tensor of a class of the program's")
MAKE_SUBCLASS = _attribute(
    "torch.Tensor._make_subclass", "make a tensor of a class of the program's on a slice"
)
disabled_torch_function = _value(
    "torch._C._disabled_torch_function_impl", "call methods of tensors on a slice without a detour"
)
DisableTorchFunctionSubclass = _value(
    "torch._C.DisableTorchFunctionSubclass", "call an operator apart from the program's own class of tensors"
)
is_torch_function_mode_enabled = _value(
    "torch.overrides._is_torch_function_mode_enabled",
    "ask the program's modes before a replaced function runs",
)
TensorBase = _value("torch._C.TensorBase", "call a method of a tensor that this package replaces")
swap_tensor_impl = _value(
    "torch._C._swap_tensor_impl", "move a tensor between devices and keep the Python object"
)
HAS_COMPATIBLE_COPY_TYPE = _attribute(
    "torch._has_compatible_shallow_copy_type", "let Module.to() assign parameters of another device"
)
tensor_text = _value("torch._tensor_str", "print a tensor as PyTorch does")
_attribute("torch._tensor_str._tensor_str", "print the elements of a tensor")
_attribute("torch._tensor_str._add_suffixes", "print the device of a tensor")
_attribute("torch.Tensor._backward_hooks", "keep the hooks of a parameter that moves")
_attribute("torch.Tensor._post_accumulate_grad_hooks", "keep the hooks of a parameter that moves")
_attribute("torch.Tensor._use_count", "see whether a graph uses a parameter that moves")
_attribute("torch.Tensor._is_view", "move views of a tensor before the tensor")
for _name in ("_indices", "_values", "_nnz"):
    _attribute(f"torch.Tensor.{_name}", "read the parts of a sparse tensor")
ALLOWED_METHODS = _attribute(
    "torch.nn.parameter.UninitializedTensorMixin._allowed_methods", "let lazy modules move to a slice"
)
_marked: Any = torch.empty(0)
_marked._is_param = True
NAMES.behaves(
    "torch.nn.Parameter._is_param",
    "let a tensor on a slice be a Parameter",
    isinstance(_marked, torch.nn.Parameter),
)

# -- storages

new_storage = _value("torch._C.StorageBase", "make the object of a storage on a slice").__new__
NEW_WRAPPED_STORAGE = _attribute("torch.TypedStorage._new_wrapped_storage", "make typed storages on a slice")
_untyped = torch.UntypedStorage(0)
_typed = torch.TypedStorage(wrap_storage=_untyped, dtype=torch.uint8, _internal=True)
_attribute("torch.TypedStorage._untyped_storage", "read a typed storage", of=_typed)
_attribute("torch.UntypedStorage._cdata", "tell storages apart", of=_untyped)

# -- operators and dispatch

OpOverload = _value("torch._ops.OpOverload", "recognize an operator in a graph")
_attribute(
    "torch._ops.OpOverload._schema",
    "read the name and arguments of an operator",
    of=torch.ops.aten.add.Tensor,
)
_attribute(
    "torch._ops.OpOverload._overloadname", "read the name of an operator", of=torch.ops.aten.add.Tensor
)
_attribute(
    "torch._ops.OpOverload._op_dk", "call an operator's kernel of one key", of=torch.ops.aten.add.Tensor
)
DispatchKey = _value("torch._C.DispatchKey", "name a kernel of an operator")
DispatchKeySet = _value("torch._C.DispatchKeySet", "call an operator's kernel of one key")
ExcludeDispatchKeyGuard = _value("torch._C._ExcludeDispatchKeyGuard", "leave autocast within its own kernels")
all_schemas = _value("torch._C._jit_get_all_schemas", "compare the operators of two releases")
all_operator_names = _value("torch._C._dispatch_get_all_op_names", "list the operators of sparse tensors")
has_kernel = _value(
    "torch._C._dispatch_has_kernel_for_dispatch_key", "see whether an operator is composed of others"
)
pytree = _value("torch.utils._pytree", "walk over nested arguments")
NativeGenerator = _value("torch._C.Generator", "give PyTorch's core a generator of its own class")

# -- collectives

work_from_future: Any = _value(
    "torch._C._distributed_c10d._create_work_from_future",
    "tell the program that a collective is done",
    optional=True,
)
COALESCING = tuple(
    _attribute(
        f"torch._C._distributed_c10d.ProcessGroup.{_name}",
        "wait for several exchanges at once",
        optional=True,
    )
    for _name in ("_start_coalescing", "_end_coalescing")
)
SUPPORTS_RANDOM = tuple(
    _later(
        f"torch.distributed.tensor.{_name}.is_rng_supported_mesh",
        "draw random numbers of sharded tensors on emulated GPUs",
        optional=True,
    )
    for _name in ("_random", "_dispatch")
)

REPLICATES_PLAIN = _later(
    "torch.distributed.tensor.DTensor._op_dispatcher._allow_implicit_replication",
    "let a program's own implicit_replication() go on after attention of sharded tensors",
)


def part_of_sharded(tensor: Any) -> Any:
    """What this rank has of a DTensor, without a gradient's way back, which ``to_local()`` would add."""
    return tensor._local_tensor


describe_failed_call = _attribute(
    "torch.distributed.c10d_logger._get_msg_dict",
    "let a collective that fails raise its own error",
    optional=True,
)

set_group_timeout = _attribute(
    "torch.distributed.distributed_c10d._set_pg_timeout",
    "let ranks wait as long for each other as a program says later",
    optional=True,
)

# -- the device

setup_device = _value(
    "torch.utils.backend_registration._setup_privateuseone_for_python_backend", "register the device gpupool"
)
DeviceGuardBase = _value("torch._C._acc.DeviceGuard", "tell PyTorch's core the device's type")
DeviceHooksBase = _value("torch._C._acc.PrivateUse1Hooks", "tell PyTorch's core whether there is a device")
DeviceType = _value("torch._C._autograd.DeviceType", "tell PyTorch's core the device's type")
set_multithreading_enabled = _value(
    "torch._C._set_multithreading_enabled", "run a backward pass in the caller's thread"
)
RUN_BACKWARD = _attribute(
    "torch.autograd.graph._engine_run_backward", "run a backward pass in the caller's thread"
)
RUN_BACKWARD_OF_AUTOGRAD = _attribute(
    "torch.autograd._engine_run_backward", "run a backward pass in the caller's thread"
)
forward_ad = _value("torch.autograd.forward_ad", "see whether forward-mode differentiation is on")
_attribute("torch.autograd.forward_ad._current_level", "see whether forward-mode differentiation is on")
profiler_state = _value("torch._C._profiler.ProfilerState", "record the host alone in a profile")
START_TRACE = _attribute("torch.autograd.profiler.profile._start_trace", "record the kernels in a profile")
PARSE_RESULTS = _attribute(
    "torch.autograd.profiler.profile._parse_kineto_results", "show the kernels in a profile"
)
#: The types that implementations for many tensors at once accept: lists that grow.
FOREACH_TYPES = (
    _value("torch.optim.optimizer._foreach_supported_types", "let optimizers update all parameters at once"),
    _value("torch.utils._foreach_utils._foreach_supported_types", "let gradients be clipped all at once"),
)

# -- files

rebuild_tensor = _value("torch._utils._rebuild_tensor_v2", "save a tensor as any PyTorch loads it")
rebuild_parameter = _value("torch._utils._rebuild_parameter", "save a parameter as any PyTorch loads it")
rebuild_parameter_with_state = _value(
    "torch._utils._rebuild_parameter_with_state", "save a parameter with attributes as any PyTorch loads it"
)
rebuild_sparse = _value("torch._utils._rebuild_sparse_tensor", "save a sparse tensor as any PyTorch loads it")
rebuild_from_type = _value("torch._tensor._rebuild_from_type_v2", "save a tensor of a class of the program's")
#: Set on a storage while torch.load has not read its bytes yet.
UNINITIALIZED = "_torch_load_uninitialized"

# -- cuda

device_constructors = _value(
    "torch.utils._device._device_constructors",
    "let `with device:` know functions that are replaced afterwards",
)
DeviceContext = _value(
    "torch.utils._device.DeviceContext", "let set_default_device() take cuda without a number"
)
GET_STREAM = _attribute("torch.nn.parallel._functions._get_stream", "copy the inputs of nn.DataParallel")
CUDNN_INIT = _attribute("torch.backends.cudnn.m._init", "leave the choice of kernels to the worker")
NVTX = _attribute("torch.cuda.nvtx._nvtx", "let NVTX annotations do nothing")
JITTED_CALL = _attribute("torch.cuda.jiterator._JittedFunction.__call__", "refuse kernels written in C++")
#: Functions of a CUDA build that torch.cuda.comm calls; a build for the CPU has none.
COLLECTIVES = tuple(
    (torch._C, f"_{name}")
    for name in (
        *("broadcast", "broadcast_out", "broadcast_coalesced"),
        *("scatter", "scatter_out", "gather", "gather_out"),
    )
)
#: What compiled graphs call to select a slice, by these names; only a build for CUDA would ask its driver here.
DEVICE_EXCHANGES = tuple(
    (torch._C, f"_{module}_{name}")
    for module in ("cuda", "accelerator")
    for name in ("exchangeDevice", "maybeExchangeDevice")
    if hasattr(torch._C, "_cuda_exchangeDevice")
)
GET_ACCELERATOR = _attribute("torch._C._get_accelerator", "let torch.distributed find the GPUs of a lease")
#: What programs call by private names, because torch.cuda has no public ones.
CUDA_ANSWERS = {
    "initialized": "_initialized",
    "lazy_init": "_lazy_init",
    "is_in_bad_fork": "_is_in_bad_fork",
    "record_memory_history": "_record_memory_history",
    "snapshot": "_snapshot",
    "exchange_device": "_exchange_device",
    "maybe_exchange_device": "_maybe_exchange_device",
}

# -- TorchScript

find_builtin = _value("torch.jit._builtins._find_builtin", "let scripts call an operator that is replaced")
register_builtin = _value(
    "torch.jit._builtins._register_builtin", "let scripts call an operator that is replaced"
)
builtin_table = _value(
    "torch.jit._builtins._get_builtin_table", "let scripts call an operator that is replaced"
)
LOAD_SCRIPT = _attribute("torch.jit._serialization.load", "load scripted modules on a slice")
FileReader = _value("torch._C.PyTorchFileReader", "see where a scripted module was saved")
SCRIPT = _attribute("torch.jit._script.script", "let scripted code see that a slice is CUDA")
rewrite_graph = _value(
    "torch._C._jit_pass_custom_pattern_based_rewrite_graph", "let scripted code see that a slice is CUDA"
)
for _name in ("_get_method", "_method_names"):
    _attribute(f"torch._C.ScriptModule.{_name}", "let scripted code see that a slice is CUDA")
MODULE_APPLY = _attribute("torch.nn.Module._apply", "move scripted modules to a slice")
_attribute("torch.nn.Module._parameters", "move scripted modules to a slice", of=torch.nn.Module())

# Only a scripted module has it, and to script one takes long: the tests of scripted modules miss it.
NAMES.behaves("torch.jit.RecursiveScriptModule._c", "move scripted modules to a slice", works=True)

# -- the compiler

eval_frame = _value("torch._C._dynamo.eval_frame", "keep the compiler out of this package")
_attribute("torch._C._dynamo.eval_frame._FrameAction", "keep the compiler out of this package")
_attribute("torch._C._dynamo.eval_frame._FrameExecStrategy", "keep the compiler out of this package")
COMPILE_WITH_INDUCTOR = _attribute(
    "torch._TorchCompileInductorWrapper.__call__", "compile for a slice without naming a backend"
)
HAS_OWN_DISPATCH = _attribute("torch._subclasses.fake_tensor._check_for_subclass_arg", "trace remote tensors")
FakeTensor = _value("torch._subclasses.fake_tensor.FakeTensor", "trace tensors on cuda")
FakeTensorMode = _value("torch._subclasses.fake_tensor.FakeTensorMode", "trace tensors on cuda")
FunctionalTensor = _value(
    "torch._subclasses.functional_tensor.FunctionalTensor", "trace changes in place on cuda"
)
MetaTensorDescriber = _value("torch._subclasses.meta_utils.MetaTensorDescriber", "trace remote tensors")
#: The names that FakeTensor has for its device.
FAKE_DEVICE = ("device", "fake_device", "_fake_device")
rule_map = _later(
    "torch._dynamo.trace_rules.get_torch_obj_rule_map",
    "let the compiler look into functions that are replaced",
)
WRAP = _later(
    "torch._dynamo.variables.builder.VariableBuilder._wrap", "trace remote tensors in compiled programs"
)
INFER_SUBCLASS_TYPE = _later(
    "torch._dynamo.variables.builder.infer_subclass_type", "trace remote tensors in compiled programs"
)
#: From 2.15 on written in C++, which does not ask torch.accelerator for it. The second is there from 2.13 on.
CURRENT_STREAM = (
    _later("torch._dynamo.utils.get_current_stream", "compile for the current stream of a slice"),
    _later(
        "torch._dynamo.guards.get_current_stream", "compile for the current stream of a slice", optional=True
    ),
)
aot_autograd = _later("torch._dynamo.backends.common.aot_autograd", "compile forward and backward passes")
make_boxed_func = _later(
    "torch._functorch.aot_autograd.make_boxed_func", "compile forward and backward passes"
)
partition = _later(
    "torch._functorch.partitioners.min_cut_rematerialization_partition", "split backward from forward passes"
)
COMPILE_INNER = _later("torch._inductor.compile_fx._compile_fx_inner", "compile for the CPU during a lease")

NAMES.check()
