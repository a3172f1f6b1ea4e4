"""Every route that the extension adds to a Jupyter server, as it adds them: who may call it with which verb."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jupyter_server.auth import Authorizer, IdentityProvider, User
from tornado.httpclient import HTTPClientError
from tornado.web import RequestHandler
from tornado.websocket import WebSocketHandler

VERBS = ("GET", "POST", "PUT", "PATCH", "DELETE")
#: Of a refusal by the pool itself, where Jupyter Server had none.
PAST = 409
#: What stands for a part of a path that a route leaves open, the first that makes it match.
_STAND_INS = (str(uuid.uuid4()), "tokens", "nothing")


class Named(IdentityProvider):
    def get_user(self, handler: Any) -> User | None:
        name = handler.request.headers.get("X-Name")
        return User(username=name) if name else None


class ByName(Authorizer):
    """`reader` may read, `writer` may do anything, everybody else nothing with this resource."""

    def is_authorized(self, handler: Any, user: User, action: str, resource: str) -> bool:
        if resource != "gpupool":
            return True
        return user.username == "writer" or (user.username == "reader" and action == "read")


def example(pattern: str) -> str:
    """A path that the route's pattern matches."""
    for word in _STAND_INS:
        path = re.sub(r"\((?:[^()]|\([^()]*\))*\)", word, pattern).replace("\\.", ".")
        if re.fullmatch(pattern, path):
            return path
    pytest.fail(f"say in this test which path fits {pattern}")


def routes(serverapp: Any) -> Iterator[tuple[str, type[RequestHandler]]]:
    (extension,) = serverapp.extension_manager.extension_apps["jupyter_gpupool"]
    for pattern, handler, *_ in extension.handlers:
        if "gpupool/api" in pattern:
            yield example(pattern), handler


def calls(serverapp: Any) -> Iterator[tuple[str, str]]:
    """Verb and path of everything that answers."""
    for path, handler in routes(serverapp):
        if not issubclass(handler, WebSocketHandler):
            for verb in VERBS:
                if getattr(handler, verb.lower()) is not RequestHandler._unimplemented_method:
                    yield verb, path


@pytest.fixture
def jp_server_config() -> dict[str, Any]:
    return {
        "ServerApp": {
            "jpserver_extensions": {"jupyter_gpupool": True},
            "authorizer_class": ByName,
            "identity_provider_class": Named,
        },
        "LocalEngine": {"emulate": "always", "emulated_count": 1, "attach_timeout_s": 120.0},
    }


@pytest.fixture
def status(jp_fetch: Callable[..., Any]) -> Callable[..., Any]:
    async def ask(verb: str, path: str, name: str = "", **headers: str) -> int:
        body = "{}" if verb in ("POST", "PUT", "PATCH") else None
        if name:
            headers["X-Name"] = name
            # What a page of this very server sends: the cross-site token as a cookie, and as a header.
            headers = {"Cookie": "_xsrf=same", "X-XSRFToken": "same", **headers}
        try:
            answer = await jp_fetch(*path.strip("/").split("/"), method=verb, body=body, headers=headers)
        except HTTPClientError as e:
            # Past the door it is the pool that refuses what only its administrators may do.
            said = e.response.body if e.response is not None else b""
            return PAST if e.code == 403 and b'"PermissionDenied"' in said else e.code
        return answer.code

    return ask


@pytest.fixture
def another_sites(status: Callable[..., Any]) -> Callable[..., Any]:
    """A page of another site has the browser send its cookies along, and knows no cross-site token."""

    async def ask(verb: str, path: str, name: str) -> int:
        headers = {"Cookie": "_xsrf=stolen", "X-XSRFToken": "", "Origin": "http://elsewhere.example"}
        return await status(verb, path, name, **headers)

    return ask


async def test_there_are_all_of_them(jp_serverapp: Any) -> None:
    from jupyter_gpupool.server.http.openapi.document import document

    served = [(path, handler) for path, handler in routes(jp_serverapp)]
    assert any(issubclass(handler, WebSocketHandler) for _, handler in served)
    patterns = [
        p for p, *_ in next(iter(jp_serverapp.extension_manager.extension_apps["jupyter_gpupool"])).handlers
    ]
    for path in document()["paths"]:
        concrete = "/gpupool/api/v1" + re.sub(r"\{\w+\}", str(uuid.uuid4()), path)
        assert any(re.fullmatch(p, concrete) for p in patterns if not p.endswith("/(.*)")), path
    assert len({verb for verb, _ in calls(jp_serverapp)}) == len(VERBS)


async def test_signed_out(jp_serverapp: Any, status: Callable[..., Any]) -> None:
    for path, _ in routes(jp_serverapp):
        for verb in VERBS:
            assert await status(verb, path) in (403, 404, 405), (verb, path)
    for verb, path in calls(jp_serverapp):
        assert await status(verb, path) == 403, (verb, path)


async def test_signed_in_and_refused(jp_serverapp: Any, status: Callable[..., Any]) -> None:
    for verb, path in calls(jp_serverapp):
        assert await status(verb, path, "nobody") == 403, (verb, path)


async def test_who_may_only_read(jp_serverapp: Any, status: Callable[..., Any]) -> None:
    for verb, path in calls(jp_serverapp):
        code = await status(verb, path, "reader")
        # What the pool's administrators are told is for those who may do what they do.
        may = verb == "GET" and not path.endswith(("/tokens", "/audit"))
        assert (code == 403) == (not may), (verb, path, code)


async def test_who_may_do_anything(jp_serverapp: Any, status: Callable[..., Any]) -> None:
    """They get past the door: what is refused then is refused for what was asked."""
    for verb, path in calls(jp_serverapp):
        code = await status(verb, path, "writer")
        assert code not in (401, 403) and code < 500, (verb, path, code)


async def test_another_sites_page(
    jp_serverapp: Any, status: Callable[..., Any], another_sites: Callable[..., Any]
) -> None:
    for verb, path in calls(jp_serverapp):
        if verb != "GET":
            # Jupyter Server says 404 where the origin is what it dislikes.
            assert await another_sites(verb, path, "writer") in (403, 404), (verb, path)
            assert await status(verb, path, "writer", **{"X-XSRFToken": "guessed"}) == 403, (verb, path)


async def test_sockets(jp_serverapp: Any, jp_ws_fetch: Callable[..., Any]) -> None:
    """A socket is execute; and no page of another site opens one."""
    sockets = [path for path, handler in routes(jp_serverapp) if issubclass(handler, WebSocketHandler)]
    assert sockets
    for path in sockets:
        words = path.strip("/").split("/")
        for headers in (
            {},
            {"X-Name": "nobody"},
            {"X-Name": "reader"},
            {"X-Name": "writer", "Origin": "http://elsewhere.example"},
        ):
            with pytest.raises(HTTPClientError) as refused:
                await jp_ws_fetch(*words, headers=headers)
            assert refused.value.code == 403, (path, headers)
        open_one = await jp_ws_fetch(*words, headers={"X-Name": "writer"})
        assert await open_one.read_message()
        open_one.close()
