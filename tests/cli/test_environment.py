"""`gpupool server environment add`, `list` and `remove`, and a pool that runs meanwhile."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from traitlets.utils.importstring import import_item

from jupyter_gpupool.cli.app import COMMANDS
from jupyter_gpupool.cli.options import UsageError
from jupyter_gpupool.core.errors import PoolError

from ..support.other_release import OTHER, interpreter, script

torch = pytest.importorskip("torch", reason="workers need PyTorch")

ADD, LIST, REMOVE = (("server", "environment", word) for word in ("add", "list", "remove"))
LIBRARY = "tests.support.operator_library/gpupool_tests"


@pytest.fixture
def other(tmp_path: Path) -> str:
    return interpreter(tmp_path)


def test_a_running_pool_takes_it_up(
    gpupool: Callable[..., Any], pool: Any, other: str, tmp_path: Path
) -> None:
    """A client of that release gets it, with the operators of its list; `gpupool leases` and the log say so."""
    here = dict(pool.environment)
    packages = f"{tmp_path / 'packages'}{os.pathsep}{Path(__file__).parents[2]}"

    def environment(*words: str) -> Any:
        done = gpupool(*words, **here)
        assert done.returncode == 0, done.stderr
        return done.stdout

    program = (
        "import torch, subprocess, sys; from tests.support import operator_library\n"
        "print(subprocess.run([sys.executable, '-m', 'jupyter_gpupool', 'leases'], stdout=-1, text=True).stdout)\n"
        "try: print(torch.ops.gpupool_tests.above(torch.tensor([1., 2.]).cuda(), 1.5).tolist())\n"
        "except RuntimeError as e: print(e)\n"
    )

    def run() -> str:
        done = gpupool("run", "-p", 0.1, "--", sys.executable, "-c", program, PYTHONPATH=packages)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    added = environment(*ADD, "other", other).splitlines()
    assert added[0].startswith(f"other: PyTorch {torch.__version__}; Python cpython-")
    assert "needs no restart" in added[1]
    refused = run()
    assert f" {torch.__version__.partition('+')[0]} (other) " in refused
    assert "gpupool_tests::above is not in the list" in refused
    assert "gpupool server environment add other --operators" in refused

    environment(*ADD, "other", "--operators", f"{LIBRARY}::above,{LIBRARY}::count")
    assert "[2.0]" in (out := run()), out
    listed = json.loads(environment(*LIST, "--json"))["environments"]
    assert [one["name"] for one in listed] == ["default", "other"]
    assert listed[1]["operators"] == [f"{LIBRARY}::above", f"{LIBRARY}::count"]
    table = environment(*LIST).splitlines()
    assert table[0].split() == ["ENVIRONMENT", "PYTORCH", "PYTHON", "OPERATORS"] and other in table[2]

    assert environment(*REMOVE, "other") == "Removed other\n"
    shown = json.loads(gpupool("leases", "--all", "--json").stdout)["leases"]
    assert [lease["environment"] for lease in shown] == ["other", "other"]
    assert (
        "computes with PyTorch" in (pool.home / "log").read_text()
        or "other" in (pool.home / "log").read_text()
    )


def run_here(*words: str) -> int:
    """Run the command in this process. Raises what it would tell in one line."""
    word = " ".join(words[:3])
    command = import_item(COMMANDS[word][0])()
    command.initialize(list(words[3:]))
    return int(command.act())


def test_what_cannot_be_used_is_told_in_one_line(tmp_path: Path, other: str, jupyter_home: Path) -> None:
    """And nothing is recorded."""
    empty = script(tmp_path / "empty", "exit 1")
    dies = script(
        tmp_path / "dies",
        f'case "$2" in *metadata*) echo {OTHER};; *) echo "cannot load x.so" >&2; exit 1;; esac',
    )
    for words, said in (
        (("x", str(tmp_path / "nowhere")), "cannot be run: No such file or directory"),
        (("x", empty), "has no PyTorch; install it there"),
        (("x", dies), f"workers cannot run with {dies}: cannot load x.so"),
        (
            ("x", other, "--operators", f"gpupool_nowhere::nms,{LIBRARY}::nms"),
            "gpupool_nowhere cannot be imported",
        ),
        (("x", other, "--operators", f"{LIBRARY}::nms"), "has no such operator"),
        (
            ("x", "--install", "gpupool-no-such-package @ file:///nonexistent"),
            "cannot install gpupool-no-such",
        ),
    ):
        with pytest.raises(PoolError) as caught:
            run_here(*ADD, *words)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not list((jupyter_home / "data" / "gpupool" / "environments").iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (ADD, "required: NAME"),
        ((*ADD, "a/b", "PYTHON"), "is not a name for an environment"),
        ((*ADD, "default", "PYTHON"), "the pool itself runs in"),
        ((*ADD, "x"), "which release?"),
        ((*ADD, "x", "--operators", "a::b"), "which release?"),
        ((*ADD, "x", "PYTHON", "--install", "torch"), "not both"),
        ((*ADD, "x", "--install=-r"), "no option of an installer"),
        ((*ADD, "x", "PYTHON", "--operators", "aten::add"), "one of PyTorch's own operators"),
        ((*ADD, "x", "PYTHON", "--operators", "nms"), "is not the name of an operator"),
        ((*ADD, "x", "PYTHON", "--directory", "/nonexistent"), "is not a server's directory"),
        ((*REMOVE, "x"), "there is no environment x"),
        ((*ADD, "x", "PYTHON", "--LocalEngine.environments={'x': '/bin/false'}"), "is in the configuration"),
        ((*REMOVE, "x", "--LocalEngine.environments={'x': '/bin/false'}"), "is in the configuration"),
    ],
)
def test_what_is_typed_wrongly(words: tuple[str, ...], said: str, other: str) -> None:
    with pytest.raises(UsageError) as caught:
        run_here(*[other if word == "PYTHON" else word for word in words])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_which_command(gpupool: Callable[..., Any], last_line: Any) -> None:
    done = gpupool("server", "environment")
    assert done.returncode == 2 and "which environment command?" in last_line(done)


def test_an_environment_that_is_installed(
    tmp_path: Path, jupyter_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requirement that is a folder stands for PyTorch's wheel: it leads to this environment's own."""
    source = tmp_path / "torch"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (source / "backend.py").write_text(
        BACKEND.format(release="2.0.9", path=os.path.dirname(os.path.dirname(torch.__file__)))
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert run_here(*ADD, "installed", "--install", str(source)) == 0
    folder = jupyter_home / "data" / "gpupool" / "environments"
    assert (folder / "installed" / "bin" / "python").exists()
    with pytest.raises(UsageError, match="there is an environment installed"):
        run_here(*ADD, "installed", "--install", str(source))
    assert run_here(*REMOVE, "installed") == 0
    assert not list(folder.iterdir())


#: Builds a wheel without anything that would have to be installed.
BACKEND = """
import zipfile


def build_wheel(folder, settings=None, metadata=None):
    name = "torch-{release}-py3-none-any.whl"
    about = "torch-{release}.dist-info"
    files = {{
        "of_the_tests.pth": {path!r} + "\\n",
        about + "/METADATA": "Metadata-Version: 2.1\\nName: torch\\nVersion: {release}\\n",
        about + "/WHEEL": "Wheel-Version: 1.0\\nGenerator: tests\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }}
    record = "".join(file + ",,\\n" for file in [*files, about + "/RECORD"])
    with zipfile.ZipFile(folder + "/" + name, "w") as wheel:
        for file, text in [*files.items(), (about + "/RECORD", record)]:
            wheel.writestr(file, text)
    return name
"""
