"""PyTorch's public scripts for several GPUs that `make programs` runs, each named by its path in its repository."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node {ranks}"


@dataclass(frozen=True, kw_only=True)
class Script:
    """A script and how it is compared.

    ``commands``: Python's arguments, one after the other in a copy of ``folder``. ``code``: the files that are made of
    a page's blocks of code, by number, for a tutorial whose code stands on a page. ``plain_attention``: on the CPU,
    too, no kernel computes attention as a whole. ``draws_empty``: the script leaves parameters without values.
    ``bound``: the largest relative difference; 0: the same digits. ``printed``: what is compared of the output, too.
    """

    repository: str
    folder: str
    commands: tuple[str, ...]
    name: str
    code: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    data: Callable[[Path], None] | None = None
    ranks: int = 2
    draws_on_cpu: bool = False
    plain_attention: bool = False
    draws_empty: bool = False
    bound: float = 0.0
    why_apart: str = ""
    printed: str = ""
    libraries: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def blocks_of_code(page: str) -> list[str]:
    """The blocks of Python of a page in reStructuredText."""
    blocks: list[str] = []
    lines = page.splitlines()
    at = 0
    while at < len(lines):
        line, at = lines[at], at + 1
        if line.strip() not in (".. code:: python", ".. code-block:: python", "::"):
            continue
        margin = len(line) - len(line.lstrip())
        block = []
        while at < len(lines) and (
            not lines[at].strip() or len(lines[at]) - len(lines[at].lstrip()) > margin
        ):
            block.append(lines[at])
            at += 1
        blocks.append(textwrap.dedent("\n".join(block)).strip() + "\n")
    return blocks


def _example(name: str, folder: str, *commands: str, **options: object) -> Script:
    return Script(  # type: ignore[arg-type]
        repository="pytorch/examples",
        folder=f"distributed/{folder}",
        commands=commands,
        name=f"distributed/{name}",
        **options,
    )


def _page(
    page: str, file: str, blocks: tuple[int, ...], command: str = "{file}", **options: object
) -> Script:
    folder, _, name = page.rpartition("/")
    return Script(  # type: ignore[arg-type]
        repository="pytorch/tutorials",
        folder=folder,
        commands=(command.format(file=file, ranks="{ranks}"),),
        name=f"{page}: {file}",
        code=((name, file, blocks),),
        **options,
    )


_MINGPT = (
    "main.py data_config.path=data/input.txt data_config.truncate=0.003 data_config.block_size=32 "
    "gpt_config.n_layer=2 gpt_config.n_head=2 gpt_config.n_embd=32 trainer_config.max_epochs=2 "
    "trainer_config.batch_size=64 trainer_config.data_loader_workers=0 trainer_config.save_every=1 "
    "trainer_config.use_amp={amp}"
)

EXAMPLES = (
    _example("ddp/example.py", "ddp", f"{TORCHRUN} example.py"),
    _example("ddp-tutorial-series/single_gpu.py", "ddp-tutorial-series", "single_gpu.py 2 1", ranks=1),
    _example("ddp-tutorial-series/multigpu.py", "ddp-tutorial-series", "multigpu.py 2 1"),
    _example(
        "ddp-tutorial-series/multigpu_torchrun.py, resumed",
        "ddp-tutorial-series",
        f"{TORCHRUN} multigpu_torchrun.py 1 2",
        f"{TORCHRUN} multigpu_torchrun.py 1 4",
    ),
    _example("ddp-tutorial-series/multinode.py", "ddp-tutorial-series", f"{TORCHRUN} multinode.py 2 1"),
    _example(
        "minGPT-ddp, resumed",
        "minGPT-ddp/mingpt",
        f"{TORCHRUN} {_MINGPT.format(amp=False)}",
        f"{TORCHRUN} {_MINGPT.format(amp=False)} trainer_config.max_epochs=3",
        draws_on_cpu=True,
        libraries=("hydra", "boto3", "fsspec"),
    ),
    *(
        _example(f"FSDP2/{command}{resumed}", "FSDP2", *runs, draws_empty=True, plain_attention=True)
        for command, resumed in (
            ("example.py --explicit-prefetching", ""),
            ("example.py --mixed-precision", ""),
            ("example.py", ", resumed"),
            ("example.py --dcp-api", ", resumed"),
        )
        for runs in ((f"{TORCHRUN} {command}",) * (2 if resumed else 1),)
    ),
    _example(
        "tensor_parallelism/tensor_parallel_example.py",
        "tensor_parallelism",
        f"{TORCHRUN} tensor_parallel_example.py",
    ),
    _example(
        "tensor_parallelism/sequence_parallel_example.py",
        "tensor_parallelism",
        f"{TORCHRUN} sequence_parallel_example.py",
        draws_on_cpu=True,
    ),
    _example(
        "tensor_parallelism/fsdp_tp_example.py",
        "tensor_parallelism",
        f"{TORCHRUN} fsdp_tp_example.py",
        ranks=4,
        draws_on_cpu=True,
        bound=1e-5,
        why_apart="float32's rounding",
        plain_attention=True,
    ),
)

TUTORIALS = (
    _page("intermediate_source/ddp_tutorial.rst", "ddp.py", (0, 1, 2, 3, 4)),
    _page("intermediate_source/ddp_tutorial.rst", "elastic_ddp.py", (5,), f"{TORCHRUN} {{file}}"),
    _page(
        "intermediate_source/pipelining_tutorial.rst",
        "pipelining_tutorial.py",
        (0, 1, 2, 4),
        f"{TORCHRUN} {{file}}",
        printed=r"tensor\((\d+\.\d+)",
    ),
    _page("recipes_source/distributed_checkpoint_recipe.rst", "save.py", (0,), draws_on_cpu=True),
    _page("recipes_source/distributed_async_checkpoint_recipe.rst", "async_save.py", (0,), draws_on_cpu=True),
    _page("recipes_source/zero_redundancy_optimizer.rst", "zero.py", (0,), printed=r"params sum is: (\S+)"),
    _page("advanced_source/generic_join.rst", "join.py", (0,), printed=r"all (\d+) of its"),
)

SCRIPTS = EXAMPLES + TUTORIALS
