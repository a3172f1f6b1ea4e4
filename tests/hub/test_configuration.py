"""What ``configure`` makes of a configuration that has something of its own already."""

from __future__ import annotations

import asyncio
import copy
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from jupyterhub.services.service import Service
from jupyterhub.spawner import SimpleLocalProcessSpawner, Spawner
from traitlets.config import Config

from jupyter_gpupool.core.errors import ImpossibleRequest, InvalidRequest
from jupyter_gpupool.hub import Limits, configure
from jupyter_gpupool.hub.options import GPUOptions, ServerStart, from_form, parse
from jupyter_gpupool.hub.service.identity import FRESH_S, HubTokens, mark, marked
from jupyter_gpupool.hub.service.pool import mark_of
from jupyter_gpupool.hub.spawn_form import ours
from jupyter_gpupool.hub.spawner_hooks import Hooks


class OtherSpawner(SimpleLocalProcessSpawner):
    """Somebody else's class, with a form and a way to read it of its own."""

    def _options_form_default(self) -> str:
        return "<input name=image>"

    def _options_from_form_default(self) -> Any:
        return lambda data: {"image": data["image"][0]}


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the hub asked of the service, which lends what it is asked for."""
    asked: list[tuple[Any, ...]] = []

    async def offer(self: Any, groups: list[str]) -> dict[str, Any]:
        gpu = {"name": "V100", "memory_mib": 32510, "granted_mib": 0, "healthy": True, "emulated": True}
        return {"servers": [{"gpus": [gpu, gpu]}], "reason": ""}

    async def begin(self: Any, *words: Any) -> dict[str, Any]:
        asked.append(("begin", *words))
        return {"state": "ACTIVE", "position": None, "reason": ""}

    async def end(self: Any, *words: Any) -> None:
        asked.append(("end", *words))

    for call in (offer, begin, end):
        monkeypatch.setattr(f"jupyter_gpupool.hub.service_client.Service.{call.__name__}", call)
    return asked


def spawner(c: Config, kind: type[Spawner] = OtherSpawner) -> Any:
    made = kind(config=c)
    made.user = SimpleNamespace(name="alice", groups=[SimpleNamespace(name="vision")])
    made.api_token = "hers"
    return made


def configured(c: Config, **arguments: Any) -> Config:
    configure(c, **arguments)
    return c


async def _said(text: str) -> str:
    return text


@pytest.mark.parametrize(
    "before",
    [
        None,
        "<input name=theirs>",
        lambda spawner: "<input name=theirs>",
        lambda spawner: _said("<input name=theirs>"),
    ],
    ids=["the class's own", "text", "function", "async function"],
)
@pytest.mark.parametrize("section", ["Spawner", "OtherSpawner"])
def test_the_form_stands_below_what_there_was(before: Any, section: str) -> None:
    c = Config()
    if before is not None:
        c[section].options_form = before
    form = asyncio.run(spawner(configured(c)).get_options_form())
    theirs = "<input name=image>" if before is None else "<input name=theirs>"
    assert form.index(theirs) < form.index('name="gpupool_num_gpus"')


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (None, {"image": "a"}),
        ("simple", {"image": "a"}),
        ("passthrough", {"image": ["a"]}),
        (lambda data: {"read": data["image"][0]}, {"read": "a"}),
        (lambda data, spawner: {"of": spawner.user.name}, {"of": "alice"}),
    ],
    ids=["the class's own", "simple", "passthrough", "function", "function of the spawner"],
)
def test_the_rest_of_a_form_is_read_as_before(before: Any, expected: dict[str, Any]) -> None:
    c = Config()
    if before is not None:
        c.Spawner.options_from_form = before
    form = {"image": ["a"], "gpupool_num_gpus": ["2"], "gpupool_partial": ["0.5"], "gpupool_model": [""]}
    said = spawner(configured(c)).run_options_from_form(form)
    assert said == {**expected, "gpupool": {"num_gpus": 2, "partial": 0.5}}


def test_hooks_that_were_there_go_on(service: list[tuple[Any, ...]]) -> None:
    calls: list[str] = []
    c = Config()
    c.OtherSpawner.pre_spawn_hook = lambda spawner: calls.append("pre")
    c.OtherSpawner.post_stop_hook = lambda spawner: calls.append("post")
    c.Spawner.auth_state_hook = lambda spawner, state: calls.append("state")
    c.Spawner.apply_user_options = lambda spawner, said: calls.append(f"apply {said}")
    c.Spawner.environment = {"THEIRS": "1"}

    async def life() -> dict[str, str]:
        made = spawner(configured(c))
        made.user_options = {"image": "a", "gpupool": {"num_gpus": 1, "partial": 0.5}}
        await made.run_auth_state_hook(None)
        await made._run_apply_user_options(made.user_options)
        await made.run_pre_spawn_hook()
        await made.run_post_stop_hook()
        return made.environment

    environment = asyncio.run(life())
    assert calls == ["state", "apply {'image': 'a'}", "pre", "post"]
    assert environment["THEIRS"] == "1"
    assert environment["GPUPOOL_TOKEN"] == "hers"
    begun = next(words for words in service if words[0] == "begin")
    assert begun[1:3] == ("alice", "")
    assert begun[3].groups == ["vision"]


def test_options_that_name_attributes_still_do() -> None:
    c = Config()
    c.Spawner.apply_user_options = {"cpus": "cpu_limit"}

    async def applied() -> Any:
        made = spawner(configured(c))
        await made._run_apply_user_options({"cpus": "2", "gpupool": {}})
        return made.cpu_limit

    assert asyncio.run(applied()) == 2


def test_what_a_hub_has_is_kept() -> None:
    c = Config()
    c.JupyterHub.services = [{"name": "theirs"}]
    c.JupyterHub.load_roles = [{"name": "user", "scopes": ["self", "shares"]}]
    c.JupyterHub.custom_scopes = {"custom:theirs": {"description": "x"}}
    c.JupyterHub.base_url = "/hubs/one"
    configured(c)
    assert [service["name"] for service in c.JupyterHub.services] == ["theirs", "gpupool"]
    can_wait = "timeout" in Service.class_traits()  # since JupyterHub 6
    assert c.JupyterHub.services[1].get("timeout") == (300 if can_wait else None)
    roles = {role["name"]: role["scopes"] for role in c.JupyterHub.load_roles}
    assert roles["user"] == ["self", "shares", "custom:gpupool:use", "access:services!service=gpupool"]
    assert set(c.JupyterHub.custom_scopes) == {"custom:theirs", "custom:gpupool:use", "custom:gpupool:admin"}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"mode": "gpu"}, "mode must be"),
        ({"attach": "direct"}, "attach must be"),
        ({"url": "localhost:1"}, "url must look like"),
        ({"managed": False}, "needs an api_token"),
        ({"url": "https://127.0.0.1:1", "ca_file": "/none"}, "cannot read a certificate"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_said_in_one_line(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        configure(Config(), **arguments)


def test_all_copies_of_a_configuration_share_what_has_begun() -> None:
    c = configured(Config())
    copied = copy.deepcopy(c)
    first, second = (x.Spawner.pre_spawn_hook.func.__self__ for x in (c, copied))
    assert isinstance(first, Hooks)
    assert first is second


def test_the_service_reads_what_the_hub_tells_it_of_a_start() -> None:
    start = ServerStart(["vision"], "an-id", "kernel", GPUOptions(2, 0.5, "V100"))
    assert ServerStart.from_json(start.to_json()) == start
    for wrong in ({"num_gpus": True}, {"num_gpus": 1, "partial": None}, {"num_gpus": 1, "gpus": 2}, {}):
        with pytest.raises(InvalidRequest):
            ServerStart.from_json({**start.to_json(), "choice": wrong})


def test_form_and_checks_agree_on_the_limits() -> None:
    limits = Limits(max_gpus=3, least=0.1, most=0.9, default_gpus=1)
    page = ours(limits, {"servers": []}, {})
    assert [n for n in range(9) if f'<option value="{n}"' in page] == [0, 1, 2, 3]
    assert 'min="0.1"' in page
    assert 'max="0.9"' in page
    assert parse(from_form({"gpupool_num_gpus": ["3"], "gpupool_partial": ["0.9"]}), limits) == GPUOptions(
        3, 0.9
    )
    for count, share in (("4", "0.5"), ("1", "0.95"), ("1", "0.05")):
        with pytest.raises(ImpossibleRequest):
            parse(from_form({"gpupool_num_gpus": [count], "gpupool_partial": [share]}), limits)
    for text in ("nan", "inf", "1e999", "x", "<b>"):
        with pytest.raises((InvalidRequest, ImpossibleRequest)):
            parse(from_form({"gpupool_num_gpus": ["1"], "gpupool_partial": [text]}), limits)


def test_idle_gpus_can_be_kept_and_several_servers_allowed() -> None:
    gpu = {"name": "V100", "memory_mib": 1000, "granted_mib": 0, "healthy": True, "emulated": False}
    offer = {"servers": [{"gpus": [gpu]}, {"gpus": [gpu]}]}
    page = ours(Limits(max_gpus=3), offer, {"never_park": True})
    assert 'name="gpupool_never_park" value="1" checked' in page
    assert 'name="gpupool_spread" value="1">' in page
    assert '<option value="2">2: 2 GPUs, only of several servers' in page
    assert '<option value="3" disabled>3: more than the pool has' in page

    form = {"gpupool_num_gpus": ["2"], "gpupool_partial": ["0.5"]}
    plain = parse(from_form(form), Limits())
    chosen = parse(from_form({**form, "gpupool_spread": ["1"], "gpupool_never_park": ["1"]}), Limits())
    assert plain is not None
    assert chosen == GPUOptions(2, 0.5, spread=True, never_park=True)
    assert chosen.request_fields() == {**plain.request_fields(), "spread": True, "never_park": True}
    assert [GPUOptions.from_text(one.to_text()) for one in (plain, chosen)] == [plain, chosen]
    assert GPUOptions.from_text("num_gpus=2&partial=0.5&model=") == plain, "of a hub that has no such fields"
    for wrong in ("yes", 1, None):
        with pytest.raises(InvalidRequest, match="never_park must be true or false"):
            parse({"num_gpus": 1, "never_park": wrong}, Limits())


def test_what_others_wrote_is_text_on_the_form() -> None:
    gpu = {"name": "<b>'\"V100", "memory_mib": 1, "granted_mib": 0, "healthy": True, "emulated": False}
    page = ours(Limits(), {"servers": [{"gpus": [gpu]}]}, {"partial": '"><script>', "model": "<i>"})
    assert "<b>" not in page
    assert '"><script>' not in page
    assert "<i>" not in page


def test_a_mark_cannot_be_forged() -> None:
    hers = mark("alice", "")
    assert mark_of(marked(f"host:1{hers}", "bob", "")) == mark("bob", "")
    assert mark("a", "b/c") != hers
    assert mark_of("jupyter") == ""


@pytest.mark.parametrize(
    ("scopes", "admin", "trusted", "expected"),
    [
        (["access:servers!server=alice/"], False, False, None),
        (["custom:gpupool:use"], False, False, (False, None)),
        (["custom:gpupool:use", "access:servers!server=alice/two"], False, False, (False, "two")),
        (["custom:gpupool:use", "access:servers!server=bob/"], False, False, (False, None)),
        (["custom:gpupool:use"], True, False, (False, None)),
        (["custom:gpupool:use"], True, True, (True, None)),
        (["custom:gpupool:admin"], False, False, (True, None)),
        ([], False, True, None),
    ],
)
def test_rights_follow_from_scopes(scopes: list[str], admin: bool, trusted: bool, expected: Any) -> None:
    tokens = HubTokens("service", lambda token: None, None, lambda *_: None)  # type: ignore[arg-type, return-value]
    model = {"kind": "user", "name": "alice", "scopes": scopes, "admin": admin, "groups": ["b", "a"]}
    caller = tokens.of_model(model, trusted)
    assert (caller and (caller.administers, caller.server)) == expected
    if caller:
        assert (caller.owner, caller.namespace) == ("alice", "a")
    assert tokens.of_model({**model, "kind": "service"}) is None


def test_an_event_stream_ends_when_the_hub_takes_its_users_rights() -> None:
    model = {"kind": "user", "name": "alice", "scopes": ["custom:gpupool:admin"], "groups": ["a"]}
    noted = []

    async def who(token: str) -> dict[str, Any]:
        return model

    async def belongs(user: str, namespace: str) -> None:
        noted.append((user, namespace))

    async def watch() -> None:
        tokens = HubTokens("service", who, None, belongs)
        before = await tokens.authenticate("Bearer secret", "127.0.0.1")
        assert before.scope is None and before.presented is not None, "she sees everybody's"
        assert "secret" not in repr(before)
        model.update(scopes=["custom:gpupool:use"], groups=["b"])
        assert tokens.is_still_valid(before), "the hub is asked no more often than every few seconds"
        before.presented.checked_at -= FRESH_S
        tokens.is_still_valid(before)
        assert before.presented.asking is not None
        await before.presented.asking
        assert not tokens.is_still_valid(before)
        after = await tokens.authenticate("Bearer secret", "127.0.0.1")
        assert after.scope == "alice" and tokens.is_still_valid(after)

    asyncio.run(watch())
    assert noted == [("alice", "a"), ("alice", "b"), ("alice", "b")]


def test_the_former_module_path_gives_the_same_configure_and_warns_once() -> None:
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    from jupyter_gpupool.jupyter.hub import Limits, configure\n"
        "    import jupyter_gpupool.jupyter.hub\n"
        "ours = [str(w.message) for w in caught if 'jupyter_gpupool' in str(w.message)]\n"
        "import jupyter_gpupool.hub as now\n"
        "assert (configure, Limits) == (now.configure, now.Limits)\n"
        "print(*ours, sep='\\n')\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "jupyter_gpupool.jupyter.hub is now jupyter_gpupool.hub; the old name works until 1.0"
    ]


def test_the_former_module_path_starts_the_service() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jupyter_gpupool.jupyter.hub.service", "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "GPUPoolHubService" in done.stdout
