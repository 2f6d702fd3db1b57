"""One training with a planted shortcut: its course, its control, and what is read on the way, by a second route."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from decaycast.core.hook import Hook
from decaycast.core.train import DivergedError
from decaycast.methods.large_lr.patch import ImagePatch, Shares, choose_marked, draw_patch, plant
from decaycast.methods.large_lr.planted import (
    COLUMNS,
    Course,
    Task,
    alone_accuracy,
    clean_accuracy,
    generator_for,
    train_planted,
)

COURSE = Course(lr=0.2, small=0.05, steps=9, anneal_at=5, batch_size=8, points=4)


def task(count: int = 36, separation: float = 0.5) -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.randn(count, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1)
    patch = draw_patch(images, 3, generator=generator, size=2, separation=separation)
    return Task(train=(images[:26], labels[:26]), held_out=(images[26:], labels[26:]), shortcut=patch)


def model(seed: int = 0) -> nn.Sequential:
    made = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    nn.init.normal_(made[1].weight, std=0.1, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    nn.init.zeros_(made[1].bias)  # type: ignore[arg-type]
    return made


def trained(own: Task, course: Course = COURSE, **options: Any) -> tuple[nn.Module, dict[str, list[float]]]:
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), lr=course.lr, momentum=0.9)
    return made, train_planted(made, optimizer, own, course, **{"planted": True, "seed": 3, **options})


def by_hand(own: Task, planted: bool) -> nn.Module:
    """The same training, with every choice written out."""
    made, (inputs, labels) = model(), own.train
    optimizer = torch.optim.SGD(made.parameters(), lr=0.2, momentum=0.9)
    order, drawn = generator_for("order", 3), generator_for("planted", 3)
    marked = choose_marked(26, own.shares, generator_for("marked", 3))
    for step in range(9):
        if step % 3 == 0:
            shuffled = torch.randperm(26, generator=order)
        index = shuffled[8 * (step % 3) : 8 * (step % 3) + 8]
        x, y = inputs[index], labels[index]
        if planted:
            x = plant(own.shortcut, x, y, marked[index], own.shares, drawn)
        optimizer.param_groups[0]["lr"] = 0.2 if step < 5 else 0.05
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(x), y).backward()
        optimizer.step()
    return made


@pytest.mark.parametrize("planted", [True, False])
def test_a_training_is_the_one_written_out(planted: bool):
    made, curve = trained(task(), planted=planted)
    wanted = by_hand(task(), planted)
    for own, other in zip(made.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-6)
    assert tuple(curve) == COLUMNS
    assert curve["step"] == [3, 5, 7, 9] and curve["lr"] == pytest.approx([0.2, 0.2, 0.05, 0.05])
    inputs, labels = task().held_out
    assert curve["clean_accuracy"][-1] == float((made(inputs).argmax(1) == labels).double().mean())
    assert curve["alone_accuracy"][-1] == alone_accuracy(made, task())


def test_a_control_differs_from_the_planted_training_in_the_shortcut_alone():
    class Batches(Hook):
        def __init__(self) -> None:
            self.seen: list[tuple[Tensor, Tensor]] = []

        def on_batch(self, step: int, batch: Any) -> Any:
            self.seen.append(batch)
            return batch

    found = {}
    for planted in (True, False):
        hook = Batches()
        trained(task(), planted=planted, hooks=[hook])
        found[planted] = hook.seen
    changed = total = 0
    for (with_, labels), (without, same) in zip(found[True], found[False], strict=True):
        assert torch.equal(labels, same)
        changed += int((with_ != without).flatten(1).any(1).sum())
        total += len(labels)
    marked = choose_marked(26, Shares(), generator_for("marked", 3))
    assert total == 72 and abs(changed / total - float(marked.float().mean())) < 0.1
    assert all(torch.isin(without, task().train[0]).all() for without, _ in found[False])


def test_what_it_reads_is_what_the_model_knows():
    """A made-up model that looks at the patch alone, and one that says the same class always."""

    class Reader(nn.Module):
        def __init__(self, patch: ImagePatch) -> None:
            super().__init__()
            self.patch = patch

        def forward(self, x: Tensor) -> Tensor:
            away = x[:, :, 2:4, 2:4] - self.patch.base
            return -torch.stack([torch.minimum((away - m).square().sum((1, 2, 3)), (away + m).square().sum((1, 2, 3)))
                                 for m in self.patch.marks], 1)  # fmt: skip

    own = task(900)
    patch: Any = own.shortcut
    assert alone_accuracy(Reader(patch), own) == 1.0
    constant = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with torch.no_grad():
        for parameter in constant.parameters():
            parameter.zero_()
    labels = own.held_out[1]
    assert clean_accuracy(constant, own.held_out) == pytest.approx(float((labels == 0).double().mean()))
    assert alone_accuracy(constant, own) == pytest.approx(float((labels == 0).double().mean()))


def test_reading_leaves_the_training_alone():
    few, many = (Course(lr=0.2, small=0.05, steps=9, anneal_at=5, batch_size=8, points=n) for n in (2, 8))
    (first, _), (second, _) = trained(task(), few), trained(task(), many)
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


def test_it_can_stop_before_annealing_and_says_what_it_measures():
    rows: list[dict[str, float]] = []
    _, curve = trained(task(), stop=5, on_row=rows.append)
    assert curve["step"] == [3, 5] and [row["step"] for row in rows] == [3, 5]
    assert [row["alone_accuracy"] for row in rows] == curve["alone_accuracy"]


def test_a_training_that_diverges_is_an_error():
    with pytest.raises(DivergedError, match="the training loss is"):
        trained(task(), Course(lr=1e38, small=1.0, steps=9, anneal_at=5, batch_size=8))


def test_a_batch_needs_samples():
    with pytest.raises(ValueError, match="a batch of 27 needs as many samples, got 26; lower the batch size"):
        trained(task(), Course(lr=0.1, small=0.1, steps=9, anneal_at=5, batch_size=27))


@given(st.integers(2, 400), st.data())
def test_the_moment_before_annealing_and_the_end_are_always_measured(steps: int, data: Any):
    anneal_at = data.draw(st.integers(1, steps - 1))
    course = Course(lr=2.0, small=1.0, steps=steps, anneal_at=anneal_at, points=data.draw(st.integers(1, 30)))
    found = course.measured_at()
    assert found == sorted(set(found)) and {anneal_at, steps} <= set(found) and found[0] >= 1
    assert [course.multiplier(step) for step in (0, anneal_at - 1, anneal_at, steps)] == [1, 1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"anneal_at": 9},
            "the training ends at step 9, before it anneals at step 9: rates are compared only after annealing",
        ),
        ({"anneal_at": 20}, "the training ends at step 9, before it anneals at step 20"),
        ({"anneal_at": 0}, "anneal_at must be a whole number >= 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number >= 1, got 2.5"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"points": 0}, "points must be a whole number >= 1, got 0"),
        ({"small": 0.3}, "annealing means to a smaller rate, got 0.2 and then 0.3"),
        ({"small": 0.0}, "a learning rate must be a finite number > 0, got small = 0.0"),
        ({"lr": float("nan")}, "a learning rate must be a finite number > 0, got lr = nan"),
        ({"lr": float("inf")}, "a learning rate must be a finite number > 0, got lr = inf"),
    ],
)
def test_a_course_that_cannot_be_is_refused(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Course(**{"lr": 0.2, "small": 0.05, "steps": 9, "anneal_at": 5, **changed})
