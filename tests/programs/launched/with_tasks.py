"""Tasks of the user's own, in processes of joblib or of Ray: each trains alone, and those of Ray once more together."""

from __future__ import annotations

import gc
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import training

ON_CPU = os.environ.get("ON_CPU") == "1"


def alone(rank: int, device: str) -> dict:
    torch.set_num_threads(1)
    model = training.network().to("cpu" if ON_CPU else device)
    losses = training.train(model, next(model.parameters()).device, rank)
    return {
        "losses": losses,
        "kind": next(model.parameters()).device.type,
        "world": torch.cuda.device_count(),
    }


def together(rank: int, store: str) -> list[float]:
    """Weights after steps of DistributedDataParallel, each rank on the only GPU that it sees."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo" if ON_CPU else "nccl", init_method=f"file://{store}", rank=rank, world_size=training.RANKS
    )
    device = "cpu" if ON_CPU else "cuda:0"
    model = torch.nn.parallel.DistributedDataParallel(training.network().to(device))
    training.train(model, device, rank)
    found = training.weights(model)
    # The group has to go last: a reducer that holds the last reference waits, with the interpreter's lock, for a thread
    # of gloo that may want it.
    del model
    gc.collect()
    dist.destroy_process_group()
    return found


def with_joblib() -> None:
    import joblib

    found = joblib.Parallel(n_jobs=2)(joblib.delayed(alone)(rank, f"cuda:{rank}") for rank in range(2))
    training.report(tasks=found)


def with_ray() -> None:
    import ray

    gpus = 0 if ON_CPU else 1
    ray.init(num_cpus=2, num_gpus=2 * gpus, include_dashboard=False, _node_ip_address="127.0.0.1")
    try:
        task = ray.remote(num_cpus=1, num_gpus=gpus)
        found = ray.get([task(alone).remote(rank, "cuda:0") for rank in range(2)])
        with tempfile.TemporaryDirectory(prefix="gpupool-test-") as folder:
            weights = ray.get([task(together).remote(rank, f"{folder}/store") for rank in range(2)])
    finally:
        ray.shutdown()
    training.report(tasks=found, weights=weights)


if __name__ == "__main__":
    {"joblib": with_joblib, "ray": with_ray}[sys.argv[1]]()
