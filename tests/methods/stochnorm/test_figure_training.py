"""One fine-tuning of the figures: network, images, pre-training and recipe, each by a second route."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from tests.methods.stochnorm.figure_plans import CONFIG, PLAN, images, part, run_of

from decaycast.core.measure import COLUMNS
from decaycast.methods.stochnorm.figures import pretraining, recipe
from decaycast.methods.stochnorm.figures.fine_tuning import FineTuning
from decaycast.methods.stochnorm.figures.images import (
    augmented,
    generator_for,
    of_classes,
    share_of_each_class,
    shuffled,
)
from decaycast.methods.stochnorm.figures.network import ResNet, new_head, resnet
from decaycast.methods.stochnorm.figures.runs import SCRATCH
from decaycast.methods.stochnorm.method import StochNorm2d

ARMS = list(PLAN.arms)
DATA = images()
CPU = torch.device("cpu")


def norms(model: torch.nn.Module) -> list[torch.nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]


# the network


def test_the_network_is_the_one_written_out():
    model = resnet("resnet-8-4", 3, 5, generator_for("w", 0)).double()
    for i, norm in enumerate(norms(model)):
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0, generator=generator_for("r", i))
        torch.nn.init.normal_(norm.bias, generator=generator_for("b", i))
    state, x = model.state_dict(), torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator_for("x", 0))

    def normed(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.0.weight"]
        x = functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        own = [state[f"{name}.1.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")]
        return own[2] * (x - own[0]) / (own[1] + 1e-5).sqrt() + own[3]

    hidden = normed("stem", x).relu()
    for i, stride in enumerate((1, 2, 2)):
        inner = normed(f"stages.{i}.second", normed(f"stages.{i}.first", hidden, stride).relu())
        skip = hidden if i == 0 else normed(f"stages.{i}.shortcut", hidden, stride)
        hidden = (inner + skip).relu()
    scores = hidden.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    assert torch.allclose(model.eval()(x), scores, rtol=1e-12)
    assert hidden.shape == (2, 16, 2, 2) and len(norms(model)) == 9


def test_weights_come_from_the_generator_alone():
    first, again, other = (resnet("resnet-14-16", 3, 5, generator_for("w", seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first.fc.weight, other.fc.weight) and len(norms(first)) == 15
    for module in first.modules():
        if isinstance(module, torch.nn.Conv2d):
            size, scale = module.weight.numel(), math.sqrt(2 / module.weight[0].numel())
            assert abs(float(module.weight.detach().std()) / scale - 1) < 5 / math.sqrt(2 * size)
    assert float(first.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.25) and not first.fc.bias.any()


@pytest.mark.parametrize(("depth", "width"), [(9, 8), (2, 8), (8, 0)])
def test_no_such_network(depth: int, width: int):
    with pytest.raises(ValueError, match=r"depth 6n \+ 2 .* got"):
        ResNet(3, 5, depth=depth, width=width)


def test_no_such_name():
    with pytest.raises(ValueError, match="unknown network 'resnet-8'; names are resnet-DEPTH-WIDTH"):
        resnet("resnet-8", 3, 5, generator_for("w", 0))


def test_a_new_head_forgets_the_old_one():
    head = torch.nn.Linear(400, 5)
    new_head(head, generator_for("h", 1))
    assert not head.bias.any() and float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.1)


# the images


def test_streams_of_seeds_and_purposes_are_their_own():
    drawn = {torch.rand(1, generator=generator_for(what, seed)).item() for what in ("a", "b") for seed in range(5)}
    assert len(drawn) == 10
    assert generator_for("a", 3).initial_seed() == generator_for("a", 3).initial_seed()


def test_classes_are_taken_out_and_numbered_from_zero():
    x, y = part(3, 5)
    chosen, labels = of_classes((x, y), 2, 4)
    assert torch.equal(labels, y[(y == 2) | (y == 3)] - 2)
    assert torch.equal(chosen, torch.stack([image for image, label in zip(x, y) if label in (2, 3)]))


def test_a_class_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no image of the classes \[5, 6\]; raise train_size"):
        of_classes(part(3, 5), 3, 7)


def test_a_share_has_as_many_of_each_class_and_holds_the_smaller_ones():
    whole = of_classes(DATA.train, 2, 5)
    drawn = [share_of_each_class(whole, 30, f, generator_for("s", 7)) for f in (0.15, 0.4, 1.0)]
    assert [torch.bincount(labels).tolist() for _, labels in drawn] == [[2, 2, 2], [4, 4, 4], [10, 10, 10]]
    known = [{image.sum().item(): int(label) for image, label in zip(*each)} for each in drawn]
    assert known[0].items() <= known[1].items() <= known[2].items()
    assert known[2].items() <= {image.sum().item(): int(label) for image, label in zip(*whole)}.items()
    other = share_of_each_class(whole, 30, 1.0, generator_for("s", 8))
    assert {image.sum().item() for image in other[0]} != set(known[2])


def test_without_a_size_every_class_gives_its_share_and_one_at_least():
    x, y = torch.zeros(17, 1, 2, 2), torch.tensor([0] * 10 + [1] * 6 + [2])
    assert torch.bincount(share_of_each_class((x, y), None, 0.5, generator_for("s", 0))[1]).tolist() == [5, 3, 1]
    assert torch.bincount(share_of_each_class((x, y), None, 0.01, generator_for("s", 0))[1]).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("size", "fraction", "words"),
    [
        (30, 0.0, r"lies in \(0, 1\], got 0.0"),
        (30, 1.1, "got 1.1"),
        (500, 1.0, "class 0 has 20 images, but 100 were asked for; lower target_size"),
        (3, 1.0, "but 0 were asked for"),
    ],
)
def test_shares_that_cannot_be(size: int, fraction: float, words: str):
    with pytest.raises(ValueError, match=words):
        share_of_each_class(DATA.train, size, fraction, generator_for("s", 0))


def test_batches_go_through_all_images_in_every_epoch():
    x = torch.arange(10.0).reshape(10, 1, 1, 1)
    stream = shuffled((x, torch.arange(10)), 4, generator_for("o", 0), flip=False, shift=0)
    batches = [next(stream) for _ in range(10)]
    assert all(len(labels) == 4 and torch.equal(images.flatten(), labels.float()) for images, labels in batches)
    seen = torch.cat([labels for _, labels in batches]).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in seen.tolist())
    assert len({tuple(epoch) for epoch in seen.tolist()}) == 4
    larger = next(shuffled((x[:3], torch.arange(3)), 8, generator_for("o", 0), flip=False, shift=0))
    assert len(larger[1]) == 8 and torch.bincount(larger[1]).min() >= 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("flip", "shift"), [(False, 0), (True, 0), (False, 2), (True, 2)])
def test_augmentation_is_a_mirror_and_a_crop(channels: int, flip: bool, shift: int):
    x = torch.randn(40, channels, 6, 5, generator=generator_for("x", 0))
    before = x.clone()
    found = augmented(x, generator_for("a", 0), flip=flip, shift=shift)
    assert torch.equal(x, before)
    kinds = set()
    for image, new in zip(x.numpy(), found.numpy()):
        wide = np.pad(image, ((0, 0), (shift, shift), (shift, shift)), mode="reflect")
        views = {
            (mirror, i, j): crop[:, :, ::-1] if mirror else crop
            for mirror in (False, True)
            for i in range(2 * shift + 1)
            for j in range(2 * shift + 1)
            if (crop := wide[:, i : i + 6, j : j + 5]) is not None
        }
        kinds.add(next(name for name, view in views.items() if np.array_equal(view, new)))
    assert {kind[0] for kind in kinds} == ({False, True} if flip else {False})
    assert {kind[1] for kind in kinds} == {kind[2] for kind in kinds} == set(range(2 * shift + 1))


def test_one_channel_keeps_the_usual_layout():
    # with one channel a transposed layout also counts as contiguous, and convolutions would follow it
    x = torch.zeros(4, 1, 6, 6)
    assert augmented(x, generator_for("a", 0), flip=True, shift=1).stride() == x.stride()


# pre-training


def test_pre_training_gives_the_same_weights_whatever_the_threads():
    model = pretraining.pretrained(pretraining._task(CONFIG, DATA.train))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        pretraining.pretrained.cache_clear()
        again = pretraining.pretrained(pretraining._task(CONFIG, DATA.train))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert model is not again and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert norms(model)[0].num_batches_tracked == 4 and model.fc.out_features == 2


def test_pre_training_happens_once_and_stays_as_it_is():
    task = pretraining._task(CONFIG, DATA.train)
    model = pretraining.pretrained(task)
    before = [value.clone() for value in model.state_dict().values()]
    for arm in ARMS:
        recipe.train_arm(None, run_of(arm), DATA)
    assert pretraining.pretrained(task) is model
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))


def test_pre_training_learns():
    task = pretraining._task({**CONFIG, "pretrain_steps": 40}, DATA.train)
    x, y = of_classes(DATA.test, 0, 2)
    assert (pretraining.pretrained(task)(x).argmax(1) == y).float().mean() > 0.9


# the recipe


class Watched:
    """What `core.train` was given, and what the model was before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.train = recipe.train
        monkeypatch.setattr(recipe, "train", self)

    def __call__(self, model: Any, batches: Any, loss: Any, optimizer: Any, **rest: Any) -> list[dict[str, float]]:
        self.model, self.optimizer = model, optimizer
        self.before = {name: value.clone() for name, value in model.state_dict().items()}
        self.batches = []

        def kept() -> Any:
            for batch in batches:
                self.batches.append(batch)
                yield batch

        return self.train(model, kept(), loss, optimizer, **rest)


def test_arms_of_one_seed_share_images_head_order_and_backbone(monkeypatch: pytest.MonkeyPatch):
    watched, seen = Watched(monkeypatch), {}
    for arm in ARMS:
        for seed in (0, 1):
            recipe.train_arm(None, run_of(arm, seed=seed), DATA)
            seen[arm, seed] = watched.batches, watched.before
    pretrained = pretraining.pretrained(pretraining._task(CONFIG, DATA.train)).state_dict()
    for (arm, seed), (batches, before) in seen.items():
        first, start = seen["plain", seed]
        assert len(batches) == 6
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches, first))
        assert torch.equal(before["fc.weight"], start["fc.weight"]) and before["fc.weight"].shape == (3, 32)
        same = all(torch.equal(before[name], value) for name, value in pretrained.items() if "fc." not in name)
        assert same == (arm != SCRATCH)
    first, other = seen["plain", 0], seen["plain", 1]
    assert not torch.equal(first[1]["fc.weight"], other[1]["fc.weight"])
    assert not torch.equal(first[0][0][0], other[0][0][0])


def test_every_arm_changes_what_it_should(monkeypatch: pytest.MonkeyPatch):
    watched, moved = Watched(monkeypatch), {}
    for arm in ARMS:
        recipe.train_arm(None, run_of(arm), DATA)
        after = watched.model.state_dict()
        moved[arm] = {name for name, value in after.items() if not torch.equal(value, watched.before[name])}
        kinds = {type(norm) for norm in norms(watched.model)}
        own = {norm.p for norm in norms(watched.model) if isinstance(norm, StochNorm2d)}
        assert kinds == ({StochNorm2d} if arm.startswith("p = ") else {torch.nn.BatchNorm2d})
        assert own == ({float(arm[4:])} if arm.startswith("p = ") else set())
    assert moved["plain"] == moved["l2-sp"] == moved["p = 0"] == set(watched.before)
    layers = [name for name, module in watched.model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {name for name in watched.before if name.rpartition(".")[0] not in layers} == moved["frozen"]


def test_stochastic_norm_with_p_of_one_is_plain_fine_tuning_to_the_bit():
    plain = recipe.train_arm(None, run_of("plain"), DATA)
    same = recipe.train_arm(None, run_of("p = 0.5", p=1.0), DATA)
    assert plain.final == same.final and plain.curve["train_loss"] == same.curve["train_loss"]
    half = [recipe.train_arm(None, run_of("p = 0.5"), DATA) for _ in range(2)]
    assert half[0].final == half[1].final  # masks come from the run's seed
    assert half[0].final["loss"] != plain.final["loss"]


def test_an_anchor_holds_the_weights_back(monkeypatch: pytest.MonkeyPatch):
    watched, distance = Watched(monkeypatch), {}
    for anchor in (1e-4, 1.0, 5.0):
        recipe.train_arm(None, run_of("l2-sp", anchor=anchor, steps=20), DATA)
        distance[anchor] = float((watched.model.stem[0].weight.detach() - watched.before["stem.0.weight"]).norm())
    assert distance[5.0] < distance[1.0] < 0.9 * distance[1e-4]


def test_the_optimiser_is_the_papers():
    model = resnet("resnet-8-8", 3, 5, generator_for("w", 0))
    for arm, head_lr, decay in (("plain", 0.1, 5e-4), ("l2-sp", 0.1, 0.3), ("scratch", 0.02, 5e-4)):
        lr = 0.02 if arm == "scratch" else 0.01
        config = {"arm": arm, "anchor": 0.3, "lr": lr, "weight_decay": 5e-4}
        rest, head = recipe.make_optimizer(model, config).param_groups
        assert (rest["lr"], rest["weight_decay"]) == (lr, decay)
        assert (head["lr"], head["weight_decay"]) == (pytest.approx(head_lr), 5e-4)
        assert rest["momentum"] == head["momentum"] == 0.9 and rest["nesterov"] and head["nesterov"]
        assert list(map(id, head["params"])) == [id(model.fc.weight), id(model.fc.bias)]
        assert len(rest["params"]) + 2 == len(list(model.parameters()))


def test_the_row_tells_what_was_measured(monkeypatch: pytest.MonkeyPatch):
    watched = Watched(monkeypatch)
    run = run_of("plain", steps=12, points=4)
    row = FineTuning().train(run, DATA)
    assert row.run == run and tuple(row.curve) == COLUMNS and list(row.curve["step"]) == [3, 6, 9, 12]
    assert row.curve["lr"] == pytest.approx([0.01, 0.01, 0.001, 0.001])  # the drop is at 12*6000/9050 = 7.96
    x, y = DATA.test
    watched.model.eval()
    scores = watched.model(x[y >= 2]).detach()
    assert row.final["accuracy"] == pytest.approx(float((scores.argmax(1) == y[y >= 2] - 2).float().mean()))
    assert row.final["loss"] == pytest.approx(float(functional.cross_entropy(scores, y[y >= 2] - 2)), rel=1e-5)
    assert row.final["images"] == 12 and {"gap_mean", "gap_variance"} < set(row.final)
    assert set(recipe.train_arm(None, run_of(SCRATCH), DATA).final) == {"accuracy", "loss", "images"}


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="trains on a GPU, which torch does not find here; take --size small"):
        recipe.train_arm(None, run_of("plain", device="cuda"), DATA)


def test_the_gap_is_that_of_the_definition():
    generator = generator_for("g", 0)
    first, second = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(2)
    model = torch.nn.Sequential(first, torch.nn.Conv2d(3, 2, 1), second).double()
    first.running_mean.copy_(torch.tensor([0.5, -1.0, 0.0]))
    first.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    x = torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) * 3 + 1
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    second.eval()
    found = recipe.statistics_gap(model, [x])
    assert model.training and first.training and not second.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    inputs = [x.numpy()]
    mean, var = (np.array(value)[:, None, None] for value in ([0.5, -1.0, 0.0], [4.0, 1.0, 0.25]))
    normed = (inputs[0] - mean) / np.sqrt(var + 1e-5)
    weight = model[1].weight.detach().numpy()[:, :, 0, 0]
    inputs.append(np.einsum("oc,nchw->nohw", weight, normed) + model[1].bias.detach().numpy()[:, None, None])
    shifts, ratios = [], []
    for value, m, r in zip(inputs, ([0.5, -1.0, 0.0], [0.0] * 2), ([4.0, 1.0, 0.25], [1.0] * 2)):
        shifts += list(np.abs(value.mean((0, 2, 3)) - m) / np.sqrt(np.array(r) + 1e-5))
        ratios += list(value.var((0, 2, 3)) / (np.array(r) + 1e-5))
    assert found == pytest.approx({"gap_mean": np.mean(shifts), "gap_variance": np.mean(ratios)}, rel=1e-12)


def test_there_is_no_gap_to_statistics_of_the_same_batch():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3, momentum=1.0)).double()
    x = torch.randn(50, 3, 8, 8, dtype=torch.float64, generator=generator_for("g", 1)) * 2 + 3
    model(x)  # takes the batch's statistics as they are
    found = recipe.statistics_gap(model, [x, x])
    assert found["gap_mean"] == pytest.approx(0, abs=1e-12)
    assert found["gap_variance"] == pytest.approx(1, abs=1e-3)  # biased over unbiased, and eps


def test_the_device_of_masks_follows_the_run():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(400))
    recipe.arrange(model, {"arm": "stochnorm", "p": 0.25}, 5, CPU)
    drawn = [model[0]._drawn(torch.zeros(2, 400, 1, 1)).float().mean() for _ in range(20)]
    assert float(torch.stack(drawn).mean()) == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 8000))
