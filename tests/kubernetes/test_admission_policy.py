"""The policies by which an API server serves Pods itself, evaluated by Google's CEL, beside what the webhook does."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.kubernetes import names
from jupyter_gpupool.kubernetes.admission_policy import SERVED, admission_policies
from jupyter_gpupool.kubernetes.injection import Settings, injected, is_injected
from jupyter_gpupool.kubernetes.manifests import Options, manifests

from ..conftest import often
from .cel_policy import Policy
from .pods import figure_12, pod, pods
from .test_review import patched

PLAIN = Settings()
SETTINGS = st.builds(Settings, st.sampled_from([None, 4096, 32510]), st.booleans())


@functools.cache
def policies(settings: Settings = PLAIN) -> tuple[Policy, Policy]:
    """What changes Pods, and what refuses those that nothing has served."""
    made = admission_policies("gpus", (1, 36), {}, settings.gpu_memory_mib, settings.account_tokens)
    mutating, validating = (one["spec"] for one in made if one["kind"].endswith("Policy"))
    return Policy(mutating), Policy(validating)


def served(given_pod: dict[str, Any], settings: Settings = PLAIN) -> dict[str, Any] | None:
    """The Pod as the policy leaves it; None where it leaves it alone."""
    patch = policies(settings)[0].patches(given_pod)
    return patched(given_pod, patch) if patch else None


def allowed(given_pod: dict[str, Any]) -> bool:
    return refusal(given_pod) is None


def refusal(given_pod: dict[str, Any]) -> str | None:
    return policies()[1].refusal(given_pod)


@st.composite
def plain_pods(draw: st.DrawFn) -> dict[str, Any]:
    """Pods as most people write them; the policy has to serve all of them."""
    limits: dict[str, Any] = {"cpu": "2"}
    env = [{"name": "BATCH_SIZE", "value": "64"}]
    if draw(st.booleans()):
        limits[names.GPU] = str(draw(st.integers(1, 16)))
        memory = draw(st.sampled_from(["", names.SHARE_PERCENT, names.MEMORY_MIB]))
        if memory:
            numbers = st.integers(1, 100).map(str)
            if memory == names.MEMORY_MIB:
                numbers |= st.sampled_from(["4096", "8000", "8k", "16000", "100000"])
            limits[memory] = draw(numbers)
    else:
        env.append({"name": "NUM_GPUS", "value": str(draw(st.integers(1, 16)))})
        fraction = draw(st.integers(1, 100)) / 100
        env.append(
            {"name": "PARTIAL_GPU", "value": draw(st.sampled_from([f"{fraction}", f"{fraction:.2f}"]))}
        )
    texts = {
        names.SPREAD: st.sampled_from(["true", "false"]),
        names.NEVER_PARK: st.sampled_from(["true", "false"]),
        names.TOKEN: st.sampled_from(["secret", "account"]),
        names.MODE: st.sampled_from(["run", "attach"]),
    }
    annotations = {name: draw(text) for name, text in texts.items() if draw(st.booleans())}
    if annotations.get(names.TOKEN) != "account" and draw(st.booleans()):
        annotations[names.SECRET] = "team-a.gpus"
    made = pod(
        limits, labels={names.INJECT: "true"}, annotations=annotations, env=env, command=["sh", "-c", "true"]
    )
    if draw(st.booleans()):
        before, after = {"name": "before", "image": "b:1"}, {"name": "after", "image": "a:1"}
        made["spec"]["containers"] = [before, *made["spec"]["containers"], after]
    if draw(st.booleans()):
        (container,) = [one for one in made["spec"]["containers"] if one["name"] == "train"]
        container["resources"]["requests"] = dict(limits)
    return made


@pytest.mark.soak
@settings(max_examples=often(60, 1000))
@given(plain_pods(), SETTINGS)
def test_plain_pods_get_what_the_webhook_gives_them(given_pod: dict[str, Any], chosen: Settings) -> None:
    after = served(given_pod, chosen)
    assert after is not None
    assert after == injected(given_pod, chosen)
    assert served(after, chosen) is None  # an API server may ask again
    assert allowed(after)
    kubernetes_validate.validate(after, "1.36", strict=True)


@pytest.mark.soak
@settings(max_examples=often(100, 2000))
@given(pods(), SETTINGS)
def test_any_pod_gets_what_the_webhook_gives_it_or_nothing(
    given_pod: dict[str, Any], chosen: Settings
) -> None:
    after = served(given_pod, chosen)
    if after is not None:
        assert after == injected(given_pod, chosen)
    assert after is None or is_injected(after)


@pytest.mark.soak
@settings(max_examples=often(100, 2000))
@given(pods())
def test_no_pod_runs_silently_without_its_slices(given_pod: dict[str, Any]) -> None:
    label = given_pod["metadata"]["labels"].get(names.INJECT)
    after = served(given_pod) or given_pod
    if allowed(after) and label != "false":
        wants = label == "true" or any(_asking(given_pod))
        assert is_injected(after) or not wants
        assert [name for name in _asking(after) if name != names.SLICE] == []


def _asking(given_pod: dict[str, Any]) -> Iterator[str]:
    """Our resources of all containers."""
    spec = given_pod["spec"]
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        for name, value in container.get("resources", {}).get("limits", {}).items():
            if name.startswith(f"{names.DOMAIN}/") and (name not in names.ASKED or value != "0"):
                yield name


@pytest.mark.soak
@settings(max_examples=often(60, 1000))
@given(st.one_of(pods(), plain_pods()))
def test_the_webhook_is_not_asked_about_pods_that_the_policy_has_served(given_pod: dict[str, Any]) -> None:
    conditions = _webhook("both")["matchConditions"]
    asked = Policy({"matchConditions": conditions[1:]})
    for one in (given_pod, served(given_pod) or given_pod):
        if one["metadata"].get("labels", {}).get(names.INJECT) != "false":
            assert asked.matches(one) == (not is_injected(one))


@pytest.mark.parametrize(
    ("written", "mib"), [("8000", "8000"), ("8k", "8000"), (16000, "16000"), ("4096", "4096")]
)
def test_memory_is_served_however_api_servers_write_it(written: object, mib: str) -> None:
    given_pod = pod({names.GPU: "1", names.MEMORY_MIB: written}, command=["true"])
    after = served(given_pod, Settings(32510))
    assert after is not None and after == injected(given_pod, Settings(32510))
    (container,) = after["spec"]["containers"]
    assert container["command"][3:5] == ["-m", mib]


def test_figure_12_is_served_as_it_is_written() -> None:
    assert served(figure_12()) == injected(figure_12())


@pytest.mark.parametrize(
    "other",
    [
        pod({names.GPU: "1"}, annotations={names.FILTERS: "name=V100"}),
        pod({names.GPU: "1"}, annotations={names.CLIENT: "copy"}),
        pod({names.GPU: "1k"}),
        pod(
            labels={names.INJECT: "true"},
            env=[{"name": "NUM_GPUS", "value": "1"}, {"name": "PARTIAL_GPU", "value": "0.125"}],
        ),
    ],
)
def test_what_it_cannot_serve_is_left_to_a_webhook_or_refused(other: dict[str, Any]) -> None:
    assert injected(other, Settings(client_image="gpupool:1")) is not None
    assert served(other) is None
    assert not allowed(other)


def _init(its: dict[str, str], **of: Any) -> dict[str, Any]:
    """A Pod with an init container that has limits."""
    made = pod(**of)
    made["spec"]["initContainers"] = [{"name": "before", "image": "b:1", "resources": {"limits": its}}]
    return made


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (pod({names.SLICE: "1"}, command=["true"]), "is what the cluster's policy writes"),
        (pod({names.SLICE: "0"}), "is what the cluster's policy writes"),
        (pod({names.GPU: "1", names.SLICE: "1"}), "is what the cluster's policy writes"),
        (pod({f"{names.GPU}s": "1"}), "a container can ask for gpupool.io/gpu, "),
        (pod({names.GPU: "1", f"{names.GPU}s": "1"}), "a container can ask for gpupool.io/gpu, "),
        (_init({names.GPU: "1"}), "only a container can have them"),
        (_init({names.GPU: "1"}, limits={names.GPU: "1"}), "only a container can have them"),
        (_init({names.SLICE: "1"}), "only a container can have them"),
        (_init({f"{names.GPU}s": "1"}), "only a container can have them"),
    ],
)
def test_what_the_webhook_refuses_is_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest):
        injected(other)
    assert served(other) is None
    assert message in (refusal(other) or "")


def test_slices_beside_those_that_it_has_given_are_refused() -> None:
    after = served(pod({names.GPU: "1"}))
    assert after is not None and allowed(after)
    after["spec"]["containers"].append(
        {"name": "b", "image": "b:1", "resources": {"limits": {names.SLICE: "1"}}}
    )
    assert not allowed(after)


@pytest.mark.parametrize(
    "other",
    [
        _init({names.GPU: "0"}),
        _init({names.GPU: "1"}, labels={names.INJECT: "false"}),
        pod({names.SLICE: "1"}, labels={names.INJECT: "false"}),
        pod(),
        pod({"cpu": "1"}),
        pod({names.GPU: "0"}),
        pod({names.GPU: "1"}, labels={names.INJECT: "false"}),
        pod(env=[{"name": "NUM_GPUS", "value": "2"}]),
        pod({names.GPU: "1"}, annotations={"kubernetes.io/config.mirror": "x"}),
    ],
)
def test_other_pods_start_as_they_are(other: dict[str, Any]) -> None:
    assert served(other) is None
    assert allowed(other)


@pytest.mark.parametrize("minor", [34, 35, 36, 37])
def test_the_policies_are_valid(minor: int) -> None:
    version = "v1" if minor >= 36 else "v1beta1"
    made = admission_policies("gpus", (1, minor), {"app": "a"}, 32510, True)
    for one in made:
        kubernetes_validate.validate(one, f"1.{minor}", strict=True)
    assert {one["apiVersion"] for one in made if "Mutating" in one["kind"]} == {
        f"admissionregistration.k8s.io/{version}"
    }


def test_names_of_annotations_that_need_a_webhook() -> None:
    assert set(names.ANNOTATIONS) - set(SERVED) == {names.FILTERS, names.CLIENT}


def _webhook(admission: str) -> dict[str, Any]:
    made = manifests(Options("gpupool:1", version=(1, 36), issuer="ca", admission=admission))
    (configuration,) = [one for one in made if one["kind"] == "MutatingWebhookConfiguration"]
    webhook: dict[str, Any] = configuration["webhooks"][0]
    return webhook


def test_without_a_webhook_there_is_none() -> None:
    made = manifests(Options("gpupool:1", version=(1, 36), admission="policy"))
    kinds = sorted(one["kind"] for one in made)
    assert kinds == [
        "MutatingAdmissionPolicy",
        "MutatingAdmissionPolicyBinding",
        "Namespace",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    ]
    assert len(_webhook("webhook")["matchConditions"]) == 1
