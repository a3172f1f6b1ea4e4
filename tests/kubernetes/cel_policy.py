"""What an API server does with a MutatingAdmissionPolicy, by Google's own CEL."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import pytest

from .quantities import decoded

cel = pytest.importorskip("cel_expr_python.cel", reason="cel-expr-python has no wheel for this Python")


def _pool() -> Any:
    """Descriptors with the type that Kubernetes adds to CEL: an operation of a JSON Patch."""
    from google.protobuf import descriptor_pb2, descriptor_pool, struct_pb2

    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(struct_pb2.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(name="json_patch.proto", syntax="proto3")
    file.dependency.append("google/protobuf/struct.proto")
    message = file.message_type.add(name="JSONPatch")
    for number, name in enumerate(("op", "path", "from"), 1):
        message.field.add(name=name, number=number, type=9, label=1)
    message.field.add(name="value", number=4, type=11, label=1, type_name=".google.protobuf.Value")
    pool.Add(file)
    return pool


def _index_of(values: Any, value: Any) -> int:
    """Of Kubernetes' library of lists."""
    found = list(values)
    return found.index(value) if value in found else -1


def _replaced(text: str, old: str, new: str) -> str:
    """Of Kubernetes' library of strings."""
    return text.replace(old, new)


class Policy:
    """Compiles once what a policy says, and evaluates it for Pods, whose quantities are rewritten before."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        index_of = cel.FunctionDecl(
            "indexOf",
            [cel.Overload("list_index_of", cel.Type.INT, [cel.Type.LIST, cel.Type.STRING], True, _index_of)],
        )
        string = cel.Type.STRING
        replaced = cel.Overload("string_replace", string, [string, string, string], True, _replaced)
        self.env = cel.NewEnv(
            _pool(),
            variables={"object": cel.Type.DYN, "variables": cel.Type.DYN},
            functions=[index_of, cel.FunctionDecl("replace", [replaced])],
        )
        compiled = self.env.compile
        self.conditions = [compiled(one["expression"]) for one in spec["matchConditions"]]
        self.variables = {one["name"]: compiled(one["expression"]) for one in spec.get("variables", [])}
        known: set[str] = set()
        for one in spec.get("variables", []):
            # An API server compiles each with those before it.
            assert set(re.findall(r"\bvariables\.(\w+)", one["expression"])) <= known, one["name"]
            known.add(one["name"])
        self.mutations = [compiled(one["jsonPatch"]["expression"]) for one in spec.get("mutations", [])]
        self.validations = [(compiled(v["expression"]), v["message"]) for v in spec.get("validations", [])]

    def matches(self, pod: Mapping[str, Any]) -> bool:
        return all(self._value(one, decoded(pod), {}) for one in self.conditions)

    def patches(self, pod: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The operations of a JSON Patch that it makes; none where it does not match."""
        if not self.matches(pod):
            return []
        given = decoded(pod)
        values = self._variables(given)
        return [operation for one in self.mutations for operation in self._value(one, given, values)]

    def refusal(self, pod: Mapping[str, Any]) -> str | None:
        """The message of the first validation that does not hold; None where all do, or it does not match."""
        if not self.matches(pod):
            return None
        given = decoded(pod)
        return next((message for one, message in self.validations if not self._value(one, given, {})), None)

    def _variables(self, pod: Mapping[str, Any]) -> dict[str, Any]:
        """Kubernetes evaluates a variable when it is used; one that fails here fails there only then."""
        values: dict[str, Any] = {}
        for name, one in self.variables.items():
            with contextlib.suppress(ValueError):
                values[name] = self._value(one, pod, values)
        return values

    def _value(self, expression: Any, pod: Mapping[str, Any], variables: Mapping[str, Any]) -> Any:
        value = expression.eval(data={"object": pod, "variables": variables})
        if value.type() == cel.Type.ERROR:
            raise ValueError(str(value.value()))
        return _plain(value.plain_value())


def _plain(value: Any) -> Any:
    from google.protobuf import json_format, message

    if isinstance(value, message.Message):
        return json_format.MessageToDict(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
