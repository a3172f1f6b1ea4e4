"""From a Pod to what it asks of the pool. Pure functions of JSON, which may be anything."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.models import Request
from jupyter_gpupool.core.request_schema import FIELDS
from jupyter_gpupool.core.validation import validate

from .names import (
    ANNOTATIONS,
    ASKED,
    CLIENT,
    CONTAINER,
    DEFAULT_SECRET,
    DOMAIN,
    FILTERS,
    GPU,
    INJECT,
    MEMORY_MIB,
    MODE,
    NEVER_PARK,
    SECRET,
    SHARE_PERCENT,
    SLICE,
    SPREAD,
    TOKEN,
)

#: The variables of `gpupool run` for the number of GPUs and the fraction of each.
NUM_GPUS, PARTIAL_GPU = "NUM_GPUS", "PARTIAL_GPU"
#: More GPUs than any pool has; a slice count beyond this would not be a valid quantity one day.
MAX_GPUS = 1 << 16
#: MiB of memory beyond which no GPU has more.
MAX_MEMORY_MIB = 1 << 30

_QUANTITY = re.compile(
    r"\+?([0-9]{1,15}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})([numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]{1,2})?"
)
_SUFFIXES = {
    **{suffix: Fraction(1000) ** power for suffix, power in zip("numkMGTPE", (-3, -2, -1, 1, 2, 3, 4, 5, 6))},
    **{f"{suffix}i": Fraction(1024) ** power for suffix, power in zip("KMGTPE", range(1, 7))},
}
#: What a Secret may be called.
SECRET_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


@dataclass(frozen=True)
class PodRequest:
    """What a Pod asks for. ``container``: the position of the container that gets the GPUs.

    ``wrapped``: `gpupool run` precedes its command; otherwise its program attaches by itself. ``account_token``: it
    uses the token of its ServiceAccount, not the Secret's; None where it does not say. ``copies_client``: the image
    lacks the client, so that an init container copies it.
    """

    container: int
    num_gpus: int
    partial: float | None
    memory_mib: int | None = None
    filters: Mapping[str, str] = field(default_factory=dict)
    spread: bool = False
    never_park: bool = False
    secret: str = DEFAULT_SECRET
    wrapped: bool = True
    account_token: bool | None = None
    copies_client: bool = False

    def slices(self, gpu_memory_mib: int | None) -> int:
        """Return GPUs × per cent of each, rounded up. ``gpu_memory_mib``: the memory of the pool's smallest GPU.

        Without it, memory in MiB counts as whole GPUs, so that no quota lets too much pass.
        """
        if self.memory_mib is None:
            assert self.partial is not None
            percent = math.ceil(round(self.partial * 100, 6))
        elif gpu_memory_mib is None:
            percent = 100
        else:
            percent = math.ceil(100 * self.memory_mib / gpu_memory_mib)
        return self.num_gpus * min(max(percent, 1), 100)

    def options(self) -> list[str]:
        """Return the options of `gpupool run` that the environment cannot express."""
        options = [] if self.memory_mib is None else ["-m", str(self.memory_mib)]
        for name, value in self.filters.items():
            options += ["--filter", f"{name}={value}"]
        return [
            *options,
            *(["--spread"] if self.spread else []),
            *(["--never-park"] if self.never_park else []),
        ]


def pod_request(pod: Mapping[str, Any]) -> PodRequest | None:
    """Return what a Pod asks for, None where it asks for nothing of ours. Raises InvalidRequest with one line."""
    labels, annotations = (mapping(mapping(pod, "metadata"), name) for name in ("labels", "annotations"))
    if labels.get(INJECT) == "false" or "kubernetes.io/config.mirror" in annotations:
        return None
    spec = mapping(pod, "spec")
    containers = listed(spec, "containers")
    labelled = labels.get(INJECT) == "true"
    asking = [n for n, container in enumerate(containers) if _asks(container)]
    if not labelled and not asking and not any(_asks(c) for c in listed(spec, "initContainers")):
        return None
    _check_pod(spec, annotations)
    chosen = _chosen(containers, asking, annotations)
    container = containers[chosen]
    if SLICE in resources(container):
        raise InvalidRequest(
            f"{SLICE} is what the webhook writes; ask for GPUs by {GPU} and {SHARE_PERCENT} or {MEMORY_MIB}"
        )
    num_gpus, partial, memory_mib = _size(container)
    secret = annotations.get(SECRET, DEFAULT_SECRET)
    if not isinstance(secret, str) or len(secret) > 253 or not SECRET_NAME.fullmatch(secret):
        raise InvalidRequest(f"the annotation {SECRET} must be the name of a Secret, not {shown(secret)}")
    request = PodRequest(
        chosen,
        num_gpus,
        partial,
        memory_mib,
        filters=_filters(annotations.get(FILTERS, "")),
        spread=_flag(annotations, SPREAD),
        never_park=_flag(annotations, NEVER_PARK),
        secret=secret,
        wrapped=_wrapped(container, annotations),
        account_token=_account_token(annotations),
        copies_client=_copies_client(annotations),
    )
    _validate(request)
    return request


def mapping(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an object within another one, empty where it is missing. Raises InvalidRequest."""
    value = parent.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be an object, not {shown(value)}")
    return value


def listed(parent: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return a list of objects within another object, empty where it is missing. Raises InvalidRequest."""
    value = parent.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise InvalidRequest(f"{name} must be a list of objects, not {shown(value)}")
    return value


def resources(container: Mapping[str, Any]) -> dict[str, Any]:
    """Return our resources of a container: its limits, and its requests where it has no limit of them."""
    both = mapping(container, "resources")
    limits, requests = mapping(both, "limits"), mapping(both, "requests")
    found = {name: value for name, value in {**requests, **limits}.items() if name.startswith(f"{DOMAIN}/")}
    for name in found:
        if name in limits and name in requests and limits[name] != requests[name]:
            raise InvalidRequest(
                f"{name} is {shown(requests[name])} among the requests and {shown(limits[name])} among the limits; "
                "write the limit only"
            )
    return found


def shown(value: object) -> str:
    """Return a value as text of at most one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _asks(container: Mapping[str, Any]) -> bool:
    return any(name not in ASKED or quantity(name, value) for name, value in resources(container).items())


def quantity(name: str, value: object) -> int:
    """Return a Kubernetes quantity, which must be a whole number. Raises InvalidRequest."""
    match = _QUANTITY.fullmatch(str(value)) if isinstance(value, (str, int)) and value is not True else None
    if match is not None:
        digits, suffix = match.groups()
        factor = Fraction(1)
        if suffix:
            factor = _SUFFIXES.get(suffix) or Fraction(10) ** int(suffix[1:])
        number = Fraction(digits.rstrip(".") if digits.endswith(".") else digits) * factor
        if number.denominator == 1:
            return int(number)
    raise InvalidRequest(f"{name} must be a whole number, not {shown(value)}")


def _check_pod(spec: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    for name in annotations:
        if str(name).startswith(f"{DOMAIN}/") and name not in ANNOTATIONS:
            raise InvalidRequest(f"unknown annotation {shown(name)}; there are {', '.join(ANNOTATIONS)}")
    for container in listed(spec, "initContainers"):
        if _asks(container):
            raise InvalidRequest(
                f"the init container {shown(container.get('name'))} asks for GPUs; only a container can have them"
            )
    if mapping(spec, "os").get("name") == "windows":
        raise InvalidRequest("GPUs of the pool need Linux, and this Pod is for Windows")


def _chosen(containers: list[Mapping[str, Any]], asking: list[int], annotations: Mapping[str, Any]) -> int:
    named = annotations.get(CONTAINER)
    names = [container.get("name") for container in containers]
    if named is not None:
        if named not in names:
            raise InvalidRequest(
                f"the annotation {CONTAINER} names {shown(named)}; the Pod's containers are "
                f"{', '.join(shown(name) for name in names[:10])}"
            )
        chosen = names.index(named)
        if set(asking) - {chosen}:
            other = names[min(set(asking) - {chosen})]
            raise InvalidRequest(
                f"the annotation {CONTAINER} names {shown(named)}, and the container {shown(other)} asks for GPUs, too"
            )
        return chosen
    candidates = asking or [n for n, c in enumerate(containers) if {NUM_GPUS, PARTIAL_GPU} & set(_names(c))]
    if not candidates:
        candidates = list(range(len(containers)))
    if len(candidates) != 1:
        raise InvalidRequest(
            "a Pod holds one lease, for one container: name the one that gets the GPUs by the annotation "
            f"{CONTAINER}"
        )
    return candidates[0]


def _names(container: Mapping[str, Any]) -> Iterator[str]:
    return (str(variable.get("name")) for variable in listed(container, "env"))


def _size(container: Mapping[str, Any]) -> tuple[int, float | None, int | None]:
    """Return the number of GPUs, and of each the fraction or the MiB. Raises InvalidRequest."""
    asked = {name: quantity(name, value) for name, value in resources(container).items() if name in ASKED}
    unknown = sorted(set(resources(container)) - set(ASKED))
    if unknown:
        raise InvalidRequest(f"unknown resource {shown(unknown[0])}; there are {', '.join(ASKED)}")
    for name, most in ((GPU, MAX_GPUS), (SHARE_PERCENT, 100), (MEMORY_MIB, MAX_MEMORY_MIB)):
        if name in asked and not 1 <= asked[name] <= most:
            raise InvalidRequest(f"{name} must be from 1 to {most}, not {asked[name]}")
    if SHARE_PERCENT in asked and MEMORY_MIB in asked:
        raise InvalidRequest(f"ask for either {SHARE_PERCENT} or {MEMORY_MIB} of each GPU, not both")
    number, fraction = _from_environment(container, NUM_GPUS, "num_gpus"), None
    if MEMORY_MIB not in asked:
        fraction = _from_environment(container, PARTIAL_GPU, "partial")
    count = asked.get(GPU) or (int(number) if number is not None else 1)
    if count > MAX_GPUS:
        raise InvalidRequest(f"{NUM_GPUS} must be from 1 to {MAX_GPUS}, not {shown(count)}")
    if GPU in asked and number is not None and number != asked[GPU]:
        raise InvalidRequest(f"{GPU} is {asked[GPU]} and {NUM_GPUS} is {number:g}; leave one of them out")
    if MEMORY_MIB in asked:
        if PARTIAL_GPU in _names(container):
            raise InvalidRequest(f"{MEMORY_MIB} and {PARTIAL_GPU} cannot be combined; leave one of them out")
        return count, None, asked[MEMORY_MIB]
    if SHARE_PERCENT in asked:
        share = asked[SHARE_PERCENT] / 100
        if fraction is not None and fraction != share:
            raise InvalidRequest(
                f"{SHARE_PERCENT} is {asked[SHARE_PERCENT]} and {PARTIAL_GPU} is {fraction:g}; leave one of them out"
            )
        return count, share, None
    return count, 1.0 if fraction is None else float(fraction), None


def _from_environment(container: Mapping[str, Any], name: str, field_name: str) -> int | float | None:
    """Return a number of the container's environment, as `gpupool run` reads it; None where it has none."""
    text: object = None
    for variable in listed(container, "env"):
        if variable.get("name") == name:  # the last one counts
            if variable.get("valueFrom") is not None:
                raise InvalidRequest(f"{name} must have a value; what valueFrom leads to cannot be seen here")
            text = variable.get("value")
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} must be text, not {shown(text)}")
    try:
        return FIELDS[field_name].from_text(text.strip())
    except (ValueError, OverflowError):
        option = FIELDS[field_name].option
        assert option is not None
        raise InvalidRequest(f"{name} must be {option.rule}, not {shown(text)}") from None


def _filters(text: object) -> dict[str, str]:
    filters: dict[str, str] = {}
    if not isinstance(text, str):
        raise InvalidRequest(f"the annotation {FILTERS} must be text, not {shown(text)}")
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, sign, value = pair.partition("=")
        if not sign or not value.strip():
            raise InvalidRequest(
                f"the annotation {FILTERS} must be written as NAME=VALUE,…, such as name=V100, not {shown(text)}"
            )
        if filters.setdefault(name.strip(), value.strip()) != value.strip():
            raise InvalidRequest(f"the annotation {FILTERS} gives {shown(name)} twice")
    return filters


def _flag(annotations: Mapping[str, Any], name: str) -> bool:
    value = annotations.get(name, "false")
    if value not in ("true", "false"):
        raise InvalidRequest(f'the annotation {name} must be "true" or "false", not {shown(value)}')
    return bool(value == "true")


def _account_token(annotations: Mapping[str, Any]) -> bool | None:
    kind = annotations.get(TOKEN)
    if kind not in (None, "secret", "account"):
        raise InvalidRequest(f"the annotation {TOKEN} must be secret or account, not {shown(kind)}")
    if kind == "account" and SECRET in annotations:
        raise InvalidRequest(f"{TOKEN}: account uses no Secret; leave out the annotation {SECRET}")
    return None if kind is None else kind == "account"


def _copies_client(annotations: Mapping[str, Any]) -> bool:
    source = annotations.get(CLIENT, "image")
    if source not in ("image", "copy"):
        raise InvalidRequest(f"the annotation {CLIENT} must be image or copy, not {shown(source)}")
    return bool(source == "copy")


def _wrapped(container: Mapping[str, Any], annotations: Mapping[str, Any]) -> bool:
    command = container.get("command")
    if command is not None and not (isinstance(command, list) and all(isinstance(w, str) for w in command)):
        raise InvalidRequest(f"command must be a list of words, not {shown(command)}")
    asks_itself = command is not None and [w.rpartition("/")[2] for w in command[:2]] == ["gpupool", "run"]
    mode = annotations.get(MODE, "run" if command and not asks_itself else "attach")
    if mode not in ("run", "attach"):
        raise InvalidRequest(f"the annotation {MODE} must be run or attach, not {shown(mode)}")
    if mode == "run" and not command:
        raise InvalidRequest(
            f"{MODE}: run needs the container's command, because the image's entrypoint cannot be seen; write it, "
            "or let the program attach by itself"
        )
    if mode == "run" and asks_itself:
        raise InvalidRequest(
            f"{MODE}: run would put a second gpupool run before the one in the command; leave it out"
        )
    return bool(mode == "run")


def _validate(request: PodRequest) -> None:
    """Raise InvalidRequest where the pool would refuse the request whatever its state."""
    validate(
        Request(
            "00000000-0000-0000-0000-000000000000",
            "pod",
            request.num_gpus,
            request.partial,
            memory_mib=request.memory_mib,
            filters=dict(request.filters),
            secret_sha256="0" * 64,
        )
    )
