"""Every code block of the tutorials runs, and prints what the page shows."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tutorial import Session, blocks, environment, matches

from ..support.ports import free_ports

pytest.importorskip("torch", reason="the tutorials compute with PyTorch")

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
PAGES = sorted(page.name for page in TUTORIALS.glob("*.md") if page.name != "index.md")


@pytest.mark.parametrize("page", PAGES)
def test_a_tutorial_runs_as_it_is_written(page: str, tmp_path: Path) -> None:
    control, data = free_ports(2)

    def on_free_ports(text: str) -> str:
        text = re.sub(r"^gpupool server --emulate$", "gpupool server --emulate --port 0", text, flags=re.M)
        return text.replace("56001", str(control)).replace("55001", str(data))

    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    session = Session(tmp_path / "work", environment(tmp_path / "home"), on_free_ports)
    try:
        for block in blocks((TUTORIALS / page).read_text()):
            if block.language == "text":
                assert matches(block.text, session.printed), (
                    f"expected\n{block.text}\nprinted\n{session.printed}"
                )
                continue
            assert block.language in ("bash", "python"), block
            if not block.mark.startswith("not run"):
                session.run(block)
    finally:
        session.close()


def test_only_installation_is_left_out() -> None:
    left_out = [
        block.text
        for page in PAGES
        for block in blocks((TUTORIALS / page).read_text())
        if block.mark.startswith("not")
    ]
    assert left_out and all("pip install" in text for text in left_out)


def test_output_is_compared_line_by_line() -> None:
    assert matches("a … c\n3", "b\na b  c\n2\n3\n")
    assert not matches("3\na", "a\n3\n")
