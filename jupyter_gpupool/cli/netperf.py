"""``gpupool netperf``"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from ..devices.checks import Check
from ..devices.diagnosis import BANDWIDTH_GBIT, ROUND_TRIP_US
from ..pool.errors import PoolError
from . import reach
from .base import Command
from .health import picture
from .obtain import interruptions
from .options import Parser, UsageError, mebibytes

#: Memory of the lease beyond what is copied, in MiB.
_MORE_MIB = 64


def duration(text: str) -> float:
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
        "Measure the way from here to each GPU server as programs use it: a small lease is taken there, an operator\n"
        "is waited for again and again, and tensors are copied both ways, over TLS where the pool has it. It is held\n"
        f"against what is recommended: {ROUND_TRIP_US:g} µs and {BANDWIDTH_GBIT:g} Gbit/s. The exit code is 1 when a\n"
        "server could not be measured."
    )
    examples = "  gpupool netperf\n  gpupool netperf --server gpu7 --size 256 --json"
    lists = True

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("--server", metavar="NAME", help="only this GPU server (default: all)")
        parser.add_argument(
            "--size", metavar="MiB", type=mebibytes, default=64, help="of each copy (default: %(default)s)"
        )
        parser.add_argument(
            "--seconds",
            metavar="S",
            type=duration,
            default=1.0,
            help="for each of the three measurements (default: %(default)g)",
        )

    def act(self) -> int:
        client, pool = self.pool()
        with client:
            servers = [s for s in pool["servers"] if self.args.server in (None, s["name"])]
            if not servers:
                names = ", ".join(server["name"] for server in pool["servers"]) or "none"
                raise UsageError(f"the pool has no server {self.args.server!r}; there are: {names}")
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
                print(f"From here to the GPU pool at {client.url}{', over TLS' if client.secure else ''}\n")
                print(picture([Check(**check) for result in results for check in result["checks"]]))
        return 1 if any(result["error"] for result in results) else 0

    def _measure(self, server: dict[str, Any], port: int) -> dict[str, Any]:
        name = server["name"]
        told: dict[str, Any] = {"server": name, "host": server["host"], "error": ""}
        connect = reach.connect(server["host"], port)
        told["connect_us"] = None if connect is None else round(connect * 1e6, 1)
        try:
            measured = self._on_a_lease(name, told)
        except (PoolError, RuntimeError) as e:
            told["error"] = str(e)
            failed = Check("netperf", "unknown", f"could not be measured: {e}", server=name)
            return {**told, "checks": [asdict(failed)]}
        p50, p99 = (measured.round_trip(share) for share in (0.5, 0.99))
        up, down = (rate * 8 / 1e9 for rate in (measured.to_device, measured.from_device))
        checks = [
            reach.round_trip_check(
                name, p50, f"half of {len(measured.round_trips)} operators that are waited for"
            ),
            reach.round_trip_check(name, p99, "99 % of them", "round trip 99 %"),
            reach.bandwidth_check(name, up, "to the device"),
            reach.bandwidth_check(name, down, "from the device"),
        ]
        return {
            **told,
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

    def _on_a_lease(self, server: str, told: dict[str, Any]) -> Any:
        from .. import face

        with face.attach(
            memory_mib=self.args.size + _MORE_MIB,
            filters={"server": server},
            wait=False,
            url=self.args.url,
            mode="remote",
            label="netperf",
        ) as lease:
            from ..remote import netperf

            (piece,) = lease.slices
            told.update(gpu=piece.name, emulated=piece.emulated, port=lease.spec.port, tls=lease.spec.secure)
            return netperf.measure(lease.devices[0], self.args.size << 20, self.args.seconds)
