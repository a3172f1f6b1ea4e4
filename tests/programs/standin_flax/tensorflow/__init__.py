"""As much of TensorFlow as Flax's example for MNIST uses: data in order, and summaries that are written nowhere."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np

float32 = np.float32


def cast(values, dtype):
    return np.asarray(values).astype(dtype)


def TensorSpec(shape, dtype):
    return shape, dtype


class Dataset:
    """The examples of a data set, dicts of arrays."""

    def __init__(self, examples):
        self._examples = list(examples)

    def map(self, function):
        return Dataset(map(function, self._examples))

    def shuffle(self, buffer_size):
        return self

    def prefetch(self, count):
        return self

    def batch(self, size, drop_remainder):
        parts = [self._examples[k : k + size] for k in range(0, len(self._examples), size)]
        return Dataset(
            {name: np.stack([example[name] for example in part]) for name in part[0]}
            for part in parts
            if len(part) == size or not drop_remainder
        )

    def as_numpy_iterator(self):
        return iter(self._examples)


class _Writer:
    def as_default(self):
        return nullcontext(self)

    def flush(self):
        pass


random = SimpleNamespace(set_seed=lambda seed: None)
data = SimpleNamespace(Dataset=Dataset)
config = SimpleNamespace(
    experimental=SimpleNamespace(set_visible_devices=lambda devices, kind: None),
)
summary = SimpleNamespace(
    SummaryWriter=_Writer,
    create_file_writer=lambda folder: _Writer(),
    scalar=lambda name, data, step: None,
)
