"""What the ends of a connection prove to each other: only the right one, to the right one, about this connection."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jupyter_gpupool.transport import proofs

SECRETS = st.text(min_size=1, max_size=60)
CERTIFICATES = st.binary(min_size=32, max_size=32)


@given(secret=SECRETS, certificate=CERTIFICATES)
def test_the_worker_of_the_lease_learns_the_secret_and_the_client_knows_it(
    secret: str, certificate: bytes
) -> None:
    digest = proofs.digest_of(secret)
    assert proofs.unseal(proofs.seal(secret, certificate), digest, certificate) == secret
    assert proofs.proves(proofs.proof(digest, certificate), secret, certificate)


@given(secret=SECRETS, other=SECRETS, certificate=CERTIFICATES, another=CERTIFICATES)
def test_nobody_else_does(secret: str, other: str, certificate: bytes, another: bytes) -> None:
    digest, sealed = proofs.digest_of(secret), proofs.seal(secret, certificate)
    if other != secret:
        assert proofs.unseal(sealed, proofs.digest_of(other), certificate) is None
        assert not proofs.proves(proofs.proof(proofs.digest_of(other), certificate), secret, certificate)
    if another != certificate:
        assert proofs.unseal(sealed, digest, another) is None, "it was sealed for who has shown the other one"
        assert not proofs.proves(proofs.proof(digest, another), secret, certificate)
    assert not proofs.proves(sealed, secret, certificate)


@given(given=st.none() | st.text() | st.integers() | st.binary() | st.lists(st.binary()))
def test_anything_else_is_no_proof(given: object) -> None:
    assert proofs.unseal(given, proofs.digest_of("secret"), bytes(32)) is None
    assert not proofs.proves(given, "secret", bytes(32))
