"""A certificate authority, and a server's certificate for this machine's loopback."""

from __future__ import annotations

from pathlib import Path

from jupyter_gpupool.server.daemon import certificates as authority


class Certificates:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = authority.new_authority("tests")
        self.ca = self.authority.certificate.decode()
        self.certfile, self.keyfile = folder / "server.crt", folder / "server.key"
        self.renew()

    def renew(self, *addresses: str) -> bytes:
        """Another certificate of the same CA, in the same files."""
        pair = authority.new_server(self.authority, addresses or ["localhost", "127.0.0.1", "::1"])
        self.certfile.write_bytes(pair.certificate)
        self.keyfile.write_bytes(pair.key)
        return pair.certificate
