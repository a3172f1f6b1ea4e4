"""The environment variables that describe a kernel's lease; see docs/reference/environment.md."""

from __future__ import annotations

#: The file that describes the lease (``transport.specs.AttachSpec`` as JSON).
LEASE = "GPUPOOL_LEASE"
#: Where that file will be once the lease is granted, and the lease's id until then.
PENDING = "GPUPOOL_PENDING"
PENDING_LEASE = "GPUPOOL_PENDING_LEASE"
#: Why the kernel has no lease although it requested one: a line for its user.
REFUSED = "GPUPOOL_REFUSED"
#: The interpreter that runs the commands of a process with a lease, such as its nvidia-smi.
PYTHON = "GPUPOOL_PYTHON"

#: The Pod that a process runs in, on Kubernetes; the webhook sets them.
POD_NAME = "GPUPOOL_POD_NAME"
POD_NAMESPACE = "GPUPOOL_POD_NAMESPACE"
POD_UID = "GPUPOOL_POD_UID"
NODE_NAME = "GPUPOOL_NODE_NAME"

#: All that describe a kernel's lease.
KERNEL_VARIABLES = (LEASE, PENDING, PENDING_LEASE, REFUSED, PYTHON)
