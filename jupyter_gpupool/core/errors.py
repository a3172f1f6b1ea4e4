"""The errors of the pool, each with the HTTP status of the API's answer."""

from __future__ import annotations


class PoolError(Exception):
    """Base of all errors. The message is one line that says what happened and what to do."""

    status = 500


class InvalidRequest(PoolError):
    """The request is invalid by itself, for example a fraction above 1 or no GPU at all."""

    status = 400


class ImpossibleRequest(PoolError):
    """This pool could never grant the request, even when idle."""

    status = 422


class NoCapacity(PoolError):
    """No GPUs are free, and the request does not wait or has waited long enough."""

    status = 409


class SliceInUse(PoolError):
    """A slice cannot be made smaller than the memory in use on it."""

    status = 409


class UnknownLease(PoolError):
    """No lease has that id, or the caller may not see it."""

    status = 404


class LeaseEnded(PoolError):
    """The lease has ended and cannot be used any more."""

    status = 410


class RequestConflict(PoolError):
    """Another request with that id exists."""

    status = 409


class LedgerUnavailable(PoolError):
    """The ledger cannot be read or written, for example because the disk is full. Nothing was changed."""

    status = 503


class EngineError(PoolError):
    """A worker could not be started, or does not answer."""

    status = 503


class PoolUnreachable(PoolError):
    """No pool answers at the address."""

    status = 502


class Unauthenticated(PoolError):
    """The token is missing, unknown, expired or revoked."""

    status = 401


class IssuerUnavailable(PoolError):
    """The token's issuer cannot be asked for the key that signed it."""

    status = 503


class PermissionDenied(PoolError):
    """The token is valid but does not permit the call."""

    status = 403


class TooManyAttempts(PoolError):
    """Too many wrong tokens or calls came from this address. The message says when to try again."""

    status = 429


class TooManyRequests(PoolError):
    """The caller makes more calls per second, keeps more calls open, or queues more requests than allowed.

    Nothing was changed; try again after ``retry_after_s``.
    """

    status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownServer(PoolError):
    """No GPU server has that name."""

    status = 404


class UnknownToken(PoolError):
    """No token has that id."""

    status = 404


class NotSupported(PoolError):
    """This kind of pool does not support the call."""

    status = 404


class NotLeading(PoolError):
    """This server is not the leader: another server on the same ledger is, or none yet. Nothing was changed."""

    status = 503


class UnknownNamespace(PoolError):
    """No namespace has that name, or the caller may not see it."""

    status = 404


class NamespaceConflict(PoolError):
    """A namespace of that name exists already, or it is in use and cannot be deleted."""

    status = 409
