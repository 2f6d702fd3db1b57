"""The public names and how they are called: code outside this repository relies on them."""

from __future__ import annotations

import inspect
import types
import typing
from dataclasses import fields

import pytest

import decaycast as dc

REQUIRED = "required"
SIGNATURES = {
    "efolds": {"lr": REQUIRED, "weight_decay": REQUIRED, "steps": REQUIRED, "momentum": 0.0, "convention": "sgd"},
    "weight_decay_for": {"efolds": REQUIRED, "lr": REQUIRED, "steps": REQUIRED, "momentum": 0.0, "convention": "sgd"},
    "effective_rate": {"optimizer": REQUIRED},
    "explain_param_groups": {"model": REQUIRED, "optimizer": REQUIRED, "no_decay": ()},
    "assert_no_decay": {"model": REQUIRED, "optimizer": REQUIRED, "names": None},
    "decay_groups": {"model": REQUIRED, "weight_decay": REQUIRED, "no_decay": ()},
    "AutoL2Rule": {"start": 0.1, "factor": 10.0, "measure_every": 10, "refractory": 0.1},
    "AutoL2": {"optimizer": REQUIRED},
    "WeightDecayScheduler": {"optimizer": REQUIRED, "fn": REQUIRED},
    "forecast": {
        "probe": REQUIRED,
        "budget_steps": REQUIRED,
        "lr": None,
        "candidates": None,
        "higher_is_better": True,
        "max_cost": 0.3,
    },
    "find": {
        "model": REQUIRED,
        "make_optimizer": REQUIRED,
        "loss_fn": REQUIRED,
        "train_loader": REQUIRED,
        "val_loader": REQUIRED,
        "budget_steps": REQUIRED,
    },
    **{
        name: {"num_features": REQUIRED, "p": 0.5, "eps": 1e-5, "momentum": 0.1, "generator": None}
        for name in ("StochNorm", "StochNorm1d", "StochNorm2d", "StochNorm3d")
    },
    "L2SP": {"optimizer": REQUIRED, "free": ()},
    "freeze_batch_norm": {"model": REQUIRED, "layers": "*", "affine": True},
    "KernelSelfDistillation": {
        "kernel": "rbf",
        "gamma": None,
        "alpha": 1.0,
        "tolerance": None,
        "rounds": 1,
        "mix": 0.0,
    },
    "distill": {"fit": REQUIRED, "inputs": REQUIRED, "targets": REQUIRED, "rounds": REQUIRED, "mix": 0.0},
    "ActivationNoise": {"std": REQUIRED, "per_element": False, "generator": None},
    "insert_activation_noise": {"model": REQUIRED, "std": REQUIRED, "per_element": False, "generator": None},
    "LabelNoise": {"flip": REQUIRED, "num_classes": REQUIRED, "generator": None},
    "hessian_trace": {
        "model": REQUIRED,
        "loss_fn": REQUIRED,
        "batches": REQUIRED,
        "relative_error": 0.05,
        "matrix": "hessian",
        "generator": None,
    },
    "implicit_regularizer": {"model": REQUIRED, "inputs": REQUIRED, "lr": REQUIRED, "momentum": 0.0},
}
METHODS = {
    "AutoL2Rule": ("update", "state_dict", "load_state_dict"),
    "AutoL2": ("step", "get_last_wd", "state_dict", "load_state_dict"),
    "WeightDecayScheduler": ("step", "get_last_wd", "state_dict", "load_state_dict"),
    "Forecast": ("plot", "to_dict"),
    "StochNorm": ("convert", "revert"),
    "KernelSelfDistillation": ("fit", "predict", "score"),
    "LabelNoise": ("on_batch", "state_dict", "load_state_dict"),
    "L2SP": ("distance", "state_dict", "load_state_dict", "remove"),
}


def test_the_public_names_are_exactly_these():
    modules = {"infinite_width", "transfer"}
    assert set(dc.__all__) == {*SIGNATURES, "Forecast", "Estimate", *modules}
    public = {
        name for name, value in vars(dc).items() if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert (public | modules | {"KernelSelfDistillation"}) - {"annotations", "Any", "TYPE_CHECKING"} == set(dc.__all__)


def test_an_unknown_name_is_said():
    with pytest.raises(AttributeError, match="module 'decaycast' has no attribute 'anneal'"):
        dc.anneal  # noqa: B018


def test_functions_of_the_modules_that_are_called_from_outside():
    given = {
        dc.infinite_width.outputs: ["time", "eigenvalues", "targets", "initial", "weight_decay", "degree"],
        dc.infinite_width.kernel_scale: ["time", "weight_decay", "degree"],
        dc.transfer.power_lines: ["tokens_per_parameter"],
        dc.transfer.weight_decay_from_tau: ["tau", "lr", "steps"],
    }
    for function, names in given.items():
        parameters = inspect.signature(function).parameters
        assert list(parameters)[: len(names)] == names
        assert all(parameters[other].default is not inspect.Parameter.empty for other in list(parameters)[len(names) :])


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_and_defaults(name: str):
    parameters = inspect.signature(getattr(dc, name)).parameters
    expected = SIGNATURES[name]
    assert list(parameters)[: len(expected)] == list(expected)
    for argument, default in expected.items():
        given = parameters[argument].default
        assert (REQUIRED if given is inspect.Parameter.empty else given) == default
    # what came later has a default
    assert all(parameters[other].default is not inspect.Parameter.empty for other in set(parameters) - set(expected))


@pytest.mark.parametrize("name", ["efolds", "weight_decay_for"])
def test_numbers_of_different_units_are_named_when_given(name: str):
    kinds = {parameter.kind for parameter in inspect.signature(getattr(dc, name)).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


def test_what_a_forecast_holds():
    assert [field.name for field in fields(dc.Forecast)][:6] == [
        "weight_decay",
        "interval",
        "verdict",
        "reason",
        "efolds",
        "cost",
    ]
    assert typing.get_args(typing.get_type_hints(dc.Forecast)["verdict"]) == ("trust", "weak", "refuse")


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name, methods in METHODS.items() for method in methods]
)
def test_methods(name: str, method: str):
    assert callable(getattr(getattr(dc, name), method))


def test_autol2_is_stepped_with_loss_and_error():
    assert list(inspect.signature(dc.AutoL2.step).parameters) == ["self", "loss", "error"]
    assert list(inspect.signature(dc.AutoL2Rule.update).parameters) == ["self", "step", "loss", "error"]


@pytest.mark.parametrize("name", dc.__all__)
def test_every_public_name_and_method_is_explained(name: str):
    value = getattr(dc, name)
    assert len(inspect.getdoc(value) or "") > 60
    for attribute, member in vars(value).items() if inspect.isclass(value) else ():
        if not attribute.startswith("_") and callable(member):
            assert inspect.getdoc(member), f"{name}.{attribute}"


def test_conversion_takes_a_model_and_p_and_a_layer_takes_a_mask():
    assert list(inspect.signature(dc.StochNorm.convert).parameters)[:2] == ["model", "p"]
    assert inspect.signature(dc.StochNorm.convert).parameters["p"].default == 0.5
    assert next(iter(inspect.signature(dc.StochNorm.revert).parameters)) == "model"
    assert inspect.signature(dc.StochNorm2d.forward).parameters["mask"].default is None
