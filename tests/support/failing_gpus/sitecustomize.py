"""Python imports this at its start where the folder is in PYTHONPATH. Only the processes that fork workers use it."""

import sys
from pathlib import Path

if "jupyter_gpupool.engines.local.zygote" in sys.orig_argv:
    sys.path.append(str(Path(__file__).parents[3]))
    from tests.support.failing_gpus import install

    install()
