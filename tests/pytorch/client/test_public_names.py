"""Every public name of PyTorch that has to do with a GPU works on a leased one, or is refused with one line."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the names are PyTorch's")

from benchmarks.conformance.walk import AREAS, FAULT, figures, judge  # noqa: E402


@pytest.mark.parametrize("area", AREAS)
def test_no_name_is_a_fault(attached: object, area: str) -> None:
    uses = list(AREAS[area]())
    for row in figures(uses):
        print(f"{row['area']}: {row['works']} work, {row['refused']} refused, {row['fault']} faults")
    faults = [f"{use.name} {use.how}: {use.why}" for use in uses if use.verdict == FAULT]
    assert not faults, "\n".join(faults)


def test_a_name_without_arguments_is_an_error(attached: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "later", lambda needed: None, raising=False)
    monkeypatch.setattr(torch.accelerator, "__all__", [*torch.accelerator.__all__, "later"])
    with pytest.raises(LookupError, match="torch.accelerator.later needs arguments"):
        list(AREAS["torch.accelerator"]())


def test_another_value_than_the_cpus_is_a_fault(attached: object) -> None:
    wanted = torch.ones(2)
    assert judge(lambda: torch.ones(2, device="cuda"), wanted) == ("works", "")
    assert judge(lambda: torch.zeros(2, device="cuda"), wanted)[0] == FAULT
    assert judge(lambda: torch.ones(2, device="cuda").missing, wanted)[0] == FAULT
    assert judge(torch.cuda.cudart, wanted)[0] == "refused"
