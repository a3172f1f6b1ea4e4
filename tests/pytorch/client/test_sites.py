"""The error of an operator that failed in the worker names the line of the program that called it."""

from __future__ import annotations

import linecache
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")


def line_of(function: Callable, text: str) -> str:
    code = function.__code__
    for number in range(code.co_firstlineno, code.co_firstlineno + 40):
        if text in linecache.getline(code.co_filename, number):
            return f'File "{code.co_filename}", line {number}, in {code.co_name}'
    raise AssertionError(text)


def train(rows: torch.Tensor) -> None:
    weight = torch.ones(3, 2, device="cuda")
    table = torch.nn.Embedding.from_pretrained(weight)
    found = table(rows)  # this line
    for _ in range(50):
        found = found + 1
    torch.cuda.synchronize()


def change(where: torch.Tensor) -> None:
    x = torch.zeros(3, device="cuda")
    for _ in range(3):
        x.index_add_(0, where, torch.ones(1, device="cuda"))  # that line
    torch.cuda.synchronize()


def test_what_makes_a_tensor(attached: object) -> None:
    with pytest.raises(IndexError, match="out of range") as error:
        train(torch.tensor([7], device="cuda"))
    text = str(error.value)
    assert "aten::embedding.default(float32[3, 2], int64[1])" in text
    assert line_of(train, "# this line") in text
    assert "    found = table(rows)  # this line" in text


def test_what_changes_a_tensor(attached: object) -> None:
    with pytest.raises(Exception, match="out of") as error:
        change(torch.tensor([7], device="cuda"))
    assert line_of(change, "# that line") in str(error.value)


def test_what_is_asked_for_later(attached: object) -> None:
    def compute() -> torch.Tensor:
        return torch.ones(3, 2, device="cuda")[torch.tensor([9], device="cuda")]  # here

    rows = compute()
    for _ in range(2):  # at once, and when the value is looked at
        with pytest.raises(Exception, match="out of") as error:
            (rows + 1).sum().item()
        assert line_of(compute, "# here") in str(error.value)


def test_a_cell_of_a_notebook(attached: object) -> None:
    source = "y = table[index]\n"
    name = "<ipython-input-5>"
    linecache.cache[name] = (len(source), None, [source], name)
    names = {"table": torch.ones(3, device="cuda"), "index": torch.tensor([5], device="cuda")}
    with pytest.raises(Exception, match="out of") as error:
        exec(compile(source, name, "exec"), names)
        torch.cuda.synchronize()
    assert 'File "<ipython-input-5>", line 1, in <module>\n    y = table[index]' in str(error.value)
