"""``python -m jupyter_gpupool`` is the ``gpupool`` command."""

from __future__ import annotations

from .cli.app import main

if __name__ == "__main__":
    main()
