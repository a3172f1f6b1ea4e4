"""Data of a few kilobytes in the place of what public scripts download."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np

TEXT = "the pool lends a slice of a card to a notebook and takes it back when the notebook has ended\n" * 60


def write_mnist(folder: Path, train: int = 512, test: int = 256, name: str = "MNIST") -> None:
    """Digits as bright bars on noise, in MNIST's own format below `folder`/`name`/raw."""
    draws = np.random.default_rng(0)
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for part, number in (("train", train), ("t10k", test)):
        labels = draws.integers(0, 10, number, dtype=np.uint8)
        images = draws.integers(0, 60, (number, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 + 2 * label : 7 + 2 * label, 4:24] = 240
        header = np.array([2051, number, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([2049, number], dtype=">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def write_corpus(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text(TEXT)


def write_cora(file: Path, papers: int = 1600, words: int = 24) -> None:
    """A citation graph in Cora's format; the scripts keep 1500 papers from training, so it has more."""
    draws = np.random.default_rng(0)
    topics = draws.integers(0, 3, papers)
    has = draws.random((papers, words)) < 0.1 + 0.4 * (np.arange(words) % 3 == topics[:, None])
    has[:, 0] |= ~has.any(1)
    folder = file.parent / "graph"
    folder.mkdir()
    content = "\n".join(
        f"{n}\t" + "\t".join(str(int(word)) for word in row) + f"\ttopic{topic}"
        for n, (row, topic) in enumerate(zip(has, topics, strict=True))
    )
    (folder / "cora.content").write_text(content)
    edges = {(int(a), int(b)) for a, b in draws.integers(0, papers, (3 * papers, 2)) if a != b}
    (folder / "cora.cites").write_text("\n".join(f"{a}\t{b}" for a, b in sorted(edges)))
    with tarfile.open(file, "w:gz") as archive:
        archive.add(folder, "cora")


def write_images(folder: Path, number: int, pixels: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for n in range(number):
        coarse = draws.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((pixels, pixels)).save(folder / f"{n}.png")
