"""The forecast with a Trainer of Lightning and of Hugging Face: real trainings, everything put back, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import decaycast as dc
from decaycast.adapters.finding import FoundWeightDecay, set_largest, shrink_per_decay

TRUSTED = {"higher_is_better": False, "lr": 0.1, "max_cost": 0.3}


def sibling(name: str, package: str) -> Any:
    """Another test file of this folder, for its model and Trainer."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    path = Path(__file__).with_name(name)
    spec = importlib.util.spec_from_file_location(f"_finders_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lit() -> Any:
    return sibling("test_lightning.py", "lightning")


@pytest.fixture(scope="module")
def hf() -> Any:
    return sibling("test_huggingface.py", "transformers")


QUIET = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
pytestmark = QUIET
randomness = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: E731


# the result


def quadratic(decay: float, steps: int) -> Any:
    at = np.arange(1, steps + 1)
    return at, (np.log(decay) - np.log(0.05)) ** 2 * at / 1000 + 1 / at


def test_a_result_has_the_verbs_of_lr_find():
    found = FoundWeightDecay(forecast=dc.forecast(quadratic, 1000, **TRUSTED))
    assert found.suggestion() == found.forecast.weight_decay
    assert found.interval() == found.forecast.interval and found.verdict == found.forecast.verdict
    assert set(found.results) == {arm.weight_decay for arm in found.forecast.arms}
    steps, values = next(iter(found.results.values()))
    assert len(steps) == len(values) > 3
    assert found.to_dict()["weight_decay"] == found.suggestion()


def test_a_refused_forecast_suggests_nothing_and_says_why():
    found = FoundWeightDecay(
        forecast=dc.forecast(lambda decay, steps: (np.arange(1, steps + 1), np.ones(steps)), 1000, **TRUSTED)
    )
    assert found.verdict == "refuse"
    with pytest.warns(UserWarning, match="no weight decay is suggested: weight decay makes no measurable difference"):
        assert found.suggestion() is None


def grouped(kind: Any = torch.optim.SGD, *decays: float, **settings: Any) -> torch.optim.Optimizer:
    return kind(
        [{"params": [torch.nn.Parameter(torch.ones(1))], "weight_decay": decay} for decay in decays], lr=0.1, **settings
    )


def test_the_largest_group_is_set_and_the_others_follow():
    optimizer = grouped(torch.optim.SGD, 0.2, 0.1, 0.0)
    set_largest(optimizer, 3.0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [3.0, 1.5, 0.0]
    with pytest.raises(ValueError, match="no parameter group has a weight decay, so it is not known which should"):
        set_largest(grouped(torch.optim.SGD, 0.0), 0.1)


def test_the_shrink_per_decay_is_that_of_the_fastest_group():
    rates = np.array([[0.1, 0.4, 9.0], [0.2, 0.1, 9.0]])
    found = shrink_per_decay(grouped(torch.optim.SGD, 0.2, 0.1, 0.0, momentum=0.5), rates)
    assert found == pytest.approx(np.array([0.4, 0.4]))
    assert shrink_per_decay(grouped(torch.optim.AdamW, 0.2), None) is None
    with pytest.raises(ValueError, match="Adam couples weight decay into an adaptive step"):
        shrink_per_decay(grouped(torch.optim.Adam, 0.2), rates[:, :1])


# Lightning


def lightning_finder() -> Any:
    return pytest.importorskip("decaycast.adapters.lightning_finder").WeightDecayFinder


@pytest.mark.slow
@pytest.mark.parametrize("attribute", [True, False])
def test_lightning_finds_and_touches_nothing_else(lit: Any, tmp_path: Path, attribute: bool):
    class Plain(lit.Module):
        def __init__(self) -> None:
            super().__init__()
            if not attribute:
                del self.weight_decay

        def configure_optimizers(self) -> Any:
            return lit.make_optimizer(self.net, getattr(self, "weight_decay", 0.1))

    module = Plain()
    weights = copy.deepcopy(module.state_dict())
    shuffled = DataLoader(
        TensorDataset(lit.INPUTS, lit.LABELS), 16, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    trainer, callback = lit.trainer(tmp_path, lit.adapter.WeightDecayCallback("linear"), steps=100), None
    callback, before = trainer.callbacks[0], (randomness(), shuffled.generator.get_state())
    finder = lightning_finder()(trainer)
    find = lambda: finder.find(module, shuffled, lit.loader(32))  # noqa: E731
    if attribute:
        found = find()
        assert module.weight_decay == found.forecast.weight_decay
    else:
        with pytest.warns(UserWarning, match="the model has no attribute 'weight_decay' to update; give the optimizer"):
            found = find()
    assert found.verdict != "refuse" and found.forecast.cost <= 0.3 and len(found.results) >= 3
    assert found.forecast.rate_per_decay == pytest.approx(100 * 0.05 / (1 - 0.5))
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert trainer.global_step == 0 and callback in trainer.callbacks and callback.held is None
    assert before[0] == randomness() and torch.equal(before[1], shuffled.generator.get_state())
    assert module.seen == [] and "training_step" not in vars(module)
    again = lightning_finder()(trainer).find(Plain(), shuffled, lit.loader(32), update_attr=False)
    assert again.results == found.results


@pytest.mark.slow
def test_an_arm_of_lightning_trains_what_the_whole_fit_would(lit: Any, tmp_path: Path):
    """With data in one batch per epoch, taking an arm up again changes nothing: the curve is that of one fit."""

    made = []

    class OneBatch(lit.Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            made.append(batch_idx)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = lit.make_optimizer(self.net, self.weight_decay)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    data = DataLoader(TensorDataset(lit.INPUTS, lit.LABELS), batch_size=96)
    found = lightning_finder()(lit.trainer(tmp_path, steps=60)).find(OneBatch(), data, data, update_attr=False)
    decay, (steps, values) = max(found.results.items(), key=lambda item: item[1][0][-1])

    class Losses(lit.pl.Callback):
        def __init__(self) -> None:
            self.curve: dict[float, float] = {}

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.curve[float(trainer.global_step)] = float(trainer.callback_metrics["val_loss"])

    losses = Losses()
    lit.trainer(tmp_path, losses, steps=60, num_sanity_val_steps=0).fit(OneBatch(weight_decay=decay), data, data)
    assert steps == (1, 2, 3, 4, 5, 6)  # three arms for 4 updates each, then on to 6
    assert len(made) - 60 == sum(at[-1] for at, _ in found.results.values()) == 18  # beside the whole fit's 60
    assert list(values) == [losses.curve[step] for step in steps]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"monitor": "val_acc"}, r"validation logs no 'val_acc' \(but .*val_loss.*\); name another monitor, or log it"),
        (
            {"attr_name": "seed_of_it"},
            "configure_optimizers does not pass seed_of_it on: with seed_of_it=1e-06 the optimizer's",
        ),
        ({"mode": "least"}, "unknown mode 'least'"),
    ],
)
def test_what_lightning_cannot_find_from_is_refused(lit: Any, tmp_path: Path, change: Any, message: str):
    module = lit.Module()
    module.seed_of_it = 3
    with pytest.raises(ValueError, match=message):
        lightning_finder()(lit.trainer(tmp_path, steps=40)).find(module, lit.loader(), lit.loader(), **change)


def test_lightning_modules_that_do_not_fit_are_refused(lit: Any, tmp_path: Path):
    for kind, message in (
        (lit.Manual, "WeightDecayFinder needs automatic optimization"),
        (lit.Adam, "does not pass weight_decay on"),
    ):
        with pytest.raises(ValueError, match=message):
            lightning_finder()(lit.trainer(tmp_path, steps=40)).find(kind(), lit.loader(), lit.loader())
    module = lit.Adam()
    del module.weight_decay
    with pytest.raises(ValueError, match="Adam couples weight decay into an adaptive step"):
        lightning_finder()(lit.trainer(tmp_path, steps=40)).find(module, lit.loader(), lit.loader())


def test_trainers_that_do_not_fit_are_refused(lit: Any, tmp_path: Path):
    with pytest.raises(ValueError, match="a Trainer with fast_dev_run makes too few updates to forecast from"):
        lightning_finder()(lit.trainer(tmp_path, fast_dev_run=True))

    class Many:
        world_size = 8

    with pytest.raises(ValueError, match="WeightDecayFinder needs a Trainer of one process, got 8; use devices=1"):
        lightning_finder()(Many())


# Hugging Face


def huggingface_find() -> Any:
    return pytest.importorskip("decaycast.adapters.huggingface_finder").find_weight_decay


@pytest.mark.slow
def test_huggingface_finds_and_puts_everything_back(hf: Any, tmp_path: Path):
    settings = {"max_steps": 100, "lr_scheduler_type": "cosine", "optim": "adamw_torch", "learning_rate": 0.003}
    made = hf.trainer(tmp_path, hf.adapter.WeightDecayCallback("linear"), **settings)
    weights = copy.deepcopy(made.model.state_dict())
    kept = [
        getattr(made, name)
        for name in ("args", "state", "control", "callback_handler", "model", "optimizer", "lr_scheduler")
    ]
    before = randomness()
    found = huggingface_find()(made)
    names = ("args", "state", "control", "callback_handler", "model", "optimizer", "lr_scheduler")
    assert all(getattr(made, name) is value for name, value in zip(names, kept, strict=True))
    assert found.verdict != "refuse"
    assert made.args.weight_decay == found.forecast.weight_decay and made.args.output_dir == str(tmp_path)
    assert found.forecast.cost <= 0.3 and len(found.results) >= 3
    rates = [0.003 * (1 + np.cos(np.pi * step / 100)) / 2 for step in range(100)]
    assert found.forecast.rate_per_decay == pytest.approx(sum(rates))
    assert all(torch.equal(value, weights[name]) for name, value in made.model.state_dict().items())
    assert before == randomness() and not list(tmp_path.glob("checkpoint*"))
    assert {decay for _, decay in made.decays} == {0.0}

    # the arm that came farthest, paused and taken up again, against one uninterrupted training
    decay, (steps, values) = max(found.results.items(), key=lambda item: item[1][0][-1])
    losses: dict[float, float] = {}

    class Losses(hf.transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_evaluate = state.global_step in steps

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            losses[float(state.global_step)] = metrics["eval_loss"]

    hf.trainer(tmp_path, Losses(), weight_decay=decay, **settings).train()
    assert len(steps) >= 5 and list(values) == [losses[step] for step in steps]


def test_huggingface_trainers_that_do_not_fit_are_refused(hf: Any, tmp_path: Path):
    find = huggingface_find()
    made = hf.trainer(tmp_path)
    with pytest.raises(
        ValueError, match=r"evaluation gives no 'eval_accuracy', but eval_loss.*; name one of these as metric"
    ):
        find(hf.trainer(tmp_path, max_steps=40), metric="eval_accuracy")
    made.create_optimizer()
    with pytest.raises(ValueError, match="this Trainer has its optimizer already, handed in or from a training before"):
        find(made)
    made = hf.trainer(tmp_path)
    made.eval_dataset = None
    with pytest.raises(ValueError, match="the Trainer has no eval_dataset to compare the arms on"):
        find(made)
    with pytest.raises(TypeError, match="expected a transformers.Trainer, got Linear"):
        find(torch.nn.Linear(1, 1))
    adam = hf.trainer(tmp_path, optim="adagrad")
    with pytest.raises(ValueError, match="couples weight decay into an adaptive step"):
        find(adam)
    assert adam.optimizer is None and adam.args.weight_decay == hf.DECAY
    endless = hf.trainer(tmp_path, max_steps=-1)
    endless.train_dataset = (row for row in ())
    endless.get_train_dataloader = lambda: endless.train_dataset
    with pytest.raises(ValueError, match="the training data have no length, so the Trainer needs max_steps"):
        find(endless)


def test_epochs_are_counted_as_the_trainer_counts_them(hf: Any, tmp_path: Path):
    steps = pytest.importorskip("decaycast.adapters.huggingface_arm").trainer_steps
    made = hf.trainer(tmp_path, max_steps=-1, num_train_epochs=1.5, size=10, gradient_accumulation_steps=3)
    expected = steps(made)
    made.train()
    assert expected == made.state.max_steps == made.state.global_step
