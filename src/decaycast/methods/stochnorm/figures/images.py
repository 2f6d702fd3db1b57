"""Which images a run sees, and in what order: parts by class, a share of each class, shuffled and augmented batches.

Everything follows from seeds: runs of one seed see the same images in the same order, whatever else differs between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as functional

Part = tuple[torch.Tensor, torch.Tensor]
"""Images of shape (n, channels, height, width) and their labels, int64 of shape (n,)."""


def generator_for(purpose: str, seed: int) -> torch.Generator:
    """A generator whose stream depends on both: what one purpose draws does not move what another one gets."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def of_classes(part: Part, first: int, last: int) -> Part:
    """The images of the classes first, ..., last - 1, whose labels become 0, 1, ...

    Raises:
        ValueError: there are none of a class.

    >>> of_classes((torch.zeros(4, 1, 2, 2), torch.tensor([0, 3, 2, 3])), 2, 4)[1]
    tensor([1, 0, 1])
    """
    images, labels = part
    missing = sorted(set(range(first, last)) - set(labels.tolist()))
    if missing:
        raise ValueError(f"the data have no image of the classes {missing}; raise train_size, or the other sizes")
    chosen = (labels >= first) & (labels < last)
    return images[chosen], labels[chosen] - first


def share_of_each_class(part: Part, size: int | None, fraction: float, generator: torch.Generator) -> Part:
    """A random share of every class: `fraction` of `size` images in all, equally many of each class (one at least).

    The draws of one generator state are nested: a smaller fraction's images are among those of a larger one.

    Args:
        part: images and labels 0, ..., classes - 1.
        size: images at fraction 1; None for all, however many each class has.
        fraction: in (0, 1].
        generator: decides which.

    Raises:
        ValueError: a fraction outside (0, 1], or a class with too few images.
    """
    images, labels = part
    if not 0 < fraction <= 1:
        raise ValueError(f"a fraction of the images lies in (0, 1], got {fraction}")
    classes = int(labels.max()) + 1
    chosen = []
    for label in range(classes):
        own = (labels == label).nonzero()[:, 0]
        full = len(own) if size is None else size // classes
        if not 1 <= full <= len(own):
            raise ValueError(f"class {label} has {len(own)} images, but {full} were asked for; lower target_size")
        chosen.append(own[torch.randperm(len(own), generator=generator)][: max(1, round(fraction * full))])
    index = torch.cat(chosen)
    return images[index], labels[index]


def shuffled(part: Part, batch_size: int, generator: torch.Generator, *, flip: bool, shift: int) -> Iterator[Part]:
    """Endless augmented batches, all of `batch_size`: one epoch's random order follows the other without a gap."""
    images, labels = part
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(len(images), generator=generator)])
        index, queue = queue[:batch_size], queue[batch_size:]
        yield augmented(images[index], generator, flip=flip, shift=shift), labels[index]


def augmented(images: torch.Tensor, generator: torch.Generator, *, flip: bool, shift: int) -> torch.Tensor:
    """Each image mirrored with probability 1/2 (if `flip`) and moved by up to `shift` pixels, its border reflected."""
    count, channels, height, width = images.shape
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    if shift:
        offsets = torch.randint(2 * shift + 1, (2, count, 1), generator=generator)
        rows, columns = offsets[0] + torch.arange(height), offsets[1] + torch.arange(width)
        padded = functional.pad(images, [shift] * 4, mode="reflect")
        which, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
        images = padded[which, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return images
