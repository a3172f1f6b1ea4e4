"""Public programs for JAX that `make programs` runs, each named by its path in its repository."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import tiny_data

#: The environment variable that names a clone, by repository.
CLONES = {
    "jax-ml/jax": "JAX_SOURCES",
    "google/flax": "FLAX_SOURCES",
    "patrick-kidger/equinox": "EQUINOX_SOURCES",
    "pyro-ppl/numpyro": "NUMPYRO_SOURCES",
    "google-deepmind/optax": "OPTAX_SOURCES",
    "keras-team/keras": "KERAS_SOURCES",
}
STAND_INS = Path(__file__).with_name("standin_flax")

_ACCURACY = r"set accuracy (\S+)|digest: (.+)"


@dataclass(frozen=True, kw_only=True)
class JaxProgram:
    """A script or a notebook, and what is compared: every digit of the figures, and the bits of the digest's arrays.

    `script` runs in a copy of the repository's `folder`, which is the working directory's subfolder of that name.
    {device} in `arguments` becomes cuda or cpu.
    """

    repository: str
    script: str
    folder: str
    arguments: str = ""
    data: Callable[[Path], None] | None = None  # called with the working directory
    options: str = ""  # of tests/programs/drive_jax.py
    figures: str = r"digest: (.+)"
    libraries: tuple[str, ...] = ()
    slices: int = 1
    stand_ins: bool = False  # for TensorFlow and others
    stream: str = "stdout"  # where the figures are printed

    def __str__(self) -> str:
        return self.script


def _mnist_gz(folder: Path) -> None:
    """MNIST's files where the script's own module looks for those that it has downloaded."""
    tiny_data.write_mnist(folder)
    raw = folder / "MNIST" / "raw"
    for file in list(raw.iterdir()):
        (raw / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    module = folder / "examples" / "datasets.py"
    text = module.read_text()
    assert text.count('"/tmp/jax_example_data/"') == 1
    module.write_text(text.replace('"/tmp/jax_example_data/"', repr(f"{raw}/")))


def _mnist_npz(folder: Path) -> None:
    tiny_data.write_mnist(folder)
    raw = folder / "MNIST" / "raw"
    parts = {}
    for name, part in (("train", "train"), ("test", "t10k")):
        images = np.frombuffer((raw / f"{part}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
        labels = np.frombuffer((raw / f"{part}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
        parts |= {f"x_{name}": images.reshape(-1, 28, 28), f"y_{name}": labels.astype(np.int32)}
    np.savez(folder / "mnist.npz", **parts)


def _jax(script: str, **options: object) -> JaxProgram:
    return JaxProgram(
        repository="jax-ml/jax",
        folder="examples",
        script=f"examples/{script}",
        data=_mnist_gz,
        figures=_ACCURACY,
        **options,  # type: ignore[arg-type]
    )


def _equinox(script: str, **options: object) -> JaxProgram:
    return JaxProgram(
        repository="patrick-kidger/equinox",
        folder="docs/examples",
        script=f"docs/examples/{script}",
        libraries=("equinox", "optax"),
        **options,  # type: ignore[arg-type]
    )


def _optax(script: str, digest: str, **options: object) -> JaxProgram:
    return JaxProgram(
        repository="google-deepmind/optax",
        folder="examples",
        script=f"examples/{script}",
        options=f"--digest {digest}",
        libraries=("optax", "flax", "matplotlib"),
        **options,  # type: ignore[arg-type]
    )


def _numpyro(script: str, arguments: str, **options: object) -> JaxProgram:
    return JaxProgram(
        repository="pyro-ppl/numpyro",
        folder="examples",
        script=f"examples/{script}",
        arguments=f"{arguments} --device {{device}}",
        libraries=("numpyro", "matplotlib"),
        **options,  # type: ignore[arg-type]
    )


def _keras(script: str, **options: object) -> JaxProgram:
    return JaxProgram(
        repository="keras-team/keras",
        folder="examples",
        script=f"examples/{script}",
        data=_mnist_npz,
        libraries=("keras",),
        **options,  # type: ignore[arg-type]
    )


PROGRAMS = (
    _jax("mnist_classifier.py", options="--digest params"),
    _jax("mnist_classifier_fromscratch.py", options="--digest params"),
    _jax("spmd_mnist_classifier_fromscratch.py", options="--digest replicated_params", slices=2),
    JaxProgram(
        repository="google/flax",
        folder="examples/mnist",
        script="examples/mnist/main.py",
        arguments="--workdir=out --config=examples/mnist/configs/default.py --config.num_epochs=3 --verbosity=0",
        data=_mnist_npz,
        figures=r"(?:loss|accuracy): (\d+\.\d+)",
        libraries=("flax", "optax", "ml_collections"),
        stand_ins=True,
        stream="stderr",
    ),
    _equinox("train_rnn.ipynb", figures=r"(?:loss|accuracy)=(\S+)"),
    _equinox("stateful.ipynb", options="--digest (model,state,pred_test_ys)"),
    _numpyro("ar2.py", "--num-samples 200 --num-warmup 200", figures=r"-?\d+\.\d\d(?!\d)"),
    _numpyro("proportion_test.py", "--num-samples 200 --num-warmup 200", figures=r"-?\d+\.\d+"),
    _optax("flax_example.ipynb", "loss_history"),
    _optax("ogda_example.ipynb", "(params_hist,distances_to_origin)"),
    _keras(
        "demo_mnist_convnet.py",
        options="--keras-mnist mnist.npz --digest model.get_weights()",
        figures=r"Test (?:loss|accuracy): (\S+)|digest: (.+)",
    ),
)
