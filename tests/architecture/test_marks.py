"""What `make soak` is to try more often is marked, for it runs nothing else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def uses(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(one, ast.Name) and one.id in names for one in ast.walk(node))


def is_marked(node: ast.AST) -> bool:
    return any(isinstance(one, ast.Attribute) and one.attr == "soak" for one in ast.walk(node))


def unmarked(tree: ast.Module) -> Iterator[str]:
    """The tests that use ``often``, or a constant or a setting made by it, without the mark."""
    names, machines = {"often"}, set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and uses(node.value, names):
            for target in node.targets:
                if isinstance(target, ast.Attribute):  # Machine.TestCase.settings = …
                    machines.add(ast.unparse(target.value))
                else:
                    names |= {one.id for one in ast.walk(target) if isinstance(one, ast.Name)}
        elif isinstance(node, ast.Assign):
            if ast.unparse(node.value) in machines:
                yield ast.unparse(node.targets[0])
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marked = any(map(is_marked, node.decorator_list))
            if uses(node, names) and not marked:
                yield node.name


def test_what_is_tried_more_often_in_a_soak_is_marked() -> None:
    found = {
        f"{path.relative_to(TESTS)}: {name}"
        for path in sorted(TESTS.rglob("test_*.py"))
        for name in unmarked(ast.parse(path.read_text()))
    }
    assert found == set()


def test_each_way_of_saying_it_is_noticed() -> None:
    text = """
MANY, FEW = often(1, 2), often(3, 4)
OFTEN = settings(max_examples=MANY)
A.TestCase.settings = settings(max_examples=often(1, 2))
TestA = A.TestCase
TestB = pytest.mark.soak(A.TestCase)
@OFTEN
def test_c(): ...
def test_d(): use(FEW)
@pytest.mark.soak
def test_e(): use(FEW)
def test_f(): ...
"""
    assert list(unmarked(ast.parse(text))) == ["TestA", "test_c", "test_d"]
