"""How the two ends of a connection prove to each other, inside TLS, that they belong to the same lease.

The client has the lease's secret; the pool and the lease's worker have its SHA-256. Neither shows the other what it
has before it knows who that is: the client seals the secret with the digest, and the worker answers with a proof that
it has the digest. Both are bound to the certificate that the client was shown, as in SCRAM with channel binding
(RFC 5802, RFC 5929 "tls-server-end-point"). So nobody between the two, who would have to show a certificate of their
own, learns or can forward anything of use: not even the worker of another lease.
"""

from __future__ import annotations

import hashlib
import hmac

#: What each use of the key is for, so that no answer is ever good for another question.
_SEAL, _PROOF = b"gpupool: the client's secret, sealed", b"gpupool: the worker's proof"


def digest_of(secret: str) -> str:
    """Return the hex digest of a secret: what a worker admits its clients by."""
    return hashlib.sha256(secret.encode()).hexdigest()


def seal(secret: str, certificate: bytes) -> bytes:
    """Return the secret for the worker of its lease, if that worker has shown the certificate of that SHA-256."""
    plain = secret.encode()
    return _masked(plain, digest_of(secret), certificate)


def unseal(sealed: object, secret_sha256: str, certificate: bytes) -> str | None:
    """Return the secret; None if it is another lease's, or was sealed for who had shown another certificate."""
    if not isinstance(sealed, bytes):
        return None
    try:
        secret = _masked(sealed, secret_sha256, certificate).decode()
    except UnicodeDecodeError:
        return None
    return secret if hmac.compare_digest(digest_of(secret), secret_sha256) else None


def proof(secret_sha256: str, certificate: bytes) -> bytes:
    """Return what only the pool, the worker and the client of a lease know of it and of the worker's certificate."""
    return _keyed(secret_sha256, _PROOF, certificate)


def proves(given: object, secret: str, certificate: bytes) -> bool:
    """Return whether ``given`` is the proof of the worker of that secret's lease."""
    return isinstance(given, bytes) and hmac.compare_digest(given, proof(digest_of(secret), certificate))


def _masked(text: bytes, secret_sha256: str, certificate: bytes) -> bytes:
    key = _keyed(secret_sha256, _SEAL, certificate)
    mask = hashlib.shake_256(key).digest(len(text))
    return bytes(one ^ other for one, other in zip(text, mask))


def _keyed(secret_sha256: str, purpose: bytes, certificate: bytes) -> bytes:
    return hmac.digest(secret_sha256.encode(), purpose + certificate, "sha256")
