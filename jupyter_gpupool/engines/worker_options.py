"""The configuration that every engine of ours shares: emulated GPUs, the port of the workers, and what they run in."""

from __future__ import annotations

from traitlets import Bool, Dict, Enum, Float, Int, Unicode
from traitlets.config import Configurable

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
        help="Certificate (PEM), a file on each GPU server. With it workers speak TLS 1.3 only, all of a server behind "
        "`data_port`."
    ).tag(config=True)
    keyfile = Unicode(help="The certificate's private key (PEM), a file on each GPU server.").tag(config=True)
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


class WorkerEnvironments(Configurable):
    """The interpreters of a GPU server that workers may run in."""

    environments = Dict(
        key_trait=Unicode(),
        value_trait=Unicode(),
        help="Further Python interpreters on each GPU server with other releases of PyTorch, by a name of your choice, "
        "such as `{'torch-2.15': '/opt/torch-2.15/bin/python'}`. A lease's worker runs in the one that fits its client "
        "best.",
    ).tag(config=True)
    environment_idle_s = Float(
        600.0,
        min=1.0,
        help="Seconds that the warm parent of a further environment is kept while it has no lease.",
    ).tag(config=True)
