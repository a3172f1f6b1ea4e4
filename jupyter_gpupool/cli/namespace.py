"""``gpupool namespace list``, ``create``, ``set``, ``delete``, ``add`` and ``remove``"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from jupyter_gpupool.core.durations import format_duration

from .command import Command
from .options import Parser, UsageError
from .table import table

if TYPE_CHECKING:
    from jupyter_gpupool.client.http import PoolClient

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
    "reclaim_after": "reclaim_after_s",
}


def seconds(text: str) -> float:
    """Parse a time: ``"90m"`` is 5400.0 seconds. Raises ArgumentTypeError."""
    known = _TIME.fullmatch(text)
    if known is None or not int(known[1]):
        raise argparse.ArgumentTypeError(
            f"a time is a number followed by s, m, h, d or w, such as 90m or 2h; not {text!r}"
        )
    return int(known[1]) * _UNITS[known[2]]


def _or_none(kind: Any, what: str) -> Any:
    def read(text: str) -> Any:
        if text == "none":
            return None
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"give {what}, or none for no limit; not {text!r}") from None

    return read


def _yes_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"give yes or no, not {text!r}")
    return text == "yes"


def _reclaim(text: str) -> str | None:
    if text not in ("never", "idle", "default"):
        raise argparse.ArgumentTypeError(f"give never, idle or default, not {text!r}")
    return None if text == "default" else text


class NamespaceCommand(Command):
    """A command that makes one call about namespaces."""

    def client(self) -> PoolClient:
        return self.pool()[0]

    def add_settings(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="the namespace")
        parser.add_argument("--description", metavar="TEXT", help="what the namespace is for")
        limits = parser.add_argument_group("limits (the value none removes a limit)")
        share = _or_none(float, "a number such as 0.5")
        count = _or_none(int, "a whole number")
        time = _or_none(seconds, "a time such as 2h")
        limits.add_argument(
            "--memory", metavar="MiB", type=count, help="GPU memory of all its leases together, in MiB"
        )
        limits.add_argument(
            "--gpus", metavar="N", type=share, help="whole GPUs that all its slices add up to"
        )
        limits.add_argument("--leases", metavar="N", type=count, help="number of leases at the same time")
        limits.add_argument(
            "--user-share",
            metavar="F",
            type=share,
            help="fraction of these limits that one user may hold, above 0 and at most 1",
        )
        limits.add_argument(
            "--longest", metavar="TIME", type=time, help="longest time of a lease: 90m, 12h, 2d"
        )
        limits.add_argument(
            "--idle", metavar="TIME", type=time, help="how long a lease may be idle before it ends"
        )
        limits.add_argument(
            "--reclaim-after",
            metavar="TIME",
            type=time,
            help="how long an idle lease keeps its GPUs while others wait (none: as the pool has it)",
        )
        parser.add_argument(
            "--weight",
            metavar="W",
            type=float,
            help="its weight, relative to other namespaces, when requests queue (default: 1)",
        )
        parser.add_argument(
            "--names-holders",
            metavar="yes|no",
            type=_yes_no,
            help="whether members see which member holds which GPUs",
        )
        parser.add_argument(
            "--reclaim",
            metavar="never|idle|default",
            type=_reclaim,
            help="whether its leases may be parked while others wait: never, once idle, or as the pool has it",
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings that were given. None removes a limit; a setting that was not given is absent."""
        given = vars(self.args)
        names = ("description", "weight", "names_holders", "reclaim")
        found: dict[str, Any] = {name: given[name] for name in names if name in given}
        limits = {limit: given[option] for option, limit in _LIMITS.items() if option in given}
        return {**found, **({"limits": limits} if limits else {})}

    def parser(self) -> Parser:
        parser = super().parser()
        for action in parser._actions:
            if action.dest in (*_LIMITS, "description", "weight", "names_holders", "reclaim"):
                action.default = argparse.SUPPRESS
        return parser


class ListApp(NamespaceCommand):
    name = "namespace list"
    description = "List the namespaces that you are a member of, with their limits and their usage."
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
            "PER USER",
            "LONGEST",
            "IDLE",
            "RECLAIM",
            "WEIGHT",
            "MEMBERS",
            "DESCRIPTION",
        ]
        print(table(head, [_row(namespace) for namespace in found]))
        return 0


class CreateApp(NamespaceCommand):
    name = "namespace create"
    usage = "[options] NAME"
    description = (
        "Create a namespace: a tenant of the pool, with limits on what all its leases hold together."
    )
    examples = "  gpupool namespace create cnasg --gpus 4 --user-share 0.5 --longest 12h --idle 30m"

    def add_options(self, parser: Parser) -> None:
        self.add_settings(parser)

    def act(self) -> int:
        self.client().create_namespace(self.args.name, self.settings())
        print(
            f"Created the namespace {self.args.name}. To create a token for it: gpupool token create "
            f"--namespace {self.args.name} --description TEXT"
        )
        return 0


class SetApp(NamespaceCommand):
    name = "namespace set"
    usage = "[options] NAME"
    description = (
        "Change a namespace. Settings that are not given stay, and so do leases that are held already. The\n"
        "namespace's administrators can do this too, up to the limits that the pool's administrator has set."
    )
    examples = "  gpupool namespace set cnasg --gpus 8 --idle none"

    def add_options(self, parser: Parser) -> None:
        self.add_settings(parser)

    def check(self) -> None:
        if not self.settings():
            raise UsageError("nothing to change: give at least one setting; see gpupool namespace set --help")

    def act(self) -> int:
        self.client().change_namespace(self.args.name, self.settings())
        print(f"Changed the namespace {self.args.name}")
        return 0


class DeleteApp(NamespaceCommand):
    name = "namespace delete"
    usage = "[options] NAME"
    description = "Delete a namespace that has no leases and no tokens."

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
        "Add a member to a namespace, or change a member's role: view (read only), use (request GPUs) or administer\n"
        "(see and release all its leases, change its members and limits)."
    )
    examples = "  gpupool namespace add cnasg ada\n  gpupool namespace add cnasg bob --role administer"

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="the namespace")
        parser.add_argument(
            "user", metavar="USER", help="the user's name, as gpupool leases lists it under OWNER"
        )
        parser.add_argument(
            "--role", choices=("view", "use", "administer"), default="use", help="(default: use)"
        )

    def act(self) -> int:
        self.client().set_member(self.args.name, self.args.user, self.args.role)
        print(f"{self.args.user} has the role {self.args.role} in the namespace {self.args.name}")
        return 0


class RemoveApp(NamespaceCommand):
    name = "namespace remove"
    usage = "[options] NAME USER"
    description = (
        "Remove a member from a namespace. Their leases continue, but they cannot request more GPUs there."
    )

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="the namespace")
        parser.add_argument("user", metavar="USER", help="the member")

    def act(self) -> int:
        self.client().remove_member(self.args.name, self.args.user)
        print(f"Removed {self.args.user} from the namespace {self.args.name}")
        return 0


def _reclaimed(namespace: dict[str, Any]) -> str:
    """Whether its leases may be parked, and after which time: ``idle, 5m``; empty values are the pool's."""
    after_s = namespace["limits"].get("reclaim_after_s")
    parts = [namespace.get("reclaim") or "", format_duration(after_s) if after_s is not None else ""]
    return ", ".join(part for part in parts if part) or "-"


def _row(namespace: dict[str, Any]) -> list[str]:
    limits, held = namespace["limits"], namespace["held"]

    def of(name: str, amount: float) -> str:
        return f"{round(amount, 2):g}" + (f" of {limits[name]:g}" if limits[name] is not None else "")

    def time(name: str) -> str:
        return format_duration(limits[name]) if limits[name] is not None else "-"

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
        _reclaimed(namespace),
        f"{namespace['weight']:g}",
        members or "-",
        namespace["description"],
    ]
