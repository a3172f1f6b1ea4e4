"""Runs tests/support/oidc_provider.mjs, a real OpenID provider, beside a test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("oidc_provider.mjs")
SECRET = "a secret that only this test has, with enough characters"


def new_key(kid: str) -> RSAKey:
    return RSAKey.generate_key(2048, {"kid": kid, "use": "sig", "alg": "RS256"})


def node() -> str:
    """A Node that is new enough: the one of the environment, or this machine's. Skips the test without one."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    found = shutil.which("node", path=path)
    if found is None:
        pytest.skip("an OpenID provider needs Node, which `make test` installs")
    if not (ROOT / "node_modules/oidc-provider").exists():
        pytest.skip("oidc-provider is not in node_modules, where `make test` installs it")
    return found


@dataclass
class OpenIDProvider:
    """Its issuer is https://localhost:PORT; its clients are the names in ``clients``, and ``gpupool`` for people.

    ``console``: where the client ``console`` has its users sent back to, if there is one.
    """

    folder: Path
    port: int
    certificate: Path
    private_key: Path
    ca: Path
    groups: dict[str, list[str]] = field(default_factory=dict)
    clients: Sequence[str] = ("ci", "stranger")
    console: str = ""
    ttl_s: int = 3600
    key: RSAKey = field(default_factory=lambda: new_key("first"))
    process: subprocess.Popen[str] | None = None

    @property
    def issuer(self) -> str:
        return f"https://localhost:{self.port}"

    def start(self) -> None:
        """Returns when it answers."""
        programs = [
            {
                "client_id": name,
                "client_secret": SECRET,
                "grant_types": ["client_credentials"],
                "redirect_uris": [],
                "response_types": [],
            }
            for name in self.clients
        ]
        people = {
            "client_id": "gpupool",
            "application_type": "native",
            "token_endpoint_auth_method": "none",
            "grant_types": [
                "authorization_code",
                "refresh_token",
                "urn:ietf:params:oauth:grant-type:device_code",
            ],
            "redirect_uris": ["http://127.0.0.1/callback"],
            "response_types": ["code"],
        }
        console = {
            "client_id": "console",
            "client_secret": SECRET,
            "token_endpoint_auth_method": "client_secret_post",
            "grant_types": ["authorization_code", "refresh_token"],
            "redirect_uris": [self.console],
            "response_types": ["code"],
        }
        settings = {
            "issuer": self.issuer,
            "port": self.port,
            "certificate": str(self.certificate),
            "key": str(self.private_key),
            "clients": [*programs, people, *([console] if self.console else [])],
            "groups": self.groups,
            "ttl_s": self.ttl_s,
            "jwks": KeySet([self.key]).as_dict(private=True),
        }
        file = self.folder / "provider.json"
        file.write_text(json.dumps(settings))
        self.process = subprocess.Popen(
            [node(), str(PROGRAM), str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "provider.log").open("a"),
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "listening\n", (self.folder / "provider.log").read_text()

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # Node from a wheel is a child of a program in Python
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    @property
    def trusted(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca))

    def http(self) -> httpx.Client:
        return httpx.Client(verify=self.trusted, trust_env=False, base_url=self.issuer, timeout=300)

    def rotate(self, kid: str) -> None:
        """From now on it signs with another key, and publishes only that one."""
        self.key = new_key(kid)
        with self.http() as http:
            http.post("/keys", json=KeySet([self.key]).as_dict(private=True)).raise_for_status()

    def token(self, client: str = "ci", resource: str = "urn:pool") -> str:
        """A token that it issues to one of its clients."""
        form = {"grant_type": "client_credentials", "resource": resource}
        with self.http() as http:
            answer = http.post("/token", data=form, auth=(client, SECRET))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    def signed(self, claims: Mapping[str, Any], **header: Any) -> str:
        """A token with any claims, signed with its key."""
        return jwt.encode({"alg": "RS256", "kid": self.key.kid, **header}, dict(claims), self.key)


class _Forms(HTMLParser):
    """The first form of a page: where it leads, and its hidden fields."""

    def __init__(self) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        known = dict(attributes)
        if tag == "form" and self.action is None:
            self.action = known.get("action", "")
        elif tag == "input" and known.get("name"):
            self.fields[known["name"]] = known.get("value") or ""


def log_in(url: str, user: str, trusted: ssl.SSLContext, until: str = "") -> str:
    """Do in pages what a person does: log in as ``user`` and confirm. Returns the text of the last page.

    With ``until``, the beginning of an address, it returns the address that it is sent to there.
    """
    with httpx.Client(verify=trusted, trust_env=False, follow_redirects=not until, timeout=300) as http:
        page = http.get(url)
        for _ in range(10):
            while page.has_redirect_location:
                where = str(page.url.join(page.headers["Location"]))
                if where.startswith(until):
                    return where
                page = http.get(where)
            page.raise_for_status()
            forms = _Forms()
            forms.feed(page.text)
            if forms.action is None:
                return page.text
            fields = {name: user if name == "user" else value for name, value in forms.fields.items()}
            page = http.post(page.url.join(forms.action), data=fields)
    raise AssertionError(f"it asks again and again: {page.text}")


if __name__ == "__main__":  # as the BROWSER of a command
    log_in(sys.argv[-1], sys.argv[1], ssl.create_default_context(cafile=sys.argv[2]))
