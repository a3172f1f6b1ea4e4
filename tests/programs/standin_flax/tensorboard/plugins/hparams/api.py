"""Flax names the settings of a run for TensorBoard; nobody looks at them here."""


def hparams(hparams):
    pass
