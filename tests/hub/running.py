"""A JupyterHub that runs: for the tests, and for what is measured."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import PoolError

from ..conftest import PATIENCE_S, USERS_OWN
from ..support.ports import free_ports
from ..support.processes import command_line

#: Of the users, and of the tests themselves.
PASSWORD = "of-the-tests"
TOKEN = "0123456789abcdef" * 4

LIGHT = Path(__file__).with_name("light_server.py")

_CONFIGURATION = """\
import os
from jupyterhub.auth import Authenticator
from jupyter_gpupool.hub import Limits, configure

class Known(Authenticator):
    async def authenticate(self, handler, data):
        return data["username"] if data["password"] == {password!r} else None

c = get_config()
c.JupyterHub.authenticator_class = Known
c.Authenticator.allow_all = True
c.Authenticator.admin_users = {{"root"}}
c.JupyterHub.load_groups = {{"vision": {{"users": ["alice", "bob"]}}, "speech": {{"users": ["carol"]}}}}
c.JupyterHub.spawner_class = "simple"
c.JupyterHub.bind_url = "http://127.0.0.1:{port}/hubs/one/"
c.JupyterHub.hub_port = {hub_port}
c.JupyterHub.db_url = "sqlite:///{folder}/hub.sqlite"
c.JupyterHub.cookie_secret_file = "{folder}/cookie_secret"
c.JupyterHub.log_level = "INFO"
c.JupyterHub.tornado_settings = {{"slow_spawn_timeout": 1}}
c.ConfigurableHTTPProxy.command = {proxy!r}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{proxy_port}"
c.ConfigurableHTTPProxy.auth_token = {token!r}
c.ConfigurableHTTPProxy.pid_file = "{folder}/proxy.pid"
c.SimpleLocalProcessSpawner.home_dir_template = "{folder}/home/{{username}}"
c.Spawner.cmd = {command!r}
c.Spawner.env_keep = ["PATH", "LANG", "JUPYTER_PATH", "LIGHT_TAKES"]
c.Spawner.poll_interval = 2
c.Spawner.start_timeout = c.Spawner.http_timeout = 300
c.JupyterHub.services = [{{"name": "tests", "api_token": {token!r}}}]
c.JupyterHub.load_roles = [{{
    "name": "tests",
    "scopes": ["groups", "admin:users", "admin:servers", "admin:server_state", "access:servers", "tokens", "shutdown"],
    "services": ["tests"],
}}]
{more}
configure(
    c,
    url="{scheme}://127.0.0.1:{service_port}",
    directory="{folder}/gpupool",
    limits=Limits(**{limits!r}),
    options=["--emulate", "--GPUPoolHubService.log_level=INFO", *{options!r}],
    **{arguments!r},
)
"""


class Hub:
    """Can be ended in more than one way, and started again at the same address with the same database.

    ``light``: its servers are not Jupyter's, but small programs that answer the hub; they take hold of their
    leases, as Jupyter's do, if their environment has LIGHT_TAKES.
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        more: str = "",
        light: bool = False,
        secure: bool = False,
        **arguments: Any,
    ) -> None:
        self.folder = folder
        self._scheme = "https" if secure else "http"
        self._ca = Path(arguments["ca_file"]).read_text() if secure else ""
        jupyter = [sys.executable, "-m", "jupyterhub.singleuser", "--allow-root", "--LabApp.news_url="]
        self.port, hub_port, proxy_port, self.service_port = free_ports(4)
        self.url = f"http://127.0.0.1:{self.port}/hubs/one"
        self.log = folder / "hub.log"
        self._values = {
            "password": PASSWORD,
            "token": TOKEN,
            "port": self.port,
            "hub_port": hub_port,
            "proxy_port": proxy_port,
            "service_port": self.service_port,
            "folder": folder,
            "scheme": self._scheme,
            "command": [sys.executable, str(LIGHT)] if light else jupyter,
            "proxy": [str(root / "node_modules/.bin/configurable-http-proxy")],
        }
        self.process: subprocess.Popen[bytes] | None = None
        built = folder / "built" / "labextensions"
        built.mkdir(parents=True)
        (built / "jupyter-gpupool").symlink_to(root / "jupyter_gpupool/labextension")
        self.write(more, **arguments)
        self.http = httpx.Client(
            base_url=f"{self.url}/hub/api", headers={"Authorization": f"token {TOKEN}"}, timeout=300
        )
        self._users: list[PoolClient] = []

    def write(self, more: str = "", **arguments: Any) -> None:
        """The configuration that the next start has."""
        values = {"limits": arguments.pop("limits", {}), "options": arguments.pop("options", [])}
        text = _CONFIGURATION.format(more=more, arguments=arguments, **values, **self._values)
        (self.folder / "jupyterhub_config.py").write_text(text)

    def start(self) -> None:
        """Returns when the hub and the pool's service answer."""
        environment = {k: v for k, v in os.environ.items() if k not in USERS_OWN and "JUPYTERHUB" not in k}
        # The proxy's node is where jlpm's is.
        path = os.pathsep.join([os.path.dirname(sys.executable), environment["PATH"]])
        environment |= {
            "PATH": path,
            "JUPYTER_PATH": str(self.folder / "built"),
            "GPUPOOL_HUB_TOKEN": TOKEN[::-1],
        }
        deadline = time.monotonic() + 300
        begun_at = self._launch(environment)
        while not self.answers():
            assert self.process is not None
            if self.process.poll() is not None:
                # JupyterHub gives its proxy ten seconds to start, however busy the machine is.
                log = self._log_since(begun_at)
                assert "Failed to start proxy" in log and "TimeoutError" in log, log[-6000:]
                begun_at = self._launch(environment)
            assert time.monotonic() < deadline, f"JupyterHub did not start: {self.log.read_text()[-6000:]}"
            time.sleep(0.05)

    def _launch(self, environment: dict[str, str]) -> int:
        """Start its process; return where its part of the log begins."""
        with self.log.open("ab") as log:
            begun_at = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterhub", "-f", str(self.folder / "jupyterhub_config.py")],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return begun_at

    def _log_since(self, begun_at: int) -> str:
        return self.log.read_bytes()[begun_at:].decode(errors="replace")

    def answers(self) -> bool:
        try:
            httpx.get(
                f"http://127.0.0.1:{self._values['hub_port']}/hubs/one/hub/api/", timeout=PATIENCE_S
            ).raise_for_status()
            self.http.get("/").raise_for_status()
            self.pool(patience_s=0.2).pool()
            return True
        except (httpx.HTTPError, PoolError):
            return False

    def pool(self, token: str = TOKEN[::-1], ca: str = "", patience_s: float = PATIENCE_S) -> PoolClient:
        """A client of the pool; without another token, one that sees everything."""
        client = PoolClient(
            self.service_url, token, timeout_s=PATIENCE_S, patience_s=patience_s, ca=ca or self._ca
        )
        self._users.append(client)
        return client

    @property
    def service_url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.service_port}/hubs/one/services/gpupool"

    def service_environment(self) -> dict[str, str]:
        """Of a service that the hub does not start."""
        return {
            "JUPYTERHUB_SERVICE_NAME": "gpupool",
            "JUPYTERHUB_SERVICE_PREFIX": "/hubs/one/services/gpupool/",
            "JUPYTERHUB_SERVICE_URL": f"{self._scheme}://127.0.0.1:{self.service_port}",
            "JUPYTERHUB_API_URL": f"http://127.0.0.1:{self._values['hub_port']}/hubs/one/hub/api",
            "JUPYTERHUB_BASE_URL": "/hubs/one/",
            "JUPYTERHUB_CLIENT_ID": "service-gpupool",
            "JUPYTERHUB_API_TOKEN": TOKEN[::-1],
        }

    def service(self) -> psutil.Process:
        """Its process."""
        assert self.process is not None
        (found,) = [
            p
            for p in psutil.Process(self.process.pid).children()
            if "jupyter_gpupool.hub.service.app" in command_line(p)
        ]
        return found

    def spawn(self, user: str, **choice: Any) -> httpx.Response:
        """By REST; the user need not be known yet."""
        self.http.post(f"/users/{user}")
        return self.http.post(f"/users/{user}/server", json={"gpupool": choice} if choice else {})

    def server(self, user: str) -> dict[str, Any] | None:
        """What the hub says of a user's server; None while there is none."""
        answer = self.http.get(f"/users/{user}")
        return answer.json().get("servers", {}).get("") if answer.status_code == 200 else None

    def ready(self, user: str) -> bool:
        server = self.server(user)
        return server is not None and server["ready"]

    def stop_server(self, user: str) -> None:
        assert self.http.delete(f"/users/{user}/server").status_code in (202, 204)

    def process_of(self, user: str) -> psutil.Process:
        server = self.server(user)
        assert server is not None
        return psutil.Process(server["state"]["pid"])

    def token_of(self, user: str) -> str:
        """The one that the user's server was given, and whoever may run code there can read."""
        return self.process_of(user).environ()["JUPYTERHUB_API_TOKEN"]

    def of(self, user: str) -> httpx.Client:
        """A client of the user's server."""
        return httpx.Client(
            base_url=f"{self.url}/user/{user}/", headers={"Authorization": f"token {TOKEN}"}, timeout=300
        )

    def leases(self) -> dict[str, str]:
        """Of everybody: owner → state."""
        return {lease.request.owner: lease.state.value for lease in self.pool().leases()}

    def stop(self, sig: int = signal.SIGTERM) -> None:
        """Ends the hub; by its configuration, servers and proxy go on or do not."""
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(sig)
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"JupyterHub did not end: {self.log.read_text()[-4000:]}") from None

    def end(self) -> None:
        """Nothing of it is left."""
        for client in self._users:
            client.close()
        try:
            self.stop()
        finally:
            mine = []
            for process in psutil.process_iter(["cmdline", "environ", "cwd"]):
                words = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
                if any(str(self.folder) in word for word in words) or (process.info["environ"] or {}).get(
                    "JUPYTER_PATH"
                ) == str(self.folder / "built"):
                    mine.append(process)
            for process in mine:
                with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
                    process.kill()
            psutil.wait_procs(mine, timeout=60)
            self.http.close()
