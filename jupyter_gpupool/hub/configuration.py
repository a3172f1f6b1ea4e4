"""``configure(c)`` sets up a hub's configuration for a GPU pool."""

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

from jupyter_gpupool.core.errors import InvalidRequest

from .options import MODES, Limits
from .service_client import Service
from .spawner_hooks import HOOKED, Hooks

USE, ADMINISTER = "custom:gpupool:use", "custom:gpupool:admin"
#: What the service may read from the hub: names, groups, and which servers run.
_SERVICE_SCOPES = ["read:users:name", "read:users:groups", "read:servers", "list:users"]

#: How long the hub waits for the service that it has started, in seconds; a busy machine may need more than the hub's
#: own half a minute, after which the hub would end.
_START_TIMEOUT_S = 300


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

    Args:
        c: the hub's configuration.
        mode: "server": a server's GPUs are lent from its start to its stop, and all of its kernels share them.
            "kernel": each kernel is given what was chosen unless it requests something else, and all kernels of a
            server together have at most that.
        attach: "auto": GPUs of the server's own machine are used directly. "remote": always through a worker.
        limits: what users may choose, or a function of the spawner that returns it.
        queue_timeout_s: how long a start waits in the queue, in seconds.
        namespaces: the pool's namespace of each hub group; a user gets the first that matches.
            Default: the name of the user's first group.
        groups: names of the hub groups whose members may use the pool. Default: everybody.
        administrators: names of the hub groups whose members may administer the pool, besides the hub's own
            administrators. Default: none.
        url: where the service listens, and where servers reach it.
        managed: whether the hub starts the service. Otherwise it runs elsewhere, with the same ``api_token``.
        api_token: the service's token. Default: the environment variable GPUPOOL_HUB_TOKEN.
        directory: where a managed service keeps its ledger.
        ca_file: with an https ``url``, the certificate (PEM) of the authority to trust.
        name: the service's name at the hub.
        options: further arguments of a managed service's command line.

    Raises InvalidRequest for contradictory arguments.
    """
    if mode not in MODES:
        raise InvalidRequest(f"mode must be {' or '.join(map(repr, MODES))}, not {mode!r}")
    if attach not in ("auto", "remote"):
        raise InvalidRequest(f"attach must be 'auto' or 'remote', not {attach!r}")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
        raise InvalidRequest(f"url must look like http://127.0.0.1:10101, not {url!r}")
    token = api_token or os.environ.get("GPUPOOL_HUB_TOKEN", "")
    if not token and not managed:
        raise InvalidRequest(
            "a service that the hub does not start needs an api_token; give the same one to both"
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
        service |= _start_timeout()
        where = os.path.abspath(directory or "gpupool")
        service["command"] = [
            *(sys.executable, "-P" if sys.version_info >= (3, 11) else "-s"),
            *("-m", "jupyter_gpupool.hub.service.app", f"--GPUPoolHubService.directory={where}"),
            *options,
        ]
        service["environment"] = {
            "GPUPOOL_HUB_NAMESPACES": json.dumps(dict(namespaces) if namespaces is not None else None),
            "PATH": os.environ.get("PATH", ""),
        }
    _append(c.JupyterHub, "services", service)
    _allow(c, name, groups, administrators)


def _start_timeout() -> dict[str, Any]:
    """How long the hub waits for the service, where this JupyterHub can be told."""
    from jupyterhub.services.service import Service as HubService

    return {"timeout": _START_TIMEOUT_S} if HubService.class_traits().get("timeout") else {}


def hook(c: Any, hooks: Hooks) -> None:
    """Wrap the configured hooks in every section of a spawner that configures some."""
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
    scopes[USE] = {"description": "Use GPUs of the pool"}
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
    # A server's own token: the default scopes, and this one.
    if "server_token_scopes" not in c.Spawner:
        c.Spawner.server_token_scopes = ["users:activity!user", "access:servers!server", USE]
    elif isinstance(c.Spawner.server_token_scopes, list):
        c.Spawner.server_token_scopes = [*c.Spawner.server_token_scopes, USE]


def _one_line(ca_file: str) -> str:
    """Return the certificate as the environment variable GPUPOOL_CA has it. Raises InvalidRequest."""
    try:
        return base64.b64encode(ssl.PEM_cert_to_DER_cert(Path(ca_file).read_text().strip())).decode()
    except (OSError, ValueError) as e:
        raise InvalidRequest(
            f"ca_file: cannot read a certificate from {ca_file} ({e}); give a PEM file"
        ) from None


def _append(section: Any, name: str, value: Any) -> None:
    section[name] = [*_value(section, name, []), value]


def _value(section: Any, name: str, initial: Any) -> Any:
    """Return what is configured, also if the configuration only appended to it."""
    value = section.get(name, initial)
    return value.get_value(initial) if isinstance(value, LazyConfigValue) else value


def _base_url(c: Any) -> str:
    hub = c.JupyterHub
    base = hub.get("base_url", "")
    if not base and "bind_url" in hub:
        base = urlsplit(hub.bind_url).path
    return f"/{base.strip('/')}/" if base.strip("/") else "/"
