"""The manifests on the page about dynamic resource allocation are valid ones of the release that it names."""

from __future__ import annotations

import re
from pathlib import Path

import kubernetes_validate
import yaml

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "dra.md"


def test_its_manifests_are_valid_and_belong_together() -> None:
    text = PAGE.read_text()
    found = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)]
    for one in found:
        kubernetes_validate.validate(one, "1.37", strict=True)
    assert "schemas of 1.37" in text
    published, device_class, template = found
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    (device,) = published["spec"]["devices"]
    assert request["exactly"]["deviceClassName"] == device_class["metadata"]["name"]
    assert request["exactly"]["capacity"]["requests"].keys() <= device["capacity"].keys()
    assert published["spec"]["driver"] in device_class["spec"]["selectors"][0]["cel"]["expression"]
