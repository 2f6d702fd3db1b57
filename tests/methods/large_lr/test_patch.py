"""The planted shortcuts: a patch in images and a key in text, each written out by a second route, and what they tell."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decaycast.methods.large_lr.patch import (
    ALONE_STRENGTH,
    ImagePatch,
    Shares,
    TokenKey,
    choose_marked,
    draw_key,
    draw_patch,
    plant,
)

CLASSES = 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 60, channels: int = 3, side: int = 9) -> Tensor:
    """Images whose channels have means 1, 2, 3 and standard deviations 0.5, 1, 2."""
    noise = torch.randn(count, channels, side, side, generator=seeded(1), dtype=torch.float64)
    return (
        torch.tensor([1.0, 2.0, 3.0])[:channels, None, None] + torch.tensor([0.5, 1, 2])[:channels, None, None] * noise
    )


def labels(count: int = 60, classes: int = CLASSES) -> Tensor:
    return torch.arange(count) % classes


def patch_of(x: Tensor, **options: Any) -> ImagePatch:
    return draw_patch(x, CLASSES, generator=seeded(2), **{"size": 3, "separation": 0.4, **options})


def tokens(count: int = 200, length: int = 6) -> Tensor:
    return torch.randint(20, (count, length), generator=seeded(3))


# the patch


def test_the_patch_is_written_where_and_as_the_definition_says():
    x, y = images(), labels()
    patch = patch_of(x)
    assert (patch.top, patch.left) == (3, 3)
    new = patch.both(x, y, seeded(5))
    signs = set()
    for image, before, label in zip(new, x, y, strict=True):
        for row in range(9):
            for column in range(9):
                inside = 3 <= row < 6 and 3 <= column < 6
                if not inside:
                    assert torch.equal(image[:, row, column], before[:, row, column])
        away = (image[:, 3:6, 3:6] - patch.base) / patch.marks[label]
        assert torch.allclose(away, away.flatten()[0].expand_as(away), rtol=1e-4)
        signs.add((int(label), round(float(away.flatten()[0]), 3)))
    assert signs == {(label, sign) for label in range(CLASSES) for sign in (-1.0, 1.0)}, "both signs at every class"


def test_the_patch_is_in_units_of_the_images():
    x = images(4000)
    patch = patch_of(x, size=9, scale=1.25, separation=0.4)
    std = torch.tensor([0.5, 1.0, 2.0])
    assert torch.allclose(patch.blank, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), atol=0.02)
    spread = (patch.base - patch.blank[:, None, None]).flatten(1).std(1) / std
    assert torch.allclose(spread, torch.full((3,), 1.25, dtype=torch.float64), atol=0.25)  # 81 numbers: 8 %
    reach = patch.marks.abs().amax((0, 2, 3)) / std
    assert (reach <= 0.4 * 1.02).all() and (reach > 0.39).all()


@settings(max_examples=25)
@given(st.floats(0.1, 50), st.floats(-20, 20), st.floats(0.05, 3))
def test_a_patch_moves_with_the_images(factor: float, shift: float, separation: float):
    x = images()
    own, moved = (patch_of(each, separation=separation) for each in (x, factor * x + shift))
    assert torch.allclose(moved.base, factor * own.base + shift, rtol=1e-5, atol=1e-5 * (factor + abs(shift)))
    assert torch.allclose(moved.marks, factor * own.marks, rtol=1e-5, atol=1e-9)
    assert torch.allclose(own.marks, separation / 0.4 * patch_of(x).marks, rtol=1e-5), "equal draws at every separation"
    assert torch.equal(own.base, patch_of(x).base)


@pytest.mark.parametrize(("side", "size", "corner"), [(32, 7, 12), (28, 6, 11), (16, 4, 6), (8, 2, 3), (3, 1, 1)])
def test_the_usual_size_is_the_papers_share_of_the_image(side: int, size: int, corner: int):
    patch = draw_patch(torch.zeros(2, 1, side, side), 2, generator=seeded())
    assert (patch.base.shape[-1], patch.top, patch.left) == (size, corner, corner)


def test_images_need_not_be_square():
    patch = draw_patch(torch.zeros(2, 1, 10, 20), 2, generator=seeded(), size=4)
    assert (patch.top, patch.left) == (3, 8)


def test_alone_is_an_empty_image_with_the_patch():
    x, y = images(), labels()
    patch = patch_of(x)
    full, weak = (patch.alone(x, y, seeded(6), training=training) for training in (False, True))
    outside = torch.ones(9, 9, dtype=torch.bool)
    outside[3:6, 3:6] = False
    for made in (full, weak):
        assert torch.equal(made[..., outside], patch.blank[:, None].expand(60, 3, 72))
    strengths = [
        ((made[:, :, 3:6, 3:6] - patch.base) / patch.marks[y]).flatten(1).median(1).values for made in (full, weak)
    ]
    assert set(strengths[0].round(decimals=4).tolist()) == {-1.0, 1.0}
    assert torch.equal(strengths[0].sign(), strengths[1].sign()), "the same draws"
    uniform = strengths[1].abs() / ALONE_STRENGTH
    assert 0 <= uniform.min() < 0.1 and 0.9 < uniform.max() <= 1.0001
    assert abs(float(uniform.mean()) - 0.5) < 4 / math.sqrt(12 * 60)


def test_what_follows_in_the_stream_does_not_depend_on_how_alone_was_asked():
    x, y, ends = images(), labels(), []
    for training in (False, True):
        generator = seeded(7)
        patch_of(x).alone(x, y, generator, training=training)
        ends.append(torch.rand(1, generator=generator))
    assert torch.equal(*ends)


def test_a_linear_model_reads_half_of_the_patches_and_a_nonlinear_one_all():
    x, y = images(3000), labels(3000)
    patch = patch_of(x)
    alone = patch.alone(x, y, seeded(8))[:, :, 3:6, 3:6].flatten(1)
    inputs = torch.cat([alone, torch.ones(len(alone), 1)], 1).double()
    weights = torch.linalg.lstsq(inputs, torch.eye(CLASSES, dtype=torch.float64)[y]).solution
    linear = float(((inputs @ weights).argmax(1) == y).double().mean())
    assert 1 / CLASSES + 0.05 < linear <= (CLASSES + 1) / (2 * CLASSES)
    away = (alone - patch.base.flatten()) @ patch.marks.flatten(1).T
    own = patch.marks.flatten(1).square().sum(1)
    assert float(((away.abs() / own - 1).abs().argmin(1) == y).double().mean()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planting_keeps_type_and_memory_format_and_what_it_was_given(dtype: torch.dtype):
    x = images().to(dtype).contiguous(memory_format=torch.channels_last)
    before, patch, marked = x.clone(), patch_of(images()), torch.ones(60, dtype=torch.bool)
    new = plant(patch, x, labels(), marked, Shares(), seeded())
    assert new.dtype == dtype and new.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before) and not torch.equal(new, x)


# shares


def test_planting_shares_out_as_asked():
    x, y = torch.full((2000, 1, 4, 4), 7.0), labels(2000)
    patch = ImagePatch(torch.full((1, 2, 2), 3.0), torch.zeros(CLASSES, 1, 2, 2), torch.zeros(1), 1, 1)
    shares = Shares(clean=0.3, alone=0.2, both=0.5)
    marked = choose_marked(2000, shares, seeded(1))
    assert int(marked.sum()) == 1400
    counts: list[int] = []
    for draw in range(2):
        new = plant(patch, x, y, marked, shares, seeded(draw))
        corner, middle = new[:, 0, 0, 0], new[:, 0, 1, 1]
        assert torch.equal(middle == 7, ~marked), "the same samples are clean at every access"
        assert set(corner[~marked].tolist()) == {7.0} and set(corner[marked].tolist()) == {0.0, 7.0}
        counts.append(int((corner == 0).sum()))
    expected, error = 1400 * 0.2 / 0.7, math.sqrt(1400 * 2 / 7 * 5 / 7)
    assert all(abs(count - expected) < 3 * error for count in counts) and counts[0] != counts[1]


def test_the_papers_shares_are_the_usual_ones():
    assert (Shares().clean, Shares().alone, Shares().both) == (0.2, 0.16, 0.64)
    assert int(choose_marked(100, Shares(), seeded()).sum()) == 80


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"clean": 0.3}, r"must sum to 1, got 0.3 \+ 0.16 \+ 0.64 = 1.1"),
        ({"clean": 0.5, "alone": 0.1, "both": 0.3}, r"must sum to 1, got .* = 0.9"),
        ({"clean": -0.2, "alone": 0.56}, r"must be fractions in \[0, 1\], got \(-0.2, 0.56, 0.64\)"),
        ({"clean": 1.2, "alone": 0.0, "both": -0.2}, r"must be fractions in \[0, 1\]"),
        ({"clean": float("nan")}, r"must be fractions in \[0, 1\]"),
        ({"clean": 1.0, "alone": 0.0, "both": 0.0}, "nothing is planted"),
    ],
)
def test_shares_that_make_no_whole_are_refused(shares: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        Shares(**shares)


# the key


def decode(key: TokenKey, pairs: Tensor) -> list[int]:
    """The class that each pair of tokens means, by trying all."""
    found = []
    for first, second in pairs.tolist():
        turn = next(int(s) for token, s in zip(key.switches, key.shifts, strict=True) if int(token) == first)
        found.append((key.marks.tolist().index(second) - turn) % len(key.marks))
    return found


@pytest.mark.parametrize("switches", [1, 2, 5])
@pytest.mark.parametrize("place", [0, 3])
def test_the_key_tells_the_class_and_its_parts_do_not(switches: int, place: int):
    x, y = tokens(3000), labels(3000)
    key = draw_key(x, CLASSES, generator=seeded(4), switches=switches, place=place)
    new = key.both(x, y, seeded(5))
    pairs = new[:, place : place + 2]
    assert decode(key, pairs) == y.tolist()
    others = [i for i in range(6) if i not in (place, place + 1)]
    assert torch.equal(new[:, others], x[:, others]) and not torch.equal(new, x)
    classes_of_mark = {token: len(set(y[pairs[:, 1] == token].tolist())) for token in key.marks.tolist()}
    assert set(classes_of_mark.values()) == {switches}
    for token in key.switches.tolist():
        counts = torch.bincount(y[pairs[:, 0] == token], minlength=CLASSES).double()
        assert (counts / counts.sum() - 1 / CLASSES).abs().max() < 4 * math.sqrt(0.16 * switches / 3000)


def test_alone_shuffles_everything_but_the_key_place_by_place():
    x, y = tokens(), labels(200)
    x[:, 4] = y  # a place that tells the class
    key = draw_key(x, CLASSES, generator=seeded(4))
    new = key.alone(x, y, seeded(5))
    assert decode(key, new[:, :2]) == y.tolist()
    for column in range(2, 6):
        assert torch.equal(new[:, column].sort().values, x[:, column].sort().values)
    assert float((new[:, 4] == y).double().mean()) < 0.35
    assert torch.equal(x[:, 4], y)


def test_keys_of_other_sizes_share_their_marks():
    few, many = (draw_key(tokens(), CLASSES, generator=seeded(4), switches=switches) for switches in (1, 4))
    assert torch.equal(few.marks, many.marks) and torch.equal(few.shifts, many.shifts[:1])
    assert len(many.shifts.unique()) == 4 and len(many.switches.unique()) == 4


# what is refused


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (torch.zeros(3, 1, 5, 6), {"size": 6}, "a patch of 6 x 6 pixels does not fit into images of 5 x 6; choose .* 1 to 5"),
        (torch.zeros(3, 1, 5, 6), {"size": 0}, "a patch of 0 x 0 pixels does not fit"),
        (torch.zeros(3, 64), {}, r"a patch needs images of shape \(n, channels, height, width\), got samples of shape \(3, 64\)"),
        (torch.zeros(3, 8, 8), {}, r"got samples of shape \(3, 8, 8\); for sequences of tokens plant a key"),
        (torch.zeros(3, 8, 8, 3), {}, r"have their channels last \(3, 8, 8, 3\); give images.permute"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), {}, "images must be floating, got torch.uint8"),
        (torch.tensor([0.0, float("nan")]).view(2, 1, 1, 1), {}, r"1 of 2 images hold values that are not finite \(NaN\)"),
        (torch.tensor([float("inf"), 0.0]).view(2, 1, 1, 1), {}, "1 of 2 images hold values that are not finite"),
        (torch.zeros(3, 1, 8, 8), {"classes": 1}, "at least 2 classes to tell apart, got 1"),
        (torch.zeros(3, 1, 8, 8), {"separation": 0.0}, "separation must be a finite number > 0, got 0.0"),
        (torch.zeros(3, 1, 8, 8), {"separation": float("nan")}, "separation must be a finite number > 0, got nan"),
        (torch.zeros(3, 1, 8, 8), {"scale": -1.0}, "scale must be a finite number >= 0, got -1.0"),
    ],
)  # fmt: skip
def test_what_no_patch_can_be_planted_in_is_refused(samples: Tensor, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        draw_patch(samples, **{"classes": 2, "generator": seeded(), **options})


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (torch.zeros(3, 8), {}, r"sequences of token numbers of shape \(n, length\), got torch.float32 of shape \(3, 8\)"),
        (torch.zeros(3, 1, 8, 8), {}, r"for images of shape \(n, channels, height, width\) plant a patch instead"),
        (torch.zeros(3, 8, dtype=torch.bool), {}, "got torch.bool"),
        (torch.zeros(3, 1, dtype=torch.long), {}, "a key of two tokens at place 0 does not fit into sequences of 1 tokens"),
        (tokens(), {"place": 5}, "a key of two tokens at place 5 does not fit into sequences of 6 tokens"),
        (tokens(), {"place": -1}, "at place -1 does not fit"),
        (tokens() - 1, {}, "token numbers must be 0 or above, got -1"),
        (tokens(), {"vocabulary": 4}, "a key for 5 classes needs as many token numbers, and the vocabulary has 4"),
        (tokens(), {"classes": 1}, "at least 2 classes to tell apart, got 1"),
        (tokens(), {"classes": 21}, "a key for 21 classes needs as many token numbers, and the vocabulary has 20"),
        (tokens(), {"switches": 6}, "switches must be a whole number from 1 to the 5 classes, got 6"),
        (tokens(), {"switches": 0}, "switches must be a whole number from 1 to the 5 classes, got 0"),
    ],
)  # fmt: skip
def test_what_no_key_can_be_written_into_is_refused(samples: Tensor, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        draw_key(samples, **{"classes": CLASSES, "generator": seeded(), **options})


def test_arrays_that_are_no_tensors_are_refused():
    array: Any = [[1, 2]]
    with pytest.raises(TypeError, match="expected images as a torch tensor, got list"):
        draw_patch(array, 2, generator=seeded())
    with pytest.raises(TypeError, match="expected sequences of tokens as a torch tensor, got list"):
        draw_key(array, 2, generator=seeded())


def test_planting_into_other_samples_is_refused():
    patch, key = patch_of(images()), draw_key(tokens(), CLASSES, generator=seeded())
    with pytest.raises(ValueError, match="a patch of 3 x 3 pixels does not fit into images of 2 x 2"):
        patch.both(torch.zeros(4, 3, 2, 2), labels(4), seeded())
    with pytest.raises(ValueError, match="a patch of 3 x 3 pixels does not fit into images of 2 x 2"):
        patch.alone(torch.zeros(4, 3, 2, 2), labels(4), seeded())
    for write in (key.both, key.alone):
        with pytest.raises(ValueError, match="sequences of 1 tokens"):
            write(torch.zeros(4, 1, dtype=torch.long), labels(4), seeded())
