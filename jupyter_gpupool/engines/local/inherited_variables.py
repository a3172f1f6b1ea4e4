"""What the process that workers are forked from inherits of its pool's environment: nothing that looks like a secret.

A service often has credentials in its environment: a token of a hub, the password of a database. A tenant who has
taken a worker over could read them there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from jupyter_gpupool.core.environment import LEASE

_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASS|CREDENTIAL|COOKIE|DSN|(^|_)AUTH(_|$)|(^|_)(API|ACCESS|PRIVATE|SECRET)_?KEY|_KEY$",
    re.IGNORECASE,
)
#: A URL with a user and a password, or a key in its text form.
_SECRET_VALUE = re.compile(
    r"[a-z][a-z0-9+.-]*://[^/\s@:]*:[^/\s@]+@|-----BEGIN [A-Z ]*PRIVATE KEY", re.IGNORECASE
)


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables but those that may be secrets, by their names or values, and that of a lease."""
    return {name: value for name, value in variables.items() if name != LEASE and not _is_secret(name, value)}


def _is_secret(name: str, value: str) -> bool:
    return bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))
