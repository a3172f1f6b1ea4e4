"""What the pool refuses, each with the HTTP status that the API answers with."""

from __future__ import annotations


class PoolError(Exception):
    """Base of every refusal: one clear line that says what to do."""

    status = 500


class InvalidRequest(PoolError):
    """The request makes no sense by itself (a fraction above 1, no GPU at all, ...)."""

    status = 400


class ImpossibleRequest(PoolError):
    """No pool like this one could ever grant the request."""

    status = 422


class NoCapacity(PoolError):
    """The request cannot be met now, and its owner would not wait."""

    status = 409


class InUse(PoolError):
    """A slice cannot be made smaller than what is on it."""

    status = 409


class UnknownLease(PoolError):
    """No lease has that id, or it is not the caller's."""

    status = 404


class LeaseEnded(PoolError):
    """The lease has ended; nothing revives it."""

    status = 410


class RequestConflict(PoolError):
    """A request with that id exists and asks for something else."""

    status = 409


class LedgerUnavailable(PoolError):
    """The ledger cannot be read or written (a full disk, say); nothing was changed."""

    status = 503


class EngineFailure(PoolError):
    """A worker could not be started."""

    status = 503


class PoolUnreachable(PoolError):
    """No pool answers where one was looked for."""

    status = 502


class NotAdmitted(PoolError):
    """The pool does not know who calls."""

    status = 401


class NotAllowed(PoolError):
    """The pool knows who calls, and that they may not do this."""

    status = 403


class TooManyAttempts(PoolError):
    """Too many wrong tokens, or too much of something else, came from there; the text says what to do."""

    status = 429


class UnknownServer(PoolError):
    """No GPU server has that name."""

    status = 404


class UnknownToken(PoolError):
    """No token has that id."""

    status = 404


class NotOffered(PoolError):
    """This kind of pool has no such call."""

    status = 404


class NotLeading(PoolError):
    """This daemon does not lead: another one on the same ledger does, or none for a moment. Nothing was changed."""

    status = 503


class UnknownNamespace(PoolError):
    """The pool has no namespace of that name, or the caller is not to know of it."""

    status = 404


class NamespaceConflict(PoolError):
    """A namespace of that name exists already, or what is in use cannot be deleted."""

    status = 409
