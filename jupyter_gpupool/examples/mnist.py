"""Trains a small convolutional network to read handwritten digits, on a GPU where there is one.

Reads the MNIST files (``train-images-idx3-ubyte`` and so on, packed with gzip or not) where ``--data`` holds them;
otherwise the 1797 digits of 8x8 pixels that scikit-learn brings along, enlarged to MNIST's 28x28.
"""

from __future__ import annotations

import argparse
import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

#: Mean and deviation of MNIST's pixels, for both data sets.
MEAN, DEVIATION = 0.1307, 0.3081
#: What an idx file begins with: two zeros, the type of its elements (8 is an unsigned byte), its dimensions.
IDX_BYTES = 8

Batches = DataLoader[tuple[torch.Tensor, ...]]


class Net(nn.Module):
    """Two convolutions and two linear layers for images of 1 × 28 × 28 pixels; returns 10 logits."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(32 * 12 * 12, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(self.dropout(x.flatten(1))))
        logits: torch.Tensor = self.fc2(self.dropout(x))
        return logits


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes, packed or not, in the shape that it names."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        content = f.read()
    zero, kind, rank = struct.unpack_from(">HBB", content)
    if zero != 0 or kind != IDX_BYTES:
        raise ValueError(f"{path} is not an idx file of bytes")
    shape = struct.unpack_from(f">{rank}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def mnist(folder: Path) -> tuple[np.ndarray, ...] | None:
    """Images and labels for training, then for testing; None where a file is missing."""
    arrays = []
    for part in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            places = [folder / f"{part}-{kind}", folder / "MNIST" / "raw" / f"{part}-{kind}"]
            files = [
                p for place in places for p in (place, place.with_name(place.name + ".gz")) if p.is_file()
            ]
            if not files:
                return None
            arrays.append(read_idx(files[0]))
    return tuple(arrays)


def small_digits() -> tuple[np.ndarray, ...]:
    """The same for scikit-learn's digits: every pixel becomes 3x3, with a margin of 2."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.kron(digits.images * (255 / 16), np.ones((3, 3))).round().astype(np.uint8)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:-360], order[-360:]
    return images[train], digits.target[train], images[test], digits.target[test]


def dataset(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    """Return normalized images of shape (n, 1, 28, 28) and their labels (n) from uint8 arrays."""
    pixels = torch.from_numpy(images.astype(np.float32) / 255).unsqueeze(1)
    return TensorDataset((pixels - MEAN) / DEVIATION, torch.from_numpy(labels.astype(np.int64)))


def train(
    args: argparse.Namespace, model: nn.Module, loader: Batches, optimizer: torch.optim.Optimizer, epoch: int
) -> None:
    """Train for one epoch, and print the loss every ``log_interval`` steps."""
    model.train()
    total = len(loader.dataset)  # type: ignore[arg-type]
    for batch, (data, target) in enumerate(loader):
        data, target = data.to(args.device, non_blocking=True), target.to(args.device, non_blocking=True)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if batch % args.log_interval == 0:
            seen = batch * args.batch_size
            share = 100 * batch // len(loader)
            print(f"Train Epoch: {epoch} [{seen}/{total} ({share}%)] Loss: {loss.item():.6f}", flush=True)


@torch.no_grad()
def test(args: argparse.Namespace, model: nn.Module, loader: Batches) -> None:
    """Print the average loss and the accuracy on the test images."""
    model.eval()
    total = len(loader.dataset)  # type: ignore[arg-type]
    loss, right = 0.0, 0
    for data, target in loader:
        data, target = data.to(args.device), target.to(args.device)
        output = model(data)
        loss += F.cross_entropy(output, target, reduction="sum").item()
        right += (output.argmax(1) == target).sum().item()
    accuracy = 100 * right / total
    print(
        f"Test set: Average loss: {loss / total:.4f}, Accuracy: {right}/{total} ({accuracy:.0f}%)", flush=True
    )


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train a convolutional network on handwritten digits.")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="where MNIST's files are (default: data)"
    )
    parser.add_argument("--epochs", type=int, default=3, help="passes over the data (default: 3)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default: 64)")
    parser.add_argument(
        "--test-batch-size", type=int, default=500, help="images per step of testing (default: 500)"
    )
    parser.add_argument("--lr", type=float, default=0.001, help="learning rate (default: 0.001)")
    parser.add_argument("--dropout", type=float, default=0.25, help="share of values dropped (default: 0.25)")
    parser.add_argument("--seed", type=int, default=1, help="seed of all chance (default: 1)")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that load data (default: 2)")
    parser.add_argument("--log-interval", type=int, default=10, help="steps between two lines (default: 10)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one)")
    parser.add_argument(
        "--output-path", type=Path, default=Path("."), help="where the model goes (default: here)"
    )
    parser.add_argument("--save-model", action="store_true", help="save the trained model as mnist_cnn.pt")
    return parser.parse_args()


def main() -> None:
    """Train and test for the number of epochs, and save the model if that is wanted."""
    args = arguments()
    torch.manual_seed(args.seed)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    data = mnist(args.data)
    if data is None:
        print(f"No MNIST files in {args.data}: training on scikit-learn's small digits instead.")
        data = small_digits()
    on_gpu = args.device.type != "cpu"
    options = {"num_workers": args.num_workers, "pin_memory": on_gpu}
    train_loader = DataLoader(dataset(*data[:2]), batch_size=args.batch_size, shuffle=True, **options)
    test_loader = DataLoader(dataset(*data[2:]), batch_size=args.test_batch_size, **options)

    if args.device.type == "cuda":
        print(f"Training on {args.device}: {torch.cuda.get_device_name(args.device)}", flush=True)
    else:
        print(f"Training on {args.device}", flush=True)
    model = Net(args.dropout).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    for epoch in range(1, args.epochs + 1):
        train(args, model, train_loader, optimizer, epoch)
        test(args, model, test_loader)

    if args.save_model:
        args.output_path.mkdir(parents=True, exist_ok=True)
        path = args.output_path / "mnist_cnn.pt"
        torch.save(model.state_dict(), path)
        print(f"Saved the model as {path}")


if __name__ == "__main__":
    main()
