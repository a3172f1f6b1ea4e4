"""The policy that lets the controller create no other Secrets than those that it needs. Pure functions."""

from __future__ import annotations

from typing import Any

from .names import CONFIG_MAP, DEFAULT_SECRET

#: The first version with ValidatingAdmissionPolicies of v1.
POLICIES_V1 = (1, 30)
_VERSION = "admissionregistration.k8s.io/v1"


def creation_policy(name: str, namespace: str, labels: dict[str, str]) -> list[dict[str, Any]]:
    """Return the policy and its binding. ``name``: of the controller's account, and of these objects.

    Roles limit neither the name nor the type of what is created. Without this, whoever has the account could have a
    token of any other account put into a Secret, and read it.
    """
    metadata = {"name": name, "labels": labels}
    account = f"system:serviceaccount:{namespace}:{name}"
    is_secret = "request.resource.resource == 'secrets'"
    named = "has(object.metadata.name) && object.metadata.name =="
    rule = {
        "apiGroups": [""],
        "apiVersions": ["v1"],
        "operations": ["CREATE"],
        "resources": ["secrets", "configmaps"],
    }
    policy = {
        "apiVersion": _VERSION,
        "kind": "ValidatingAdmissionPolicy",
        "metadata": metadata,
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [rule]},
            "matchConditions": [
                {"name": "by-the-controller", "expression": f"request.userInfo.username == '{account}'"}
            ],
            "validations": [
                {
                    "expression": f"!({is_secret}) || ({named} '{DEFAULT_SECRET}')",
                    "message": f"the controller creates only Secrets named {DEFAULT_SECRET}",
                },
                {
                    "expression": f"!({is_secret}) || !has(object.type) || object.type == 'Opaque'",
                    "message": "the controller creates only Secrets of the type Opaque",
                },
                {
                    "expression": f"{is_secret} || ({named} '{CONFIG_MAP}')",
                    "message": f"the controller creates only ConfigMaps named {CONFIG_MAP}",
                },
            ],
        },
    }
    binding = {
        "apiVersion": _VERSION,
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": metadata,
        "spec": {"policyName": name, "validationActions": ["Deny"]},
    }
    return [policy, binding]
