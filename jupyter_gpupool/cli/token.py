"""``gpupool token create``, ``list``, ``extend`` and ``revoke``"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_gpupool.client import bundle
from jupyter_gpupool.core.durations import format_time
from jupyter_gpupool.core.errors import PoolError, UnknownToken
from jupyter_gpupool.core.models import Scope

from .command import Command
from .options import Parser, UsageError, lifetime
from .table import table

if TYPE_CHECKING:
    from jupyter_gpupool.client.http import PoolClient


def add_lifetime(parser: Parser) -> None:
    """Add the option for a token's lifetime."""
    parser.add_argument(
        "--expires",
        metavar="LIFETIME",
        type=lifetime,
        default=lifetime("365d"),
        help="lifetime of the token, counted from now: 90m, 12h, 365d, 4w, 2y or never (default: 365d)",
    )


class TokenCommand(Command):
    """A command that makes one call to a secured server, as its administrator."""

    def client(self) -> PoolClient:
        """Return a client of the server. Raises UsageError where the user names none."""
        if not self.names_pool():
            raise UsageError(
                "which server? Set GPUPOOL_CONFIG_DIR to the administrator's bundle: <the server's directory>/admin"
            )
        return self.pool()[0]

    def find(self, client: PoolClient, text: str) -> str:
        """Return the id of the token whose id begins with ``text``. Raises UnknownToken for none or several."""
        found = [str(token["id"]) for token in client.tokens() if token["id"].startswith(text.lower())]
        if len(found) != 1:
            what = f"the ids of {len(found)} tokens begin" if found else "no token's id begins"
            raise UnknownToken(f"{what} with {text!r}; see gpupool token list")
        return found[0]


class CreateApp(TokenCommand):
    name = "token create"
    description = (
        "Create a token for a user of a secured server. Writes the user's bundle, a tar archive of ca.crt,\n"
        "client.yaml and servers.conf, which the user unpacks into ~/.gpupool or /etc/gpupool. Only the bundle\n"
        "contains the token; the server keeps a hash."
    )
    examples = (
        "  gpupool token create --description 'cnasg cluster' --namespace cnasg --expires 365d\n"
        "  gpupool token create --description prometheus --administrator --scope read\n"
        "  gpupool token create --description ada --output - | ssh ada@client 'mkdir -p .gpupool; tar -xC .gpupool'"
    )
    lists = True

    def add_options(self, parser: Parser) -> None:
        parser.add_argument(
            "--description", metavar="TEXT", required=True, help="who or what the token is for"
        )
        parser.add_argument(
            "--namespace",
            metavar="NAME",
            default="default",
            help="namespace whose limits its leases count against (default: default)",
        )
        parser.add_argument(
            "--user",
            metavar="NAME",
            default="",
            help="user that it belongs to; all tokens of a user see and release the same leases (default: a new user)",
        )
        parser.add_argument(
            "--administrator",
            action="store_true",
            help="allow everything: see and change all leases, tokens and namespaces",
        )
        parser.add_argument(
            "--scope",
            choices=[scope.value for scope in Scope],
            default=Scope.ADMINISTER.value,
            help="the most that it may do of what its user may: read; lease, also request and release GPUs; "
            "administer, also change namespaces, and servers and tokens with --administrator (default: administer)",
        )
        parser.add_argument(
            "--one-namespace", action="store_true", help="change nothing outside of its namespace"
        )
        add_lifetime(parser)
        parser.add_argument(
            "--output",
            metavar="FILE",
            help="file for the bundle, - for stdout (default: gpupool-<token>.tar in this directory)",
        )

    def check(self) -> None:
        if self.args.json and self.args.output == "-":
            raise UsageError(
                "cannot write both the archive and JSON to stdout; use --output FILE, or leave out --json"
            )
        if self.args.output == "-" and sys.stdout.isatty():
            raise UsageError("refusing to write a tar archive to a terminal; use --output FILE, or pipe it")

    def act(self) -> int:
        args = self.args
        created = self.client().create_token(
            args.description,
            args.expires,
            namespace=args.namespace,
            owner=args.user,
            administers=args.administrator,
            # Servers of the version before have neither of these.
            **({} if args.scope == Scope.ADMINISTER.value else {"scope": args.scope}),
            **({"one_namespace": True} if args.one_namespace else {}),
        )
        # Only these three: the server must not add files to an archive that a user unpacks.
        archive = bundle.tar(
            {name: created["files"][name] for name in (bundle.CA, bundle.CLIENT, bundle.SERVERS)}
        )
        if args.output == "-":
            sys.stdout.buffer.write(archive)
            sys.stdout.buffer.flush()
            return 0
        path = Path(args.output or f"gpupool-{created['id']}.tar")
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                f.write(archive)
        except OSError as e:
            self.pool()[0].revoke_token(created["id"])
            raise PoolError(f"cannot write {path}: {e.strerror}. The new token has been revoked") from None
        if args.json:
            self.print_json(
                {**{k: v for k, v in created.items() if k not in ("token", "files")}, "bundle": str(path)}
            )
            return 0
        print(
            f"Created token {created['id']} of {created['owner']}, namespace {created['namespace']}, {_until(created)}"
        )
        print(
            f"Wrote {path}. On the user's machine: mkdir -p ~/.gpupool && tar -xf {path.name} -C ~/.gpupool"
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
        head = ["TOKEN", "STATE", "EXPIRES", "LAST USED", "SCOPE", "USER", "NAMESPACE", "DESCRIPTION"]
        print(table(head, [_row(token) for token in tokens]))
        return 0


class ExtendApp(TokenCommand):
    name = "token extend"
    usage = "[options] TOKEN"
    description = "Extend the validity of a token, also of one that has expired. Clients keep their bundles."
    examples = "  gpupool token extend 3f2a --expires 90d"

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("token", metavar="TOKEN", help="the token's id, or its first characters")
        add_lifetime(parser)

    def act(self) -> int:
        client = self.client()
        token = client.extend_token(self.find(client, self.args.token), self.args.expires)
        print(f"Token {token['id']} is valid {_until(token)}")
        return 0


class RevokeApp(TokenCommand):
    name = "token revoke"
    usage = "[options] TOKEN"
    description = "Revoke a token, at once and permanently. Its leases continue unless --end-leases is given."
    examples = "  gpupool token revoke --end-leases 3f2a"

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("token", metavar="TOKEN", help="the token's id, or its first characters")
        parser.add_argument("--end-leases", action="store_true", help="also end its leases now")

    def act(self) -> int:
        client = self.client()
        token_id = self.find(client, self.args.token)
        client.revoke_token(token_id, self.args.end_leases)
        print(f"Revoked token {token_id}" + (" and ended its leases" if self.args.end_leases else ""))
        return 0


def _until(token: dict[str, Any]) -> str:
    return f"until {format_time(token['expires_at'])}" if token["expires_at"] is not None else "without end"


def _row(token: dict[str, Any]) -> list[str]:
    used = format_time(token["last_used_at"]) if token["last_used_at"] is not None else "-"
    expires = format_time(token["expires_at"]) if token["expires_at"] is not None else "never"
    owner = token["owner"] + (" (administrator)" if token["administers"] else "")
    scope = token.get("scope", Scope.ADMINISTER.value)
    namespace = token["namespace"] + (" (only)" if token.get("one_namespace") else "")
    return [token["id"], token["state"], expires, used, scope, owner, namespace, token["description"]]
