"""Two hosts that a test makes: network namespaces with a cable between them, and a firewall before the server."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

_FIREWALL = """
table inet gpupool {{
  chain input {{
    type filter hook input priority 0; policy drop;
    iif lo accept
    tcp dport {{ {ports} }} accept
    meta l4proto tcp reject with tcp reset
  }}
}}
"""


@dataclass(frozen=True)
class Host:
    """A network namespace. Its file system is everybody's."""

    name: str
    address: str

    def command(self, *words: object) -> list[str]:
        return ["ip", "netns", "exec", self.name, *map(str, words)]

    def processes(self) -> list[int]:
        """What runs in it."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.name).split()]

    def admits_only(self, *ports: int) -> None:
        _run(*self.command("nft", "-f", "-"), text=_FIREWALL.format(ports=", ".join(map(str, ports))))


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """They reach each other and nobody else; they are gone afterwards. Skips where they cannot be had."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces are root's to make")
    for program in ("ip", "nft"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no `{program}` (Debian: iproute2, nftables)")
    me = os.getpid()
    hosts = Host(f"gpupool-{me}-a", "10.87.0.1"), Host(f"gpupool-{me}-b", "10.87.0.2")
    made = []
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.name)
            made.append(host)
        first, second = (host.name for host in hosts)
        _run(
            *("ip", "link", "add", "wire", "netns", first),
            *("type", "veth", "peer", "name", "wire", "netns", second),
        )
        for host in hosts:
            _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", "wire")
            for link in ("lo", "wire"):
                _run("ip", "-n", host.name, "link", "set", link, "up")
        yield hosts
    finally:
        for host in made:
            _run("ip", "netns", "delete", host.name)


def _run(*words: str, text: str = "") -> str:
    done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout
