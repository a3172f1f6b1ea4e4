"""``gpupool namespace list``, ``create``, ``set``, ``delete``, ``add`` and ``remove``"""

from __future__ import annotations

import argparse
import re
from typing import Any

from ..api.client import PoolClient
from ..pool.terms import span
from .base import Command
from .options import Parser, UsageError
from .table import table

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_TIME = re.compile(r"([0-9]{1,6})([smhdw])")
#: Option → the limit that it sets.
_LIMITS = {
    "memory": "memory_mib",
    "gpus": "gpus",
    "leases": "leases",
    "user_share": "user_share",
    "longest": "lease_s",
    "idle": "idle_s",
}


def seconds(text: str) -> float:
    """``"90m"`` → 5400.0"""
    known = _TIME.fullmatch(text)
    if known is None or not int(known[1]):
        raise argparse.ArgumentTypeError(
            f"a time is a number with s, m, h, d or w behind it, such as 90m or 2h; not {text!r}"
        )
    return int(known[1]) * _UNITS[known[2]]


def _or_none(kind: Any, what: str) -> Any:
    def read(text: str) -> Any:
        if text == "none":
            return None
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{what}, or none for no limit; not {text!r}") from None

    return read


def _yes_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"yes or no, not {text!r}")
    return text == "yes"


class NamespaceCommand(Command):
    """One call to a pool about its namespaces."""

    def client(self) -> PoolClient:
        return self.pool()[0]

    def add_settings(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="the namespace")
        parser.add_argument("--description", metavar="TEXT", help="whom, or what, it is for")
        limits = parser.add_argument_group("limits (none takes one away)")
        share = _or_none(float, "a number such as 0.5")
        count = _or_none(int, "a whole number")
        time = _or_none(seconds, "a time such as 2h")
        limits.add_argument(
            "--memory", metavar="MiB", type=count, help="GPU memory of all its leases together"
        )
        limits.add_argument("--gpus", metavar="N", type=share, help="whole GPUs that its slices amount to")
        limits.add_argument("--leases", metavar="N", type=count, help="leases at a time")
        limits.add_argument(
            "--user-share", metavar="F", type=share, help="what one user may hold of these, 0 to 1"
        )
        limits.add_argument(
            "--longest", metavar="TIME", type=time, help="how long a lease lasts: 90m, 12h, 2d"
        )
        limits.add_argument("--idle", metavar="TIME", type=time, help="how long a lease may compute nothing")
        parser.add_argument(
            "--weight", metavar="W", type=float, help="its share when requests queue (default: 1)"
        )
        parser.add_argument(
            "--names-holders",
            metavar="yes|no",
            type=_yes_no,
            help="whether members see who of them holds what",
        )

    def settings(self) -> dict[str, Any]:
        """What was given. ``None`` is a limit that is taken away, so what is absent is told by its absence."""
        given = vars(self.args)
        names = ("description", "weight", "names_holders")
        found: dict[str, Any] = {name: given[name] for name in names if name in given}
        limits = {limit: given[option] for option, limit in _LIMITS.items() if option in given}
        return {**found, **({"limits": limits} if limits else {})}

    def parser(self) -> Parser:
        parser = super().parser()
        for action in parser._actions:
            if action.dest in (*_LIMITS, "description", "weight", "names_holders"):
                action.default = argparse.SUPPRESS
        return parser


class ListApp(NamespaceCommand):
    name = "namespace list"
    description = "List the namespaces that you are a member of, their limits and what is held of them."
    lists = True

    def act(self) -> int:
        found = self.client().namespaces()
        if self.args.json:
            self.print_json(found)
            return 0
        head = [
            "NAMESPACE",
            "GPUS",
            "MiB",
            "LEASES",
            "ONE USER",
            "LONGEST",
            "IDLE",
            "WEIGHT",
            "MEMBERS",
            "DESCRIPTION",
        ]
        print(table(head, [_row(namespace) for namespace in found]))
        return 0


class CreateApp(NamespaceCommand):
    name = "namespace create"
    usage = "[options] NAME"
    description = "Make a namespace: a tenant of the pool, with limits on what its leases hold together."
    examples = "  gpupool namespace create cnasg --gpus 4 --user-share 0.5 --longest 12h --idle 30m"

    def add_options(self, parser: Parser) -> None:
        self.add_settings(parser)

    def act(self) -> int:
        self.client().create_namespace(self.args.name, self.settings())
        print(
            f"Made the namespace {self.args.name}; admit somebody: gpupool token create --namespace {self.args.name}"
        )
        return 0


class SetApp(NamespaceCommand):
    name = "namespace set"
    usage = "[options] NAME"
    description = (
        "Change a namespace; what is not named stays. Its administrators may, as far as the pool's has set it.\n"
        "What is held already stays, too."
    )
    examples = "  gpupool namespace set cnasg --gpus 8 --idle none"

    def add_options(self, parser: Parser) -> None:
        self.add_settings(parser)

    def check(self) -> None:
        if not self.settings():
            raise UsageError("what is to change? See gpupool namespace set --help")

    def act(self) -> int:
        self.client().change_namespace(self.args.name, self.settings())
        print(f"Changed the namespace {self.args.name}")
        return 0


class DeleteApp(NamespaceCommand):
    name = "namespace delete"
    usage = "[options] NAME"
    description = "Delete a namespace of which neither leases nor tokens are."

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="the namespace")

    def act(self) -> int:
        self.client().delete_namespace(self.args.name)
        print(f"Deleted the namespace {self.args.name}")
        return 0


class AddApp(NamespaceCommand):
    name = "namespace add"
    usage = "[options] NAME USER"
    description = (
        "Add a member to a namespace, or change what they may do: view (look), use (request slices)\n"
        "or administer (see and release its leases, change members and limits)."
    )
    examples = "  gpupool namespace add cnasg ada\n  gpupool namespace add cnasg bob --role administer"

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="the namespace")
        parser.add_argument("user", metavar="USER", help="as their leases name them")
        parser.add_argument(
            "--role", choices=("view", "use", "administer"), default="use", help="(default: use)"
        )

    def act(self) -> int:
        self.client().set_member(self.args.name, self.args.user, self.args.role)
        print(f"{self.args.user} may {self.args.role} the namespace {self.args.name}")
        return 0


class RemoveApp(NamespaceCommand):
    name = "namespace remove"
    usage = "[options] NAME USER"
    description = "Take a member out of a namespace. What they hold goes on; they can request no more there."

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="the namespace")
        parser.add_argument("user", metavar="USER", help="the member")

    def act(self) -> int:
        self.client().remove_member(self.args.name, self.args.user)
        print(f"{self.args.user} is no member of the namespace {self.args.name} any more")
        return 0


def _row(namespace: dict[str, Any]) -> list[str]:
    limits, held = namespace["limits"], namespace["held"]

    def of(name: str, amount: float) -> str:
        return f"{round(amount, 2):g}" + (f" of {limits[name]:g}" if limits[name] is not None else "")

    def time(name: str) -> str:
        return span(limits[name]) if limits[name] is not None else "-"

    memory = f"{held['memory_mib']}" + (
        f" of {limits['memory_mib']}" if limits["memory_mib"] is not None else ""
    )
    share = f"{limits['user_share']:.0%}" if limits["user_share"] is not None else "-"
    members = ", ".join(
        user + ("" if role == "use" else f" ({role})") for user, role in namespace["members"].items()
    )
    return [
        namespace["name"],
        of("gpus", held["gpus"]),
        memory,
        of("leases", held["leases"]),
        share,
        time("lease_s"),
        time("idle_s"),
        f"{namespace['weight']:g}",
        members or "-",
        namespace["description"],
    ]
