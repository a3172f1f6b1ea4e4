"""Pods for tests: Figure 12's, arbitrary valid ones, and what may not be in any."""

from __future__ import annotations

import copy
import re
from typing import Any

from hypothesis import strategies as st

from jupyter_gpupool.kubernetes import names

#: Ends when it is asked to, as the first process of a container has to by itself.
WAIT = ["python", "-c", "import signal; signal.sigwait([signal.SIGTERM])"]
#: Ends when it is killed.
STUBBORN = [
    *WAIT[:2],
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.sigwait([signal.SIGUSR1])",
]

#: Asks the pool again and again, by a new process each time.
ASKS = "trap 'exit 0' TERM; while :; do if gpupool leases >&2; then echo answered; else echo refused; fi; sleep 1; done"

#: The case study's Pod (Figure 12), labelled so that its environment counts.
FIGURE_12: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "labels": {"run": "pod-pytorch-mock-bitfusion", "gpupool.io/inject": "true"},
        "name": "pod-pytorch-mock-bitfusion",
    },
    "spec": {
        "containers": [
            {
                "name": "pod-pytorch-mock-bitfusion",
                "image": "172.24.206.3/cnasg/pytorch-mock-bitfusion:latest",
                "imagePullPolicy": "Always",
                "command": ["/workspace/dlbs/run_pytorch.sh"],
                "env": [
                    {"name": "BATCH_SIZE", "value": "64"},
                    {"name": "OUTPUT_PATH", "value": "/tmp/data/"},
                    {"name": "NUM_GPUS", "value": "2"},
                    {"name": "PARTIAL_GPU", "value": "0.8"},
                    {"name": "USER", "value": "cnasg-user"},
                ],
                "volumeMounts": [{"name": "data-vol", "mountPath": "/tmp/data/"}],
            }
        ],
        "imagePullSecrets": [{"name": "cred-pytorch-mock-bitfusion"}],
        "restartPolicy": "Never",
        "dnsPolicy": "ClusterFirst",
        "volumes": [
            {"name": "data-vol", "persistentVolumeClaim": {"claimName": "pvc-pytorch-mock-bitfusion"}}
        ],
    },
}


#: Figure 13, with what differs from run to run left open.
FIGURE_13 = [
    r"\[INFO\] \S+ Query server (\S+) to claim client id: [0-9a-f-]{36}",
    r"\[INFO\] \S+ Query server \S+ gpu availability",
    r"\[INFO\] \S+ Query server health status",
    r"\[INFO\] \S+ Choosing GPUs from server list \[\S+\]",
    r"\[INFO\] \S+ Requesting GPUs \[0 1\] with 26008 MiB of memory from server 0, with version \S+\.\.\.",
    r"Requested resources:",
    r"Server List: \S+",
    r"Client idle timeout: 0 min",
    r"\[INFO\] \S+ Locked 2 GPUs with partial memory 0\.8, configuration saved to '/tmp/\S+'",
    r"\[INFO\] \S+ Running client command '/workspace/dlbs/run_pytorch\.sh' on 2 GPUs, with the following servers:",
    r"Train Epoch: 1 \[0/\d+ \(0%\)\] Loss: [\d.]+",
    r"\[INFO\] \S+ Released GPUs on 1 servers",
]


def missing_line(log: str) -> str:
    """Which line of Figure 13 a log lacks, or does not have in its place; empty where it has all."""
    place = 0
    for line in FIGURE_13:
        found = re.compile(line).search(log, place)
        if found is None:
            return line
        place = found.end()
    return ""


def figure_12() -> dict[str, Any]:
    return copy.deepcopy(FIGURE_12)


def pod(
    limits: dict[str, Any] | None = None,
    *,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    env: list[dict[str, Any]] | None = None,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """A Pod of one container."""
    container: dict[str, Any] = {"name": "train", "image": "train:1"}
    if limits:
        container["resources"] = {"limits": limits}
    if env:
        container["env"] = env
    if command:
        container["command"] = command
    metadata = {"name": "train", "labels": labels, "annotations": annotations}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {key: value for key, value in metadata.items() if value},
        "spec": {"containers": [container]},
    }


def review(pod: Any, **request: Any) -> dict[str, Any]:
    """The API server's question about a new Pod."""
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    asked = {
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
        "kind": kind,
        "operation": "CREATE",
        "object": pod,
    }
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {**asked, **request}}


def problems(pod: dict[str, Any]) -> list[str]:
    """What an API server would refuse although the schema allows it: names that are twice, mounts of nothing."""
    found = []
    spec = pod["spec"]
    programs = [
        container["name"] for part in ("initContainers", "containers") for container in spec.get(part, [])
    ]
    if len(set(programs)) != len(programs):
        found.append("a container's name is twice")
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    if len(set(volumes)) != len(volumes):
        found.append("a volume's name is twice")
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        mounts = container.get("volumeMounts", [])
        if {mount["name"] for mount in mounts} - set(volumes):
            found.append("a mount of no volume")
        if len({mount["mountPath"] for mount in mounts}) != len(mounts):
            found.append("a path is mounted twice")
        both = container.get("resources", {})
        limits, requests = both.get("limits", {}), both.get("requests", {})
        for name in {n for n in {**limits, **requests} if n.startswith(names.DOMAIN)}:
            if limits.get(name) != requests.get(name, limits.get(name)) or not str(limits[name]).isdigit():
                found.append(f"{name} is no whole number that is requested and limited alike")
    return found


_NAMES = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
_VALUES = st.one_of(
    st.sampled_from(
        ["1", "2", "8", "0.5", "0.8", "1.0", "1e-3", "0", "-1", "", " 2 ", "nan", "$(N)", "x", "٣"]
    ),
    st.text("0123456789.e-", max_size=6),
)
_VARIABLES = st.one_of(
    st.builds(
        lambda name, value: {"name": name, "value": value},
        st.sampled_from(["NUM_GPUS", "PARTIAL_GPU"]),
        _VALUES,
    ),
    st.builds(lambda value: {"name": "BATCH_SIZE", "value": value}, st.text(max_size=5)),
    st.just({"name": "NUM_GPUS", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}),
    st.just({"name": "GPUPOOL_CONFIG_DIR", "value": "/own"}),
)
_QUANTITIES = st.one_of(
    st.integers(0, 10).map(str),
    st.sampled_from(
        ["100", "80", "4096", "8000", "1k", "2000m", "1Ki", "1e2", "0.5", "101", "99999999999999999"]
    ),
)


@st.composite
def containers(draw: st.DrawFn, volumes: list[str]) -> dict[str, Any]:
    container: dict[str, Any] = {"name": draw(_NAMES), "image": "image:1"}
    if draw(st.booleans()):
        limits = draw(
            st.dictionaries(
                st.sampled_from([*names.ASKED, names.SLICE, f"{names.GPU}s", "cpu"]), _QUANTITIES, max_size=3
            )
        )
        container["resources"] = {"limits": limits}
        if draw(st.booleans()):
            container["resources"]["requests"] = dict(limits)
    if draw(st.booleans()):
        container["env"] = draw(st.lists(_VARIABLES, max_size=4))
    if draw(st.booleans()):
        container["command"] = draw(
            st.one_of(
                st.lists(st.text(max_size=8), min_size=1, max_size=3), st.just(["gpupool", "run", "--", "sh"])
            )
        )
    if volumes and draw(st.booleans()):
        path = draw(st.sampled_from(["/data", names.FOLDER, names.FOLDER + "/"]))
        container["volumeMounts"] = [{"name": draw(st.sampled_from(volumes)), "mountPath": path}]
    return container


@st.composite
def pods(draw: st.DrawFn) -> dict[str, Any]:
    """Valid Pods, most of which ask for something."""
    volumes = draw(st.lists(st.one_of(_NAMES, st.just(names.VOLUME)), max_size=2, unique=True))
    before = draw(st.sampled_from([0, 0, 0, 1]))
    made = draw(
        st.lists(containers(volumes), min_size=before + 1, max_size=before + 3, unique_by=lambda c: c["name"])
    )
    first, made = made[:before], made[before:]
    labels = draw(
        st.dictionaries(st.just(names.INJECT), st.sampled_from(["true", "true", "false", "yes"]), max_size=1)
    )
    texts = st.sampled_from(
        [
            "true",
            "false",
            "run",
            "attach",
            "copy",
            "name=V100",
            "name=V100,server=a",
            "own",
            "no=1",
            "",
            made[-1]["name"],
        ]
    )
    annotations = draw(st.dictionaries(st.sampled_from(names.ANNOTATIONS), texts, max_size=2))
    spec: dict[str, Any] = {"containers": made}
    if first:
        spec["initContainers"] = first
    if volumes:
        spec["volumes"] = [{"name": name, "emptyDir": {}} for name in volumes]
    metadata = {"name": draw(_NAMES), "labels": labels, "annotations": annotations}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=12)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=12), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A review in which something stands where something else belongs."""
    value: Any = review(draw(pods()))
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or draw(st.integers(0, 4)) == 0:
            place[key] = draw(JSON)
            return value
        place = inner
