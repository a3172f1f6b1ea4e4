"""``gpupool token create``, ``list``, ``extend`` and ``revoke``"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from ..api import bundle
from ..api.client import PoolClient
from ..pool.errors import PoolError, UnknownToken
from ..pool.tokens import date
from .base import Command
from .options import Parser, UsageError
from .table import table

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0, "y": 365 * 86400.0}
_LIFE = re.compile(r"([0-9]{1,6})([mhdwy])")


def life(text: str) -> float | None:
    """``"365d"`` → seconds; ``"never"`` → None."""
    if text == "never":
        return None
    known = _LIFE.fullmatch(text)
    if known is None or not int(known[1]):
        raise argparse.ArgumentTypeError(
            f"a token's life is a number with m, h, d, w or y behind it, such as 365d, or never; not {text!r}"
        )
    return int(known[1]) * _UNITS[known[2]]


def add_life(parser: Parser) -> None:
    parser.add_argument(
        "--expires",
        metavar="LIFE",
        type=life,
        default=life("365d"),
        help="how long it is valid from now on: 90m, 12h, 365d (the default), 4w, 2y or never",
    )


class TokenCommand(Command):
    """One call to a secured server, as its administrator."""

    def client(self) -> PoolClient:
        if not self.names_pool():
            raise UsageError(
                "which server? Name the administrator's bundle: GPUPOOL_CONFIG_DIR=<the server's directory>/admin"
            )
        return self.pool()[0]

    def find(self, client: PoolClient, text: str) -> str:
        """The id of the token that is called so, or whose id begins so."""
        found = [token["id"] for token in client.tokens() if token["id"].startswith(text.lower())]
        if len(found) != 1:
            what = f"{len(found)} tokens begin" if found else "no token begins"
            raise UnknownToken(f"{what} with {text!r}; see gpupool token list")
        return found[0]


class CreateApp(TokenCommand):
    name = "token create"
    description = (
        "Admit somebody to a secured server. Writes their bundle, a tar of ca.crt, client.yaml and servers.conf,\n"
        "which they unpack into ~/.gpupool or /etc/gpupool. The token is nowhere else: the server keeps a hash."
    )
    examples = (
        "  gpupool token create --description 'cnasg cluster' --namespace cnasg --expires 365d\n"
        "  gpupool token create --description ada --output - | ssh ada@client 'mkdir -p .gpupool; tar -xC .gpupool'"
    )
    lists = True

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("--description", metavar="TEXT", required=True, help="whom, or what, it is for")
        parser.add_argument(
            "--namespace", metavar="NAME", default="default", help="whose share its leases count against"
        )
        parser.add_argument(
            "--user",
            metavar="NAME",
            default="",
            help="whose leases it sees and releases; tokens of one user share them (default: its own alone)",
        )
        parser.add_argument("--administrator", action="store_true", help="it sees and does everything")
        add_life(parser)
        parser.add_argument(
            "--output",
            metavar="FILE",
            help="where the tar goes, - for stdout (default: gpupool-<token>.tar here)",
        )

    def check(self) -> None:
        if self.args.json and self.args.output == "-":
            raise UsageError("stdout is for the tar or for JSON, not for both")
        if self.args.output == "-" and sys.stdout.isatty():
            raise UsageError("a tar is nothing for a terminal; give a file, or pipe it on")

    def act(self) -> int:
        args = self.args
        made = self.client().create_token(
            args.description,
            args.expires,
            namespace=args.namespace,
            owner=args.user,
            administers=args.administrator,
        )
        # Whoever unpacks it is to get these three, whatever the server says.
        archive = bundle.tar(
            {name: made["files"][name] for name in (bundle.CA, bundle.CLIENT, bundle.SERVERS)}
        )
        if args.output == "-":
            sys.stdout.buffer.write(archive)
            sys.stdout.buffer.flush()
            return 0
        path = Path(args.output or f"gpupool-{made['id']}.tar")
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                f.write(archive)
        except OSError as e:
            self.pool()[0].revoke_token(made["id"])
            raise PoolError(f"{path} cannot be written ({e.strerror}); the token was revoked again") from None
        if args.json:
            self.print_json(
                {**{k: v for k, v in made.items() if k not in ("token", "files")}, "bundle": str(path)}
            )
            return 0
        print(f"Token {made['id']} of {made['owner']}, namespace {made['namespace']}, {_until(made)}")
        print(
            f"Wrote {path}; unpack it where its user is: mkdir -p ~/.gpupool && tar -xf {path.name} -C ~/.gpupool"
        )
        return 0


class ListApp(TokenCommand):
    name = "token list"
    description = "List the tokens of a secured server."
    lists = True

    def act(self) -> int:
        tokens = self.client().tokens()
        if self.args.json:
            self.print_json(tokens)
            return 0
        head = ["TOKEN", "STATE", "EXPIRES", "LAST USED", "USER", "NAMESPACE", "DESCRIPTION"]
        print(table(head, [_row(token) for token in tokens]))
        return 0


class ExtendApp(TokenCommand):
    name = "token extend"
    usage = "[options] TOKEN"
    description = (
        "Have a token, expired ones too, be valid for so long from now on. Clients keep what they have."
    )
    examples = "  gpupool token extend 3f2a --expires 90d"

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("token", metavar="TOKEN", help="its id, or how it begins")
        add_life(parser)

    def act(self) -> int:
        client = self.client()
        token = client.extend_token(self.find(client, self.args.token), self.args.expires)
        print(f"Token {token['id']} is valid {_until(token)}")
        return 0


class RevokeApp(TokenCommand):
    name = "token revoke"
    usage = "[options] TOKEN"
    description = (
        "Admit a token no more, at once and for good. What it has leased goes on unless that is to end too."
    )
    examples = "  gpupool token revoke --end-leases 3f2a"

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("token", metavar="TOKEN", help="its id, or how it begins")
        parser.add_argument("--end-leases", action="store_true", help="end its leases now")

    def act(self) -> int:
        client = self.client()
        token_id = self.find(client, self.args.token)
        client.revoke_token(token_id, self.args.end_leases)
        print(f"Token {token_id} is revoked" + (", its leases have ended" if self.args.end_leases else ""))
        return 0


def _until(token: dict[str, Any]) -> str:
    return f"until {date(token['expires_at'])}" if token["expires_at"] is not None else "for good"


def _row(token: dict[str, Any]) -> list[str]:
    used = date(token["last_used_at"]) if token["last_used_at"] is not None else "-"
    expires = date(token["expires_at"]) if token["expires_at"] is not None else "never"
    owner = token["owner"] + (" (administrator)" if token["administers"] else "")
    return [token["id"], token["state"], expires, used, owner, token["namespace"], token["description"]]
