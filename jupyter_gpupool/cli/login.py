"""``gpupool login``, ``logout`` and ``whoami``"""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from pathlib import Path

from jupyter_gpupool.client import bundle
from jupyter_gpupool.core.errors import IssuerUnavailable, PoolError

from .command import Command
from .options import Parser, UsageError

#: Environment variable: whether logins are kept in the system's keyring, where the command does not say.
KEYRING = "GPUPOOL_KEYRING"


class LoginApp(Command):
    name = "login"
    usage = "[options] [ADDRESS]"
    description = (
        "Log in at a secured server with your organisation's identity. Opens a browser where there is one; otherwise\n"
        "it prints an address and a code, which any device can open. The login is kept in ~/.gpupool/login.json,\n"
        "which only you can read, and is refreshed while you use the pool. With --keyring, or GPUPOOL_KEYRING=1 in\n"
        "the environment, its tokens are kept in the system's keyring instead."
    )
    examples = "  gpupool login gpus.example:56001 --ca ca.crt\n  gpupool login --device"
    asks_pool = False

    def add_options(self, parser: Parser) -> None:
        parser.add_argument(
            "address",
            metavar="ADDRESS",
            nargs="?",
            help="the server (default: those of the installed bundle)",
        )
        parser.add_argument(
            "--ca", metavar="FILE", help="certificate of the authority to trust for that server"
        )
        parser.add_argument(
            "--issuer", metavar="URL", default="", help="the identity provider, if there are several"
        )
        parser.add_argument(
            "--keyring",
            action=argparse.BooleanOptionalAction,
            default=os.environ.get(KEYRING, "") not in ("", "0"),
            help="keep the tokens in the system's keyring (needs jupyter_gpupool[keyring])",
        )
        parser.add_argument("--device", action="store_true", help="use no browser of this machine")

    def act(self) -> int:
        from jupyter_gpupool.client.http import PoolClient
        from jupyter_gpupool.client.sign_in import sign_in

        servers, ca = self._servers()
        first, *others = servers
        with PoolClient(first, ca=ca, also=others) as client:
            offered = client.login_offer()
        by_browser = not self.args.device and _has_browser()
        sign_in(
            offered,
            servers,
            ca,
            bundle.login_path(),
            show=lambda url, code: self.tell.info(f"Open {url} and confirm the code {code}"),
            open_page=self._open if by_browser else None,
            issuer=self.args.issuer,
            keyring=self.args.keyring,
        )
        with PoolClient(first, ca=ca, also=others, login=str(bundle.login_path())) as client:
            who = client.whoami()
        print(f"Logged in as {who['owner']}" + (", an administrator" if who["administers"] else ""))
        return 0

    def _servers(self) -> tuple[tuple[str, ...], str]:
        if self.args.address is None:
            installed = bundle.find()
            if installed is None:
                raise UsageError(
                    "which server? Name it, such as gpupool login gpus.example:56001 --ca ca.crt"
                )
            return installed.urls, installed.ca
        address = self.args.address.removeprefix("https://").rstrip("/")
        if "/" in address or not address:
            raise UsageError(f"{self.args.address!r} is no address of a server; write gpus.example:56001")
        try:
            ca = Path(self.args.ca).read_text() if self.args.ca else ""
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"cannot read {self.args.ca}: {getattr(e, 'strerror', None) or e}") from None
        return (f"https://{bundle.with_port(address)}",), ca

    def _open(self, url: str) -> None:
        self.tell.info(f"Log in in the browser. If it does not open: {url}")
        webbrowser.open(url)


class LogoutApp(Command):
    name = "logout"
    description = "Log out: delete the login, and have the identity provider forget it. Your leases continue."
    asks_pool = False

    def act(self) -> int:
        from jupyter_gpupool.client.sign_in import sign_out

        try:
            login = sign_out(bundle.login_path())
        except IssuerUnavailable as e:
            raise PoolError(f"logged out here, but not at the identity provider: {e}") from None
        print("Logged out" if login is not None else "You are not logged in")
        return 0


class WhoAmIApp(Command):
    name = "whoami"
    description = "Show who you are for the pool, and your roles in its namespaces."
    lists = True

    def act(self) -> int:
        client, _ = self.pool()
        with client:
            who = client.whoami()
        if self.args.json:
            self.print_json(who)
            return 0
        print(who["owner"] + (" (administrator)" if who["administers"] else ""))
        for namespace, role in who["namespaces"].items():
            print(f"  {namespace}: {role}")
        return 0


def _has_browser() -> bool:
    """Return whether a page that is opened here is one that the user sees."""
    # Only on Linux do variables tell whether there is a screen.
    screen = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if os.environ.get("SSH_CONNECTION") or not screen:
        return bool(os.environ.get("BROWSER"))
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True
