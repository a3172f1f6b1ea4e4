"""Links of pages lead somewhere. The build checks those between pages; these are the ones to files and folders."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

from source_pages import rewrite  # noqa: E402

PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")]
    if "_build" not in page.parts
)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)|(?:src|srcset|href)=\"(?P<file>[^\"]+)\"")
_ELSEWHERE = re.compile(r"[a-z]+:|#|\{")


def targets(page: Path) -> list[str]:
    """The relative links of a page, without anchors; its code blocks are no links."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.M | re.S)
    found = (match["target"] or match["file"] for match in _LINK.finditer(text))
    return [unquote(target.split("#")[0]) for target in found if not _ELSEWHERE.match(target)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_or_folder(page: Path) -> None:
    missing = [target for target in targets(page) if not (page.parent / target).exists()]
    assert not missing


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_anchors_exist_in_pages_that_the_build_does_not_check(page: Path) -> None:
    linked = re.findall(r"\]\(([^)\s:]+\.md)#([^)\s]+)\)", page.read_text())
    assert not [(target, anchor) for target, anchor in linked if anchor not in anchors(page.parent / target)]


@pytest.mark.parametrize(
    ("question", "answers"),
    [
        ("CUDA query", {"queries.py": "class Queries"}),
        ("token checked", {"authentication.py": "async def who_calls", "tokens.py": "class Tokens"}),
        ("request queued", {"manager.py": "LeaseState.QUEUED", "fair_queue.py": "def fair_order"}),
        ("runs in the worker", {"worker.py": "def serve"}),
        ("AMD", {"__init__.py": "nvml_gpus(server)", "devices.py": "cuda_device"}),
        ("placement policy", {"policy.py": "POLICIES:"}),
        ("section of the sidebar", {"body.tsx": "sections", "tokens.ts": "interface ISidebarSections"}),
        ("another framework", {"frameworks.py": "FRAMEWORKS = "}),
        ("Kubernetes", {"engine.py": "class Engine(Protocol)", "registry.py": '"ray"'}),
    ],
)
def test_the_map_answers_where_things_are(question: str, answers: dict[str, str]) -> None:
    """Each answer's places exist, and the files have what the answer says of them."""
    page = ROOT / "docs" / "explanation" / "architecture.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("|") and question in line]
    assert len(rows) == 1
    places = [page.parent / match["target"] for match in _LINK.finditer(rows[0])]
    assert places and all(place.exists() for place in places)
    linked = {place.name: place.read_text() for place in places if place.is_file()}
    assert not [name for name, text in answers.items() if text not in linked.get(name, "")]


def test_a_link_to_a_source_leads_to_its_page_on_the_site() -> None:
    page = ROOT / "docs" / "explanation" / "architecture.md"
    linked = rewrite("[`core/`](../../jupyter_gpupool/core), [x](ledger.md), [y](../grafana.json)", page)
    assert '<a href="../source/jupyter_gpupool/core/index.html">`core/`</a>' in linked
    assert "[x](ledger.md), [y](../grafana.json)" in linked
