"""A MutatingAdmissionPolicy that does the webhook's work for most Pods, in the API server itself. Pure functions.

Its CEL serves only Pods for which it puts in exactly what :func:`~.injection.injected` does; tests compare the two.
It leaves the others alone: a webhook beside it serves them, or a second policy refuses them.
"""

from __future__ import annotations

from typing import Any

from . import names
from .cel import Expression, literal, patch, quoted, words
from .injection import (
    CONFIG_DIR,
    DOWNWARD,
    RUN,
    account_volume,
    asks_in_cel,
    is_injected_in_cel,
    mount_of,
    secret_volume,
)
from .pod_request import NUM_GPUS, PARTIAL_GPU, SECRET_NAME

#: The first versions with MutatingAdmissionPolicies of v1beta1, which an administrator has to switch on, and of v1.
POLICIES_BETA, POLICIES_V1 = (1, 34), (1, 36)
#: The name of all objects.
NAME = "gpupool-admission"
_GROUP = "admissionregistration.k8s.io"
_OURS = f"startsWith({quoted(names.DOMAIN + '/')})"
#: Annotations that it understands. A webhook has to serve Pods with others, which need more than CEL can say well:
#: filters are checked by the pool's rules, and a copied client brings an init container.
SERVED = tuple(name for name in names.ANNOTATIONS if name not in (names.FILTERS, names.CLIENT))
#: Quantities as API servers write them, which make 8k of 8000, and fractions of at most two decimals.
_SIZES = {names.GPU: "^[1-9][0-9]{0,3}$", names.SHARE_PERCENT: "^([1-9][0-9]?|100)$"}
_SIZES[names.MEMORY_MIB] = "^([1-9][0-9]{0,8}|[1-9][0-9]{0,5}k)$"
_FRACTION = "^(0[.](0[1-9]|[1-9][0-9]?)|1([.]00?)?)$"


def _annotation(name: str, values: tuple[str, ...]) -> str:
    """Return that an annotation is missing, or one of these."""
    return f"(!({quoted(name)} in variables.annotations) || variables.annotations[{quoted(name)}] in {words(values)})"


def _is(name: str, value: str) -> str:
    return f"({quoted(name)} in variables.annotations && variables.annotations[{quoted(name)}] == {quoted(value)})"


def _asks(container: str) -> str:
    of = [f"(has({container}.resources.{kind}) && {container}.resources.{kind}.exists(n, n.{_OURS}))"
          for kind in ("limits", "requests")]  # fmt: skip
    return f"has({container}.resources) && ({' || '.join(of)})"


def _optional(field: str, empty: str) -> str:
    """Return a field's value, or an empty one. Each step on its way but the last is known to be there."""
    return f"has({field}) ? {field} : {empty}"


def _variables(gpu_memory_mib: int | None, account_tokens: bool) -> dict[str, str]:
    """Name → CEL; each may use those before it, and is evaluated only where it is used."""
    gpu, share, memory = (quoted(name) for name in names.ASKED)
    limits, env = "variables.limits", "variables.env"
    one_of = ["variables.asking.all(n, n == variables.names[0]) && size(variables.names) == 1",
              "object.spec.containers.filter(c, c.name == variables.names[0]).size() == 1"]  # fmt: skip
    sizes = " && ".join(
        f"(!({quoted(name)} in {limits}) || string({limits}[{quoted(name)}]).matches({quoted(pattern)}))"
        for name, pattern in _SIZES.items()
    )
    return {
        "gpuMemory": str(gpu_memory_mib or 0),
        "accountTokens": literal(account_tokens),
        "annotations": _optional("object.metadata.annotations", "{}"),
        "labels": _optional("object.metadata.labels", "{}"),
        "asking": f"object.spec.containers.filter(c, {_asks('c')}).map(c, c.name)",
        "told": "object.spec.containers.filter(c, has(c.env)"
        f" && c.env.exists(e, e.name in {words((NUM_GPUS, PARTIAL_GPU))})).map(c, c.name)",
        # Which container gets the GPUs; only one name is an answer.
        "names": f"{quoted(names.CONTAINER)} in variables.annotations"
        f" ? [variables.annotations[{quoted(names.CONTAINER)}]]"
        " : size(variables.asking) > 0 ? variables.asking"
        " : size(variables.told) > 0 ? variables.told : object.spec.containers.map(c, c.name)",
        "isOurs": " && ".join(
            [
                f"(size(variables.asking) > 0 || {_labelled('true')}) && !{_labelled('false')}",
                "!('kubernetes.io/config.mirror' in variables.annotations)",
                "!(has(object.spec.os) && object.spec.os.name == 'windows')",
                f"variables.annotations.all(n, !n.{_OURS} || n in {words(SERVED)})",
                f"(!has(object.spec.initContainers) || !object.spec.initContainers.exists(c, {_asks('c')}))",
                *one_of,
            ]
        ),
        "container": "object.spec.containers.filter(c, c.name == variables.names[0])[0]",
        "resources": _optional("variables.container.resources", "{}"),
        "limits": _optional("variables.resources.limits", "{}"),
        "requests": _optional("variables.resources.requests", "{}"),
        "env": _optional("variables.container.env", "[]"),
        "command": _optional("variables.container.command", "[]"),
        "number": f"{env}.filter(e, e.name == {quoted(NUM_GPUS)})",
        "fraction": f"{env}.filter(e, e.name == {quoted(PARTIAL_GPU)})",
        "isSized": " && ".join(
            [
                f"{limits}.all(n, !n.{_OURS} || n in {words(names.ASKED)})",
                f"variables.requests.all(n, !n.{_OURS}"
                f" || (n in {limits} && string({limits}[n]) == string(variables.requests[n])))",
                sizes,
                f"!({memory} in {limits} && ({share} in {limits} || size(variables.fraction) > 0))",
                "size(variables.number) < 2 && size(variables.fraction) < 2",
                f"variables.number.all(e, has(e.value) && e.value.matches({quoted(_SIZES[names.GPU])}))",
                f"variables.fraction.all(e, has(e.value) && e.value.matches({quoted(_FRACTION)}))",
            ]
        ),
        "gpus": f"{gpu} in {limits} ? int(string({limits}[{gpu}]))"
        " : size(variables.number) > 0 ? int(variables.number[0].value) : 1",
        "memory": f"{memory} in {limits} ? string({limits}[{memory}]).replace('k', '000') : ''",
        # Rounded, because of binary fractions.
        "told100": "size(variables.fraction) == 0 ? 100 : int(double(variables.fraction[0].value) * 100.0 + 0.5)",
        "percent": f"{share} in {limits} ? int(string({limits}[{share}])) : !({memory} in {limits}) ? variables.told100"
        " : variables.gpuMemory == 0 ? 100"
        f" : (int(variables.memory) * 100 + variables.gpuMemory - 1) / variables.gpuMemory",
        "slices": "string(variables.gpus * (variables.percent > 100 ? 100 : variables.percent))",
        "agrees": "variables.number.all(e, int(e.value) == variables.gpus)"
        f" && (size(variables.fraction) == 0 || !({share} in {limits}) || variables.told100 == variables.percent)",
        "asksItself": "size(variables.command) > 1"
        " && (variables.command[0] == 'gpupool' || variables.command[0].endsWith('/gpupool'))"
        " && (variables.command[1] == 'run' || variables.command[1].endsWith('/run'))",
        "runs": f"size(variables.command) > 0 && !variables.asksItself && !{_is(names.MODE, 'attach')}",
        "secret": f"{quoted(names.SECRET)} in variables.annotations"
        f" ? variables.annotations[{quoted(names.SECRET)}] : {quoted(names.DEFAULT_SECRET)}",
        "serves": " && ".join(
            [
                "variables.isOurs && variables.isSized && variables.agrees",
                _annotation(names.MODE, ("run", "attach")),
                f"(!{_is(names.MODE, 'run')} || variables.runs)",
                *(_annotation(name, ("true", "false")) for name in (names.SPREAD, names.NEVER_PARK)),
                _annotation(names.TOKEN, ("secret", "account")),
                f"(!({quoted(names.SECRET)} in variables.annotations) || (variables.secret.size() < 254"
                f" && variables.secret.matches({quoted(f'^{SECRET_NAME.pattern}$')})"
                f" && !{_is(names.TOKEN, 'account')}))",
                f"(!has(object.spec.volumes) || object.spec.volumes.all(v, v.name != {quoted(names.VOLUME)}))",
                "(!has(variables.container.volumeMounts) || variables.container.volumeMounts.all(m,"
                f" !m.mountPath.startsWith({quoted(names.FOLDER)})))",
            ]
        ),
        "byAccount": f"{quoted(names.TOKEN)} in variables.annotations ? {_is(names.TOKEN, 'account')}"
        f" : variables.accountTokens && !({quoted(names.SECRET)} in variables.annotations)",
        "share": "variables.percent == 100 ? '1' : variables.percent % 10 == 0 ? '0.' + string(variables.percent / 10)"
        " : (variables.percent < 10 ? '0.0' : '0.') + string(variables.percent)",
        "wanted": _wanted(memory),
        "words": f"{words(RUN)} + ({memory} in {limits} ? ['-m', variables.memory] : [])"
        f" + ({_is(names.SPREAD, 'true')} ? ['--spread'] : [])"
        f" + ({_is(names.NEVER_PARK, 'true')} ? ['--never-park'] : []) + ['--']",
        "at": "'/spec/containers/' + string(object.spec.containers.map(c, c.name).indexOf(variables.names[0]))",
    }


def _labelled(value: str) -> str:
    label = quoted(names.INJECT)
    return f"({label} in variables.labels && variables.labels[{label}] == {quoted(value)})"


def _wanted(memory: str) -> str:
    """Return the variables of the container, in the order in which the webhook adds those that are missing."""
    first: list[dict[str, Any]] = [{"name": NUM_GPUS, "value": Expression("string(variables.gpus)")}]
    rest: list[dict[str, Any]] = [{"name": CONFIG_DIR, "value": names.FOLDER}]
    rest += [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in DOWNWARD.items()
    ]
    fraction = [{"name": PARTIAL_GPU, "value": Expression("variables.share")}]
    return (
        f"({literal(first)} + ({memory} in variables.limits ? [] : {literal(fraction)}) + {literal(rest)})"
        ".filter(w, !variables.env.exists(e, e.name == w.name))"
    )


def _at(path: str) -> str:
    """Return a place below the container that gets the GPUs, as CEL."""
    return f"variables.at + {quoted('/' + path)}"


def _joined(lists: list[str]) -> str:
    """Return all lists as one, in CEL; as a tree, because parsers limit how deep an expression is."""
    if len(lists) == 1:
        return lists[0]
    half = len(lists) // 2
    return f"({_joined(lists[:half])} + {_joined(lists[half:])})"


def _escaped(name: str) -> str:
    return name.replace("/", "~1")


def _mutation() -> str:
    """Return the operations as CEL."""
    label = _escaped(names.INJECTED)
    volume = (
        f"variables.byAccount ? dyn({literal(account_volume())})"
        f" : dyn({literal(secret_volume(Expression('variables.secret')))})"
    )
    operations = [
        f"(has(object.metadata.labels) ? [] : [{patch('add', quoted('/metadata/labels'), {})}])",
        f"[{patch('add', quoted('/metadata/labels/' + label), 'true')}]",
        f"(has(object.spec.volumes) ? [] : [{patch('add', quoted('/spec/volumes'), [])}])",
        f"[{patch('add', quoted('/spec/volumes/-'), Expression(volume))}]",
        *(
            f"(has(variables.container.{field}) ? [] : [{patch('add', _at(field), [])}])"
            for field in ("volumeMounts", "env")
        ),
        f"[{patch('add', _at('volumeMounts/-'), mount_of(names.VOLUME, names.FOLDER))}]",
        f"variables.wanted.map(w, {patch('add', _at('env/-'), Expression('w'))})",
        f"(has(variables.container.resources) ? [] : [{patch('add', _at('resources'), {})}])",
    ]
    for kind in ("limits", "requests"):
        place = _at(f"resources/{kind}")
        added = patch("add", _at(f"resources/{kind}/{_escaped(names.SLICE)}"), Expression("variables.slices"))
        operations += [
            f"(has(variables.resources.{kind}) ? [] : [{patch('add', place, {})}])",
            *(
                f"({quoted(name)} in variables.{kind}"
                f" ? [{patch('remove', _at(f'resources/{kind}/{_escaped(name)}'))}] : [])"
                for name in names.ASKED
            ),
            f"[{added}]",
        ]
    command = patch("replace", _at("command"), Expression("variables.words + variables.command"))
    operations.append(f"(variables.runs ? [{command}] : [])")
    return f"!variables.serves ? [] : {_joined(operations)}"


def admission_policies(
    namespace: str,
    version: tuple[int, int],
    labels: dict[str, str],
    gpu_memory_mib: int | None = None,
    account_tokens: bool = False,
) -> list[dict[str, Any]]:
    """Return the policy, the one that refuses Pods which nothing served, and their bindings.

    ``namespace``: whose Pods they leave alone. ``version``: of the API server, at least ``POLICIES_BETA``.
    """
    assert version >= POLICIES_BETA
    api = f"{_GROUP}/{'v1' if version >= POLICIES_V1 else 'v1beta1'}"
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    elsewhere = {
        "key": "kubernetes.io/metadata.name",
        "operator": "NotIn",
        "values": [namespace, "kube-system"],
    }
    common: dict[str, Any] = {
        "failurePolicy": "Fail",
        "matchConstraints": {
            "namespaceSelector": {"matchExpressions": [elsewhere]},
            "resourceRules": [rule],
        },
        "matchConditions": [{"name": "asks-for-gpus", "expression": asks_in_cel()}],
    }
    variables = [
        {"name": name, "expression": text}
        for name, text in _variables(gpu_memory_mib, account_tokens).items()
    ]
    mutation = {"patchType": "JSONPatch", "jsonPatch": {"expression": _mutation()}}
    mutates = {**common, "reinvocationPolicy": "IfNeeded", "variables": variables, "mutations": [mutation]}
    refuses = {**common, "validations": _validations()}

    def named(api: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
        return {"apiVersion": api, "kind": kind, "metadata": {"name": NAME, "labels": labels}, "spec": spec}

    return [
        named(api, "MutatingAdmissionPolicy", mutates),
        named(api, "MutatingAdmissionPolicyBinding", {"policyName": NAME}),
        named(f"{_GROUP}/v1", "ValidatingAdmissionPolicy", refuses),
        named(
            f"{_GROUP}/v1",
            "ValidatingAdmissionPolicyBinding",
            {"policyName": NAME, "validationActions": ["Deny"]},
        ),
    ]


def _validations() -> list[dict[str, str]]:
    """Return what holds for every Pod that was served, or does not want to be: what the webhook would refuse, these do.

    Quantities are written as API servers do, so that no other text means 0.
    """
    label = quoted(names.INJECT)
    labelled = (
        f"has(object.metadata.labels) && {label} in object.metadata.labels && object.metadata.labels[{label}]"
    )
    mirror = (
        "has(object.metadata.annotations) && 'kubernetes.io/config.mirror' in object.metadata.annotations"
    )
    excused = f"({mirror}) || ({labelled} == 'false')"
    limits, injected = "c.resources.limits", is_injected_in_cel("c")
    asked = f"n in {words(names.ASKED)}"
    unserved = f"{asked} && string({limits}[n]) != '0'"
    unknown = f"n.{_OURS} && !({asked}) && !(n == {quoted(names.SLICE)} && {injected})"

    def no(containers: str, resource: str) -> str:
        return (
            f"{excused} || !object.spec.{containers}.exists(c, has(c.resources) && has({limits})"
            f" && {limits}.exists(n, {resource}))"
        )

    why = (
        "nothing gave this Pod its GPU slices. The cluster's policy serves Pods that ask by whole numbers, or by "
        "NUM_GPUS and PARTIAL_GPU with at most two decimals, for one container, without the annotations "
        f"{names.FILTERS} and {names.CLIENT}"
    )
    resources = (
        f"a container can ask for {', '.join(names.ASKED)}; {names.SLICE} is what the cluster's policy writes"
    )
    found = {
        no("containers", unknown): resources,
        f"!has(object.spec.initContainers) || {no('initContainers', f'n.{_OURS} && !({asked}) || {unserved}')}": (
            "an init container asks for GPUs; only a container can have them"
        ),
        no("containers", unserved): why,
        f"{excused} || !({labelled} == 'true') || object.spec.containers.exists(c, {injected})": why,
    }
    return [{"expression": expression, "message": message} for expression, message in found.items()]
