"""The system's keyring (Secret Service, KWallet, Keychain), in which a login can be kept instead of in a file."""

from __future__ import annotations

from typing import Any

from jupyter_gpupool.core.errors import InvalidRequest

#: The name of the pool's entries in the keyring.
SERVICE = "jupyter_gpupool"
#: Backends of the library `keyring` that keep nothing, or keep it in files of their own.
_REFUSED = ("keyring.backends.fail", "keyring.backends.null", "keyrings.alt.")


def backend() -> Any:
    """Return the keyring of this system. Raises InvalidRequest where there is none that protects its contents."""
    try:
        import keyring
    except ImportError:
        raise InvalidRequest(
            "the library for the system's keyring is missing: pip install 'jupyter_gpupool[keyring]'"
        ) from None
    try:
        chosen = keyring.get_keyring()
        # The library joins several into one, which would fall back to the next.
        found = [*getattr(chosen, "backends", [chosen])]
    except Exception as e:  # a backend may raise anything
        raise _unusable(e) from None
    for one in found:
        if not f"{type(one).__module__}.".startswith(_REFUSED):
            return one
    raise InvalidRequest(
        "this machine has no keyring to keep a login in, or it does not run (such as gnome-keyring with D-Bus); "
        "without --keyring, the login is kept in a file that only you can read"
    )


def get(account: str) -> str | None:
    """Return what is kept for an account, None where nothing is. Raises InvalidRequest."""
    try:
        found = backend().get_password(SERVICE, account)
    except InvalidRequest:
        raise
    except Exception as e:
        raise _unusable(e) from None
    return None if found is None else str(found)


def put(account: str, secret: str) -> None:
    """Keep something for an account, in place of what was kept. Raises InvalidRequest."""
    try:
        backend().set_password(SERVICE, account, secret)
    except InvalidRequest:
        raise
    except Exception as e:
        raise _unusable(e) from None


def delete(account: str) -> None:
    """Delete what is kept for an account, if there is anything. Raises InvalidRequest."""
    if get(account) is None:
        return
    try:
        backend().delete_password(SERVICE, account)
    except Exception as e:
        raise _unusable(e) from None


def _unusable(error: Exception) -> InvalidRequest:
    what = " ".join(str(error).split()) or type(error).__name__
    return InvalidRequest(f"the system's keyring cannot be used ({what}); unlock it, and try again")
