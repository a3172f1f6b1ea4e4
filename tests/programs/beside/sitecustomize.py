"""Let torchvision be imported beside a PyTorch that its compiled half does not fit, in spawned processes too.

Wheels of torchvision on the registries belong to PyTorch with CUDA. Beside PyTorch for the CPU its models, data sets
and transforms work, once the two operators exist whose names it looks up when it is imported.
"""

import sys


class _BeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            # It is kept for as long as the process lives, for with it the operators would go.
            torch.gpupool_programs = library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision())
