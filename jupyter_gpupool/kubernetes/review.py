"""From an AdmissionReview to its answer. A pure function, which never fails."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from jupyter_gpupool.core.errors import InvalidRequest

from .injection import Settings, injected
from .json_patch import difference
from .pod_request import mapping

API_VERSION = "admission.k8s.io/v1"


def reviewed(review: object, settings: Settings) -> dict[str, Any]:
    """Return the AdmissionReview that answers ``review``. Raises InvalidRequest where it is none."""
    if not isinstance(review, Mapping) or review.get("kind") != "AdmissionReview":
        raise InvalidRequest("this is no AdmissionReview")
    if review.get("apiVersion") != API_VERSION:
        raise InvalidRequest(f"only AdmissionReviews of {API_VERSION} are answered")
    request = mapping(review, "request")
    uid = request.get("uid")
    if not isinstance(uid, str) or not uid:
        raise InvalidRequest("the AdmissionReview has no request with a uid")
    return {
        "apiVersion": API_VERSION,
        "kind": "AdmissionReview",
        "response": {"uid": uid, **_answer(request, settings)},
    }


def _answer(request: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    try:
        if mapping(request, "kind").get("kind") != "Pod" or request.get("operation") != "CREATE":
            return {"allowed": True}
        if request.get("subResource"):
            return {"allowed": True}
        pod = mapping(request, "object")
        after = injected(pod, settings)
    except InvalidRequest as e:
        line = " ".join(str(e).split())
        # Not 422 and Invalid, of which kubectl shows the details only: "The request is invalid".
        return {"allowed": False, "status": {"code": 400, "reason": "BadRequest", "message": line}}
    if after is None:
        return {"allowed": True}
    patch = json.dumps(difference(pod, after), separators=(",", ":"))
    return {"allowed": True, "patchType": "JSONPatch", "patch": base64.b64encode(patch.encode()).decode()}
