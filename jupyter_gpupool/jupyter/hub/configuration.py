"""``configure(c)``: everything that a hub's configuration needs for a GPU pool."""

from __future__ import annotations

import base64
import functools
import json
import os
import secrets
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from traitlets.config.loader import LazyConfigValue

from ...pool.errors import InvalidRequest
from .calls import Service
from .hooks import HOOKED, Hooks
from .options import MODES, Limits

USE, ADMINISTER = "custom:gpupool:use", "custom:gpupool:admin"
#: What the service may know of the hub: who is who, and whose server runs.
_SERVICE_SCOPES = ["read:users:name", "read:users:groups", "read:servers", "list:users"]


def configure(
    c: Any,
    *,
    mode: str = "server",
    attach: str = "auto",
    limits: Limits | Callable[[Any], Limits] | None = None,
    queue_timeout_s: float = 3600.0,
    namespaces: Mapping[str, str] | None = None,
    groups: Sequence[str] | None = None,
    administrators: Sequence[str] = (),
    url: str = "http://127.0.0.1:10101",
    managed: bool = True,
    api_token: str = "",
    directory: str = "",
    ca_file: str = "",
    name: str = "gpupool",
    options: Sequence[str] = (),
) -> None:
    """Offer the pool's GPUs on the spawn page, and register the service that lends them. Call it last.

    ``mode``: "server" (a server's GPUs are lent from its start to its stop, and are its kernels') or "kernel" (what
    was chosen is what each kernel is given unless it says otherwise, and the most that they have together).
    ``attach``: "auto" (GPUs of a server's own machine directly), "remote" (always through the pool's worker).
    ``limits``: what may be chosen, or a function of the spawner. ``queue_timeout_s``: how long a start waits.
    ``namespaces``: hub group → namespace of the pool, the first that fits; without it a user's first group is the
    namespace. ``groups``: who may use the pool, and ``administrators``: who may administer it besides the hub's
    own; names of hub groups; default: everybody, and nobody.

    ``url``: where the service listens; servers reach it there. ``managed``: whether the hub starts it; else it runs
    elsewhere, with the same ``api_token`` (default: the environment's GPUPOOL_HUB_TOKEN). ``directory``: where a
    managed service keeps its ledger. ``ca_file``: with an https ``url``, whose word for its certificate is taken.
    ``options``: further words for a managed service's command line. Raises InvalidRequest.
    """
    if mode not in MODES:
        raise InvalidRequest(f"mode is {' or '.join(map(repr, MODES))}, not {mode!r}")
    if attach not in ("auto", "remote"):
        raise InvalidRequest(f"attach is 'auto' or 'remote', not {attach!r}")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
        raise InvalidRequest(f"url must look like http://127.0.0.1:10101, not {url!r}")
    token = api_token or os.environ.get("GPUPOOL_HUB_TOKEN", "")
    if not token and not managed:
        raise InvalidRequest(
            "a service that the hub does not start needs an api_token, the same at both ends"
        )
    token = token or secrets.token_hex(32)
    base = _base_url(c)
    prefix = f"{base}services/{name}"
    hooks = Hooks(
        Service(f"{url}{prefix}", token, ca_file),
        url=f"{url}{prefix}",
        page=f"{prefix}/",
        limits=limits if limits is not None else Limits(),
        mode=mode,
        attach=attach,
        queue_timeout_s=queue_timeout_s,
        ca=_one_line(ca_file) if ca_file else "",
    )
    hook(c, hooks)
    service: dict[str, Any] = {
        "name": name,
        "url": url,
        "api_token": token,
        "oauth_no_confirm": True,
        "oauth_client_allowed_scopes": [USE, ADMINISTER],
    }
    if managed:
        where = os.path.abspath(directory or "gpupool")
        service["command"] = [
            *(sys.executable, "-P" if sys.version_info >= (3, 11) else "-s"),
            *("-m", "jupyter_gpupool.jupyter.hub.service", f"--HubService.directory={where}"),
            *options,
        ]
        service["environment"] = {
            "GPUPOOL_HUB_NAMESPACES": json.dumps(dict(namespaces) if namespaces is not None else None),
            "PATH": os.environ.get("PATH", ""),
        }
    _append(c.JupyterHub, "services", service)
    _allow(c, name, groups, administrators)


def hook(c: Any, hooks: Hooks) -> None:
    """Put ours around what is configured, in every section of a spawner that has something of its own."""
    sections = [s for s in c if s.endswith("Spawner") and s != "Spawner"]
    for section in ["Spawner", *sections]:
        for trait in HOOKED:
            own = trait in c[section]
            if own or section == "Spawner":
                before = c[section][trait] if own else None
                c[section][trait] = _around(hooks, trait, before)


def _around(hooks: Hooks, trait: str, before: Any) -> Callable[..., Any]:
    ours = getattr(hooks, trait)
    if trait == "options_from_form":

        def read(data: dict[str, Any], spawner: Any = None) -> Any:
            return ours(data, spawner, before)

        return read
    return functools.partial(ours, before=before)


def _allow(c: Any, name: str, groups: Sequence[str] | None, administrators: Sequence[str]) -> None:
    hub = c.JupyterHub
    scopes = dict(_value(hub, "custom_scopes", {}))
    scopes[USE] = {"description": "Be lent GPUs of the pool"}
    scopes[ADMINISTER] = {"description": "Administer the GPU pool", "subscopes": [USE]}
    hub.custom_scopes = scopes
    theirs = [USE, f"access:services!service={name}"]
    roles = [dict(role) for role in _value(hub, "load_roles", [])]
    if groups is None:
        everybody = next((role for role in roles if role["name"] == "user"), None)
        if everybody is None:
            roles.append(everybody := {"name": "user"})
        everybody["scopes"] = [*everybody.get("scopes", ["self"]), *theirs]
    else:
        roles.append({"name": f"{name}-users", "scopes": theirs, "groups": list(groups)})
    roles.append(
        {
            "name": f"{name}-administrators",
            "scopes": [ADMINISTER, f"access:services!service={name}"],
            "groups": list(administrators),
        }
    )
    roles.append({"name": f"{name}-service", "scopes": _SERVICE_SCOPES, "services": [name]})
    hub.load_roles = roles
    # A server's own token: what it is by default, and this.
    if "server_token_scopes" not in c.Spawner:
        c.Spawner.server_token_scopes = ["users:activity!user", "access:servers!server", USE]
    elif isinstance(c.Spawner.server_token_scopes, list):
        c.Spawner.server_token_scopes = [*c.Spawner.server_token_scopes, USE]


def _one_line(ca_file: str) -> str:
    """As :data:`jupyter_gpupool.holder.CA_VARIABLE` has it. Raises InvalidRequest."""
    try:
        return base64.b64encode(ssl.PEM_cert_to_DER_cert(Path(ca_file).read_text().strip())).decode()
    except (OSError, ValueError) as e:
        raise InvalidRequest(f"ca_file: {ca_file} is no certificate that can be read ({e})") from None


def _append(section: Any, name: str, value: Any) -> None:
    section[name] = [*_value(section, name, []), value]


def _value(section: Any, name: str, initial: Any) -> Any:
    """What is configured; also where that was only ever appended to."""
    value = section.get(name, initial)
    return value.get_value(initial) if isinstance(value, LazyConfigValue) else value


def _base_url(c: Any) -> str:
    hub = c.JupyterHub
    base = hub.get("base_url", "")
    if not base and "bind_url" in hub:
        base = urlsplit(hub.bind_url).path
    return f"/{base.strip('/')}/" if base.strip("/") else "/"
