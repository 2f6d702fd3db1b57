"""A comparison as a whole: arms that fit, resuming, samples and models of one's own, failures, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.lab.comparison.compared_models import (
    INSTANCE,
    MODULE,
    Odd,
    Scaled,
    Unanswered,
    Uncopied,
    blobs,
    drawn_elsewhere,
    normed,
    plain,
    tiny,
)
from torch import nn

from decaycast.core.experiment import Row
from decaycast.lab.comparison.arms import misfit, settings_of
from decaycast.lab.comparison.task import task
from decaycast.lab.data import DataError, Split
from decaycast.lab.execute import processes
from decaycast.lab.store import Store


def test_all_arms_that_fit_are_compared_and_the_others_named():
    comparison = tiny(None)
    assert [arm.name for arm in comparison.arms] == [
        "none", "weight-decay", "autol2", "label-noise", "activation-noise", "self-distillation", "label-smoothing", "sam",
    ]  # fmt: skip
    assert comparison.left_out == {"stochnorm": "the model has no batch norm that StochNorm could replace"}
    assert all(arm.mean("gradients") == 20 and len(arm.finals) == 2 for arm in comparison.arms)
    assert "stochnorm" in [arm.name for arm in tiny(None, normed).arms]
    odd = tiny(None, Odd)
    assert set(odd.left_out) == {"stochnorm", "activation-noise"}


def test_the_same_store_trains_only_what_is_missing(tmp_path: Path):
    new: list[Row] = []
    first = tiny(store=tmp_path / "rows.sqlite", on_row=new.append)
    assert len(new) == 4
    planned: list[int] = []
    again = tiny(store=tmp_path / "rows.sqlite", on_row=new.append, on_plan=lambda runs: planned.append(len(runs)))
    assert len(new) == 4 and planned == [0] and again.to_dict() == first.to_dict()
    with Store(tmp_path / "rows.sqlite") as store:
        more = tiny(["label-smoothing", "sam"], seeds=3, store=store, on_row=new.append)
        assert len(new) == 4 + 2 + 3 and more.seeds == 3
        tiny(store=store, on_row=new.append, data=blobs(seed=1))
        assert len(new) == 9 + 4, "other samples are other runs"
        tiny(store=store, on_row=new.append, model=lambda: nn.Sequential(nn.Linear(6, 3), nn.Flatten()))
        tiny(store=store, on_row=new.append, model=lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh()))
        assert len(new) == 13 + 8, "another model is another run, also where both are called lambda"


def test_what_distinguishes_models_of_one_name():
    split, names = task(plain, blobs()).split(), set()
    for model in (plain, normed, Odd, f"{MODULE}:plain"):
        work = task(model, blobs())
        names.add(work.described(split))
        assert work.described(split) == work.described(split)
    assert len(names) == 3, "a function and its name are the same"


def test_settings_and_code_that_layers_do_not_show_are_part_of_the_model():
    """A number that only the forward reads, and a method that it calls: both change the result, not layers or weights."""
    split = task(plain, blobs()).split()
    described = [task(make, blobs()).described(split) for make in (lambda: Scaled(1.0), lambda: Scaled(2.0))]
    assert described[0] != described[1]

    class Other(Scaled):
        def score(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(super().score(x))

    Other.__name__ = "Scaled"  # as it would be after an edit of the file
    assert task(lambda: Other(1.0), blobs()).described(split) != described[0]
    typed: dict[str, Any] = {"Scaled": Scaled, "torch": torch}
    for sign in ("", "-"):
        exec(f"class Typed(Scaled):\n    def score(self, x):\n        return {sign}self.linear(x)", typed)
        described.append(task(lambda: typed["Typed"](1.0), blobs()).described(split))
    assert len(set(described)) == 4, "also where there is no file to read the source from"


def test_a_model_is_known_again_whatever_the_seeds(tmp_path: Path):
    new: list[Row] = []
    tiny(seeds=[0, 1], store=tmp_path / "rows.sqlite", on_row=new.append)
    tiny(seeds=[1, 2, 0], store=tmp_path / "rows.sqlite", on_row=new.append)
    assert [row.run.seed for row in new] == [0, 0, 1, 1, 2, 2]


def test_classes_without_a_sample_are_part_of_the_samples():
    parts = {name: getattr(task(plain, blobs()).split(), name) for name in ("train", "validation", "test")}
    names = {task("mlp-8x1", Split(name="mine", classes=classes, **parts)).data for classes in (3, 4)}
    assert len(names) == 2, "a network with four outputs is another one"


def test_what_models_share_is_left_as_it_was():
    """Layers trained before, and an activation that all models have in common: no arm may find another one's changes."""
    backbone, activation = nn.Linear(6, 12), nn.ReLU()

    def tuned() -> nn.Module:
        return nn.Sequential(backbone, activation, nn.Linear(12, 3))

    before = backbone.weight.detach().clone()
    arms = ["activation-noise", "label-smoothing", "sam"]
    together = tiny(arms, tuned, batch_size=8, lr=0.1)
    assert torch.equal(backbone.weight, before) and not list(activation.children())
    alone = tiny(["sam"], tuned, batch_size=8, lr=0.1)
    assert together.arms[-1].finals[0]["test_loss"] == alone.arms[-1].finals[0]["test_loss"]
    assert tiny(model=lambda: INSTANCE).outcome == "no difference", "and a whole network that was trained before"


@pytest.mark.slow
def test_worker_processes_train_the_same():
    arms = ["label-noise", "self-distillation", "sam"]
    here = tiny(arms, f"{MODULE}:normed")
    there = tiny(arms, f"{MODULE}:normed", execute=processes(2))
    for one, other in zip(here.rows, there.rows):
        curves = [repr(dict(row.curve)) for row in (one, other)]  # to the bit; NaN is not equal to itself
        assert one.run == other.run and curves[0] == curves[1], one.run.config["arm"]


def test_a_divergence_is_a_failed_row_and_said():
    comparison = tiny(["weight-decay"], lr=1e9, momentum=0.0)
    assert {row.status for row in comparison.rows} == {"failed"}
    assert (
        comparison.outcome == "no verdict" and "seeds of the baseline 'no regulariser' finished" in comparison.verdict
    )
    assert any("DivergedError: the training loss is nan at step" in note for note in comparison.notes())


def test_a_network_that_ends_in_nan_is_a_failed_row():
    class Spoilt(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) / (1.0 if self.training or len(input) < 3 else 0.0)

    comparison = tiny(model=lambda: nn.Sequential(Spoilt(6, 3)))
    assert {row.reason for row in comparison.rows} == {"the trained network's test loss is not finite"}


def test_a_split_of_ones_own_and_settings_of_ones_own():
    x, y = (torch.from_numpy(each) for each in blobs(90))
    split = Split(
        name="mine", train=(x[:40], y[:40]), validation=(x[40:60], y[40:60]), test=(x[60:], y[60:]), classes=3
    )
    comparison = tiny({"sam": {"rho": 0.2}, "label-noise": {}}, data=split, baseline="label-smoothing")
    assert [arm.title for arm in comparison.arms] == [
        "label smoothing 0.1 (yardstick)",
        "SAM, radius 0.2 (yardstick)",
        "label noise, flip 0.2",
    ]
    work = task(plain, split)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(work.split(), part)[0], getattr(split, part)[0])
    assert tiny("sam", data=split).arms[1].name == "sam", "one name is one arm"


def test_samples_are_split_once_and_standardised_by_the_training_part():
    x, y = blobs(100)
    parts = [getattr(task(plain, (x, y)).split(), part) for part in ("train", "validation", "test")]
    assert [len(part[1]) for part in parts] == [60, 20, 20]
    assert sorted(np.concatenate([part[0][:, 0].numpy() for part in parts])) == sorted(x[:, 0])
    work = task(plain, (3 * x + 2, y), standardise=True, train_size=50).split()
    assert work.train[0].shape == (50, 6)
    torch.testing.assert_close(work.train[0].mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(work.train[0].std(0, correction=0), torch.ones(6), rtol=1e-5, atol=0)
    torch.testing.assert_close(work.test[0], task(plain, (x, y), standardise=True, train_size=50).split().test[0])
    tokens = task(plain, (np.ones((20, 4), dtype=int), np.arange(20) % 2), standardise=True).split()
    assert tokens.train[0].dtype == torch.int64


def test_text_has_several_labels_in_a_sample():
    labels = torch.zeros(4, 7, dtype=torch.int64)
    settings = settings_of("self-distillation", {}, optimizer="sgd", schedule="cosine")
    assert misfit("self-distillation", settings, plain(), labels, 3).startswith("every sample has several labels")
    assert misfit("self-distillation", settings, plain(), labels[:, 0], 3) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 1}, "one training tells nothing about a difference: give at least 2 seeds, better 5, got 1"),
        ({"seeds": [3, 3]}, "give at least 2 seeds, better 5, got 1"),
        ({"seeds": [1, -1]}, "seed must be a whole number >= 0, got -1"),
        ({"arms": ["label-noize"]}, "unknown arm 'label-noize'; did you mean 'label-noise'\\? known: none, weight-decay"),
        ({"arms": ["none"]}, "there is nothing to compare 'none' with; name at least one other arm of none, weight-decay"),
        ({"baseline": "nothing"}, "unknown arm 'nothing'"),
        ({"arms": {"sam": {"rhoo": 1}}}, "unknown setting of arm 'sam' 'rhoo'; did you mean 'rho'"),
        ({"arms": {"sam": {"rho": 0}}}, "rho of arm 'sam' must be a number > 0, got 0"),
        ({"arms": {"sam": {"rho": True}}}, "rho of arm 'sam' must be a number > 0, got True"),
        ({"arms": {"autol2": {"clock": "hours"}}}, "unknown clock of AutoL2 'hours'"),
        ({"budget_steps": 19}, "the budget must be a whole number of at least 20 optimiser steps, got 19: teacher and student"),
        ({"budget_steps": 100.0}, "the budget must be a whole number of at least 20 optimiser steps, got 100.0"),
        ({"arms": ["stochnorm"]}, "arm 'stochnorm' does not fit: the model has no batch norm that StochNorm could replace; l"),
        ({"arms": ["activation-noise"], "model": Odd}, "arm 'activation-noise' does not fit: the model has no activation"),
        ({"arms": {"label-noise": {"flip": 0.8}}}, "with 3 classes flips have to be rarer than 0.667, where labels say nothing"),
        ({"metric": "f1"}, "unknown metric 'f1'; known: accuracy, loss"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"lr": 0.0}, "lr must be a finite number > 0, got 0.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"data": "digitz"}, "unknown data set 'digitz'; did you mean 'digits'"),
        ({"model": "mlpp"}, "unknown model 'mlpp'"),
        ({"model": "no.such:thing"}, "cannot find the model 'no.such:thing' .*name a function that makes it as package"),
        ({"model": f"{MODULE}:plane"}, "cannot find the model .*has no attribute 'plane'"),
        ({"model": f"{MODULE}:INSTANCE"}, "INSTANCE' is a Sequential; name a function that makes a new model"),
        ({"model": lambda: nn.Linear(6, 2)}, "the model has 2 outputs for 3 classes; give it one per class"),
        ({"model": lambda: nn.Linear(5, 3)}, r"the model does not take these samples, of shape \(6,\) and torch.float32"),
        ({"model": lambda: nn.Sequential(nn.Linear(6, 3), nn.Flatten(0))}, r"must return scores of shape \(2, 3\) for 2 samp"),
        ({"model": drawn_elsewhere}, "drawn_elsewhere makes other weights at each call with the same seed, so that arms"),
        ({"model": lambda: nn.Flatten()}, "the model has no parameter to train; give one that has, with requires_grad"),
        ({"model": lambda: plain().requires_grad_(False)}, "the model has no parameter to train"),
        ({"model": lambda: nn.LazyLinear(3)}, "the model has lazy layers, whose weights are not there before a first batch"),
        ({"model": lambda: Uncopied(6, 3)}, r"the model of .* cannot be copied \(TypeError: not this one\), which k"),
        ({"model": Unanswered}, r"the model does not take these samples, .*\(KeyError: 'nowhere'\); give one that does"),
        ({"model": f"{MODULE}:broken"}, r"broken failed to make a model \(KeyError: 'width'\); it is called with"),
        ({"model": f"{MODULE}:nothing"}, r"compared_models:nothing must make a torch.nn.Module, it made str"),
        ({"seeds": [1, 2**32]}, "a seed must be at most 4294967295, got 4294967296"),
        ({"data": (np.float32(3.0), np.arange(20) % 3)}, r"X and y must hold one entry for each sample, got array"),
        ({"data": (np.full((20, 6), 1e300), np.arange(20) % 3)}, "X holds values that are not finite in 32 bits"),
        ({"data": (np.zeros((20, 6)), np.ones(20, dtype=int))}, "all labels to train on are 1, so there is nothing to tell"),
        ({"data": (np.zeros((20, 6)), np.arange(19) % 3)}, "X has 20 samples and y has 19 labels; give one label"),
        ({"data": (np.zeros((20, 6)), np.zeros(20))}, "y class numbers, got float64 and float64; a comparison is for classif"),
        ({"data": (np.zeros((5, 6)), np.arange(5) % 3)}, "5 samples are too few to train, validate and test on; give at"),
        ({"data": (np.zeros((20, 6)), np.arange(20) % 3 - 1)}, "y must number the classes from 0, got -1"),
        ({"data": (np.full((20, 6), np.nan), np.arange(20) % 3)}, "X holds values that are not finite"),
        ({"data": (np.zeros((20, 6)), np.zeros(20, dtype=int))}, "all labels to train on are 0, so there is nothing to"),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_refusals_of_another_kind():
    with pytest.raises(
        TypeError, match="make_model must be a function that makes a new model .* got a Sequential; write"
    ):
        tiny(model=plain())
    with pytest.raises(TypeError, match="make_model must be a function .*got a int"):
        tiny(model=3)
    with pytest.raises(TypeError, match=r"data must be a data set's name, a pair \(X, y\) or .*Split, got dict"):
        tiny(data={"X": 1})
    with pytest.raises(
        TypeError, match="lambda.* cannot be given to other processes; name it as 'package.module:function'"
    ):
        tiny(model=lambda: nn.Linear(6, 3), execute=processes(2))
    with pytest.raises(DataError, match="there are 90 samples to train on, but 91 were asked for; change train_size"):
        tiny(train_size=91)
