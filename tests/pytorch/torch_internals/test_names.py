"""Names that PyTorch does not promise to keep: all in one room, and each there in this release."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jupyter_gpupool.pytorch.torch_internals import client, names, worker

PACKAGE = Path(names.__file__).parents[2]
ROOM = Path(names.__file__).parent


def test_this_release_has_every_name() -> None:
    """Those in modules that take long to import, too: others are seen when the room is imported."""
    used = (*client.NAMES.later_ones, *worker.NAMES.later_ones)
    assert [name.path for name in used if not (name.optional or _is_there(name.path))] == []
    assert client.NAMES.missing == worker.NAMES.missing == []


def _is_there(path: str) -> bool:
    try:
        names.resolve(path)
    except AttributeError:
        return False
    return True


def test_a_missing_name_is_one_line_with_its_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    found = names.Names()
    assert found.value("torch._C._gone", "walk") is None
    found.attribute("torch.Tensor._lost", "run")
    assert found.value("torch._C._rare", "fly", optional=True) is None
    with pytest.raises(
        names.UnsupportedPyTorch,
        match=r"^PyTorch 2\.99\.0 lacks torch\._C\._gone and 1 more name \(torch\.Tensor\._lost\), which "
        r"jupyter-gpupool needs to walk; install PyTorch 2\.11 to 2\.\d+, or a newer jupyter-gpupool$",
    ):
        found.check()


def test_a_name_that_is_looked_up_later_is_missed_when_it_is_used() -> None:
    later = names.Names().later("torch.utils.no_such_module.thing", "sleep")
    with pytest.raises(names.UnsupportedPyTorch, match="lacks torch.utils.no_such_module.thing"):
        later.get()


def test_no_other_module_names_what_is_private_in_pytorch() -> None:
    """By an attribute of torch, by an import, or by an attribute that nothing in this package defines."""
    listed = {name.path.rpartition(".")[2] for name in (*client.NAMES.used, *worker.NAMES.used)}
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py") if ROOM not in path.parents}
    ours = {name for tree in trees.values() for name in _defined(tree)} | listed
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path, tree in trees.items()
        if "pytorch" in path.parts
        for line, name in _private(tree, ours)
    ]
    assert not found, "put these into pytorch/torch_internals, with what they are for"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else []


def _private(tree: ast.AST, ours: set[str]) -> Iterator[tuple[int, str]]:
    """The uses of private names, but for operators: ``aten`` and ``torch.ops`` have those."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            path = ast.unparse(node)
            known = node.attr in ours or node.attr == "_replace"
            if not path.startswith(("aten.", "torch.ops.")) and (path.startswith("torch.") or not known):
                yield node.lineno, path
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", "") or ""
            for alias in node.names:
                path = f"{module}.{alias.name}".strip(".")
                if path.startswith("torch.") and any(map(_is_private, path.split("."))):
                    yield node.lineno, path
