"""A request's fields are declared once, and every form of a request has them."""

from __future__ import annotations

import uuid
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.models import Request
from jupyter_gpupool.core.request_schema import FIELDS, FORECAST, body_of, from_query, query_of

TEXT = st.text(st.characters(codec="ascii", exclude_characters="\n="), min_size=1, max_size=20)
REQUESTS = st.builds(
    Request,
    id=st.uuids().map(str),
    owner=st.just("ada"),
    num_gpus=st.integers(1, 10_000),
    partial=st.none() | st.floats(0.001, 1.0),
    memory_mib=st.none() | st.integers(1, 10**8),
    filters=st.dictionaries(st.sampled_from(("name", "server", "index")), TEXT, max_size=3),
    spread=st.booleans(),
    never_park=st.booleans(),
    namespace=TEXT,
    wait=st.booleans(),
    secret_sha256=st.just("0" * 64),
    label=st.just("") | TEXT,
    client=st.just("") | TEXT,
)


def as_read(request: Request, given: dict[str, Any]) -> Request:
    return Request(**{"id": request.id, "owner": request.owner, **given})


def test_a_request_has_the_declared_fields_and_an_owner() -> None:
    assert {f.name for f in fields(Request)} == {*FIELDS, "owner"}


@given(REQUESTS)
def test_a_body_says_everything(request: Request) -> None:
    assert as_read(request, body_of(request)) == request


@given(REQUESTS)
def test_a_query_says_everything_that_a_forecast_needs(request: Request) -> None:
    query = {k: v if isinstance(v, list) else [v] for k, v in query_of(request, FORECAST).items()}
    read = as_read(request, from_query(query, FORECAST))
    assert {name: getattr(read, name) for name in FORECAST} == {
        name: getattr(request, name) for name in FORECAST
    }


def test_what_is_not_asked_for_is_not_sent() -> None:
    """So a server that does not know a newer field refuses only those who need it."""
    plain = Request(str(uuid.uuid4()), "ada", partial=0.5)
    assert not {"num_gpus", "memory_mib", "filters", "spread", "never_park", "wait"} & set(body_of(plain))


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ({"num_gpus": "1.5"}, "num_gpus=1.5: give a whole number"),
        ({"partial": "nan"}, "partial=nan: give a number"),
        ({"partial": "half"}, "partial=half: give a number"),
        ({"filter": "V100"}, "filter=V100: write it as filter=NAME=VALUE, such as name=V100"),
    ],
)
def test_a_query_that_is_no_request_gets_one_line(query: dict[str, str], line: str) -> None:
    with pytest.raises(InvalidRequest, match=line):
        from_query({name: [text] for name, text in query.items()}, FORECAST)
