from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.models import Request
from jupyter_gpupool.pool.scheduling.placement import validate

Ask = Callable[..., Request]


@pytest.mark.parametrize(
    "values",
    [
        {"partial": 1},
        {"partial": 0.001},
        {"memory_mib": 1},
        {"num_gpus": 8, "partial": 0.5},
        {"filters": {"name": "V100", "server": "a", "uuid": "GPU-1", "index": "0", "emulated": "True"}},
        {"namespace": "team-1.research_x", "label": "tränieren 1/2", "client": "host pid 3"},
    ],
)
def test_good_requests_pass(ask: Ask, values: dict[str, Any]) -> None:
    validate(ask(**values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_gpus": 0}, "number of GPUs must be 1 or more, not 0"),
        ({"num_gpus": -3}, "not -3"),
        ({"num_gpus": 1.5}, "not 1.5"),
        ({"num_gpus": True}, "not True"),
        ({"num_gpus": "2"}, "not '2'"),
        ({"partial": 0}, "above 0 and at most 1, not 0"),
        ({"partial": 1.5}, "not 1.5"),
        ({"partial": -0.1}, "not -0.1"),
        ({"partial": float("nan")}, "not nan"),
        ({"partial": float("inf")}, "not inf"),
        ({"partial": "half"}, "not 'half'"),
        ({"partial": True}, "not True"),
        ({"partial": 0.5, "memory_mib": 100}, "not both"),
        ({"partial": None}, "give a fraction of each GPU"),
        ({"memory_mib": 0}, "1 MiB or more, not 0"),
        ({"memory_mib": 10.5}, "not 10.5"),
        (
            {"filters": {"colour": "green"}},
            "unknown filter 'colour'; there are name, server, uuid, index, emulated",
        ),
        ({"filters": {"index": "first"}}, "a GPU's number, not 'first'"),
        ({"filters": {"index": 1}}, "needs a printable text"),
        ({"filters": {"name": ""}}, "needs a printable text"),
        ({"filters": {"emulated": "perhaps"}}, "true or false, not 'perhaps'"),
        ({"filters": ["name"]}, "filters must be"),
        ({"id": "7"}, "must be a uuid"),
        ({"id": "../../etc/passwd"}, "must be a uuid"),
        ({"id": "{0C6F6A6E-0000-4000-8000-000000000000}"}, "must be a uuid"),
        ({"id": None}, "must be a uuid"),
        ({"owner": ""}, "no owner"),
        ({"secret_sha256": "hunter2"}, "64 lower-case hexadecimal digits"),
        ({"secret_sha256": None}, "64 lower-case hexadecimal digits"),
        ({"label": "x" * 201}, "at most 200 characters, not 201"),
        ({"label": "two\nlines"}, "printable text on one line"),
        ({"client": "\x1b[2J"}, "printable text on one line"),
        ({"namespace": ""}, "a namespace has"),
        ({"namespace": "no spaces"}, "'no spaces' does not"),
        ({"wait": "yes"}, "wait must be true or false"),
    ],
)
def test_each_mistake_gets_one_clear_line(ask: Ask, values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(ask(**values))
    line = str(caught.value)
    assert words in line
    assert "\n" not in line and len(line) < 200


def test_a_secret_is_never_repeated(ask: Ask) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(ask(secret_sha256="hunter2"))
    assert "hunter2" not in str(caught.value)
