"""``gpupool netperf``"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from jupyter_gpupool.core.checks import Check
from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.request_schema import FIELDS
from jupyter_gpupool.gpus.health.diagnosis import BANDWIDTH_GBIT, ROUND_TRIP_US

from . import network_checks
from .acquire_lease import interruptions
from .command import Command
from .health import picture
from .options import Parser, UsageError, number

#: Memory of the lease beyond the size of a copy, in MiB.
_SPARE_MIB = 64


def duration(text: str) -> float:
    """Parse seconds, above 0 and at most 60. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 60:
        raise argparse.ArgumentTypeError(f"give seconds above 0 and at most 60, not {text!r}")
    return value


class NetperfApp(Command):
    name = "netperf"
    description = (
        "Measure the network from this machine to each GPU server the way programs use it. The command acquires a\n"
        "small lease there, waits for an operator again and again, and copies tensors both ways, over TLS if the pool\n"
        f"uses it. The recommended results are {ROUND_TRIP_US:g} µs and {BANDWIDTH_GBIT:g} Gbit/s. The exit code\n"
        "is 1 if a server could not be measured."
    )
    examples = "  gpupool netperf\n  gpupool netperf --server gpu7 --size 256 --json"
    lists = True

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("--server", metavar="NAME", help="measure only this GPU server (default: all)")
        parser.add_argument(
            "--size",
            metavar="MiB",
            type=number(FIELDS["memory_mib"]),
            default=64,
            help="size of each copy in MiB (default: %(default)s)",
        )
        parser.add_argument(
            "--seconds",
            metavar="S",
            type=duration,
            default=1.0,
            help="duration of each of the three measurements in seconds (default: %(default)g)",
        )

    def act(self) -> int:
        client, pool = self.pool()
        with client:
            servers = [s for s in pool["servers"] if self.args.server in (None, s["name"])]
            if not servers:
                names = ", ".join(server["name"] for server in pool["servers"]) or "none"
                raise UsageError(f"the pool has no server {self.args.server!r}; it has: {names}")
            parts = urlsplit(client.url)
            port = parts.port or (443 if client.secure else 80)
            with interruptions():
                results = [self._measure(server, port) for server in servers]
            if self.args.json:
                recommended = {"round_trip_us": ROUND_TRIP_US, "bandwidth_gbit_s": BANDWIDTH_GBIT}
                self.print_json(
                    {"url": client.url, "tls": client.secure, "recommended": recommended, "servers": results}
                )
            else:
                print(
                    f"From this machine to the GPU pool at {client.url}{', over TLS' if client.secure else ''}\n"
                )
                print(picture([Check(**check) for result in results for check in result["checks"]]))
        return 1 if any(result["error"] for result in results) else 0

    def _measure(self, server: dict[str, Any], port: int) -> dict[str, Any]:
        name = server["name"]
        result: dict[str, Any] = {"server": name, "host": server["host"], "error": ""}
        connect = network_checks.connect(server["host"], port)
        result["connect_us"] = None if connect is None else round(connect * 1e6, 1)
        try:
            measured = self._on_a_lease(name, result)
        except (PoolError, RuntimeError) as e:
            result["error"] = str(e)
            failed = Check("netperf", "unknown", f"not measured: {e}", server=name)
            return {**result, "checks": [asdict(failed)]}
        p50, p99 = (measured.round_trip(share) for share in (0.5, 0.99))
        up, down = (rate * 8 / 1e9 for rate in (measured.to_device, measured.from_device))
        checks = [
            network_checks.round_trip_check(
                name, p50, f"median of {len(measured.round_trips)} operators, each waited for"
            ),
            network_checks.round_trip_check(name, p99, "99th percentile of the same", "round trip 99 %"),
            network_checks.bandwidth_check(name, up, "to the device"),
            network_checks.bandwidth_check(name, down, "from the device"),
        ]
        return {
            **result,
            "round_trip_us": {
                "p50": round(p50 * 1e6, 1),
                "p99": round(p99 * 1e6, 1),
                "samples": len(measured.round_trips),
            },
            "to_device_gbit_s": round(up, 3),
            "from_device_gbit_s": round(down, 3),
            "copied_bytes": measured.size,
            "checks": [asdict(check) for check in checks],
        }

    def _on_a_lease(self, server: str, result: dict[str, Any]) -> Any:
        from jupyter_gpupool.lease import attach

        with attach(
            memory_mib=self.args.size + _SPARE_MIB,
            filters={"server": server},
            wait=False,
            url=self.args.url,
            connection="remote",
            label="netperf",
        ) as lease:
            from jupyter_gpupool.pytorch.client import netperf

            (piece,) = lease.slices
            result.update(
                gpu=piece.name, emulated=piece.emulated, port=lease.spec.port, tls=lease.spec.secure
            )
            return netperf.measure(lease.devices[0], self.args.size << 20, self.args.seconds)
