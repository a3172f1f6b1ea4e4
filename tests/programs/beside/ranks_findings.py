"""What each rank of a public script computes, for two runs of it to be compared: on leased GPUs, and on the CPU.

Every rank appends lines of JSON to a file of its own: the tensors whose gradients are asked for, which are losses, and
the parameters after each step of an optimizer. Ranks draw from seeds of their own.
"""

import json
import multiprocessing
import os
import random
import re


def begin(folder, *, gpus_on_cpu, draws_on_cpu, plain_attention, draws_empty):
    """``gpus_on_cpu``: how many GPUs the CPU stands in for; 0 where there are GPUs. ``plain_attention``: of the CPU.

    ``draws_empty``: a script leaves parameters as ``Module.to_empty`` makes them, with whatever was in memory.
    """
    import torch

    if gpus_on_cpu:
        stand_in_for_gpus(gpus_on_cpu)
        if plain_attention:
            attend_plainly()
    elif draws_on_cpu:
        from tests.programs.drive import DrawsOnCpu

        DrawsOnCpu().__enter__()
    rank = rank_here()
    random.seed(rank)
    torch.manual_seed(rank)
    if draws_empty:
        draw_empty_parameters()
    note_what_is_computed(os.path.join(folder, f"rank-{rank}.jsonl"))


def attend_plainly():
    """Let sharded tensors attend on the CPU, whose fused kernel does not know them."""
    import torch
    from torch.distributed.tensor.experimental import implicit_replication

    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's kernel obeys it, too
    attend = torch.nn.functional.scaled_dot_product_attention

    def attend_plainly(*args, **kwargs):
        with implicit_replication():  # of the mask that it makes
            return attend(*args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = attend_plainly


def draw_empty_parameters():
    import torch

    to_empty = torch.nn.Module.to_empty

    def drawn(self, **kwargs):
        moved = to_empty(self, **kwargs)
        for parameter in moved.parameters():
            torch.nn.init.uniform_(parameter, -0.1, 0.1)
        return moved

    torch.nn.Module.to_empty = drawn


def rank_here():
    """The rank that torchrun names, or the number that multiprocessing gives to a process that it starts."""
    name = multiprocessing.current_process().name
    return int(os.environ.get("RANK") or re.sub(r"\D", "", name) or 0)


def note_what_is_computed(file):
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    backward = torch.autograd.backward

    def note(what, tensors):
        with torch.no_grad(), open(file, "a") as lines:
            for tensor in tensors:
                device, values = of_tensor(tensor)
                lines.write(json.dumps({"what": what, "device": device, "values": values}) + "\n")

    def noted_backward(tensors, *args, **kwargs):
        note("loss", [tensors] if isinstance(tensors, torch.Tensor) else tensors)
        return backward(tensors, *args, **kwargs)

    torch.autograd.backward = noted_backward
    register_optimizer_step_post_hook(
        lambda optimizer, args, kwargs: note(
            "parameter", [p for group in optimizer.param_groups for p in group["params"]]
        )
    )


def of_tensor(tensor):
    """Where it is, and a single value as it is, or the sum and the sum of the squares of this rank's part."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    here = local.detach().cpu().double().reshape(-1)
    place = "CPU" if local.device.type == "cpu" else "GPU"
    return place, here.tolist() if here.numel() == 1 else [here.sum().item(), here.square().sum().item()]


class Accelerator(str):
    """The CPU, where a script asks for the kind of its GPUs."""

    type = "cpu"


def stand_in_for_gpus(count):
    """Let a script that names GPUs and NCCL run on the CPU with gloo."""
    import torch
    import torch.distributed as dist
    from torch.overrides import TorchFunctionMode

    def on_cpu(value):
        is_device = isinstance(value, torch.device) and value.type != "meta"
        is_name = isinstance(value, str) and re.fullmatch(r"cuda(:\d+)?", value)
        return torch.device("cpu") if is_device or is_name else value

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if "device" in kwargs:
                kwargs["device"] = place(kwargs["device"])
            if function is torch.Tensor.pin_memory:
                return args[0]
            if function is torch.Tensor.to:
                args = (args[0], *map(place, args[1:]))
            return function(*args, **kwargs)

    def place(value):
        return torch.device("cpu") if type(value) is int else on_cpu(value)

    OnCpu().__enter__()
    move = torch.nn.Module.to
    torch.nn.Module.to = lambda self, *args, **kwargs: move(
        self, *map(place, args), **{k: place(v) for k, v in kwargs.items()}
    )
    load = torch.load
    torch.load = lambda *args, map_location=None, **kwargs: load(
        *args, map_location=on_cpu(map_location), **kwargs
    )
    torch.cuda.set_device = lambda device: None
    torch.cuda.device_count = lambda: count
    accelerator = torch.accelerator
    accelerator.is_available = lambda: True
    accelerator.device_count = lambda: count
    # PyTorch itself asks whether one is available.
    accelerator.current_accelerator = lambda check_available=False: (
        None if check_available else Accelerator("cpu")
    )
    accelerator.set_device_index = accelerator.device_index = lambda device: None
    start, wrap = dist.init_process_group, torch.nn.parallel.DistributedDataParallel.__init__
    dist.init_process_group = lambda backend=None, **kwargs: start("gloo", **{**kwargs, "device_id": None})
    torch.nn.parallel.DistributedDataParallel.__init__ = lambda self, module, **kwargs: wrap(
        self, module, **{**kwargs, "device_ids": None}
    )
    default = dist.get_default_backend_for_device
    dist.get_default_backend_for_device = lambda device: (
        default("cpu") if device == "cpu" else default(device)
    )
