"""Flowers as JPEG bytes in one file: what is decoded, how it is parted, and what goes wrong with a file."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from decaycast.lab import data, image_files

REAL = os.environ.get(data.ENVIRONMENT)


@pytest.fixture(autouse=True)
def _reads_anew(monkeypatch):
    monkeypatch.delenv(data.ENVIRONMENT, raising=False)
    data.load.cache_clear()
    data._read.cache_clear()
    yield
    data.load.cache_clear()
    data._read.cache_clear()


def jpeg(pixels: np.ndarray, kind: str = "JPEG") -> np.ndarray:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=95, subsampling=0)
    return np.frombuffer(file.getvalue(), dtype=np.uint8)


def plain(colour: tuple[int, int, int], side: int = 128) -> np.ndarray:
    """A picture of one colour, its left upper corner black."""
    pixels = np.full((side, side, 3), colour, dtype=np.uint8)
    pixels[:32, :64] = 0
    return pixels


COLOURS = [(250, 10, 20), (30, 240, 10), (20, 30, 230), (200, 200, 20), (128, 128, 128)]
CLASSES, PARTS = [0, 3, 7, 88, 5], [0, 1, 2, 2, 0]


def flower_arrays(pictures: list[np.ndarray] | None = None) -> dict[str, np.ndarray]:
    pictures = [jpeg(plain(colour)) for colour in COLOURS] if pictures is None else pictures
    return {
        "jpeg": np.concatenate(pictures),
        "offset": np.cumsum([0, *map(len, pictures)]),
        "y": np.array(CLASSES[: len(pictures)], dtype=np.uint8),
        "split": np.array(PARTS[: len(pictures)], dtype=np.uint8),
    }


def flower_file(root: Path, arrays: dict[str, np.ndarray]) -> Path:
    path = root / "flowers89" / image_files.FLOWERS_FILE
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_flowers_are_decoded_and_parted_as_the_file_says(tmp_path: Path):
    flower_file(tmp_path, flower_arrays())
    (x, y), (test_x, test_y) = data._read("flowers89", tmp_path)
    assert (x.shape, test_x.shape, x.dtype) == ((3, 3, 128, 128), (2, 3, 128, 128), np.uint8)
    assert sorted(y) == [0, 3, 5] and sorted(test_y) == [7, 88]
    for picture, label in zip([*x, *test_x], [*y, *test_y], strict=True):
        colour = np.array(COLOURS[CLASSES.index(label)])
        assert np.abs(picture[:, 96, 20].astype(int) - colour).max() <= 4  # red, green, blue; JPEG rounds
        assert (
            picture[:, 10, 50].max() <= 4 and np.abs(picture[:, 50, 10] - colour).max() <= 4
        )  # rows first, then columns


def test_flowers_become_a_split(tmp_path: Path):
    flower_file(tmp_path, flower_arrays())
    split = data.load("flowers89", data_dir=tmp_path, train_size=2, validation_size=1, pool=4)
    assert (split.shape, split.classes) == ((3, 32, 32), 89)
    assert [len(part[0]) for part in (split.train, split.validation, split.test)] == [2, 1, 2]


def test_the_first_test_flowers_are_of_many_classes(tmp_path: Path):
    """The file is sorted by class, and `test_size` takes the first."""
    picture = jpeg(plain(COLOURS[0]))
    arrays = flower_arrays([picture] * 60)
    arrays |= {"y": np.arange(60, dtype=np.uint8), "split": np.array([0] + [2] * 59, dtype=np.uint8)}
    flower_file(tmp_path, arrays)
    _, (_, labels) = data._read("flowers89", tmp_path)
    assert sorted(labels) == list(range(1, 60))
    assert 15 < np.mean(labels[:20]) < 45


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jpeg": None}, r"is of another layout .*; it needs jpeg, offset, y, split"),
        ({"y": np.array([object()] * 5)}, "cannot be read .*allow_pickle=False.*copy it again"),
        ({"y": np.zeros(4, int)}, r"holds jpeg uint8.*y int64\(4,\).*needed are bytes, n \+ 1 offsets"),
        ({"y": np.zeros((5, 1), int)}, r"y int64\(5, 1\)"),
        ({"split": np.zeros(5)}, r"split float64\(5,\)"),
        ({"jpeg": np.zeros(9, np.int16)}, r"holds jpeg int16\(9,\)"),
        ({"jpeg": np.zeros(9, np.uint8)}, "offsets do not rise from 0 to the 9 bytes that are there: truncated"),
        ({"split": np.array([0, 1, 2, 2, 3])}, r"split must be 0, 1 .* both there, got \[0 1 2 3\]"),
        ({"split": np.array([0, 1, 0, 1, 0])}, r"split must be .* got \[0 1\]"),
        ({"split": np.full(5, 2)}, r"split must be .* got \[2\]"),
        ({"y": np.array([0, 1, 89, 3, 4])}, "holds labels 0 to 89, but this data set has 0 to 88"),
        ({"y": np.array([0, 1, -1, 3, 4])}, "holds labels -1 to 4"),
    ],
)
def test_a_flower_file_of_another_kind_is_named(tmp_path: Path, change: dict, message: str):
    path = flower_file(tmp_path, {k: v for k, v in {**flower_arrays(), **change}.items() if v is not None})
    with pytest.raises(data.DataError, match=message) as caught:
        data.load("flowers89", data_dir=tmp_path)
    assert str(path) in str(caught.value)


def test_offsets_that_fall_are_refused(tmp_path: Path):
    arrays = flower_arrays()
    arrays["offset"][[1, 2]] = arrays["offset"][[2, 1]]
    flower_file(tmp_path, arrays)
    with pytest.raises(data.DataError, match="the offsets do not rise from 0"):
        data.load("flowers89", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "cannot be read .*damaged or no .npz file: copy it again"),
        (lambda raw: raw[:2000] + bytes(64) + raw[2064:], "cannot be read .*damaged"),
        (lambda raw: b"not zipped", "cannot be read .*damaged"),
        (lambda raw: b"", "cannot be read .*damaged"),
    ],
)
def test_a_damaged_flower_file_is_named(tmp_path: Path, content, message: str):
    path = flower_file(tmp_path, flower_arrays())
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(data.DataError, match=f"{image_files.FLOWERS_FILE} {message}"):
        data.load("flowers89", data_dir=tmp_path)


def test_an_array_in_the_place_of_the_archive_is_refused(tmp_path: Path):
    path = flower_file(tmp_path, flower_arrays())
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(data.DataError, match="cannot be read .*no .npz file"):
        data.load("flowers89", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (lambda: jpeg(plain((1, 2, 3)))[:200], "image 1 cannot be decoded .*the file is damaged: copy it again"),
        (lambda: np.zeros(0, np.uint8), "image 1 cannot be decoded"),
        (lambda: jpeg(plain((1, 2, 3)), "PNG"), "image 1 cannot be decoded"),
        (lambda: jpeg(plain((1, 2, 3), 64)), "image 1 has 64x64 pixels, but this data set's have 128x128"),
    ],
)
def test_a_damaged_picture_is_named(tmp_path: Path, picture, message: str):
    flower_file(tmp_path, flower_arrays([jpeg(plain((9, 9, 9))), picture(), *[jpeg(plain((9, 9, 9)))] * 3]))
    with pytest.raises(data.DataError, match=message):
        data.load("flowers89", data_dir=tmp_path)


def test_a_grey_picture_has_three_equal_channels(tmp_path: Path):
    flower_file(tmp_path, flower_arrays([jpeg(np.full((128, 128), 77, dtype=np.uint8))] * 5))
    (x, _), _ = data._read("flowers89", tmp_path)
    assert np.unique(x).tolist() == [77]


def test_a_missing_pillow_is_named(tmp_path: Path, monkeypatch):
    flower_file(tmp_path, flower_arrays())
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(data.DataError, match=r"JPEG images, which Pillow reads: pip install 'decaycast\[lab\]'"):
        data.load("flowers89", data_dir=tmp_path)


def test_missing_flowers_are_not_downloaded(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *a, **k: pytest.fail("asked the network"))
    message = f"put {image_files.FLOWERS_FILE} into <data folder>/flowers89/: it cannot be downloaded"
    with pytest.raises(data.DataError, match=f"flowers89 was not found: looked in .*{message}"):
        data.load("flowers89", data_dir=tmp_path)
    (found,) = [entry for entry in data.availability(tmp_path) if entry.name == "flowers89"]
    assert found.status == "missing" and message in found.advice
    flower_file(tmp_path, flower_arrays())
    (found,) = [entry for entry in data.availability(tmp_path) if entry.name == "flowers89"]
    assert (found.status, found.where) == ("present", str(tmp_path / "flowers89"))


@pytest.mark.skipif(not REAL, reason=f"{data.ENVIRONMENT} is not set")
def test_the_real_flowers():
    folder = data._find_folder("flowers89", REAL)
    if folder is None:
        pytest.skip(f"there are no flowers in {REAL}")
    with np.load(folder / image_files.FLOWERS_FILE, allow_pickle=False) as file:
        assert file["split_names"].tolist() == ["train", "val", "test"]  # what the codes 0, 1, 2 mean
        per_class = np.bincount(file["y"][file["split"] != 2], minlength=89)
    (x, y), (test_x, test_y) = data._read("flowers89", REAL)
    assert (x.shape, test_x.shape) == ((1780, 3, 128, 128), (1652, 3, 128, 128))
    assert np.array_equal(np.bincount(y), per_class) and set(per_class) == {20}
    assert np.bincount(test_y).min() >= 8 and len(set(test_y[:200])) > 70
    red, green, blue = x.mean((0, 2, 3)) / 255
    assert red > green > blue > 0.25  # of flowers before leaves
