"""``c.OIDC``: the issuers whose tokens a secured server accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from traitlets import Dict, Float, List, TraitError, Unicode, validate
from traitlets.config import Configurable

from jupyter_gpupool.core.errors import InvalidRequest

from .issuers import Issuer, issuers_from


class OIDC(Configurable):
    """OpenID Connect on a secured server."""

    issuers = List(
        Dict(),
        help="The issuers whose tokens are accepted, each a dictionary. `issuer` (its URL), `audience` and `grants` "
        "are needed: a grant is `{'claims': {'groups': 'ml-team'}, 'namespace': 'ml', 'role': 'use'}`, or with "
        "`'administers': True`. Further: `user_claim` (default: `sub`), `user_prefix`, `clients` (ids; default: all), "
        "`algorithms`, `leeway_s`, `max_age_s`, `grace_s`, `jwks_uri`, `ca_file`, `keys_token_file`, and for people "
        "who log in `client_id`, `login_scopes` and `login_parameters`; `console_client_id` and `console_secret_file` "
        "for the Console.",
    ).tag(config=True)
    console_address = Unicode(
        help="The address that people open the Console at, `https://` and without a path. Default: this server's."
    ).tag(config=True)
    console_session_s = Float(
        12 * 3600.0, min=60, help="How long a sign-in of the Console lasts at most, in seconds."
    ).tag(config=True)

    @validate("issuers")
    def _check(self, proposal: Any) -> Sequence[Mapping[str, Any]]:
        try:
            issuers_from(proposal["value"])
        except InvalidRequest as e:
            raise TraitError(f"OIDC.issuers: {e}") from None
        found: Sequence[Mapping[str, Any]] = proposal["value"]
        return found

    @validate("console_address")
    def _check_address(self, proposal: Any) -> str:
        address = str(proposal["value"]).rstrip("/")
        parts = urlsplit(address)
        if address and (parts.scheme != "https" or not parts.hostname or parts.path or parts.query):
            raise TraitError(f"OIDC.console_address={address!r} must be https://NAME or https://NAME:PORT")
        return address

    def parsed(self) -> tuple[Issuer, ...]:
        """Return the issuers."""
        return issuers_from(self.issuers)
