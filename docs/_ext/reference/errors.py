"""Every refusal of a pool, from its class; what to do about it stands here."""

from __future__ import annotations

from http import HTTPStatus

from jupyter_gpupool.core import errors
from jupyter_gpupool.core.errors import PoolError

from .text import prose, table

#: What to do, by the name of the class. `tests/docs/test_reference.py` fails where one is missing or left over.
REMEDIES = {
    "InvalidRequest": "Correct the request; the message names the field and its bounds.",
    "ImpossibleRequest": "Request fewer GPUs, less memory or other filters, or allow several servers with `spread`. "
    "If a limit of the namespace is named, ask its administrator to raise it.",
    "NoCapacity": "Let the request wait (leave out `--no-wait`), or request less. "
    "For a resize: choose a smaller size, or wait until other leases on that GPU end.",
    "SliceInUse": "Free tensors first (`del`, then `torch.cuda.empty_cache()`), or choose a larger size.",
    "UnknownLease": "List your leases with `gpupool leases --all`. "
    "A lease of another owner is reported as unknown, too.",
    "LeaseEnded": "Request GPUs again. The message contains the reason for the end.",
    "RequestConflict": "Choose a new id (a uuid) for every new request.",
    "LedgerUnavailable": "Repeat the call: nothing was changed. "
    "As an administrator, check the disk or the database with `gpupool health`.",
    "EngineError": "Read the reason in the message, then check `gpupool health` and the GPU server's log.",
    "PoolUnreachable": "Check the address (`GPUPOOL_URL`, `servers.conf`), the network and that the pool runs.",
    "Unauthenticated": "Use a valid token. Ask the pool's administrator to extend yours or to issue a new one.",
    "IssuerUnavailable": "Try again in a minute. Tokens whose keys the pool knows are accepted meanwhile. "
    "As an administrator, check the way from the pool's server to the issuer.",
    "PermissionDenied": "Use a token with that right, or ask an administrator. The message names the right.",
    "TooManyRequests": "Wait as long as `Retry-After` says; call less often, or have the limits raised.",
    "TooManyAttempts": "Wait a minute, and correct the token before the next attempt.",
    "UnknownServer": "List the servers with `gpupool gpus`.",
    "UnknownToken": "List the tokens with `gpupool token list`.",
    "NotSupported": "Use another kind of pool: tokens and servers, for example, need a secured server.",
    "NotLeading": "Ask the server that the message names. A client with several addresses does so by itself.",
    "UnknownNamespace": "List the namespaces with `gpupool namespace list`, or ask to become a member.",
    "NamespaceConflict": "Choose another name, or end the leases and tokens that the namespace still has.",
}


def catalogue() -> list[type[PoolError]]:
    """The classes of refusals, in the order in which they are defined."""
    found = (
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, PoolError)
    )
    return [cls for cls in dict.fromkeys(found) if cls is not PoolError]


def markdown() -> str:
    parts = []
    rows = [(f"[`{cls.__name__}`](#{cls.__name__.lower()})", _status(cls)) for cls in catalogue()]
    parts.append(table(["error", "HTTP status"], rows))
    for cls in catalogue():
        parts.append(
            f"## {cls.__name__}\n\n"
            f"**Status:** {_status(cls)}\n\n"
            f"**Cause:** {prose(cls.__doc__)}\n\n"
            f"**Remedy:** {REMEDIES.get(cls.__name__, 'The message names it.')}"
        )
    return "\n\n".join(parts)


def _status(cls: type[PoolError]) -> str:
    return f"{cls.status} {HTTPStatus(cls.status).phrase}"
