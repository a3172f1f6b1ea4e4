"""PyTorch's tests of collectives that slices refuse or answer otherwise, with the reason."""

from __future__ import annotations

#: Part of a test's name → part of what it fails with, and the reason. Another failure of that test is a failure.
REFUSALS: tuple[tuple[str, str, str], ...] = (
    (
        "profil",
        "nccl.version is not available",
        "profiles have the worker's times, and no events of NCCL's own",
    ),
    ("send_recv_nccl_autograd_profiler", "[] is not true", "profiles have no events of NCCL's own"),
    (
        "test_ddp_logging_data_gpu",
        "0 not greater than or equal to 1",
        "a reducer has no time statistics for this kind of device",
    ),
    (
        "test_ddp_apply_optim_in_backward",
        "Tensor-likes are not close",
        "on the CPU, with gloo as well, a product with 1/3 and a quotient by 3 differ in the last digit",
    ),
    (
        "test_monitored_barrier_allreduce_hang",
        "RuntimeError not raised",
        "TORCH_NCCL_BLOCKING_WAIT has no effect: the group's timeout ends a collective, where values are looked at",
    ),
    (
        "test_nccl_high_priority_stream",
        "init_process_group or new_group",
        "a process group is made by init_process_group or new_group, not of NCCL's own class",
    ),
)


def reason_of(test: str, why: str) -> str:
    """Why that test is refused if it fails with ``why``; empty if it should not."""
    return next((reason for name, words, reason in REFUSALS if name in test and words in why), "")
