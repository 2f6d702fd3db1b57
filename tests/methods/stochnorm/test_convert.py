"""Whole models to StochNorm and back: nothing but the class of the layers changes, and what is left alone is said."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from decaycast.core.train import train
from decaycast.methods.stochnorm.convert import Conversion
from decaycast.methods.stochnorm.freeze import freeze_batch_norm
from decaycast.methods.stochnorm.method import StochNorm, StochNorm1d, StochNorm2d, StochNorm3d
from decaycast.methods.stochnorm.variants import LazyStochNorm2d, SyncStochNorm


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm with its activation inside, in the manner of timm."""

    def __init__(self, channels: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


class SyncBatchNormAct(nn.SyncBatchNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class Doubling(nn.BatchNorm2d):
    """Has an `act`, but is something else."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.act(super().forward(x))


class Renamed(nn.BatchNorm2d):
    """Batch norm under another name, with a method of its own."""

    def spread(self) -> torch.Tensor:
        return self.running_var.sqrt()


class Chosen(BatchNormAct2d):
    """A forward with an argument more."""

    def forward(self, x: torch.Tensor, domain: int = 0) -> torch.Tensor:
        return super().forward(x)


class LazyRenamed(nn.LazyBatchNorm2d): ...


class OwnStochNorm(StochNorm2d): ...


def with_its_own_forward() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x  # type: ignore[method-assign,assignment]
    return layer


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def parametrized(kind: type[nn.Module]) -> nn.Module:
    layer = kind(3)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


class FrozenBatchNorm2d(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
        nn.BatchNorm1d(5),
    )


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def told(model: nn.Module, **options: Any) -> str:
    words: list[str] = []
    StochNorm.convert(model, report=words.append, **options)
    return "\n".join(words)


def test_every_batch_norm_is_converted_and_comes_back():
    model = network()
    model(images())
    model.eval()
    expected, keys, parameters = model(images()), list(model.state_dict()), list(model.parameters())
    assert StochNorm.convert(model, p=0.25, report=None) is model
    assert [type(model[i]) for i in (1, 5)] == [StochNorm2d, StochNorm1d] and type(model[2][1]) is StochNorm2d
    assert model[2][1].p == 0.25 and list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(images()), expected)
    assert StochNorm.revert(model, report=None) is model
    assert [type(model[i]) for i in (1, 5)] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert torch.equal(model(images()), expected)
    assert vars(model[1]).keys() == vars(nn.BatchNorm2d(4)).keys()


def test_converted_training_is_stochastic_norms():
    model = StochNorm.convert(network(), p=0.5, generator=torch.Generator().manual_seed(3), report=None)
    generator = torch.Generator().manual_seed(3)
    masks = [torch.rand(n, generator=generator) < 0.5 for n in (4, 6, 5)]
    by_hand = StochNorm.convert(copy.deepcopy(model), report=None)
    hidden = by_hand[1](by_hand[0](images()), masks[0])
    hidden = by_hand[2][2](by_hand[2][1](by_hand[2][0](hidden), masks[1]))
    expected = by_hand[5](by_hand[4](by_hand[3](hidden)), masks[2])
    assert torch.equal(model(images()), expected)
    assert not torch.equal(model(images()), network()(images()))


def test_p_one_trains_as_before():
    plain, converted = network(), StochNorm.convert(network(), p=1, report=None)
    for model in (plain, converted):
        model(images()).square().mean().backward()
    for a, b in zip(plain.parameters(), converted.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), converted.buffers(), strict=True))


def test_flags_hooks_counts_and_the_optimiser_stay():
    model, seen = network(), []
    model(images())
    model[1].eval()
    model[1].weight.requires_grad_(False)
    model[5].register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    StochNorm.convert(model, report=None)
    assert type(model[1]) is StochNorm2d and not model[1].training and model[5].training
    assert not model[1].weight.requires_grad and model[1].bias.requires_grad
    assert int(model[5].num_batches_tracked) == 1
    before = model[5].weight.detach().clone()
    model(images()).square().mean().backward()
    optimizer.step()
    assert seen == ["StochNorm1d"] and not torch.equal(model[5].weight, before)
    StochNorm.revert(model, report=None)
    model(images())
    assert seen == ["StochNorm1d", "BatchNorm1d"] and not model[1].training and not model[1].weight.requires_grad


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    words = told(model)
    assert model["a"] is model["b"][0] and type(model["a"]) is StochNorm1d
    assert "1 of 1 layers" in words and "a = b.0" in words


def test_a_single_layer_is_a_model():
    assert type(StochNorm.convert(nn.BatchNorm3d(4), report=None)) is StochNorm3d


def test_a_model_in_evaluation_stays_there():
    model = StochNorm.convert(network().eval(), report=None)
    assert not any(each.training for each in model.modules()) and type(model[1]) is StochNorm2d


# other kinds of batch norm


@pytest.mark.parametrize("drop", [None, nn.Dropout(0.5)])
@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(), nn.PReLU(4)], ids=lambda act: type(act).__name__)
def test_an_activation_inside_is_kept(act: nn.Module, drop: nn.Module | None):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act, drop)).train()
    model(images())
    expected, keys = copy.deepcopy(model).eval()(images()), list(model.state_dict())
    StochNorm.convert(model, p=0.5, report=None)
    assert type(model[1]).__name__ == "StochNormAct2d" and model[1].act is act
    assert isinstance(model[1], StochNorm2d) and isinstance(model[1], BatchNormAct2d)
    assert list(model.state_dict()) == keys and all(each.training for each in model.modules())
    assert torch.equal(model.eval()(images()), expected)
    mask, hidden = torch.tensor([True, False, True, False]), model[0](images())
    plain = StochNorm2d(4)
    plain.load_state_dict({name: model[1].state_dict()[name] for name in plain.state_dict()})
    if drop is None:
        assert torch.equal(model.train()[1](hidden, mask), act(plain(hidden, mask)))
    assert type(StochNorm.revert(model, report=None)[1]) is BatchNormAct2d


def test_synchronised_norms():
    group = object()
    model = nn.Sequential(nn.SyncBatchNorm(4, process_group=group), SyncBatchNormAct(4))
    StochNorm.convert(model, report=None)
    assert [type(each).__name__ for each in model] == ["SyncStochNorm", "SyncStochNormAct"]
    assert all(isinstance(each, SyncStochNorm) for each in model) and isinstance(model[1], SyncBatchNormAct)
    assert model[0].process_group is group
    model[0].process_group = None
    model(torch.randn(2, 4, 3, 3))
    StochNorm.revert(model, report=None)
    assert [type(each) for each in model] == [nn.SyncBatchNorm, SyncBatchNormAct]


def test_lazy_layers_stay_lazy():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyBatchNorm1d())
    StochNorm.convert(model, p=0.3, report=None)
    assert type(model[1]) is LazyStochNorm2d
    model(images())
    assert [type(model[i]) for i in (1, 3)] == [StochNorm2d, StochNorm1d] and model[1].p == 0.3
    assert model[1].num_features == 4 and int(model[1].num_batches_tracked) == 1
    StochNorm.revert(model, report=None)
    assert [type(model[i]) for i in (1, 3)] == [nn.BatchNorm2d, nn.BatchNorm1d]


def test_lazy_layers_come_back_lazy():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    StochNorm.revert(StochNorm.convert(model, report=None), report=None)
    assert type(model[0]) is nn.LazyBatchNorm2d
    model(images())
    assert type(model[0]) is nn.BatchNorm2d


def test_a_subclass_that_is_batch_norm():
    model = nn.Sequential(Renamed(3))
    StochNorm.convert(model, report=None)
    assert isinstance(model[0], StochNorm2d) and isinstance(model[0], Renamed)
    assert repr(model[0]).startswith("StochRenamed(3, ") and torch.equal(model[0].spread(), torch.ones(3))
    assert type(StochNorm.revert(model, report=None)[0]) is Renamed


@pytest.mark.parametrize("layer", [Renamed(3), BatchNormAct2d(3, nn.SiLU())], ids=lambda layer: type(layer).__name__)
def test_derived_layers_are_copied_and_saved(layer: nn.Module):
    kind, kept = type(layer), io.BytesIO()
    model = StochNorm.convert(nn.Sequential(nn.Conv2d(3, 3, 1), copy.deepcopy(layer)), p=0.25, report=None)
    model(images())
    torch.save(model, kept)
    kept.seek(0)
    for other in (copy.deepcopy(model), torch.load(kept, weights_only=False)):
        assert type(other[1]) is type(model[1]) and other[1].p == 0.25
        assert torch.equal(other[1].running_mean, model[1].running_mean)
        assert type(StochNorm.revert(other, report=None)[1]) is kind


def test_layers_made_as_stochastic_norms_become_batch_norms():
    model = nn.Sequential(StochNorm2d(3), SyncStochNorm(3))
    StochNorm.revert(model, report=None)
    assert [type(each) for each in model] == [nn.BatchNorm2d, nn.SyncBatchNorm]


# what is left alone


def frozen_layer() -> nn.Module:
    layer = nn.BatchNorm2d(3).eval()
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (frozen_layer(), "BatchNorm2d: left alone, frozen"),
        (nn.BatchNorm2d(3, affine=False).eval(), "BatchNorm2d: left alone, frozen"),
        (FrozenBatchNorm2d(), "FrozenBatchNorm2d: left alone, frozen"),
        (nn.BatchNorm2d(3, track_running_stats=False), "BatchNorm2d: left alone, no running statistics"),
        (nn.BatchNorm2d(3).requires_grad_(False).eval(), "BatchNorm2d: left alone, frozen"),
        (Doubling(3), "Doubling: left alone, a forward of its own, not known to be batch norm"),
        (Chosen(3, nn.ReLU()), "Chosen: left alone, a forward of its own, not known to be batch norm"),
        (with_its_own_forward(), "BatchNorm2d: left alone, a forward of its own, not known to be batch norm"),
        (parametrized(nn.BatchNorm2d), "ParametrizedBatchNorm2d: left alone, parametrized"),
        (torch.nn.Sequential(nn.Conv2d(3, 3, 1)), "no batch norm in this model: nothing was converted"),
    ],
    ids=str,
)
def test_left_alone_and_said_so(layer: nn.Module, reason: str):
    model, kind, state = nn.Sequential(layer), type(layer), copy.deepcopy(layer.state_dict())
    flags = [each.training for each in model.modules()]
    assert reason in told(model)
    assert type(model[0]) is kind and [each.training for each in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model[0].state_dict().items())


def test_a_lazy_class_of_ones_own_is_converted_once_it_has_seen_data():
    model = nn.Sequential(LazyRenamed())
    assert "LazyRenamed: left alone, lazy and a class of its own: call the model once first" in told(model)


def test_frozen_in_a_model_in_evaluation():
    model = network().eval()
    model[1].requires_grad_(False)
    assert "1  BatchNorm2d: left alone, frozen  [1]" in told(model) and type(model[5]) is StochNorm1d
    everything = network().eval().requires_grad_(False)  # a model for inference, nothing held on purpose
    assert "3 of 3 layers" in told(everything)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (parametrized(StochNorm2d), "ParametrizedStochNorm2d: left alone, parametrized"),
        (OwnStochNorm(3), "OwnStochNorm: left alone, a class of its own"),
    ],
    ids=["parametrized", "own"],
)
def test_not_reverted_and_said_so(layer: nn.Module, reason: str):
    words: list[str] = []
    kind = type(layer)
    assert type(StochNorm.revert(nn.Sequential(layer), report=words.append)[0]) is kind
    assert reason in words[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_layers_are_left_alone():
    model = nn.Sequential(torch.jit.script(nn.BatchNorm2d(3)))
    assert "TorchScript: convert before scripting" in told(model)


def test_layers_held_in_evaluation_are_frozen_even_before_their_first_call():
    model = network()
    handle = freeze_batch_norm(model, "1")
    model.train()
    assert "1  BatchNorm2d: left alone, frozen  [1]" in told(model)
    assert type(model[1]) is nn.BatchNorm2d and type(model[5]) is StochNorm1d
    handle.remove()
    assert "1 of 3" not in told(model) and type(model[1]) is StochNorm2d


def test_without_statistics_p_one_is_fine():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    assert type(StochNorm.convert(model, p=1, report=None)[0]) is StochNorm2d


def test_nothing_to_skip():
    assert "3 of 3" in told(network(), skip=None)


@pytest.mark.parametrize("skip", [("1", "5"), "[15]", iter(["1", "5"])])
def test_skip_by_name_or_pattern(skip: Any):
    model = network()
    assert "2 of 3" not in told(model, skip=skip)
    assert [type(model[i]) for i in (1, 5)] == [nn.BatchNorm2d, nn.BatchNorm1d] and type(model[2][1]) is StochNorm2d


def test_a_second_conversion_sets_p():
    model = StochNorm.convert(network(), p=0.5, report=None)
    assert "StochNorm2d: p and generator set" in told(model, p=0.75)
    assert model[1].p == 0.75
    assert type(StochNorm.revert(model, report=None)[1]) is nn.BatchNorm2d


# what is said


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]):
    model = network()
    StochNorm.convert(model, p=0.5, skip="5")
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "StochNorm, p = 0.5: 2 of 3 layers",
        "     2  BatchNorm2d -> StochNorm2d  [1, 2.1]",
        "     1  BatchNorm1d: left alone, in skip  [5]",
    ]
    StochNorm.revert(model)
    assert "2  StochNorm2d -> BatchNorm2d  [1, 2.1]" in capsys.readouterr().out
    StochNorm.revert(model)
    assert capsys.readouterr().out == "no StochNorm in this model: nothing was reverted\n"
    StochNorm.convert(nn.Linear(2, 2))
    assert capsys.readouterr().out == "no batch norm in this model: nothing was converted\n"


def test_long_lists_are_cut():
    assert ", ... (7 more)]" in told(nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(10)]))


# the hook


def test_the_hook_converts_before_training():
    hook = Conversion(p=0.5, generator=torch.Generator().manual_seed(0))
    model = hook.prepare(network())
    before = model[1].running_mean.clone()
    batches = iter([(images(seed), torch.tensor([0, 1, 2, 3])) for seed in range(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = train(model, batches, nn.functional.cross_entropy, optimizer, stop=3, hooks=[hook], measure_at=[3])
    assert type(model[1]) is StochNorm2d and len(rows) == 1 and not torch.equal(model[1].running_mean, before)


# bad input


def test_nothing_is_converted_on_bad_input():
    model = network()
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 2"):
        StochNorm.convert(model, p=2)
    with pytest.raises(TypeError, match="p must be a number"):
        StochNorm.convert(model, p="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'bn1' in skip matches no batch norm of the model; there are: 1, 2.1, 5"):
        StochNorm.convert(model, skip=("1", "bn1"))
    assert type(model[1]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got -1"):
        Conversion(p=-1)


@pytest.mark.parametrize("function", [StochNorm.convert, StochNorm.revert])
def test_only_modules(function: Any):
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got list"):
        function([nn.BatchNorm1d(3)])
