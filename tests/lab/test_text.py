"""Text as windows of characters: what is cut where, and what goes wrong with a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from decaycast.core.experiment import Run
from decaycast.lab import data, text
from decaycast.lab.trial import train_run

LENGTH = 20_000


@pytest.fixture(autouse=True)
def _reads_anew():
    data.load.cache_clear()
    data._read_text.cache_clear()
    yield
    data.load.cache_clear()
    data._read_text.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text in which every character follows from the one before: a, b, ..., z, a, ..."""
    (tmp_path / "text").mkdir()
    letters = "".join(chr(ord("a") + index % 26) for index in range(LENGTH))
    (tmp_path / "text" / "tinyshakespeare.txt").write_text(letters, encoding="utf-8")
    return tmp_path


def test_labels_are_the_next_characters(folder: Path):
    split = data.load("shakespeare", train_size=20, validation_size=5, data_dir=folder)
    assert split.classes == 26
    assert split.shape == (text.CONTEXT,)
    for inputs, target in (split.train, split.validation, split.test):
        assert inputs.dtype == target.dtype == torch.int64
        assert inputs.shape == target.shape
        assert torch.equal(target, (inputs + 1) % 26)
    assert [len(part[0]) for part in (split.train, split.validation)] == [20, 5]


@pytest.mark.parametrize("part", text.PARTS)
def test_windows_stay_inside_their_part_and_do_not_overlap(part: str):
    codes = np.arange(LENGTH)
    inputs, target = text.windows(codes, part)
    begin, end = (share * LENGTH for share in text.PARTS[part])
    assert inputs.min() >= begin
    assert target.max() < end
    assert len(np.unique(inputs)) == inputs.size
    assert inputs.size > end - begin - 2 * text.CONTEXT  # hardly anything is left over


def test_the_alphabet_is_sorted_and_codes_decode():
    codes, alphabet = text.encode("to be\nor")
    assert alphabet == "\n beort"
    assert "".join(alphabet[code] for code in codes) == "to be\nor"


def test_the_split_does_not_depend_on_the_training_seed_but_on_its_own(folder: Path):
    one, other = (data.load("shakespeare", train_size=20, split_seed=s, data_dir=folder).train[0] for s in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": 2}, "cannot be pooled; leave pool at 1, got 2"),
        ({"validation_size": -1}, "validation windows, but -1 were asked for"),
        ({"train_size": 0}, "train windows, but 0 were asked for"),
        ({"train_size": 10**6}, "train windows, but 1000000 were asked for; lower train_size"),
    ],
)
def test_sizes_the_text_does_not_have(folder: Path, settings: dict, message: str):
    with pytest.raises(data.DataError, match=message):
        data.load("shakespeare", data_dir=folder, **settings)


def test_a_missing_text_comes_with_advice(tmp_path: Path):
    with pytest.raises(data.DataError, match=r"shakespeare was not found: looked in .*text/tinyshakespeare\.txt"):
        data.load("shakespeare", data_dir=tmp_path)
    found = {item.name: item for item in data.availability(tmp_path)}
    assert found["shakespeare"].status == "missing"


def test_a_text_that_is_there_is_found(folder: Path):
    found = {item.name: item for item in data.availability(folder)}
    assert found["shakespeare"].status == "present"


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe\xff", "cannot be read as text"), (b"short", "holds 5 characters, too few")]
)
def test_a_damaged_text_is_named(folder: Path, content: bytes, message: str):
    (folder / "text" / "tinyshakespeare.txt").write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        data.load("shakespeare", data_dir=folder)


@pytest.mark.parametrize("rule", ["constant", "autol2"])
def test_a_language_model_learns_what_follows_what(folder: Path, rule: str):
    config = {"data": "shakespeare", "train_size": 40, "validation_size": 5, "test_size": 5, "model": "gpt-16x1"}
    settings = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "steps": 60, "batch_size": 8, "points": 4}
    row = train_run(Run(config={**config, **settings, "rule": rule}), data_dir=str(folder))
    assert row.status == "done"
    assert row.final["test_accuracy"] > 0.9
    assert row.curve["train_accuracy"][-1] > 0.9
    assert row.curve["validation_accuracy"][0] < 0.9
