"""The reference is complete: what the code has is on the pages, and the pages name nothing else."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

from reference import (  # noqa: E402
    collectives,
    command_line,
    configuration,
    conformance,
    errors,
    http,
    lease_event,
    metrics,
    programs,
    public_names,
)
from reference.classes import subclasses  # noqa: E402
from traitlets.config import Configurable  # noqa: E402
from traitlets.utils.importstring import import_item  # noqa: E402

from benchmarks.conformance.collective_refusals import REFUSALS  # noqa: E402
from jupyter_gpupool.cli.app import COMMANDS  # noqa: E402

DOCS = ROOT / "docs"
PAGES = [page for page in [*DOCS.rglob("*.md"), ROOT / "README.md"] if "_build" not in page.parts]


def text_of_pages() -> str:
    return "\n".join(page.read_text() for page in PAGES)


def test_every_error_has_a_remedy_and_none_is_left_over() -> None:
    assert {cls.__name__ for cls in errors.catalogue()} == set(errors.REMEDIES)
    page = errors.markdown()
    assert all(f"## {cls.__name__}\n" in page and str(cls.status) in page for cls in errors.catalogue())


def test_every_setting_that_a_page_names_exists() -> None:
    traits = {cls.__name__: set(cls.class_trait_names(config=True)) for cls in subclasses(Configurable)}
    named = set(re.findall(r"(?:\bc\.|--)([A-Z]\w+)\.(\w+)\b", text_of_pages()))
    ours = {
        (cls, trait)
        for cls, trait in named
        if cls not in ("Class", "JupyterHub", "Spawner", "SystemdSpawner")
    }
    assert ours and not [f"{cls}.{trait}" for cls, trait in sorted(ours) if trait not in traits.get(cls, ())]


def test_every_setting_is_on_the_page() -> None:
    page = configuration.markdown()
    for cls in subclasses(Configurable):
        for name, trait in cls.class_own_traits(config=True).items():
            assert f"`c.{cls.__name__}.{name}`" in page or not trait.help, f"{cls.__name__}.{name}"


def test_every_command_is_on_the_page() -> None:
    page = command_line.markdown()
    assert all(f"## gpupool {word}\n" in page for word in COMMANDS)
    assert "`--num-gpus N`" in page


def commands() -> list[str]:
    """The gpupool commands in the pages' code blocks."""
    found = []
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text_of_pages(), re.M | re.S):
        for line in block.splitlines():
            line = re.sub(r"\s+#.*", "", line.strip().removeprefix("$ "))
            line = re.sub(r"^(?:[A-Z_]+=\S+ +|sudo +|\S+/bin/|runuser -u gpupool -- \S+/bin/)+", "", line)
            if line.startswith("gpupool ") and "…" not in line:
                found.append(re.split(r" (?:\|\|?|&&|>) ", line)[0])
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_every_command_that_a_page_shows_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)[1:]
    word = next(name for n in (3, 2, 1) if (name := " ".join(words[:n])) in COMMANDS)
    parser = import_item(COMMANDS[word][0])().parser()
    given = words[len(word.split()) :]
    if word == "run":
        given, _ = parser.options_before_command(given)
    parser.parse_args([option for option in given if not re.match(r"--[A-Z]", option)])


def test_every_metric_that_a_page_names_exists() -> None:
    known = set(re.findall(r"`(gpupool_\w+)`", metrics.markdown()))
    named = set(re.findall(r"\bgpupool_[a-z_]+\b", (DOCS / "how-to" / "monitoring.md").read_text()))
    assert named - {"gpupool_config"} <= known


def test_every_call_and_the_event_are_on_their_pages() -> None:
    from jupyter_gpupool.server.http.openapi.document import document

    page = http.markdown()
    assert all(f"{path}`" in page for path in document()["paths"])
    assert "`previous`" in lease_event.markdown()
    assert "forward" in conformance.markdown()
    assert "distributed_test.py" in collectives.markdown()
    assert "karpathy/nanoGPT" in programs.markdown()
    assert "| `torch.cuda` |" in public_names.markdown()


def test_no_published_test_of_collectives_fails_and_what_is_refused_has_its_reason() -> None:
    reasons = {reason for _, _, reason in REFUSALS}
    rows = json.loads(collectives.RESULTS.read_text())["table"]
    assert {(part, ranks) for part in collectives.PARTS for ranks in (2, 3)} <= {
        (row["part"], row["ranks"]) for row in rows
    }
    for row in rows:
        assert row["passed"] > 100
        assert row["failed"] == 0, row["tests"]["failed"]
        assert reasons.issuperset(row["tests"]["refused"])
