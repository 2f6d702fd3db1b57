"""A probe for shortcuts: plant a memorisable pattern, train briefly at each rate, anneal all alike, see what was learnt first.

A small learning rate looks better early and may get there by memorising (Li, Wei & Ma 2019). The probe plants a shortcut that
can be counted: a patch in images, a key of two tokens in sequences. It trains a fresh network at each candidate rate, with the
shortcut and without (the control), brings all of them down to one small rate, and reports the accuracy on the shortcut alone
before and after. Rates are never ranked by what they show before annealing.

How hard the shortcut is decides what can be seen: too easy, and every rate memorises it; too hard, and none does. Unless it is
given, it is tuned on a seed of its own: the hardest one that the *small* rate has memorised before annealing. The large rates
take no part in that, so that what they do is a measurement.

Text. One label per sequence, as for a classifier. Windows of a language model have a label at every place; there the label is the
token that follows the window, scores are read at the last place alone, and the network trains on that place alone. With a loss
over all places a shortcut would stand at one place of many and could not crowd out what is to be learnt, which is the
mechanism. So for a language model the probe looks at a harder and noisier task than its training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from decaycast.core.train import DivergedError
from decaycast.methods.large_lr.patch import Shares, Shortcut, check_images, check_tokens, draw_key, draw_patch
from decaycast.methods.large_lr.planted import Course, Part, Task, generator_for, train_planted
from decaycast.methods.large_lr.probe_report import Arm, ProbeReport

MakeModel = Callable[[int], nn.Module]
MakeOptimizer = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
OnRow = Callable[[str, dict[str, float]], None]
SEPARATIONS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # from hard to easy
SWITCHES = (8, 4, 2, 1)
TUNED_SKILL = 0.9  # on the shortcut alone, before annealing, at the small rate
TUNING_SEED = 1_000_003
_HELD_OUT = 0.25


def paper_sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9 and weight decay 5e-4, as in the paper's patch experiment."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def probe_shortcuts(
    make_model: MakeModel,
    train: Part,
    rates: Sequence[float],
    *,
    held_out: Part | None = None,
    small: float | None = None,
    steps: int = 1500,
    anneal_at: int | None = None,
    batch_size: int = 64,
    seeds: int = 5,
    make_optimizer: MakeOptimizer = paper_sgd,
    size: int | None = None,
    difficulty: float | None = None,
    shares: Shares | None = None,
    points: int = 8,
    on_row: OnRow | None = None,
) -> ProbeReport:
    """Which of these learning rates make the network memorise a planted shortcut before it learns the rest.

    Cost: 2*seeds trainings of `steps` for each rate, the small one included, and at most three half ones for the tuning.

    Args:
        make_model: seed -> a fresh model on the samples' device, scores of shape (n, classes), or (n, classes, length) for a
            language model. It is called with torch's own generator seeded, and that is put back at the end.
        train: samples and labels. Images are floating, of shape (n, channels, height, width), as the model wants them; sequences
            whole numbers of shape (n, length). Labels are whole numbers of shape (n,), or (n, length) for windows.
        rates: candidate learning rates, each at least `small`.
        held_out: samples and labels of the same kinds; None keeps a quarter of the training samples back.
        small: the rate that all anneal to; None for the smallest of `rates`. It is an arm too.
        steps: optimiser steps of each training.
        anneal_at: first step at the small rate; None for half of them.
        batch_size: samples in a step.
        seeds: networks per rate, with and without shortcut, from seed 0 on; below 2 there is no verdict, below 5 seldom one.
        make_optimizer: (parameters, learning rate) -> optimiser; the paper's SGD by default.
        size: side of the patch in pixels; None for 7/32 of the image.
        difficulty: separation of the patch, or switches of the key; None tunes it.
        shares: what the network sees; None for the paper's 20 % clean, 16 % shortcut alone, 64 % both.
        points: measurements in a training.
        on_row: called with words on the training and each of its measurements.

    Returns:
        A report, whose `print` is a table with a sentence per rate. A rate that diverges is in it with the reason.

    Raises:
        TypeError: samples that are no tensors.
        ValueError: samples that no shortcut can be planted in (wrong shape, NaN, a patch larger than the image); one class alone;
            fewer samples than a batch; rates that are none or below `small`; a training that ends before it anneals.

    Source: Li, Wei & Ma 2019, section 5, made a diagnostic; control, tuning and differences in differences are ours.

    >>> generator = torch.Generator().manual_seed(0)
    >>> labels = torch.arange(64) % 2
    >>> images = torch.randn(64, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    >>> report = probe_shortcuts(lambda seed: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (images, labels), [0.01, 0.1],
    ...     steps=8, batch_size=16, seeds=1, difficulty=0.5)
    >>> [arm.lr for arm in report.arms], report.trainings, report.what
    ([0.1, 0.01], 4, 'patch of 2 x 2 pixels')
    """
    began = time.perf_counter()
    parts = _parts(train, held_out)
    rates = _rates(rates, small)
    course = Course(
        lr=rates[-1],
        small=rates[-1],
        steps=steps,
        anneal_at=_half(steps) if anneal_at is None else anneal_at,
        batch_size=batch_size,
        points=points,
    )
    if not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds must be a whole number >= 1, got {seeds!r}")
    if len(parts[0][0]) < batch_size:
        raise ValueError(f"a batch of {batch_size} needs as many samples, got {len(parts[0][0])}; lower the batch size")
    bench = _Bench(
        make_model,
        make_optimizer,
        *parts,
        shares=shares or Shares(),
        size=size,
        on_row=on_row or (lambda words, row: None),
        labels_are_tokens=train[1].ndim == 2,
    )
    chosen, learnable, words = bench.tuned(course) if difficulty is None else (difficulty, None, "as given")
    bench.shortcut_for(0, chosen)  # whatever is wrong with it comes up before anything is trained
    arms = [bench.arm(replace(course, lr=rate), chosen, seeds) for rate in rates]
    return ProbeReport(
        what=bench.what(),
        difficulty=f"{bench.kind} {chosen:g} {words}",
        learnable=learnable,
        small=rates[-1],
        steps=steps,
        anneal_at=course.anneal_at,
        chance=_chance(parts[1][1]),
        arms=arms,
        seeds=seeds,
        trainings=bench.trainings,
        seconds=time.perf_counter() - began,
    )


class _Bench:
    """What all trainings of a probe share, and how many there were."""

    def __init__(
        self,
        make_model: MakeModel,
        make_optimizer: MakeOptimizer,
        train: Part,
        held_out: Part,
        *,
        shares: Shares,
        size: int | None,
        on_row: OnRow,
        labels_are_tokens: bool,
    ) -> None:
        self.make_model, self.make_optimizer, self.on_row = make_model, make_optimizer, on_row
        self.train, self.held_out, self.shares, self.size = train, held_out, shares, size
        self.is_text = train[0].ndim == 2
        self.kind = "switches" if self.is_text else "separation"
        self.classes = int(torch.cat([train[1], held_out[1]]).max()) + 1
        self.labels_are_tokens = labels_are_tokens
        self.trainings = 0

    def what(self) -> str:
        if self.is_text:
            return "key of two tokens at the start of a sequence"
        side = self.shortcut_for(0, 1.0).base.shape[-1]  # type: ignore[attr-defined]
        return f"patch of {side} x {side} pixels"

    def shortcut_for(self, seed: int, difficulty: float) -> Shortcut:
        """Each seed has a pattern of its own: what is said about a rate must not hang on one pattern."""
        generator = generator_for("shortcut", seed)
        if self.is_text:
            largest = max(int(part[0].max()) for part in (self.train, self.held_out))
            vocabulary = max(largest + 1, self.classes if self.labels_are_tokens else 0)
            return draw_key(
                self.train[0],
                self.classes,
                generator=generator,
                switches=_whole(difficulty),
                vocabulary=vocabulary,
            )
        return draw_patch(
            self.train[0], self.classes, generator=generator, size=self.size, separation=float(difficulty)
        )

    def tuned(self, course: Course) -> tuple[float, bool, str]:
        """The hardest shortcut that the small rate memorises before annealing, by bisection from hard to easy."""
        ladder = [q for q in SWITCHES if q <= self.classes] if self.is_text else list(SEPARATIONS)
        low, high = 0, len(ladder)  # the answer is in [low, high]; high means none
        while low < high:
            middle = (low + high) // 2
            if self._learns(course, ladder[middle]):
                high = middle
            else:
                low = middle + 1
        if low == len(ladder):
            return ladder[-1], False, f"(the easiest tried: at {course.small:g} it is not memorised in time)"
        return ladder[low], True, "(tuned on another seed)"

    def _learns(self, course: Course, difficulty: float) -> bool:
        words = f"tuning, {self.kind} {difficulty:g}"
        curve = self._trained(course, difficulty, TUNING_SEED, planted=True, stop=course.anneal_at, words=words)
        chance = _chance(self.held_out[1])
        return (curve["alone_accuracy"][-1] - chance) / (1 - chance) >= TUNED_SKILL

    def arm(self, course: Course, difficulty: float, seeds: int) -> Arm:
        """All trainings at one rate; the first that diverges ends them."""
        curves: dict[bool, list[dict[str, list[float]]]] = {True: [], False: []}
        for seed in range(seeds):
            for planted in (True, False):
                words = f"rate {course.lr:g}, seed {seed}, {'shortcut' if planted else 'control'}"
                try:
                    curves[planted].append(self._trained(course, difficulty, seed, planted=planted, words=words))
                except DivergedError as error:
                    return Arm(lr=course.lr, failed=f"diverged ({words}): {error}")
        return _summed_up(course, curves[True], curves[False])

    def _trained(
        self, course: Course, difficulty: float, seed: int, *, planted: bool, words: str, stop: int | None = None
    ) -> dict[str, list[float]]:
        task = Task(
            train=self.train,
            held_out=self.held_out,
            shortcut=self.shortcut_for(seed, difficulty),
            shares=self.shares,
        )
        self.trainings += 1
        devices = [self.train[0].device] if self.train[0].is_cuda else []
        with torch.random.fork_rng(devices=devices):  # dropout and the model's start draw from torch's own generator
            torch.manual_seed(seed)
            model = _AtLastPlace(self.make_model(seed))
            optimizer = self.make_optimizer(model.parameters(), course.lr)
            return train_planted(
                model,
                optimizer,
                task,
                course,
                planted=planted,
                seed=seed,
                on_row=lambda row: self.on_row(words, row),
                stop=stop,
            )


class _AtLastPlace(nn.Module):
    """Scores of a language model at the last place of a window; those of other models as they are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        scores = self.model(inputs)
        return scores[..., -1] if scores.ndim == 3 else scores


def _summed_up(course: Course, planted: list[dict[str, list[float]]], control: list[dict[str, list[float]]]) -> Arm:
    """The numbers of all seeds of a rate, before annealing and at the end."""
    before = course.measured_at().index(course.anneal_at)

    def mean(curves: list[dict[str, list[float]]], name: str) -> tuple[float, ...]:
        return tuple(sum(values) / len(values) for values in zip(*(curve[name] for curve in curves), strict=True))

    return Arm(
        lr=course.lr,
        alone_before=tuple(curve["alone_accuracy"][before] for curve in planted),
        alone_after=tuple(curve["alone_accuracy"][-1] for curve in planted),
        clean_before=tuple(curve["clean_accuracy"][before] for curve in planted),
        clean_after=tuple(curve["clean_accuracy"][-1] for curve in planted),
        control_alone=tuple(curve["alone_accuracy"][-1] for curve in control),
        control_clean=tuple(curve["clean_accuracy"][-1] for curve in control),
        curves={
            "step": mean(planted, "step"),
            "alone": mean(planted, "alone_accuracy"),
            "clean": mean(planted, "clean_accuracy"),
            "control": mean(control, "clean_accuracy"),
        },
    )


def _parts(train: Part, held_out: Part | None) -> tuple[Part, Part]:
    """Both parts checked, labels int64 of shape (n,); a quarter of the training samples is held out where none are given."""
    train = _checked("training", train)
    if held_out is None:
        order = torch.randperm(len(train[0]), generator=generator_for("held out", 0)).to(train[0].device)
        cut = max(1, round(_HELD_OUT * len(order)))
        held_out, train = (train[0][order[:cut]], train[1][order[:cut]]), (train[0][order[cut:]], train[1][order[cut:]])
    else:
        held_out = _checked("held-out", held_out)
        if held_out[0].shape[1:] != train[0].shape[1:] or held_out[0].dtype != train[0].dtype:
            raise ValueError(
                f"training and held-out samples differ: {_shape(train[0])} and {_shape(held_out[0])}; prepare them alike"
            )
    if len(torch.unique(train[1])) < 2:
        raise ValueError(f"all training samples are of one class, {int(train[1][0])}: there is nothing to tell apart")
    return train, held_out


def _checked(what: str, part: Any) -> Part:
    if not isinstance(part, (tuple, list)) or len(part) != 2:
        raise ValueError(f"the {what} data must be a pair (samples, labels), got {type(part).__name__}")
    inputs, labels = part
    if isinstance(inputs, Tensor) and inputs.ndim == 2 and not inputs.is_floating_point():
        check_tokens(inputs)
    else:
        check_images(inputs, 1)
        if not torch.isfinite(inputs).all():
            raise ValueError(f"the {what} images hold values that are not finite (NaN); repair or drop them")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"the {what} labels must be a tensor of whole numbers, got {found}; give class numbers")
    if labels.ndim == 2 and labels.shape == inputs.shape:
        labels = labels[:, -1]  # windows of a language model: what follows the window
    if labels.shape != inputs.shape[:1] or not len(labels):
        raise ValueError(
            f"the {what} data have {len(inputs)} samples and labels of shape {tuple(labels.shape)}; one each"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"the {what} labels must be 0 or above, got {int(labels.min())}")
    return inputs, labels.long()


def _rates(rates: Sequence[float], small: float | None) -> list[float]:
    """Candidate rates, falling, the small one last."""
    found = {float(rate) for rate in rates}
    if not found or not all(0 < rate < float("inf") for rate in found):
        raise ValueError(f"rates must be at least one finite learning rate > 0, got {list(rates)}")
    last = min(found) if small is None else float(small)
    if not 0 < last <= min(found):
        raise ValueError(f"small must be a rate > 0 and not above the candidates {sorted(found)}, got {small!r}")
    found = sorted(found | {last}, reverse=True)
    if len(found) < 2:
        raise ValueError(
            f"one rate, {found[0]:g}, has nothing to be compared with; give a larger one too, or a smaller small"
        )
    return found


def _half(steps: int) -> int:
    return max(1, steps // 2) if isinstance(steps, int) else 1


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError(f"the difficulty of a key is its number of switches, a whole number, got {value!r}")
    return int(value)


def _chance(labels: Tensor) -> float:
    return float(torch.bincount(labels).max()) / len(labels)


def _shape(samples: Tensor) -> str:
    return f"{samples.dtype} of shape {tuple(samples.shape)}"
