"""What the webhook makes of Pods: as values, without a server."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import kubernetes_validate
import pytest
from hypothesis import given, settings

from jupyter_gpupool.kubernetes import names
from jupyter_gpupool.kubernetes.injection import Settings, injected
from jupyter_gpupool.kubernetes.json_patch import difference
from jupyter_gpupool.kubernetes.review import reviewed

from ..conftest import often
from .pods import JSON, damaged, figure_12, pod, pods, problems, review

#: The oldest Kubernetes whose API server looks at resources, and the newest that the schemas know.
VERSIONS = ("1.28", "1.37")
SETTINGS = Settings(client_image="gpupool:1")


def patched(value: Any, patch: list[dict[str, Any]]) -> Any:
    """Apply a patch as an API server does; only the operations that are made here."""
    value = copy.deepcopy(value)
    for operation in patch:
        *path, last = [p.replace("~1", "/").replace("~0", "~") for p in operation["path"].split("/")[1:]]
        place = value
        for step in path:
            place = place[int(step)] if isinstance(place, list) else place[step]
        if operation["op"] == "remove":
            del place[last]
        elif isinstance(place, list) and last == "-":
            place.append(operation["value"])
        else:
            place[int(last) if isinstance(place, list) else last] = operation["value"]
    return value


def answer(review: Any, settings: Settings = SETTINGS) -> dict[str, Any]:
    return reviewed(review, settings)["response"]


def admitted(given_pod: dict[str, Any]) -> dict[str, Any]:
    """The Pod as the API server has it then."""
    response = answer(review(given_pod))
    assert response["allowed"], response["status"]["message"]
    return (
        patched(given_pod, json.loads(base64.b64decode(response["patch"])))
        if "patch" in response
        else given_pod
    )


def refusal(given_pod: dict[str, Any]) -> str:
    response = answer(review(given_pod))
    assert not response["allowed"]
    message: str = response["status"]["message"]
    assert "\n" not in message
    return message


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {
        variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]
    }


def test_figure_12_gets_its_slices() -> None:
    after = admitted(figure_12())
    (container,) = after["spec"]["containers"]
    assert container["command"] == [
        "gpupool",
        "run",
        "--wait-for-pool",
        "--",
        "/workspace/dlbs/run_pytorch.sh",
    ]
    assert container["resources"] == {"limits": {names.SLICE: "160"}, "requests": {names.SLICE: "160"}}
    variables = environment(container)
    assert (variables["NUM_GPUS"], variables["PARTIAL_GPU"], variables["USER"]) == ("2", "0.8", "cnasg-user")
    assert variables["GPUPOOL_POD_UID"] == {"fieldRef": {"fieldPath": "metadata.uid"}}
    mount = next(m for m in container["volumeMounts"] if m["name"] == names.VOLUME)
    assert mount == {"name": names.VOLUME, "mountPath": variables["GPUPOOL_CONFIG_DIR"], "readOnly": True}
    assert after["spec"]["volumes"][-1]["secret"] == {"secretName": "gpupool", "defaultMode": 0o444}
    untouched = copy.deepcopy(after)
    assert untouched["metadata"]["labels"].pop(names.INJECTED) == "true"
    for part in ("volumes", "containers"):
        untouched["spec"][part] = figure_12()["spec"][part]
    assert untouched == figure_12()


def test_resources_become_one_resource_and_the_environment() -> None:
    asked = {names.GPU: "2", names.SHARE_PERCENT: "80", "cpu": "1"}
    (container,) = admitted(pod(asked, command=["python", "train.py"]))["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "1", names.SLICE: "160"}
    assert container["resources"]["requests"] == {names.SLICE: "160"}
    assert (environment(container)["NUM_GPUS"], environment(container)["PARTIAL_GPU"]) == ("2", "0.8")


@pytest.mark.parametrize(
    ("gpu_memory_mib", "slices"), [(None, "200"), (32510, "26"), (4096, "200"), (1, "200")]
)
def test_memory_counts_by_the_memory_of_a_gpu(gpu_memory_mib: int | None, slices: str) -> None:
    given_pod = pod({names.GPU: "2", names.MEMORY_MIB: "4096"}, command=["sh"])
    after = injected(given_pod, Settings(gpu_memory_mib))
    assert after is not None
    (container,) = after["spec"]["containers"]
    assert container["resources"]["limits"] == {names.SLICE: slices}
    assert container["command"] == ["gpupool", "run", "--wait-for-pool", "-m", "4096", "--", "sh"]
    assert "PARTIAL_GPU" not in environment(container)


def test_annotations_become_options() -> None:
    annotations = {names.FILTERS: "name=V100, emulated=true", names.SPREAD: "true", names.SECRET: "team-a"}
    after = admitted(pod({names.GPU: "1"}, annotations=annotations, command=["sh"]))
    (container,) = after["spec"]["containers"]
    options = ["--filter", "name=V100", "--filter", "emulated=true", "--spread"]
    assert container["command"] == ["gpupool", "run", "--wait-for-pool", *options, "--", "sh"]
    assert after["spec"]["volumes"][-1]["secret"]["secretName"] == "team-a"


def test_a_pod_can_use_the_token_of_its_account_in_place_of_the_secret() -> None:
    def volume(settings: Settings, **annotations: str) -> dict[str, Any]:
        given = pod(
            {names.GPU: "1"},
            command=["sh"],
            annotations={f"gpupool.io/{k}": v for k, v in annotations.items()},
        )
        after = injected(given, settings)
        assert after is not None and injected(after, settings) is None
        return dict(after["spec"]["volumes"][-1])

    for chosen, said in ((Settings(), {"token": "account"}), (Settings(account_tokens=True), {})):
        token, config = volume(chosen, **said)["projected"]["sources"]
        wanted = {"audience": "gpupool", "expirationSeconds": 3600, "path": "token"}
        assert token["serviceAccountToken"] == wanted
        assert [item["path"] for item in config["configMap"]["items"]] == ["ca.crt", "servers.conf"]
    for said in ({"token": "secret"}, {"secret": "own"}):
        assert "secret" in volume(Settings(account_tokens=True), **said)
    assert "gpupool.io/token must be secret or account" in refusal(
        pod({names.GPU: "1"}, annotations={names.TOKEN: "mine"})
    )


def test_an_init_container_copies_the_client_where_the_image_lacks_it() -> None:
    copies = {names.CLIENT: "copy"}
    after = admitted(pod({names.GPU: "1"}, annotations=copies, command=["python", "train.py"]))
    spec = after["spec"]
    (copying,), (container,) = spec["initContainers"], spec["containers"]
    command = [f"{names.CLIENT_FOLDER}/bin/gpupool", "run", "--wait-for-pool", "--", "python", "train.py"]
    assert container["command"] == command
    assert "PYTHONPATH" not in environment(container)
    assert copying["image"] == "gpupool:1"
    assert copying["command"] == ["gpupool", "kubernetes", "copy-client", names.CLIENT_FOLDER]
    for one, reads in ((copying, False), (container, True)):
        (mount,) = [m for m in one["volumeMounts"] if m["name"] == names.CLIENT_VOLUME]
        assert (mount["mountPath"], mount.get("readOnly", False)) == (names.CLIENT_FOLDER, reads)
    assert [v["name"] for v in spec["volumes"] if "emptyDir" in v] == [names.CLIENT_VOLUME]
    assert names.SLICE not in copying["resources"]["limits"]
    # One whose program attaches by itself finds the client by the variable, beside what its author wrote there.
    for written, value in (([], "/opt/gpupool/lib"), (env("PYTHONPATH", "/own"), "/opt/gpupool/lib:/own")):
        attaching = admitted(pod({names.GPU: "1"}, annotations=copies, env=written))
        assert environment(attaching["spec"]["containers"][0])["PYTHONPATH"] == value
    # A later variable may mean what stands before it.
    written = [*env("PYTHONPATH", "/own"), *env("SEARCHED", "$(PYTHONPATH)")]
    attaching = admitted(pod({names.GPU: "1"}, annotations=copies, env=written))
    order = [one["name"] for one in attaching["spec"]["containers"][0]["env"]]
    assert order.index("PYTHONPATH") < order.index("SEARCHED")


def test_without_an_image_to_copy_from_such_a_pod_is_refused() -> None:
    asked = pod({names.GPU: "1"}, annotations={names.CLIENT: "copy"}, command=["true"])
    refused = answer(review(asked), Settings())
    assert "use an image that contains jupyter_gpupool" in refused["status"]["message"]


@pytest.mark.parametrize(
    ("command", "annotations"),
    [
        (None, {}),  # the image's entrypoint cannot be seen
        (["python", "attaches.py"], {names.MODE: "attach"}),
        (["/opt/bin/gpupool", "run", "--", "python", "train.py"], {}),
    ],
)
def test_a_program_that_attaches_by_itself_keeps_its_command(
    command: list[str] | None, annotations: dict[str, str]
) -> None:
    (container,) = admitted(pod({names.GPU: "1"}, command=command, annotations=annotations))["spec"][
        "containers"
    ]
    assert container.get("command") == command
    assert "GPUPOOL_CONFIG_DIR" in environment(container)


@pytest.mark.parametrize(
    "other",
    [
        pod(),
        pod({"cpu": "1"}),
        pod({names.GPU: "0"}),
        pod({names.GPU: "1"}, labels={names.INJECT: "false"}),
        pod(env=[{"name": "NUM_GPUS", "value": "2"}]),  # means nothing of ours without the label
        pod({names.GPU: "1"}, annotations={"kubernetes.io/config.mirror": "x"}),
    ],
)
def test_other_pods_stay_as_they_are(other: dict[str, Any]) -> None:
    assert answer(review(other)) == {"uid": review(other)["request"]["uid"], "allowed": True}


@pytest.mark.parametrize(
    "request_",
    [{"operation": "UPDATE"}, {"subResource": "ephemeralcontainers"}, {"kind": {"kind": "Deployment"}}],
)
def test_other_calls_are_none_of_its_business(request_: dict[str, Any]) -> None:
    assert "patch" not in answer(review(figure_12(), **request_))


def env(name: str, value: str) -> list[dict[str, Any]]:
    return [{"name": name, "value": value}]


LABEL = {names.INJECT: "true"}


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (
            pod(labels=LABEL, env=env("NUM_GPUS", "two")),
            "NUM_GPUS must be a whole number from 1 up, not 'two'",
        ),
        (
            pod(labels=LABEL, env=env("PARTIAL_GPU", "80")),
            "PARTIAL_GPU must be a number above 0 and at most 1",
        ),
        (pod(labels=LABEL, env=env("NUM_GPUS", "9" * 30)), "NUM_GPUS must be from 1 to 65536"),
        (
            pod(
                labels=LABEL,
                env=[{"name": "NUM_GPUS", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
            ),
            "NUM_GPUS must have a value",
        ),
        (pod({names.GPU: "1500m"}), "gpupool.io/gpu must be a whole number, not '1500m'"),
        (pod({names.SHARE_PERCENT: "101"}), "gpupool.io/share-percent must be from 1 to 100, not 101"),
        (pod({names.SHARE_PERCENT: "50", names.MEMORY_MIB: "4096"}), "ask for either"),
        (pod({names.GPU: "2"}, env=env("NUM_GPUS", "1")), "gpupool.io/gpu is 2 and NUM_GPUS is 1"),
        (pod({names.SHARE_PERCENT: "50"}, env=env("PARTIAL_GPU", "0.6")), "and PARTIAL_GPU is 0.6"),
        (pod({names.MEMORY_MIB: "9"}, env=env("PARTIAL_GPU", "1")), "cannot be combined"),
        (pod({names.SLICE: "80"}), "gpupool.io/slice is what the webhook writes"),
        (pod({"gpupool.io/gpus": "1"}), "unknown resource 'gpupool.io/gpus'"),
        (pod({names.GPU: "1"}, annotations={"gpupool.io/filter": "name=V100"}), "unknown annotation"),
        (pod({names.GPU: "1"}, annotations={names.FILTERS: "colour=red"}), "unknown filter 'colour'"),
        (pod({names.GPU: "1"}, annotations={names.FILTERS: "V100"}), "NAME=VALUE"),
        (pod({names.GPU: "1"}, annotations={names.SPREAD: "yes"}), '"true" or "false"'),
        (pod({names.GPU: "1"}, annotations={names.MODE: "run"}), "the image's entrypoint cannot be seen"),
        (pod({names.GPU: "1"}, annotations={names.CONTAINER: "other"}), "the Pod's containers are 'train'"),
        (pod({names.GPU: "1"}, annotations={names.CLIENT: "yes"}), "must be image or copy, not 'yes'"),
        (
            pod(
                {names.GPU: "1"},
                annotations={names.CLIENT: "copy"},
                env=[{"name": "PYTHONPATH", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
            ),
            "PYTHONPATH must have a value",
        ),
        (pod({names.GPU: "1"}, annotations={names.SECRET: "No Secret"}), "must be the name of a Secret"),
    ],
)
def test_a_refusal_says_in_a_line_what_to_change(refused: dict[str, Any], words: str) -> None:
    assert words in refusal(refused)


def test_one_of_several_containers_gets_the_gpus() -> None:
    two = pod({names.GPU: "1"})
    two["spec"]["containers"].append({"name": "sidecar", "image": "sidecar:1"})
    first, second = admitted(two)["spec"]["containers"]
    assert names.SLICE in first["resources"]["limits"]
    assert second == two["spec"]["containers"][1]

    labelled = pod(labels=LABEL)
    labelled["spec"]["containers"].append({"name": "sidecar", "image": "sidecar:1"})
    assert names.CONTAINER in refusal(labelled)
    labelled["metadata"]["annotations"] = {names.CONTAINER: "sidecar"}
    assert names.SLICE in admitted(labelled)["spec"]["containers"][1]["resources"]["limits"]

    two["spec"]["containers"][1]["resources"] = {"limits": {names.GPU: "1"}}
    assert "a Pod holds one lease" in refusal(two)


def test_init_containers_cannot_have_gpus() -> None:
    asking = pod()
    asking["spec"]["initContainers"] = [{"name": "before", "resources": {"limits": {names.GPU: "1"}}}]
    assert "the init container 'before' asks for GPUs" in refusal(asking)


def test_what_a_pod_has_at_the_webhooks_places_is_not_overwritten() -> None:
    taken = figure_12()
    taken["spec"]["volumes"].append({"name": names.VOLUME, "emptyDir": {}})
    assert "is taken" in refusal(taken)
    copies = pod({names.GPU: "1"}, annotations={names.CLIENT: "copy"}, command=["true"])
    copies["spec"]["initContainers"] = [{"name": names.CLIENT_VOLUME}]
    assert "give the Pod's own init container another name" in refusal(copies)
    mounted = figure_12()
    mounted["spec"]["containers"][0]["volumeMounts"].append(
        {"name": "data-vol", "mountPath": names.FOLDER + "/"}
    )
    assert "give it another path" in refusal(mounted)


@pytest.mark.soak
@settings(max_examples=often(300, 5000), deadline=None)
@given(pods())
def test_an_admitted_pod_is_valid_and_is_admitted_once(given_pod: dict[str, Any]) -> None:
    before = copy.deepcopy(given_pod)
    response = answer(review(given_pod))
    assert given_pod == before
    if not response["allowed"]:
        assert 0 < len(response["status"]["message"]) < 500
        assert "\n" not in response["status"]["message"]
        return
    after = admitted(given_pod)
    assert admitted(after) == after
    if "patch" in response:
        assert after == injected(given_pod, SETTINGS)
        assert problems(after) == []
        for version in VERSIONS:
            kubernetes_validate.validate(after, version, strict=True)
        counted = [
            c["resources"]["limits"].get(names.SLICE) for c in after["spec"]["containers"] if "resources" in c
        ]
        assert [int(n) > 0 for n in counted if n is not None] == [True]


@pytest.mark.soak
@settings(max_examples=often(500, 5000), deadline=None)
@given(damaged())
def test_a_damaged_review_has_an_answer_or_is_none(value: Any) -> None:
    from jupyter_gpupool.core.errors import InvalidRequest

    try:
        response = reviewed(value, Settings())["response"]
    except InvalidRequest as e:
        assert "AdmissionReview" in str(e) or "must be an object" in str(e)
        return
    assert isinstance(response["allowed"], bool)
    json.dumps(response)


@pytest.mark.soak
@settings(max_examples=often(200, 5000), deadline=None)
@given(JSON, JSON)
def test_a_patch_leads_from_one_value_to_the_other(before: Any, after: Any) -> None:
    before, after = {"root": before}, {"root": after}
    assert patched(before, difference(before, after)) == after
