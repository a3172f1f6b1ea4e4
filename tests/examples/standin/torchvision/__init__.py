"""The few names of torchvision that PyTorch's public MNIST script imports, over scikit-learn's digits.

torchvision has no build for PyTorch without CUDA on the registries, and the script downloads its data.
"""

from torchvision import datasets, transforms

__all__ = ["datasets", "transforms"]
