"""Data files: real ones are read right, damaged ones are named, missing ones come with advice."""

from __future__ import annotations

import gzip
import os
import struct
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from decaycast.lab import data, image_files

TRAIN, TEST = 40, 12
REAL = os.environ.get(data.ENVIRONMENT)


@pytest.fixture(autouse=True)
def _no_memory_and_no_folder(monkeypatch):
    """Each test reads anew, from the folder it names."""
    monkeypatch.delenv(data.ENVIRONMENT, raising=False)
    data.load.cache_clear()
    data._read.cache_clear()
    yield
    data.load.cache_clear()
    data._read.cache_clear()


def idx(array: np.ndarray, magic: bytes | None = None) -> bytes:
    head = magic or bytes([0, 0, 8, array.ndim])
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


def images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with a small MNIST in the published layout."""
    (tmp_path / "mnist").mkdir()
    for part, count in (("train", TRAIN), ("test", TEST)):
        x, y = images(count, seed=count)
        for name, array in zip(image_files.IDX_FILES[part], (x, y), strict=True):
            (tmp_path / "mnist" / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path


def rewrite(folder: Path, name: str, change) -> Path:
    path = folder / "mnist" / f"{name}.gz"
    path.write_bytes(change(path.read_bytes()))
    return path


TRAIN_IMAGES, TRAIN_LABELS = image_files.IDX_FILES["train"]


# reading


def test_idx_files_are_read_as_they_are(folder: Path):
    (x, y), (test_x, test_y) = data._read("mnist", folder)
    expected_x, expected_y = images(TRAIN, seed=TRAIN)
    assert x.shape == (TRAIN, 1, 28, 28)
    assert np.array_equal(x[:, 0], expected_x)
    assert np.array_equal(y, expected_y)
    assert np.array_equal(test_x[:, 0], images(TEST, seed=TEST)[0])
    assert len(test_y) == TEST


def test_unpacked_files_and_torchvisions_folder_work_too(folder: Path):
    (folder / "MNIST").mkdir()
    (folder / "mnist").rename(folder / "MNIST" / "raw")
    for path in (folder / "MNIST" / "raw").glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    split = data.load("mnist", data_dir=folder, train_size=20, validation_size=10)
    assert split.shape == (1, 28, 28)
    assert len(split.train[0]) == 20


def test_a_split_is_disjoint_standardised_and_repeatable(folder: Path):
    split = data.load("mnist", data_dir=folder, train_size=25, validation_size=15, test_size=5)
    train, validation = split.train[0], split.validation[0]
    assert train.mean().abs() < 1e-5
    assert train.std() == pytest.approx(1.0, abs=1e-5)
    assert (len(train), len(validation), len(split.test[0])) == (25, 15, 5)
    assert split.classes == 10
    assert split.train[1].dtype == torch.int64
    both = torch.cat([train, validation]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 40  # every image is there once
    data.load.cache_clear()
    again = data.load("mnist", data_dir=folder, train_size=25, validation_size=15, test_size=5)
    assert torch.equal(again.train[0], train)
    other = data.load("mnist", data_dir=folder, train_size=25, validation_size=15, split_seed=1)
    assert not torch.equal(other.train[1], split.train[1])


def test_a_smaller_training_set_is_part_of_a_larger_one(folder: Path):
    small = data.load("mnist", data_dir=folder, train_size=10, validation_size=15)
    large = data.load("mnist", data_dir=folder, train_size=20, validation_size=15)
    assert torch.equal(small.train[1], large.train[1][:10])
    assert torch.equal(small.validation[1], large.validation[1])


def test_pooling_averages(folder: Path):
    split = data.load("mnist", data_dir=folder, train_size=10, validation_size=5, pool=2)
    assert split.shape == (1, 14, 14)
    raw = torch.from_numpy(images(TEST, seed=TEST)[0][0] / 255.0)
    pooled = raw.reshape(14, 2, 14, 2).mean((1, 3))
    # the same affine standardisation for all: differences keep their ratio
    mine, hand = split.test[0][0, 0].double(), pooled
    assert torch.corrcoef(torch.stack([mine.flatten(), hand.flatten()]))[0, 1] == pytest.approx(1.0, abs=1e-6)


def test_the_environment_names_the_folder(folder: Path, monkeypatch):
    monkeypatch.setenv(data.ENVIRONMENT, str(folder))
    assert len(data.load("mnist", train_size=10, validation_size=5).train[0]) == 10


def test_digits_need_no_folder():
    split = data.load("digits")
    assert split.shape == (1, 8, 8)
    assert split.classes == 10
    assert len(split.train[0]) + len(split.validation[0]) == 1400
    assert len(split.test[0]) == 397
    from sklearn.datasets import load_digits

    assert sorted(torch.cat([split.train[1], split.validation[1], split.test[1]]).tolist()) == sorted(
        load_digits().target.tolist()
    )


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(data.DataError, match=r"the digits data come with scikit-learn: pip install 'decaycast\[lab\]'"):
        data.load("digits")


# damaged files


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (TRAIN_IMAGES, lambda raw: raw[: len(raw) // 2], "cannot be read .*missing or damaged: fetch it again"),
        (TRAIN_IMAGES, lambda raw: raw[:200] + b"\0" * 50 + raw[250:], "cannot be read .*damaged"),
        (TRAIN_IMAGES, lambda raw: b"not gzip at all", "cannot be read .*damaged"),
        (TRAIN_IMAGES, lambda raw: b"", "no IDX file of 3 dimensions"),
        (TRAIN_IMAGES, lambda raw: gzip.compress(b"\0\0"), r"no IDX file of 3 dimensions \(wrong magic number 0000\)"),
        (
            TRAIN_IMAGES,
            lambda raw: gzip.compress(idx(images(4, 0)[0], magic=b"\0\0\x0d\x03")),
            "wrong magic number 00000d03",
        ),
        (
            TRAIN_IMAGES,
            lambda raw: gzip.compress(idx(images(4, 0)[1])),
            r"no IDX file of 3 dimensions \(wrong magic number 00000801\)",
        ),
        (
            TRAIN_IMAGES,
            lambda raw: gzip.compress(gzip.decompress(raw)[:-100]),
            "31260 bytes of data .* says 31360: tru",
        ),
        (TRAIN_IMAGES, lambda raw: gzip.compress(gzip.decompress(raw) + b"\0"), "holds 31361 bytes .* says 31360"),
        (TRAIN_IMAGES, lambda raw: gzip.compress(gzip.decompress(raw)[:9]), "ends after 9 bytes, inside its header"),
        (TRAIN_IMAGES, lambda raw: gzip.compress(gzip.decompress(raw)[:12]), "ends after 12 bytes"),
        (
            TRAIN_IMAGES,
            lambda raw: gzip.compress(idx(np.zeros((40, 14, 14)))),
            r"have shape \(14, 14\), but this data set's are 28x28",
        ),
        (TRAIN_LABELS, lambda raw: gzip.compress(idx(np.arange(40))), "holds label 39, but this data set has 0 to 9"),
        (TRAIN_LABELS, lambda raw: gzip.compress(idx(np.arange(39))), "40 images in .* but 39 labels in"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(folder: Path, name: str, change, message: str):
    rewrite(folder, name, change)
    with pytest.raises(data.DataError, match=message) as caught:
        data.load("mnist", data_dir=folder)
    assert str(folder) in str(caught.value)


def test_a_missing_part_is_named(folder: Path):
    (folder / "mnist" / f"{TRAIN_LABELS}.gz").unlink()
    with pytest.raises(data.DataError, match=f"{TRAIN_LABELS} cannot be read .*missing or damaged"):
        data.load("mnist", data_dir=folder)


# CIFAR-10


def cifar_folder(root: Path, rows: int = 6) -> np.ndarray:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    generator = np.random.default_rng(0)
    table = generator.integers(0, 256, (6, rows, 3073), dtype=np.uint8)
    table[:, :, 0] %= 10
    table[0, 0, 0] = 9
    for i, name in enumerate([f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]):
        (folder / name).write_bytes(table[i].tobytes())
    return table


def test_cifars_binary_layout(tmp_path: Path):
    table = cifar_folder(tmp_path)
    (x, y), (test_x, test_y) = data._read("cifar10", tmp_path)
    assert x.shape == (30, 3, 32, 32)
    assert y.tolist() == table[:5, :, 0].flatten().tolist()
    # a row is label, then all red, all green, all blue
    assert x[7, 2, 1, 3] == table[1, 1, 1 + 2 * 1024 + 1 * 32 + 3]
    assert np.array_equal(test_y, table[5, :, 0])
    assert test_x[2, 0, 0, 5] == table[5, 2, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], "18437 bytes, not a multiple of 3,073: truncated or not CIFAR-10's binary layout"),
        (lambda raw: b"", "holds 0 bytes"),
        (lambda raw: b"\x0b" + raw[1:], "holds label 11, but CIFAR-10 has 0 to 9: not this layout"),
    ],
)
def test_a_damaged_cifar_batch_is_named(tmp_path: Path, change, message: str):
    cifar_folder(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(data.DataError, match=f"data_batch_3.bin .*{message}"):
        data.load("cifar10", data_dir=tmp_path)


def test_a_missing_cifar_batch_is_named(tmp_path: Path):
    cifar_folder(tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(data.DataError, match=r"data_batch_4.bin cannot be read .*fetch it again"):
        data.load("cifar10", data_dir=tmp_path)


# missing data: download or advice


def test_what_is_missing_is_downloaded(tmp_path: Path, monkeypatch):
    asked = []

    def fetch_openml(name, **options):
        asked.append((name, options["as_frame"]))
        flat = np.arange(10_030)[:, None] % 251 * np.ones((1, 784))
        return SimpleNamespace(data=flat, target=np.array([str(i % 10) for i in range(10_030)], dtype=object))

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch_openml)
    (x, y), (test_x, test_y) = data._read("fashion_mnist", tmp_path)
    assert asked == [("Fashion-MNIST", False)]
    assert x.shape == (30, 1, 28, 28)
    assert (y[13], x[13, 0, 5, 5]) == (3, 13)
    assert len(test_x) == len(test_y) == 10_000
    assert test_y[0] == 0


def test_offline_the_advice_names_folder_and_layout(tmp_path: Path, monkeypatch):
    def fetch_openml(name, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch_openml)
    message = (
        "could not be downloaded .no route to host.; looked in .*put the published files into <data folder>/mnist/"
    )
    with pytest.raises(data.DataError, match=message) as caught:
        data.load("mnist", data_dir=tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(data.DataError, match=r"no folder given \(--data-dir or DECAYCAST_DATA\)"):
        data.load("mnist")


def test_without_a_downloader_the_extra_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(data.DataError, match=r"cifar10 was not found: .*\(pip install 'decaycast\[lab\]'\)"):
        data.load("cifar10", data_dir=tmp_path)


def test_packed_images_come_with_the_command_that_unpacks_them(tmp_path: Path):
    (tmp_path / "prepare.py").write_text("")
    (found,) = [entry for entry in data.availability(tmp_path) if entry.name == "cifar10"]
    assert found.status == "missing"
    assert f"python {tmp_path / 'prepare.py'} OUT" in found.advice


def test_availability_says_what_is_there(folder: Path):
    found = {entry.name: entry for entry in data.availability(folder)}
    assert tuple(found) == data.NAMES
    assert found["digits"].status == "embedded"
    assert (found["mnist"].status, found["mnist"].where, found["mnist"].advice) == (
        "present",
        str(folder / "mnist"),
        "",
    )
    assert found["fashion_mnist"].status == "missing"
    assert "<data folder>/fashion-mnist/" in found["fashion_mnist"].advice


def test_availability_without_scikit_learn(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    digits = data.availability()[0]
    assert (digits.status, digits.advice) == ("missing", "pip install 'decaycast[lab]'")


# sizes, names, batches


def test_an_unknown_data_set_gets_the_nearest():
    with pytest.raises(ValueError, match="unknown data set 'minst'; did you mean 'mnist'"):
        data.load("minst")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"validation_size": -2}, "validation_size must be at least 1, got -2"),
        (
            {"train_size": 30, "validation_size": 11},
            r"mnist has 40 samples .* but 30 \+ 11 were asked for; lower train_s",
        ),
        ({"train_size": 41}, "mnist has 40 samples"),
    ],
)
def test_sizes_the_data_do_not_have(folder: Path, sizes: dict[str, int], message: str):
    with pytest.raises(data.DataError, match=message):
        data.load("mnist", data_dir=folder, **sizes)


@pytest.mark.parametrize(("train_size", "expected"), [(None, (30, 10)), (25, (25, 15)), (39, (39, 1))])
def test_sizes_left_open_fit(folder: Path, train_size, expected):
    split = data.load("mnist", data_dir=folder, train_size=train_size)
    assert (len(split.train[0]), len(split.validation[0])) == expected


def test_batches_go_through_every_sample_once_an_epoch():
    inputs, target = torch.arange(10.0)[:, None], torch.arange(10)
    seen = [y for _, y in islice(data.batches(inputs, target, 3, seed=0), 6)]
    epochs = [torch.cat(seen[:3]).tolist(), torch.cat(seen[3:]).tolist()]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = [y for _, y in islice(data.batches(inputs, target, 3, seed=0), 6)]
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=True))
    other = [y for _, y in islice(data.batches(inputs, target, 3, seed=1), 3)]
    assert torch.cat(other).tolist() != epochs[0]
    assert all(torch.equal(x[:, 0].long(), y) for x, y in islice(data.batches(inputs, target, 4, seed=2), 5))


def test_a_batch_of_everything_is_the_data_themselves():
    inputs, target = torch.arange(4.0)[:, None], torch.arange(4)
    x, y = next(data.batches(inputs, target, 9, seed=0))
    assert x is inputs
    assert y is target


def test_batches_of_nothing_are_refused():
    with pytest.raises(data.DataError, match="there are no training samples; ask for at least one"):
        next(data.batches(torch.zeros(0, 1), torch.zeros(0), 4, seed=0))


# the real files, where they are


@pytest.mark.parametrize(
    ("name", "first_labels", "pixel_mean"),
    [
        ("mnist", [5, 0, 4, 1, 9], 0.1307),
        ("fashion_mnist", [9, 0, 0, 3, 0], 0.2860),
        ("cifar10", [6, 9, 9, 4, 1], 0.4734),
    ],
)
@pytest.mark.skipif(not REAL, reason=f"{data.ENVIRONMENT} is not set")
def test_the_published_data(name: str, first_labels: list[int], pixel_mean: float):
    (x, y), (test_x, test_y) = data._read(name, REAL)
    assert (len(x), len(test_x)) == ((50_000 if name == "cifar10" else 60_000), 10_000)
    assert y[:5].tolist() == first_labels
    assert x.mean() / 255 == pytest.approx(pixel_mean, abs=1e-4)
    assert np.bincount(test_y).tolist() == [1000] * 10 or name == "mnist"


def test_packed_cifar_is_named_without_asking_the_network(tmp_path, monkeypatch):
    (tmp_path / "prepare.py").write_text("")
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *a, **k: pytest.fail("asked the network"))
    with pytest.raises(data.DataError, match="the images are there in packed form; unpack them once with"):
        data.load("cifar10", data_dir=tmp_path, train_size=10)
