"""Image files as arrays: each data set in the layout it is published in, checked while it is read.

Every reader gives uint8 images of shape (n, channels, height, width) and labels of shape (n,). What is missing or damaged is a
`DataError` that names the file. Nothing that is read can run code: no pickles.
"""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FLOWERS_FILE = "flowers89_128_lite40.npz"
_FLOWERS_SIDE, _FLOWERS_CLASSES = 128, 89
_TRAIN, _VALIDATION, _TEST = range(3)  # codes of "split" in that file


class DataError(ValueError):
    """A data file is missing, damaged or not what its name says."""


def digits() -> tuple[Arrays, Arrays]:
    """The 8x8 digits of scikit-learn, 1,400 to train and validate on and 397 to test, in a fixed order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits data come with scikit-learn: pip install 'decaycast[lab]'") from error
    data: Any = load_digits()
    order = np.random.default_rng(1797).permutation(len(data.target))
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[order][:, None]
    labels = data.target[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def idx_pair(folder: Path, part: str) -> Arrays:
    """Images and labels of the `part` "train" or "test" of MNIST or a data set in its layout."""
    image_file, label_file = IDX_FILES[part]
    images, labels = _idx(folder, image_file, 3), _idx(folder, label_file, 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images in {image_file} but {len(labels)} labels in {label_file}")
    if images.shape[1:] != (28, 28):
        raise DataError(
            f"{folder}: images in {image_file} have shape {images.shape[1:]}, but this data set's are 28x28"
        )
    if len(labels) and labels.max() > 9:
        raise DataError(f"{folder}: {label_file} holds label {labels.max()}, but this data set has 0 to 9")
    return images[:, None], labels


def _idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """One IDX file: magic (0, 0, 8 = uint8, number of dimensions), big-endian sizes, bytes."""
    path = folder / f"{name}.gz"
    path = path if path.is_file() else folder / name
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); it is missing or damaged: fetch it again") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or raw[3] != dimensions:
        raise DataError(f"{path} is no IDX file of {dimensions} dimensions (wrong magic number {raw[:4].hex()})")
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise DataError(f"{path} ends after {len(raw)} bytes, inside its header: truncated?")
    sizes = np.frombuffer(raw[4:header], dtype=">u4")
    expected = int(np.prod(sizes, dtype=np.int64))
    if len(raw) - header != expected:
        raise DataError(f"{path} holds {len(raw) - header} bytes of data where its header says {expected}: truncated?")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape([int(size) for size in sizes])


def cifar(folder: Path) -> tuple[Arrays, Arrays]:
    """CIFAR-10's training and test part from its binary version."""
    train = [_cifar_batch(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    images, labels = (np.concatenate([part[k] for part in train]) for k in (0, 1))
    return (images, labels), _cifar_batch(folder / "test_batch.bin")


def _cifar_batch(path: Path) -> Arrays:
    """CIFAR-10's binary layout: per image one label byte, then 3,072 bytes channel by channel."""
    try:
        raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    if len(raw) == 0 or len(raw) % 3073:
        raise DataError(
            f"{path} holds {len(raw)} bytes, not a multiple of 3,073: truncated or not CIFAR-10's binary layout"
        )
    rows = raw.reshape(-1, 3073)
    if rows[:, 0].max() > 9:
        raise DataError(f"{path} holds label {rows[:, 0].max()}, but CIFAR-10 has 0 to 9: not this layout")
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def flowers(path: Path) -> tuple[Arrays, Arrays]:
    """89 kinds of flowers as photographs of 128x128: those to train and validate on (20 of each), and those to test.

    The file holds JPEG bytes one after the other (`jpeg`, image i from `offset[i]` to `offset[i + 1]`), the class `y` and the
    part `split`, sorted by class. They are returned in a fixed random order, so that the first n test images have all classes.
    """
    packed = _arrays(path, ("jpeg", "offset", "y", "split"))
    _check_flowers(path, packed)
    jpeg, offset, labels, split = packed.values()
    order = np.random.default_rng(len(labels)).permutation(len(labels))
    images = np.empty((len(order), 3, _FLOWERS_SIDE, _FLOWERS_SIDE), dtype=np.uint8)
    for place, index in enumerate(order):
        images[place] = _decoded(jpeg[offset[index] : offset[index + 1]].tobytes(), f"{path}: image {index}")
    labels, is_test = labels[order], split[order] == _TEST
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])


def _arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except KeyError as error:
        raise DataError(f"{path} is of another layout ({error.args[0]}); it needs {', '.join(names)}") from error
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); it is damaged or no .npz file: copy it again") from error


def _check_flowers(path: Path, packed: dict[str, np.ndarray]) -> None:
    jpeg, offset, labels, split = packed.values()
    whole = all(np.issubdtype(array.dtype, np.integer) and array.ndim == 1 for array in packed.values())
    if not (whole and jpeg.dtype == np.uint8 and len(labels) == len(split) == len(offset) - 1):
        shapes = ", ".join(f"{name} {array.dtype}{array.shape}" for name, array in packed.items())
        raise DataError(f"{path} holds {shapes}; needed are bytes, n + 1 offsets, n labels and n parts")
    if offset[0] != 0 or offset[-1] != len(jpeg) or (offset[1:] < offset[:-1]).any():
        raise DataError(f"{path}: the offsets do not rise from 0 to the {len(jpeg)} bytes that are there: truncated?")
    if not (np.isin(split, (_TRAIN, _VALIDATION, _TEST)).all() and (split == _TEST).any() and (split != _TEST).any()):
        raise DataError(f"{path}: split must be 0, 1 (train, validate) or 2 (test), both there, got {np.unique(split)}")
    if not 0 <= labels.min() <= labels.max() < _FLOWERS_CLASSES:
        raise DataError(f"{path} holds labels {labels.min()} to {labels.max()}, but this data set has 0 to 88")


def _decoded(raw: bytes, where: str) -> np.ndarray:
    """One JPEG as uint8 of shape (3, side, side)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("the flowers are JPEG images, which Pillow reads: pip install 'decaycast[lab]'") from error
    try:
        with Image.open(io.BytesIO(raw), formats=["JPEG"]) as picture:
            size = picture.size
            pixels = np.asarray(picture.convert("RGB")) if size == (_FLOWERS_SIDE, _FLOWERS_SIDE) else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} cannot be decoded ({error}); the file is damaged: copy it again") from error
    if pixels is None:
        raise DataError(f"{where} has {size[0]}x{size[1]} pixels, but this data set's have 128x128")
    return pixels.transpose(2, 0, 1)
