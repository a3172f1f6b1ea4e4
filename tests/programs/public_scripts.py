"""Public scripts that `make programs` runs, each named by its path in its repository."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import tiny_data

#: The environment variable that names a clone, by repository.
CLONES = {
    "pytorch/examples": "PYTORCH_EXAMPLES",
    "pytorch/tutorials": "PYTORCH_TUTORIALS",
    "karpathy/nanoGPT": "NANOGPT",
    "karpathy/minGPT": "MINGPT",
    "lucidrains/vit-pytorch": "VIT_PYTORCH",
}

#: Every number with a point, unless it is a time.
NUMBERS = r"-?\d+\.\d+(?:e[-+]?\d+)?(?![\d.]|\s?m?s\b)"


@dataclass(frozen=True, kw_only=True)
class Program:
    """A script and what is compared.

    `commands` run one after the other in a copy of the repository's `folder`. In them {accel} and {cuda} become the
    option that chooses the GPU, and {device} its name; on the CPU {accel} and {cuda} become nothing.
    """

    repository: str
    folder: str
    commands: tuple[str, ...]
    name: str = ""
    data: Callable[[Path], None] | None = None  # called with the copy of `folder`
    options: str = ""  # of tests/programs/drive.py
    figures: str = NUMBERS
    bound: float = 0.0  # the largest relative difference; 0: the same digits
    libraries: tuple[str, ...] = ()
    gpus: str = "0"  # CUDA_VISIBLE_DEVICES
    what: str = "figures"  # what `figures` finds, in the table

    def __str__(self) -> str:
        return self.name or f"{self.folder}/{self.commands[-1].split()[0]}"


def _examples(folder: str, *commands: str, **options: object) -> Program:
    return Program(repository="pytorch/examples", folder=folder, commands=commands, **options)  # type: ignore[arg-type]


def _mnist_beside(folder: Path) -> None:
    tiny_data.write_mnist(folder.parent / "data")


def _mnist_and_results(folder: Path) -> None:
    _mnist_beside(folder)
    (folder / "results").mkdir(exist_ok=True)


def _mnist_within(folder: Path) -> None:
    tiny_data.write_mnist(folder / "data")


def _fashion_within(folder: Path) -> None:
    tiny_data.write_mnist(folder / "data", name="FashionMNIST")


def _cora(folder: Path) -> None:
    tiny_data.write_cora(folder / "cora.tgz")


def _corpus(folder: Path) -> None:
    tiny_data.write_corpus(folder / "corpus")


def _bsds(folder: Path) -> None:
    for part in ("train", "test"):
        tiny_data.write_images(folder / "dataset" / "BSDS300" / "images" / part, 4, 256)


def _classes(folder: Path) -> None:
    for part in ("train", "val"):
        for name in ("cats", "dogs"):
            tiny_data.write_images(folder / "sample" / part / name, 4, 256)


_WORDS = "--emsize 16 --nhid 16 --nlayers 1 --batch_size 4 --nhead 2 --dropout 0 --data corpus --epochs 2"

EXAMPLES = (
    _examples(
        "mnist",
        "main.py --epochs 2 --save-model --log-interval 2",
        data=_mnist_beside,
        options="--in-order --draws-on-cpu",
        libraries=("torchvision",),
    ),
    _examples(
        "mnist_rnn",
        "main.py {accel} --epochs 2 --log-interval 2",
        data=_mnist_beside,
        options="--draws-on-cpu",
        libraries=("torchvision",),
    ),
    _examples(
        "mnist_forward_forward",
        "main.py --epochs 20 --train_size 256 --test_size 256",
        data=_mnist_within,
        libraries=("torchvision",),
        options="--in-order",
    ),
    _examples(
        "mnist_hogwild",
        "main.py {cuda} --epochs 2 --num-processes 1",
        data=_mnist_beside,
        figures=r"Average loss: (\d+\.\d+)",
        bound=0.1,  # its processes draw dropout from the generator of their device
        libraries=("torchvision",),
    ),
    _examples(
        "vae",
        "main.py --epochs 2 --log-interval 1",
        data=_mnist_and_results,
        options="--draws-on-cpu",
        libraries=("torchvision",),
    ),
    _examples(
        "siamese_network",
        "main.py --epochs 1 --log-interval 1",
        data=_mnist_beside,
        libraries=("torchvision",),
        options="--in-order",
    ),
    _examples(
        "imagenet",
        "main.py -a resnet18 -b 4 -j 0 -p 1 --epochs 1 --seed 1 sample",
        data=_classes,
        figures=r"Loss (\S+) \( *(\S+)\)",
        libraries=("torchvision",),
    ),
    _examples(
        "super_resolution",
        "main.py --upscale_factor 3 --batchSize 2 --testBatchSize 2 --nEpochs 2 --threads 0 {accel}",
        "super_resolve.py --input_image dataset/BSDS300/images/test/0.png --model model_epoch_2.pth "
        "--output_filename out.png {accel}",
        data=_bsds,
        libraries=("torchvision", "PIL"),
        name="super_resolution",
    ),
    _examples(
        "gcn",
        "main.py --epochs 20 --val-every 5",
        data=_cora,
        options="--draws-on-cpu --download cora.tgz",
        libraries=("requests",),
    ),
    _examples(
        "gat",
        "main.py --epochs 4 --val-every 1 --num-heads 2 --hidden-dim 8",
        data=_cora,
        options="--draws-on-cpu --download cora.tgz",
        libraries=("requests",),
    ),
    _examples(
        "dcgan",
        "main.py {accel} --dataset fake --workers 0 --niter 1 --ngf 8 --ndf 8 --manualSeed 1",
        options="--draws-on-cpu",
        figures=r"(?:Loss_D|Loss_G|D\(x\)|D\(G\(z\)\)): (\S+)(?: / (\S+))?",
        libraries=("torchvision",),
    ),
    *(
        _examples(
            "word_language_model",
            f"main.py {{accel}} --model {model} --lr 0.5 {_WORDS}",
            "generate.py {accel} --data corpus --words 12 --checkpoint model.pt",
            data=_corpus,
            name=f"word_language_model, {model}",
            options="--draws-on-cpu",
            figures=r"(?:loss|ppl) +(\d+\.\d+)",
        )
        for model in ("LSTM", "GRU", "RNN_TANH", "RNN_RELU", "Transformer")
    ),
    _examples("regression", "main.py", options="--on-device {device}"),
)


def _tutorial(folder: str, command: str, **options: object) -> Program:
    return Program(
        repository="pytorch/tutorials",
        folder=folder,
        commands=(command,),
        **options,  # type: ignore[arg-type]
    )


TUTORIALS = (
    _tutorial(
        "beginner_source/basics",
        "quickstart_tutorial.py",
        data=_fashion_within,
        figures=r"loss: +(\d+\.\d+)|Accuracy: (\S+)%|Predicted: (.+),",
        libraries=("torchvision",),
    ),
    _tutorial("beginner_source/examples_autograd", "polynomial_autograd.py", options="--draws-on-cpu"),
    _tutorial(
        "beginner_source/examples_nn", "polynomial_optim.py", options="--on-device {device} --draws-on-cpu"
    ),
    _tutorial(
        "beginner_source/blitz",
        "data_parallel_tutorial.py",
        figures=r"Outside: (.+)",
        gpus="0,1",
        what="shapes, on two GPUs",
    ),
)

_NANOGPT = (
    "train.py config/train_shakespeare_char.py --device={device} --out_dir=out --always_save_checkpoint=True "
    "--eval_iters=2 --eval_interval=4 --log_interval=1 --block_size=32 --batch_size=4 "
    "--n_layer=2 --n_head=2 --n_embd=32 --lr_decay_iters=12 "
)


def _shakespeare(folder: Path) -> None:
    (folder / "data" / "shakespeare_char" / "input.txt").write_text(tiny_data.TEXT)


def _characters(folder: Path) -> None:
    (folder / "input.txt").write_text(tiny_data.TEXT + "O God, O God!\n")


GPTS = (
    Program(
        repository="karpathy/nanoGPT",
        folder=".",
        name="train.py with its own dtype, compiled",
        commands=(
            "data/shakespeare_char/prepare.py",
            f"{_NANOGPT} --compile={{compile}} --dropout=0.0 --max_iters=8",
        ),
        data=_shakespeare,
        figures=r"loss (\d+\.\d+)",
        bound=0.02,  # bfloat16, where the CPU computes in float32
        libraries=("requests",),
    ),
    Program(
        repository="karpathy/nanoGPT",
        folder=".",
        name="train.py, resumed, and sample.py in float32",
        commands=(
            "data/shakespeare_char/prepare.py",
            f"{_NANOGPT} --compile=False --dtype=float32 --max_iters=8",
            f"{_NANOGPT} --compile=False --dtype=float32 --max_iters=12 --init_from=resume",
            "sample.py --device={device} --dtype=float32 --num_samples=2 --max_new_tokens=40",
        ),
        data=_shakespeare,
        options="--draws-on-cpu",
        figures=r"loss (\d+\.\d+)|(?:pkl\.{3}|-{15})\n([^-]+)\n(?=-{15})",
        libraries=("requests", "tiktoken"),
        what="losses and texts",
    ),
    Program(
        repository="karpathy/minGPT",
        folder=".",
        commands=(
            "projects/chargpt/chargpt.py --model.model_type=gpt-nano --data.block_size=32 "
            "--trainer.max_iters=31 --trainer.batch_size=8 --trainer.num_workers=0",
        ),
        name="projects/chargpt/chargpt.py",
        data=_characters,
        options="--draws-on-cpu",
        figures=r"train loss (\d+\.\d+)",
    ),
    Program(
        repository="karpathy/minGPT",
        folder=".",
        commands=("projects/adder/adder.py --trainer.max_iters=31 --trainer.num_workers=0",),
        name="projects/adder/adder.py",
        options="--draws-on-cpu",
        figures=r"train loss (\d+\.\d+)|final score: (\d+/\d+)",
    ),
)

PROGRAMS = EXAMPLES + TUTORIALS + GPTS
