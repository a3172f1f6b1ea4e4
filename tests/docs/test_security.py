"""The threat model names tests that exist, for every threat."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "security.md").read_text()
SHOWN_BY = re.compile(r"^\| (?P<threat>[^|]+) \|(?:[^|]+\|)* (?P<tests>[^|]+) \|$")


def rows() -> list[tuple[str, str]]:
    """Threats and what shows that they are held, of each table that says so."""
    found: list[tuple[str, str]] = []
    is_table = False
    for line in PAGE.splitlines():
        if not line.startswith("|"):
            is_table = False
        elif line.endswith("| shown by |"):
            is_table = True
        elif is_table and (match := SHOWN_BY.match(line)) and not set(line) <= set("|- "):
            found.append((match["threat"], match["tests"]))
    return found


def test_the_page_has_threats() -> None:
    assert len(rows()) > 25


@pytest.mark.parametrize(("threat", "shown_by"), rows(), ids=lambda words: words[:60])
def test_each_threat_names_files_with_tests(threat: str, shown_by: str) -> None:
    files = re.findall(r"`([^`]+)`", shown_by)
    assert files or shown_by.startswith("the same"), "no test shows it"
    for name in files:
        assert re.search(r"^ *(async )?def test_", (ROOT / name).read_text(), re.M), f"{name} has no tests"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[^`]+)`", PAGE))))
def test_every_file_and_folder_of_tests_that_the_page_names_exists(name: str) -> None:
    assert (ROOT / name).exists()
