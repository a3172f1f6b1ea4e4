"""``gpupool gpus``"""

from __future__ import annotations

from .command import Command
from .table import table


class GPUsApp(Command):
    name = "gpus"
    description = "List the pool's GPUs and the memory that is free to request."
    lists = True

    def act(self) -> int:
        _, pool = self.pool()
        if self.args.json:
            self.print_json({"servers": pool["servers"]})
            return 0
        rows = [
            [
                server["name"],
                str(gpu["index"]),
                gpu["name"],
                str(max(0, gpu["memory_mib"] - gpu["granted_mib"] - gpu.get("taken_mib", 0))),
                str(gpu["memory_mib"]),
                "yes" if gpu["emulated"] else "no",
                "drained" if server.get("draining") else "yes" if gpu.get("healthy", True) else "NO",
                gpu["uuid"],
            ]
            for server in pool["servers"]
            for gpu in server["gpus"]
        ]
        if rows:
            print(
                table(
                    ["SERVER", "GPU", "NAME", "FREE MiB", "MiB", "EMULATED", "HEALTHY", "UUID"],
                    rows,
                    right=(1, 3, 4),
                )
            )
            for gpu in (gpu for server in pool["servers"] for gpu in server["gpus"]):
                if not gpu.get("healthy", True):
                    print(
                        f"GPU {gpu['index']} ({gpu['uuid']}) gets no new slices: {gpu.get('trouble') or 'not healthy'}"
                    )
        else:
            print("The pool has no GPUs")
        return 0
