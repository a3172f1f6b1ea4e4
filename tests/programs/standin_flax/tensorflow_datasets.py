"""``load("mnist")`` from a file in the working directory that the tests write."""

import numpy as np
import tensorflow as tf


def load(name, split):
    found = np.load(f"{name}.npz")
    parts = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}
    images, labels = (found[part] for part in parts[split])
    return tf.data.Dataset({"image": x[..., None], "label": y} for x, y in zip(images, labels, strict=True))
