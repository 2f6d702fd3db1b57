"""Label noise as a function and as a hook: how often and where to labels move, from which stream, and what is refused."""

from __future__ import annotations

import copy
import doctest
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.data import DataLoader

from decaycast.core.hook import chain
from decaycast.core.train import train
from decaycast.methods.label_noise import method
from decaycast.methods.label_noise.method import LabelNoise, TargetNoise


def test_the_examples_run():
    assert doctest.testmod(method).failed == 0


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LABELS = torch.randint(5, (400,), generator=seeded(9))


# whole classes


@pytest.mark.parametrize("generator", [None, 3])
@pytest.mark.parametrize(("flip", "classes"), [(0.2, 5), (0.45, 2), (0.7, 4)])
def test_labels_move_as_often_as_said_and_everywhere_alike(generator: int | None, flip: float, classes: int):
    torch.manual_seed(4)
    noise = LabelNoise(flip, classes, None if generator is None else seeded(generator))
    count = 60_000
    for label in range(classes):
        drawn = torch.cat([noise(torch.full((count // 60,), label)) for _ in range(60)])
        shares = torch.bincount(drawn, minlength=classes) / count
        expected = torch.full((classes,), flip / (classes - 1))
        expected[label] = 1 - flip
        error = (expected * (1 - expected) / count).sqrt()
        assert ((shares - expected).abs() < 4 * error).all()


def test_flips_are_independent_between_labels_and_calls():
    torch.manual_seed(1)
    noise = LabelNoise(0.3, 5)
    moved = torch.stack([noise(LABELS) != LABELS for _ in range(2000)]).double() - 0.3
    within = moved[:, :-1] * moved[:, 1:]
    between = moved[:-1] * moved[1:]
    for products in (within, between):
        assert abs(products.mean()) < 4 * 0.21 / math.sqrt(products.numel())


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 6), st.floats(0, 0.99), st.lists(st.integers(1, 3), min_size=0, max_size=3), st.integers(0, 2**31)
)
def test_what_comes_out_fits_what_went_in(classes: int, share: float, shape: list, seed: int):
    targets = torch.randint(classes, shape, generator=seeded(seed))
    before = targets.clone()
    found = LabelNoise(share * (classes - 1) / classes, classes, seeded(seed))(targets)
    assert torch.equal(targets, before) and found is not targets
    assert (found.shape, found.dtype, found.device) == (targets.shape, targets.dtype, targets.device)
    assert 0 <= found.min() and found.max() < classes
    assert torch.equal(LabelNoise(0.0, classes)(targets), targets)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_dtypes_and_layouts(dtype: torch.dtype):
    targets = torch.randint(120, (40, 3), generator=seeded()).to(dtype)
    found = LabelNoise(0.9, 120, seeded(1))(targets)
    assert found.dtype == dtype and torch.equal(found.long(), LabelNoise(0.9, 120, seeded(1))(targets.long()))
    across = LabelNoise(0.9, 120, seeded(1))(targets.T.contiguous().T)
    assert torch.equal(across, found)


def test_a_full_byte_of_classes_does_not_overflow():
    found = LabelNoise(0.99, 256, seeded())(torch.full((4000,), 255, dtype=torch.uint8))
    counts = torch.bincount(found.long(), minlength=256)
    assert counts.min() > 0 and counts[255] < 100


def test_ignored_labels_stay():
    targets = LABELS.clone()
    targets[::3] = -100
    found = LabelNoise(0.79, 5, seeded())(targets)
    assert (found[::3] == -100).all()
    rest = torch.ones(len(targets), dtype=torch.bool)
    rest[::3] = False
    assert (found[rest] >= 0).all() and (found[rest] != targets[rest]).float().mean() > 0.6
    inside = LabelNoise(0.79, 5, seeded(), ignore_index=4)(LABELS)
    assert torch.equal(inside[LABELS == 4], LABELS[LABELS == 4]) and not torch.equal(inside, LABELS)


def test_the_flip_probability_may_be_changed():
    noise = LabelNoise(0.4, 5)
    noise.flip = 0.0
    assert torch.equal(noise(LABELS), LABELS)
    noise.flip = 0.79
    assert (noise(LABELS) != LABELS).float().mean() > 0.7
    with pytest.raises(ValueError, match=r"has to be in \[0, 0\.8\) for 5 classes, got 0\.8"):
        noise.flip = 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype):
    expected = LabelNoise(0.4, 5, seeded())(LABELS)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(LabelNoise(0.4, 5, seeded())(LABELS), expected)
    finally:
        torch.set_default_dtype(before)


# class probabilities


def test_one_hot_rows_move_as_their_classes_do():
    hot = functional.one_hot(LABELS, 5).float()
    found = LabelNoise(0.4, 5, seeded())(hot)
    assert torch.equal(found.argmax(1), LabelNoise(0.4, 5, seeded())(LABELS))
    assert found.dtype == torch.float32 and torch.equal(found.sum(1), torch.ones(400)) and found.max() == 1
    places = hot.reshape(100, 4, 5).movedim(2, 1)  # (n, C, places)
    moved = LabelNoise(0.4, 5, seeded())(places)
    assert torch.equal(moved.argmax(1), LabelNoise(0.4, 5, seeded())(LABELS.reshape(100, 4)))


def test_soft_rows_become_the_smoothed_target_on_average():
    torch.manual_seed(0)
    rows = torch.softmax(torch.randn(3, 4, dtype=torch.float64), 1)
    noise, flip, count = LabelNoise(0.3, 4), 0.3, 40_000
    found = noise(rows.repeat(count, 1)).reshape(count, 3, 4)
    expected = (1 - flip) * rows + flip * (1 - rows) / 3
    assert ((found.mean(0) - expected).abs() < 4 * found.std(0) / math.sqrt(count)).all()
    assert torch.equal(LabelNoise(0.0, 4)(rows), rows)
    torch.testing.assert_close(found[0].sort(1).values, rows.sort(1).values, rtol=0, atol=0)  # entries only move
    noise(rows.clone().requires_grad_()).square().sum().backward()  # a teacher that is trained along


def test_the_noise_of_a_gradient_is_fresh_and_unbiased():
    # mean over many draws of the sampled gradient = gradient of the smoothed loss
    from decaycast.methods.label_noise.flips import smoothed_loss

    logits = torch.randn(6, 5, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    labels, noise, count = LABELS[:6], LabelNoise(0.3, 5, seeded(5)), 1000
    slopes = torch.stack(
        [torch.autograd.grad(functional.cross_entropy(logits, noise(labels)), logits)[0] for _ in range(count)]
    )
    (expected,) = torch.autograd.grad(smoothed_loss(logits, labels, 0.3), logits)
    assert ((slopes.mean(0) - expected).abs() < 4.5 * slopes.std(0) / math.sqrt(count)).all()


# streams


@pytest.mark.parametrize("make", [lambda g: LabelNoise(0.4, 5, g), lambda g: TargetNoise(0.5, generator=g)])
@pytest.mark.parametrize("generator", [False, True])
def test_every_call_is_fresh_and_every_run_the_same(make, generator: bool):
    targets = LABELS if isinstance(make(None), LabelNoise) else LABELS.double()

    def run() -> list[torch.Tensor]:
        torch.manual_seed(3)
        noise = make(seeded(7) if generator else None)
        return [noise(targets) for _ in range(30)]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


def test_a_generator_set_back_repeats_and_the_global_one_is_left_alone():
    generator = seeded(7)
    noise = LabelNoise(0.4, 5, generator)
    before = torch.get_rng_state()
    first = noise(LABELS)
    generator.manual_seed(7)
    assert torch.equal(noise(LABELS), first)
    other = LabelNoise(0.4, 5)  # takes one number at construction
    assert not torch.equal(torch.get_rng_state(), before)
    before = torch.get_rng_state()
    other(LABELS)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(LabelNoise(0.4, 5)(LABELS), LabelNoise(0.4, 5)(LABELS))  # two objects, two streams


def test_the_two_draws_of_a_step_of_two_micro_batches_differ():
    torch.manual_seed(0)
    noise = LabelNoise(0.4, 5)
    one, two = (noise.on_batch(0, (torch.zeros(400), LABELS))[1] for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("stop", [1, 7, 40])
def test_a_resumed_run_goes_on_exactly(generator: bool, stop: int):
    # batches of changing size, past the end of what is drawn at a time
    sizes = [32, 32, 17, 400, 1, 32, 5000, 32] * 8

    def make() -> LabelNoise:
        return LabelNoise(0.4, 5, seeded(7) if generator else None)

    def batch(size: int) -> torch.Tensor:
        return torch.arange(size) % 5

    noise = make()
    for size in sizes[:stop]:
        noise(batch(size))
    state = noise.state_dict()
    if not generator:
        state = json.loads(json.dumps(state))
    expected = [noise(batch(size)) for size in sizes[stop:]]
    fresh = make()
    fresh(batch(3))
    fresh.load_state_dict(state)
    assert all(torch.equal(fresh(batch(size)), each) for size, each in zip(sizes[stop:], expected))


def test_the_state_goes_through_a_chain_and_torchs_files(tmp_path):
    hook = chain(LabelNoise(0.4, 5, seeded(7)), TargetNoise(0.5))
    hook.hooks[0](LABELS)
    torch.save(hook.state_dict(), tmp_path / "state.pt")
    expected = hook.hooks[0](LABELS)
    other = chain(LabelNoise(0.4, 5, seeded(8)), TargetNoise(0.5))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.hooks[0](LABELS), expected)
    assert torch.equal(other.hooks[1](LABELS.double()), hook.hooks[1](LABELS.double()))


def test_copies_go_on_as_the_original():
    noise = LabelNoise(0.4, 5)
    noise(LABELS)
    for other in (copy.deepcopy(noise), pickle.loads(pickle.dumps(noise))):
        assert torch.equal(other(LABELS), copy.deepcopy(noise)(LABELS))


@pytest.mark.parametrize("make", [lambda: LabelNoise(0.4, 5), lambda: TargetNoise(0.5)])
def test_a_copy_does_not_carry_what_was_drawn_ahead(make):
    # thousands of views of one block, each pickled with all of it, were 135 MB for a batch of one and 12 GB for a larger block
    noise = make()
    noise(LABELS[:1] if isinstance(noise, LabelNoise) else torch.ones(1))
    assert len(pickle.dumps(noise)) < 2000


def test_batches_of_changing_size_share_no_numbers():
    # blocks of calls of nearly equal sizes must not be cut from one sequence of numbers
    def draw(sizes: list[int]) -> torch.Tensor:
        torch.manual_seed(3)
        noise = TargetNoise(1.0, "gaussian")
        return torch.cat([noise(torch.zeros(size, dtype=torch.float64)) for size in sizes])

    for sizes in ([32, 31, 33, 32, 30], [2700, 2600, 2500], [5000, 4500, 4200]):
        found = draw(sizes)
        assert len(found.unique()) == sum(sizes)
        assert torch.equal(found, draw(sizes))


def test_a_state_that_does_not_belong_here_is_refused():
    plain, given_ = LabelNoise(0.4, 5), LabelNoise(0.4, 5, seeded())
    with pytest.raises(ValueError, match="no state of LabelNoise without a generator: missing"):
        plain.load_state_dict(given_.state_dict())
    with pytest.raises(ValueError, match="no state of LabelNoise with a generator: missing"):
        given_.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="calls must be a whole number >= 0, got -1"):
        plain.load_state_dict({"seed": 3, "calls": -1})
    with pytest.raises(ValueError, match="that of rank 3's generator and this is rank 0, which would draw the same"):
        given_.load_state_dict({**given_.state_dict(), "rank": 3})
    with pytest.raises(ValueError, match="a generator on another device than this one's cpu"):
        given_.load_state_dict({"generator": torch.zeros(16, dtype=torch.uint8), "rank": 0})


# as a hook


def test_batches_of_each_kind():
    inputs = torch.zeros(400)
    noise = LabelNoise(0.4, 5, seeded())
    expected = LabelNoise(0.4, 5, seeded())(LABELS)
    pair = (inputs, LABELS)
    found = noise.on_batch(0, pair)
    assert found[0] is inputs and torch.equal(found[1], expected) and pair[1] is LABELS
    noise.generator = seeded()
    assert torch.equal(noise.on_batch(0, [inputs, LABELS])[1], expected)
    noise.generator = seeded()
    batch = {"pixel_values": inputs, "labels": LABELS}
    found = noise.on_batch(0, batch)
    assert found["pixel_values"] is inputs and torch.equal(found["labels"], expected) and batch["labels"] is LABELS


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(2), "got a Tensor; call the noise on the targets yourself"),
        ((torch.zeros(2), LABELS, LABELS), "got a tuple of 3"),
        ({"x": LABELS}, r"got a mapping with \['x'\]"),
    ],
)
def test_other_batches_are_refused(batch, words: str):
    with pytest.raises(TypeError, match=words):
        LabelNoise(0.4, 5).on_batch(0, batch)


def test_it_trains_through_the_loop():
    """SGD with flips in the project's loop is the same loop on labels that were flipped by hand."""
    x, y = torch.randn(40, 3, generator=seeded(1)), torch.randint(3, (40,), generator=seeded(2))

    def weights(batches, hooks) -> torch.Tensor:
        model = torch.nn.Linear(3, 3)
        torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, iter(batches), functional.cross_entropy, optimizer, stop=10, hooks=hooks)
        return model.weight.detach()

    noise = LabelNoise(0.4, 3, seeded(5))
    by_hand = LabelNoise(0.4, 3, seeded(5))
    found = weights([(x, y)] * 10, [noise])
    assert torch.equal(found, weights([(x, by_hand(y)) for _ in range(10)], []))
    assert not torch.equal(found, weights([(x, y)] * 10, []))


class Worker:
    """A collate function that flips in a worker process, as it should not."""

    def __init__(self) -> None:
        self.noise = LabelNoise(0.4, 5)

    def __call__(self, samples: list) -> torch.Tensor:
        return self.noise(torch.tensor(samples))


@pytest.mark.slow
def test_a_worker_process_is_refused():
    loader = DataLoader(LABELS.tolist(), batch_size=8, collate_fn=Worker(), num_workers=1)
    with pytest.raises(RuntimeError, match="label noise is called in a DataLoader worker, where copies of it"):
        next(iter(loader))
    assert len(next(iter(DataLoader(LABELS.tolist(), batch_size=8, collate_fn=Worker())))) == 8


# regression


@pytest.mark.parametrize("generator", [None, 3])
@pytest.mark.parametrize("kind", method.KINDS)
def test_target_noise_has_its_variance(kind: str, generator: int | None):
    torch.manual_seed(2)
    noise, count = TargetNoise(0.3, kind, None if generator is None else seeded(generator)), 40_000
    targets = torch.linspace(-3, 7, count, dtype=torch.float64)
    drawn = torch.cat([noise(part) - part for part in targets.split(500)])
    assert abs(drawn.mean()) < 4 * 0.3 / math.sqrt(count)
    if kind == "rademacher":
        np.testing.assert_allclose(drawn.abs(), 0.3, rtol=1e-12)
    else:
        assert drawn.square().mean().item() == pytest.approx(0.09, rel=4 * math.sqrt(2 / count))
        assert (drawn**4).mean().item() == pytest.approx(3 * 0.3**4, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", method.KINDS)
def test_target_noise_keeps_shape_and_dtype(kind: str, dtype: torch.dtype):
    targets = torch.ones(3, 4, dtype=dtype)
    noise = TargetNoise(0.5, kind)
    found = noise.on_batch(0, (None, targets))[1]
    assert (found.shape, found.dtype) == (targets.shape, dtype) and bool((targets == 1).all())
    noise.sigma = 0.0
    assert torch.equal(noise(targets), targets)
    noise.sigma, noise.kind = 0.5, "gaussian"  # at once, whatever was drawn ahead
    assert len(noise(targets).unique()) > 2


# bad input


@pytest.mark.parametrize(
    ("flip", "classes", "words"),
    [
        (-0.1, 5, r"flip is the probability of another class and has to be in \[0, 0.8\) for 5 classes, got -0.1"),
        (0.8, 5, "got 0.8; at its end labels say nothing any more"),
        (math.nan, 5, "got nan"),
        ("0.1", 5, "got '0.1'"),
        (0.1, 1, "num_classes must be a whole number >= 2, got 1"),
        (0.1, 2.5, "num_classes must be a whole number >= 2, got 2.5"),
    ],
)
def test_bad_settings(flip, classes, words: str):
    with pytest.raises(ValueError, match=words):
        LabelNoise(flip, classes)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (torch.tensor([0, 5]), r"labels have to be in \[0, 5\), or -100 to be ignored, got 5; count the classes"),
        (torch.tensor([-1, 0]), "got -1"),
        (torch.tensor([-100, 7]), "got 7"),
        (
            torch.tensor([0.0, 1.0]),
            r"shape \(n, 5, ...\), got torch.float32 of shape \(2,\); convert labels with .long",
        ),
        (torch.zeros(2, 4), r"got torch.float32 of shape \(2, 4\)"),
        (torch.zeros(2, 5), "float targets have to be class probabilities: no entry below 0 and a sum of 1"),
        (torch.tensor([[1.5, -0.5, 0, 0, 0]]), "float targets have to be class probabilities"),
        (torch.full((1, 5), math.nan), "float targets have to be class probabilities"),
        (torch.zeros(2, dtype=torch.bool), "labels have to be whole numbers, got torch.bool"),
        (torch.zeros(2, dtype=torch.complex64), "labels have to be whole numbers, got torch.complex64"),
        (torch.zeros(0, dtype=torch.long), r"at least one label, got shape \(0,\); is the batch empty\?"),
        ([0, 1], "at least one label, got list"),
    ],
)
def test_bad_labels(targets, words: str):
    noise = LabelNoise(0.2, 5)
    state = noise.state_dict()
    with pytest.raises(ValueError, match=words):
        noise(targets)
    assert noise.state_dict() == state  # nothing was drawn


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: TargetNoise(-1.0), ValueError, "sigma must be a finite number >= 0, got -1.0"),
        (lambda: TargetNoise(0.1, "cauchy"), ValueError, "unknown kind of noise 'cauchy'"),
        (lambda: TargetNoise(0.1)(LABELS), ValueError, "floating tensor with at least one number, got torch.int64"),
        (lambda: TargetNoise(0.1)(torch.zeros(0)), ValueError, r"got torch.float32 of shape \(0,\)"),
        (lambda: TargetNoise(0.1)([1.0]), ValueError, "got a list of 1; for classes use LabelNoise"),
        (lambda: TargetNoise(0.1, generator=3), TypeError, "generator has to be a torch.Generator, got int"),
        (lambda: LabelNoise(0.1, 2, 3), TypeError, "generator has to be a torch.Generator, got int"),
    ],
)
def test_bad_target_noise(call, error: type, words: str):
    with pytest.raises(error, match=words):
        call()


# another device, without one: "meta" tensors have a device and no numbers


class ElsewhereGenerator(torch.Generator):
    """Says that it is on a GPU."""

    device = torch.device("cuda", 0)


def test_devices_are_compared_by_kind_and_number():
    first, second, current = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda")
    for generator, targets in ((first, first), (first, current), (current, second)):
        method._check_device(generator, targets)
    for generator, targets in ((first, second), (torch.device("cpu"), first)):
        with pytest.raises(ValueError, match=f"the generator is on {generator} and the targets on {targets}; give one"):
            method._check_device(generator, targets)


def test_a_generator_on_another_device_is_refused():
    for noise, targets in (
        (LabelNoise(0.2, 5, ElsewhereGenerator()), LABELS),
        (TargetNoise(0.2, generator=ElsewhereGenerator()), LABELS.float()),
    ):
        with pytest.raises(ValueError, match="the generator is on cuda:0 and the targets on cpu; give one on the same"):
            noise(targets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    labels = LABELS.cuda()
    noise = LabelNoise(0.4, 5, torch.Generator("cuda").manual_seed(0))
    found = noise(labels)
    assert found.device == labels.device and 0.3 < (found != labels).float().mean() < 0.5
    with pytest.raises(ValueError, match="labels have to be in"):
        LabelNoise(0.4, 5)(labels + 3)
    own = LabelNoise(0.4, 5)
    own(labels)
    # later calls do not wait for the device: what is out of range comes back as it is
    assert torch.equal(own(labels + 5), labels + 5)
    state = own.state_dict()
    expected = own(labels)
    own.load_state_dict(state)
    assert torch.equal(own(labels), expected)
