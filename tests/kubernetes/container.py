"""Run a command as a container does: the first process of its own PID namespace, with its own mounts.

``unshare --mount --pid --fork --kill-child python container.py SPECIFICATION.json``. Its root is made of this machine's
folders, with a /tmp, a /run and the image's own files of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

#: Of these the container has its own.
OWN = ("tmp", "run", "var", "opt", "proc", "lost+found")


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    root = Path(spec["root"])
    _mount("-t", "tmpfs", "container", str(root))
    for entry in Path("/").iterdir():
        place = root / entry.name
        if entry.is_symlink():
            place.symlink_to(os.readlink(entry))
        elif entry.is_dir():
            place.mkdir()
            if entry.name not in OWN:
                _mount("--rbind", str(entry), str(place))
    for name in OWN[:5]:
        (root / name).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)
    (root / "var" / "run").symlink_to("/run")
    _mount("-t", "proc", "proc", str(root / "proc"))
    for path, text in spec["files"].items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(0o755)
    for mount in spec["mounts"]:
        target = root / mount["path"].replace("/var/run/", "/run/").strip("/")
        target.mkdir(parents=True, exist_ok=True)
        _mount("--bind", mount["source"], str(target))
        if mount["read_only"]:
            _mount("-o", "remount,bind,ro", str(target))
    for source in spec["visible"]:
        target = root / source.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        if not any(target.iterdir()):  # else it is a part of another one
            _mount("--bind", source, str(target))
    os.chroot(root)
    os.chdir("/")
    command, environment = spec["command"], spec["env"]
    try:
        os.execvpe(command[0], command, environment)
    except OSError as e:
        print(f"{command[0]}: {e.strerror}", file=sys.stderr)
        os._exit(128)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


if __name__ == "__main__":
    main()
