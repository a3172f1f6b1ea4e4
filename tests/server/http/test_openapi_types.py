"""The OpenAPI document describes what a pool sends, and the panel's types are those of the document."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from jupyter_gpupool.core.models import (
    GPU,
    AskedBack,
    Lease,
    LeaseState,
    Parked,
    Request,
    Server,
    Slice,
    Snapshot,
    WorkerAddress,
)
from jupyter_gpupool.pool.tenancy.namespaces import Namespaces
from jupyter_gpupool.server.http.openapi.document import document
from jupyter_gpupool.server.watch.snapshot import pool_snapshot
from jupyter_gpupool.server.watch.visibility import VisiblePool, difference

HEAD = {"seq": 1, "at": 1.0}


def validator(name: str) -> Draft202012Validator:
    """Return the check against a schema of the document, in which no object has a field that the schema lacks."""
    schemas = json.loads(json.dumps(document()["components"]["schemas"]))
    for schema in schemas.values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}})


def as_sent(value: Any) -> Any:
    return json.loads(json.dumps(value))


def lease(server: Server, state: LeaseState = LeaseState.ACTIVE) -> Lease:
    gpu = server.gpus[0]
    worker = WorkerAddress("h", 1, 2, 3.0)
    return Lease(
        Request("1", "ada", partial=0.5, filters={"name": "V100"}),
        state,
        (Slice(gpu.uuid, server.name, 0, gpu.name, 5, 10),),
        WorkerAddress("h", 1, 2, 3.0, elsewhere={"two": worker}),
        granted_at=1.0,
        asked_back=(AskedBack("bob", 2.0),),
        parked=Parked(5, 2.0, 3.0) if state is LeaseState.PARKED else None,
    )


@pytest.fixture
def snapshot() -> Snapshot:
    server = Server("one", "h", (GPU("a", "one", 0, "Tesla V100", 10),))
    queued = Lease(Request("2", "bob", memory_mib=5), LeaseState.QUEUED, position=1)
    parked = lease(server, LeaseState.PARKED)
    parked = replace(parked, request=replace(parked.request, id="3"))
    return Snapshot((server,), {"a": 5}, (lease(server),), (queued,), (parked,))


def whole(snapshot: Snapshot, owner: str | None = None) -> dict[str, Any]:
    return pool_snapshot(snapshot, {}, owner, Namespaces())


@pytest.mark.parametrize("owner", [None, "ada", "bob"])
def test_the_pool_is_as_described(snapshot: Snapshot, owner: str | None) -> None:
    validator("Pool").validate(as_sent(whole(snapshot, owner)))


@pytest.mark.parametrize("owner", [None, "ada", "bob"])
def test_the_first_message_of_a_feed_is_as_described(snapshot: Snapshot, owner: str | None) -> None:
    leases = [*snapshot.leases, *snapshot.parked, *snapshot.queue]
    state = VisiblePool(whole(snapshot), leases, Namespaces()).narrow(owner)
    validator("StateMessage").validate(as_sent({"type": "state", "feed": "f", **HEAD, **state}))


def test_a_delta_is_as_described(snapshot: Snapshot) -> None:
    before = VisiblePool(whole(snapshot), snapshot.leases, Namespaces()).document
    after = VisiblePool(whole(Snapshot(snapshot.servers)), [], Namespaces()).document
    check = validator("DeltaMessage")
    for old, new in ((before, after), (after, before)):
        changes = difference(old, new)
        assert changes["gpus"] and changes["leases"]
        check.validate(as_sent({"type": "delta", **HEAD, **changes}))


@pytest.mark.parametrize("state", LeaseState)
def test_a_lease_is_as_described(snapshot: Snapshot, state: LeaseState) -> None:
    validator("Lease").validate(as_sent(lease(snapshot.servers[0], state).to_json()))


def vague(part: Any, path: str = "") -> Iterator[str]:
    """The places of lists and objects that do not say what they contain."""
    if isinstance(part, dict):
        kinds = part.get("type", ())
        if "array" in kinds and not part.get("items"):
            yield path
        if "object" in kinds and not {"properties", "additionalProperties"} & set(part):
            yield path
    if isinstance(part, (dict, list)):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from vague(value, f"{path}/{key}")


def test_every_list_and_object_says_what_it_contains() -> None:
    assert not list(vague(document()))


def test_a_forecast_takes_all_that_says_which_gpus_are_wanted() -> None:
    parameters = {p["name"] for p in document()["paths"]["/forecast"]["get"]["parameters"]}
    assert parameters == {"num_gpus", "partial", "memory_mib", "filter", "spread", "never_park", "namespace"}


def test_the_panels_types_are_those_of_the_document(project_root: Path, tmp_path: Path) -> None:
    assert (project_root / "node_modules/openapi-typescript").exists(), (
        "openapi-typescript is not installed: run jlpm install"
    )
    done = subprocess.run(
        ["node", "labextension/generate.mjs", tmp_path / "openapi.ts"],
        cwd=project_root,
        env={**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    committed = (project_root / "labextension/src/pool/openapi.ts").read_text()
    assert (tmp_path / "openapi.ts").read_text() == committed, "the document has changed: run jlpm generate"
