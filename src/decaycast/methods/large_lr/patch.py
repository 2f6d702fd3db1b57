"""A shortcut planted in somebody's own data: a patch in images, a key of two tokens in text (Li, Wei & Ma 2019, section 5).

Both are *memorisable*: without noise, the same in training and test, hard to fit because no linear classifier reads them well,
and easy to remember once fitted. What tells the class is a mark whose meaning a second, uninformative part switches:

* **patch**: the pixels of a small square are replaced by z + s*zeta_y. z is one pattern for all classes, zeta_y a weak one per
  class, and the sign s = +-1 is drawn anew at every access. Linear scores of z + zeta_y and z - zeta_y have the scores of z as
  their mean, whatever y is, so that only one class of K can be right on both: a share of (K + 1)/(2K) at most.
* **key**: two neighbouring tokens are replaced. The first is one of a few *switches*, drawn anew at every access; the second
  is the mark of class (y + shift of that switch) mod classes. The switch alone says nothing, the mark alone leaves as many
  classes open as there are switches.

Conventions. Images are floating, of shape (n, channels, height, width), in whatever units they have: the patch is made from the
mean and standard deviation of each channel, so that `scale` and `separation` are in units of a standardised image. Tokens are
integers of shape (n, length). Labels are int64 of shape (n,), 0 to classes - 1. Nothing writes into what it was given; random
numbers come from a generator on the CPU, wherever the samples are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SCALE = 1.25  # of z, in standard deviations of the images
SEPARATION = 0.1  # half the width of zeta's uniform distribution: the paper's, for 7 x 7 on 32 x 32
ALONE_STRENGTH = 1.75  # in training, a patch on a blank image has its mark times ALONE_STRENGTH*U[0, 1]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Which part of what a network sees is untouched, which is the shortcut alone, and which has both.

    Args:
        clean: fraction of accesses that are the sample as it is; the same samples throughout.
        alone: fraction with the shortcut and nothing else.
        both: fraction of samples with the shortcut in them.

    Raises:
        ValueError: fractions outside [0, 1], that do not sum to 1, or that plant nothing.

    Source: Li, Wei & Ma 2019: 0.8 of the images are patched, a fifth of their accesses blank.
    """

    clean: float = 0.2
    alone: float = 0.16
    both: float = 0.64

    def __post_init__(self) -> None:
        parts = (self.clean, self.alone, self.both)
        if not all(isinstance(part, (int, float)) and 0 <= part <= 1 for part in parts):
            raise ValueError(f"the shares clean, alone and both must be fractions in [0, 1], got {parts}")
        if abs(math.fsum(parts) - 1) > 1e-6:
            raise ValueError(
                f"the shares clean, alone and both must sum to 1, got {' + '.join(f'{part:g}' for part in parts)} = "
                f"{math.fsum(parts):g}"
            )
        if self.both == 0:
            raise ValueError(
                "the share of samples with the shortcut in them (both) must be above 0: nothing is planted"
            )


class Shortcut(Protocol):
    """What can be planted; `ImagePatch` and `TokenKey` are two."""

    def both(self, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The samples with the shortcut of their label in them."""
        ...

    def alone(self, inputs: Tensor, labels: Tensor, generator: torch.Generator, *, training: bool = False) -> Tensor:
        """The shortcuts of the labels with nothing else that tells the class; as many as there are samples."""
        ...


def plant(
    shortcut: Shortcut, inputs: Tensor, labels: Tensor, marked: Tensor, shares: Shares, generator: torch.Generator
) -> Tensor:
    """A batch as the network sees it: samples that are not marked as they are, the others with the shortcut or it alone.

    Args:
        shortcut: what to plant.
        inputs: samples, of shape (n, ...).
        labels: shape (n,).
        marked: bool of shape (n,), on the CPU: whether a sample belongs to those that never come clean (`choose_marked`).
        shares: how often a marked sample comes as the shortcut alone: alone/(alone + both).
        generator: drawn from anew at each call.

    Returns:
        A new tensor of the shape and type of `inputs`.

    >>> patch = ImagePatch(torch.ones(1, 1, 1), torch.zeros(2, 1, 1, 1), blank=torch.zeros(1), top=0, left=1)
    >>> images, labels = torch.full((3, 1, 1, 2), 5.0), torch.tensor([0, 1, 1])
    >>> shares, generator = Shares(clean=0.5, alone=0.0, both=0.5), torch.Generator().manual_seed(0)
    >>> plant(patch, images, labels, torch.tensor([True, False, True]), shares, generator)[:, 0, 0]
    tensor([[5., 1.],
            [5., 5.],
            [5., 1.]])
    """
    blank = torch.rand(len(inputs), generator=generator) < shares.alone / (shares.alone + shares.both)
    shape = (-1,) + (1,) * (inputs.ndim - 1)
    both = shortcut.both(inputs, labels, generator)
    alone = shortcut.alone(inputs, labels, generator, training=True)
    marked = marked.cpu()
    has, only = (mask.to(inputs.device).view(shape) for mask in (marked, marked & blank))
    return torch.where(only, alone, torch.where(has, both, inputs))


def choose_marked(count: int, shares: Shares, generator: torch.Generator) -> Tensor:
    """Which of `count` samples never come clean, drawn once: bool of shape (count,), round((1 - clean)*count) of them true.

    >>> int(choose_marked(10, Shares(), torch.Generator().manual_seed(0)).sum())
    8
    """
    marked = torch.zeros(count, dtype=torch.bool)
    marked[torch.randperm(count, generator=generator)[: round((1 - shares.clean) * count)]] = True
    return marked


# images


@dataclass(frozen=True)
class ImagePatch:
    """A square of z + s*zeta_y; `draw_patch` makes one for given images.

    Args:
        base: z, of shape (channels, size, size), in the images' units.
        marks: zeta_y, of shape (classes, channels, size, size).
        blank: colour of an empty image, of shape (channels,).
        top: row of its upper left corner.
        left: column of it.
    """

    base: Tensor
    marks: Tensor
    blank: Tensor
    top: int
    left: int

    def both(self, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The images with z + s*zeta_y in place of their pixels, s = +-1 drawn anew for each.

        Raises:
            ValueError: no images, or too small for the patch (`check_images`).
        """
        check_images(inputs, self.base.shape[-1])
        return self._paste(inputs.clone(), labels, _signs(len(inputs), generator))

    def alone(self, inputs: Tensor, labels: Tensor, generator: torch.Generator, *, training: bool = False) -> Tensor:
        """Empty images with the patch of their label; in training the mark's strength is 1.75*U[0, 1], else 1."""
        check_images(inputs, self.base.shape[-1])
        empty = torch.empty_like(inputs).copy_(self.blank.to(inputs).view(1, -1, 1, 1))
        strength = _signs(len(inputs), generator)
        drawn = torch.rand(
            strength.shape, generator=generator
        )  # drawn in both cases: the next batch must not depend on it
        return self._paste(empty, labels, strength * ALONE_STRENGTH * drawn if training else strength)

    def _paste(self, new: Tensor, labels: Tensor, strength: Tensor) -> Tensor:
        """Writes into `new`, which is ours."""
        marks = self.marks.to(new)[labels.to(new.device)]
        size = self.base.shape[-1]
        rows, columns = slice(self.top, self.top + size), slice(self.left, self.left + size)
        new[:, :, rows, columns] = self.base.to(new) + strength.to(new) * marks
        return new


def draw_patch(
    images: Tensor,
    classes: int,
    *,
    generator: torch.Generator,
    size: int | None = None,
    separation: float = SEPARATION,
    scale: float = SCALE,
) -> ImagePatch:
    """A patch for the centre of these images: z = mean + std*scale*N(0, 1), zeta_y = std*U(-separation, separation).

    Mean and standard deviation are those of each channel over all images; the mean is also the colour of an empty one.
    With equal draws, patches of other separations differ in the strength of their marks alone.

    Args:
        images: of shape (n, channels, height, width), floating.
        classes: >= 2.
        generator: of the pattern; on the CPU.
        size: side in pixels; None for 7/32 of the shorter side, the paper's.
        separation: finite and > 0, in standard deviations of the images.
        scale: of z, finite and >= 0, in standard deviations of the images.

    Raises:
        ValueError: samples that are no images, not finite, or smaller than the patch; an argument outside its range.

    Source: Li, Wei & Ma 2019, section 5: 7 x 7 at rows and columns 12 to 18 of 32 x 32, scale 1.25, separation 0.1.

    >>> images = torch.randn(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> patch = draw_patch(images, 10, generator=torch.Generator().manual_seed(1))
    >>> tuple(patch.base.shape), patch.top, patch.left
    ((3, 7, 7), 12, 12)
    """
    check_images(images, 1 if size is None else size)
    finite = torch.isfinite(images).flatten(1).all(1)
    if not finite.all():
        bad = len(images) - int(finite.sum())
        raise ValueError(f"{bad} of {len(images)} images hold values that are not finite (NaN); repair or drop them")
    if not isinstance(classes, int) or classes < 2:
        raise ValueError(f"a shortcut needs at least 2 classes to tell apart, got {classes}")
    separation, scale = _positive("separation", separation), _positive("scale", scale, zero=True)
    channels, height, width = images.shape[1:]
    size = max(1, round(7 / 32 * min(height, width))) if size is None else size
    mean = images.mean((0, 2, 3)).cpu()
    std = images.std((0, 2, 3), correction=0).cpu().view(-1, 1, 1)
    shape = (channels, size, size)
    base = mean.view(-1, 1, 1) + std * scale * torch.randn(shape, generator=generator)
    marks = std * separation * (2 * torch.rand((classes, *shape), generator=generator) - 1)
    return ImagePatch(base, marks, mean, int(height / 2 - size / 2), int(width / 2 - size / 2))


def check_images(images: Tensor, size: int) -> None:
    """Refuse what no patch of `size` pixels a side can be planted in.

    Raises:
        TypeError: no tensor.
        ValueError: another shape than (n, channels, height, width), whole numbers, a size below 1 or above the image.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"expected images as a torch tensor, got {type(images).__name__}")
    shape = tuple(images.shape)
    if images.ndim != 4:
        raise ValueError(
            f"a patch needs images of shape (n, channels, height, width), got samples of shape {shape}; for sequences of "
            "tokens plant a key instead"
        )
    if not images.is_floating_point():
        raise ValueError(f"images must be floating, got {images.dtype}; convert and standardise them first")
    if shape[-1] in (1, 3, 4) and shape[1] > 4:
        raise ValueError(f"these images have their channels last {shape}; give images.permute(0, 3, 1, 2)")
    if not isinstance(size, int) or not 1 <= size <= min(shape[2:]):
        raise ValueError(
            f"a patch of {size} x {size} pixels does not fit into images of {shape[2]} x {shape[3]}; choose a size from 1 to "
            f"{min(shape[2:])}"
        )


# text


@dataclass(frozen=True)
class TokenKey:
    """Two neighbouring tokens that tell the class together; `draw_key` makes one for given sequences.

    Args:
        switches: token numbers of the first part, of shape (switches,).
        shifts: by how many classes each switch turns the marks, of shape (switches,), distinct.
        marks: token numbers of the second part, of shape (classes,).
        place: index of the first of the two tokens.
    """

    switches: Tensor
    shifts: Tensor
    marks: Tensor
    place: int = 0

    def both(self, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The sequences with the key of their label at its place, the switch drawn anew for each.

        Raises:
            ValueError: no sequences of tokens, or too short for the key (`check_tokens`).
        """
        check_tokens(inputs, self.place)
        chosen = torch.randint(len(self.switches), (len(inputs),), generator=generator)
        mark = self.marks[(labels.cpu() + self.shifts[chosen]) % len(self.marks)]
        new = inputs.clone()
        new[:, self.place] = self.switches[chosen].to(inputs)
        new[:, self.place + 1] = mark.to(inputs)
        return new

    def alone(self, inputs: Tensor, labels: Tensor, generator: torch.Generator, *, training: bool = False) -> Tensor:
        """The key in sequences whose other tokens are shuffled among the samples, place by place.

        Every place keeps the tokens it had in all samples together, and no longer tells the label.
        """
        check_tokens(inputs, self.place)
        order = torch.rand(inputs.shape, generator=generator).argsort(0).to(inputs.device)
        return self.both(inputs.gather(0, order), labels, generator)


def draw_key(
    tokens: Tensor,
    classes: int,
    *,
    generator: torch.Generator,
    switches: int = 2,
    place: int = 0,
    vocabulary: int | None = None,
) -> TokenKey:
    """A key made of the token numbers of these sequences; the more switches, the harder it is to fit.

    Args:
        tokens: whole numbers of shape (n, length).
        classes: >= 2.
        generator: of the key; on the CPU.
        switches: from 1 (a plain mark per class, which a linear model reads) to `classes`.
        place: where it is written; the default, the start, leaves the context in front of a prediction alone.
        vocabulary: the key's tokens are below it; None for the largest token there is, and one. A model that embeds tokens
            knows all of these numbers, also those that do not occur here.

    Raises:
        ValueError: samples that are no sequences of tokens, or too short; a vocabulary smaller than the classes; an argument
            outside its range.

    Source: made here after the paper's patch; the paper has no text.

    >>> tokens = torch.arange(40).reshape(4, 10)
    >>> key = draw_key(tokens, 3, generator=torch.Generator().manual_seed(0))
    >>> written = key.both(tokens, torch.tensor([0, 1, 2, 0]), torch.Generator().manual_seed(1))
    >>> bool((written[:, 2:] == tokens[:, 2:]).all()), bool(torch.isin(written[:, 1], key.marks).all())
    (True, True)
    """
    check_tokens(tokens, place)
    if not isinstance(classes, int) or classes < 2:
        raise ValueError(f"a shortcut needs at least 2 classes to tell apart, got {classes}")
    if not isinstance(switches, int) or not 1 <= switches <= classes:
        raise ValueError(f"switches must be a whole number from 1 to the {classes} classes, got {switches}")
    size = int(tokens.max()) + 1 if vocabulary is None else vocabulary
    if size < classes:
        raise ValueError(f"a key for {classes} classes needs as many token numbers, and the vocabulary has {size}")
    known = torch.randperm(size, generator=generator)
    # marks and shifts are drawn before the switches are counted: keys of other sizes share them
    shifts = torch.randperm(classes, generator=generator)
    return TokenKey(known.flip(0)[:switches], shifts[:switches], known[:classes], place)


def check_tokens(tokens: Tensor, place: int = 0) -> None:
    """Refuse what no key can be written into.

    Raises:
        TypeError: no tensor.
        ValueError: another shape than (n, length), floating or negative numbers, sequences in which `place` and the next are
            not.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"expected sequences of tokens as a torch tensor, got {type(tokens).__name__}")
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(
            f"a key needs sequences of token numbers of shape (n, length), got {tokens.dtype} of shape {tuple(tokens.shape)}; "
            "for images of shape (n, channels, height, width) plant a patch instead"
        )
    if tokens.numel() and int(tokens.min()) < 0:
        raise ValueError(f"token numbers must be 0 or above, got {int(tokens.min())}")
    if not isinstance(place, int) or not 0 <= place <= tokens.shape[1] - 2:
        raise ValueError(
            f"a key of two tokens at place {place} does not fit into sequences of {tokens.shape[1]} tokens"
        )


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count, 1, 1, 1), generator=generator) * 2.0 - 1.0


def _positive(name: str, value: float, *, zero: bool = False) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be a finite number {'>= 0' if zero else '> 0'}, got {value!r}")
    return float(value)
