"""The configuration that every engine of ours shares: emulated GPUs, the port of the workers, and what they run in."""

from __future__ import annotations

from typing import Any

from traitlets import Bool, Dict, Enum, Float, Int, List, TraitError, Unicode, validate
from traitlets.config import Configurable

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.operator_names import extra_operators
from jupyter_gpupool.gpus.emulated import DEFAULT_MEMORY_MIB, DEFAULT_NAME


class EmulatedGPUs(Configurable):
    """Whether GPU servers offer emulated GPUs, and which."""

    emulate = Enum(
        ["auto", "always", "never"],
        "auto",
        help="Offer emulated GPUs: `auto` on GPU servers where NVML finds no GPU, `always` (only those), or `never`.",
    ).tag(config=True)
    emulated_name = Unicode(DEFAULT_NAME, help="Name of the emulated GPUs.").tag(config=True)
    emulated_memory_mib = Int(DEFAULT_MEMORY_MIB, min=1, help="Memory of each emulated GPU, in MiB.").tag(
        config=True
    )


class WorkerPort(Configurable):
    """The port and the certificate of the workers on a GPU server."""

    certfile = Unicode(
        help="The pool's certificate (PEM). With it workers speak TLS 1.3 only, all of a server behind `data_port`, "
        "each with a certificate of its own. `gpupool health` says when the pool's expires."
    ).tag(config=True)
    keyfile = Unicode(help="Not used any more: no worker is given the certificate's private key.").tag(
        config=True
    )
    data_port = Int(
        0,
        min=0,
        max=65535,
        help="On each GPU server the one port of all workers with TLS; 0 takes a free one.",
    ).tag(config=True)
    resume_s = Float(
        120.0,
        min=0.0,
        help="Seconds that a lease outlives its client's and its holder's lost connections, and its last heartbeat; "
        "they try to connect again for so long. A holder that is killed is noticed within seconds all the same.",
    ).tag(config=True)
    window_mib = Int(
        64,
        min=1,
        help="MiB that a client sends ahead of its worker; it keeps a copy of them, to send them again on another "
        "connection.",
    ).tag(config=True)
    persistent = Bool(False, help="Workers outlive a pool that is killed, and its successor finds them.").tag(
        config=True
    )


class WorkerParking(Configurable):
    """The host memory for parked leases on a GPU server."""

    park_memory_mib = Int(
        0,
        min=0,
        help="Host memory for parked leases on each GPU server, in MiB. It is reserved when the server starts. 0: no "
        "lease is parked.",
    ).tag(config=True)
    clean_after_s = Float(
        60.0,
        min=0.0,
        help="Seconds without an operator after which a lease is copied to the memory for parked leases, so that "
        "parking it later takes no time.",
    ).tag(config=True)


class WorkerSandbox(Configurable):
    """What the workers of a GPU server are shut in."""

    sandbox = Enum(
        ["auto", "require", "off"],
        "auto",
        help="Shut each worker in, so that a tenant who takes it over reaches nothing of others: `auto` as far as the "
        "server's kernel allows, and with GPUs that are not emulated only by what their driver is known to work with; "
        "`require` by every layer, or no worker starts; `off`. `gpupool health` names the layers.",
    ).tag(config=True)


class WorkerBounds(Configurable):
    """What each worker may take of its GPU server besides the GPU."""

    host_memory_mib = Int(
        None,
        allow_none=True,
        min=0,
        help="Host memory that each worker may have, in MiB; one that takes more is ended, and its lease with it. "
        "0: no limit. Default: twice the memory of its slices and 4096 MiB, and at most nine tenths of the machine's. "
        "An emulated GPU's memory is host memory, copies take as much again, and the rest is for libraries "
        "and compilers.",
    ).tag(config=True)
    worker_disk_mib = Int(
        8192,
        min=0,
        help="What each worker may write to its own directory, below `run_dir`, in MiB: graphs that it compiles. 0: no "
        "limit.",
    ).tag(config=True)


class WorkerEnvironments(Configurable):
    """The interpreters of a GPU server that workers may run in."""

    environments = Dict(
        key_trait=Unicode(),
        value_trait=Unicode(),
        help="Further Python interpreters on each GPU server with other releases of PyTorch, by a name of your choice, "
        "such as `{'torch-2.15': '/opt/torch-2.15/bin/python'}`. A lease's worker runs in the one that fits its client "
        "best.",
    ).tag(config=True)
    environments_dir = Unicode(
        help="Folder on each GPU server in which `gpupool server environment add` records further interpreters, and "
        "installs them. Default: in the directory of a secured server, else in Jupyter's data directory."
    ).tag(config=True)
    operators = Dict(
        key_trait=Unicode(),
        value_trait=List(Unicode()),
        help="Operators of other libraries than PyTorch that a lease may use, by the environment that has them, such "
        "as `{'torch-2.15': ['torchvision::nms']}`; `default` is the interpreter of the pool itself. They run "
        "whatever the library does with any arguments, so allow only those that use the GPU's memory alone.",
    ).tag(config=True)
    environment_idle_s = Float(
        600.0,
        min=1.0,
        help="Seconds that the warm parent of a further environment is kept while it has no lease.",
    ).tag(config=True)

    @validate("operators")
    def _check_operators(self, proposal: Any) -> dict[str, list[str]]:
        try:
            return {name: list(extra_operators(given)) for name, given in proposal["value"].items()}
        except InvalidRequest as e:
            raise TraitError(f"the setting {type(self).__name__}.operators: {e}") from None
