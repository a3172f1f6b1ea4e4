"""``gpupool health``"""

from __future__ import annotations

from .base import Command


class HealthApp(Command):
    name = "health"
    description = "Check whether the pool is well. The exit code is 1 when it is not."
    lists = True

    def act(self) -> int:
        client, _ = self.pool()
        health = client.health()
        if self.args.json:
            self.print_json(health)
        else:
            print(f"The GPU pool at {client.url} is {health['status']}")
            width = max((len(check["name"]) for check in health["checks"]), default=0)
            for check in health["checks"]:
                print(f"  {'ok  ' if check['ok'] else 'FAIL'}  {check['name']:<{width}}  {check['detail']}")
        return 0 if health["status"] == "ok" else 1
