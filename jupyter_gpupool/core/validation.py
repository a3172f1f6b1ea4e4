"""Check requests by themselves, independent of the pool's state."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from dataclasses import replace

from .errors import InvalidRequest, RequestConflict
from .models import Lease, Request
from .request_schema import FIELDS

FILTERS = ("name", "server", "uuid", "index", "emulated")
MAX_TEXT = 200
_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NAMESPACE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_SHA256 = re.compile(FIELDS["secret_sha256"].pattern)
_YES_NO = ("true", "false")


def validate(request: Request) -> None:
    """Raise :class:`InvalidRequest` with one line for the first error.

    Types are checked too, because a request may come straight from a client's JSON.
    """
    _check_id(request.id)
    check_text("owner", request.owner)
    if not request.owner:
        raise InvalidRequest("the request has no owner")
    _check_size(request)
    _check_filters(request.filters)
    for name in ("spread", "never_park"):
        if not isinstance(getattr(request, name), bool):
            raise InvalidRequest(f"{name} must be true or false, not {_shown(getattr(request, name))}")
    check_namespace(request.namespace)
    if not isinstance(request.wait, bool):
        raise InvalidRequest(f"wait must be true or false, not {_shown(request.wait)}")
    if not isinstance(request.secret_sha256, str) or not _SHA256.fullmatch(request.secret_sha256):
        # The message does not show the value, which the client may want to keep to itself.
        raise InvalidRequest("secret_sha256 must be 64 lower-case hexadecimal digits")
    check_text("label", request.label)
    check_text("client", request.client)


def is_id(value: object) -> bool:
    """Return whether it is a uuid in canonical form; ids are keys, and parts of file names."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _check_id(value: object) -> None:
    if not is_id(value):
        raise InvalidRequest(
            f"the request's id must be a uuid such as 0c6f6a6e-…, in lower case, not {_shown(value)}"
        )


def _check_size(request: Request) -> None:
    count = request.num_gpus
    if not _is_int(count) or not FIELDS["num_gpus"].allows(count):
        raise InvalidRequest(f"the number of GPUs must be 1 or more, not {_shown(count)}")
    check_memory(request.partial, request.memory_mib)


def check_memory(partial: object, memory_mib: object) -> None:
    """Raise InvalidRequest unless exactly one of them is given, and valid."""
    if partial is not None and memory_mib is not None:
        raise InvalidRequest("give either a fraction of each GPU or its memory in MiB, not both")
    if memory_mib is not None:
        if (
            isinstance(memory_mib, bool)
            or not isinstance(memory_mib, int)
            or not FIELDS["memory_mib"].allows(memory_mib)
        ):
            raise InvalidRequest(f"the memory per GPU must be 1 MiB or more, not {_shown(memory_mib)}")
        return
    if partial is None:
        raise InvalidRequest("give a fraction of each GPU (1 for whole ones) or its memory in MiB")
    if isinstance(partial, bool) or not isinstance(partial, (int, float)):
        number = False
    else:
        number = FIELDS["partial"].allows(partial)
    if not number:
        raise InvalidRequest(f"the fraction of a GPU must be above 0 and at most 1, not {_shown(partial)}")


def _check_filters(filters: object) -> None:
    if not isinstance(filters, Mapping):
        raise InvalidRequest(f"filters must be names with values, not {_shown(filters)}")
    for key, value in filters.items():
        if key not in FILTERS:
            raise InvalidRequest(f"unknown filter {_shown(key)}; there are {', '.join(FILTERS)}")
        if (
            not isinstance(value, str)
            or not value.strip()
            or len(value) > MAX_TEXT
            or not value.isprintable()
        ):
            raise InvalidRequest(f"the filter {key} needs a printable text of 1 to {MAX_TEXT} characters")
        if key == "index" and not (value.isascii() and value.isdigit() and len(value) <= 6):
            raise InvalidRequest(f"the filter index must be a GPU's number, not {_shown(value)}")
        if key == "emulated" and value.lower() not in _YES_NO:
            raise InvalidRequest(f"the filter emulated must be true or false, not {_shown(value)}")


def check_namespace(value: object) -> None:
    """Raise InvalidRequest unless it is a valid name of a namespace."""
    if not isinstance(value, str) or not _NAMESPACE.fullmatch(value):
        raise InvalidRequest(
            "a namespace has 1 to 63 letters, digits, dots, dashes and underscores, and begins and ends "
            f"with a letter or digit; {_shown(value)} does not"
        )


def check_text(what: str, value: object) -> None:
    """Raise InvalidRequest unless it is short, printable text, because it appears in logs and terminals."""
    if not isinstance(value, str) or not value.isprintable():
        raise InvalidRequest(f"the {what} must be printable text on one line")
    if len(value) > MAX_TEXT:
        raise InvalidRequest(f"the {what} must have at most {MAX_TEXT} characters, not {len(value)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """Return the value as text of at most one line."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def check_same(known: Lease, request: Request) -> None:
    """Raise RequestConflict unless ``request`` repeats the known one; reveal nothing of another user's request."""
    if known.request.owner != request.owner:
        raise RequestConflict(f"the id {request.id} is taken; choose a new one")
    same_secret = hmac.compare_digest(known.request.secret_sha256, request.secret_sha256)
    repeated = replace(request, secret_sha256="", client="")
    if not same_secret or replace(known.request, secret_sha256="", client="") != repeated:
        raise RequestConflict(f"you asked for something else under the id {request.id}; choose a new one")
