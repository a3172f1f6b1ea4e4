"""Let torchvision be imported beside a PyTorch that its compiled half does not fit, in spawned processes too.

Wheels of torchvision on the registries belong to PyTorch with CUDA. Beside PyTorch for the CPU its models, data sets
and transforms work, once the two operators exist whose names it looks up when it is imported.
"""

import importlib.machinery
import json
import os
import sys


class _BeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision" or not (found := importlib.machinery.PathFinder.find_spec(name, path)):
            return None
        sys.meta_path.remove(self)
        import torch

        try:
            torch.ops.load_library(os.path.join(os.path.dirname(found.origin), "_C.so"))
        except OSError:
            # It is kept for as long as the process lives, for with it the operators would go.
            torch.gpupool_programs = library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return found


class _AfterTorch:
    """Runs ranks_findings.py as soon as a rank of a public script has imported torch."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch" or not (found := importlib.machinery.PathFinder.find_spec(name, path)):
            return None
        sys.meta_path.remove(self)
        execute = found.loader.exec_module

        def exec_module(module):
            execute(module)
            import ranks_findings

            ranks_findings.begin(**json.loads(os.environ["PROGRAMS_FINDINGS"]))

        found.loader.exec_module = exec_module
        return found


sys.meta_path.insert(0, _BeforeTorchvision())
if "PROGRAMS_FINDINGS" in os.environ:
    sys.meta_path.insert(0, _AfterTorch())
