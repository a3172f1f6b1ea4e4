"""The errors of TensorFlow's files, which Flax names."""


class NotFoundError(Exception):
    pass
