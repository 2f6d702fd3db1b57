"""Frozen batch norm: what stays, what goes on, copies, the way back, and what is refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from decaycast.methods.stochnorm.freeze import freeze_batch_norm, is_frozen
from decaycast.methods.stochnorm.method import StochNorm2d

SEED = 7


class Block(nn.Module):
    """A convolution and its norm, with a way around both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.bn(self.conv(x)))


def network() -> nn.Sequential:
    """Norms "1", "2.0.bn", "2.1.bn" and "5", with statistics and affine off their initial values."""
    torch.manual_seed(SEED)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(Block(), Block()),
        nn.Flatten(),
        nn.LazyLinear(6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 2),
    )
    for _ in range(3):
        model(torch.randn(8, 3, 6, 6) * 2 + 1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.add_(0.1)
                module.bias.sub_(0.2)
    return model


def batch(seed: int) -> torch.Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 3 - 1


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_everything_of_a_frozen_norm_stays_and_the_rest_moves():
    model = network()
    frozen = freeze_batch_norm(model)
    assert frozen.names == ("1", "2.0.bn", "2.1.bn", "5")
    assert not any(model.get_submodule(name).training for name in frozen.names)  # at once, not at the first call only
    before = state(model)
    train(model, adamw(model))
    kept = {name for name in before if any(name.startswith(f"{norm}.") for norm in frozen.names)}
    assert changed(model, before) == set(before) - kept
    assert len(kept) == 4 * 5  # gamma, beta, mean, variance, number of batches


def test_the_output_in_training_is_that_of_evaluation():
    model = network()
    freeze_batch_norm(model)
    expected = model.eval()(batch(0))
    assert torch.equal(model.train()(batch(0)), expected)


def test_a_pattern_freezes_the_layers_it_matches():
    model = network()
    frozen = freeze_batch_norm(model, "2.*")
    assert frozen.names == ("2.0.bn", "2.1.bn")
    before = state(model)
    train(model, adamw(model))
    same = set(before) - changed(model, before)
    assert same == {name for name in before if ".bn." in name}


def test_several_patterns_may_overlap_and_keep_the_models_order():
    assert freeze_batch_norm(network(), ["5", "2.*", "*.bn"]).names == ("2.0.bn", "2.1.bn", "5")


def test_without_affine_the_statistics_alone_are_frozen():
    model = network()
    freeze_batch_norm(model, "1", affine=False)
    before = state(model)
    train(model, adamw(model))
    of_norm = {name for name in changed(model, before) if name.startswith("1.")}
    assert of_norm == {"1.weight", "1.bias"}


def test_a_gradient_that_is_there_is_not_used_any_more():
    model = network()
    optimizer = adamw(model)
    model.train()(batch(0)).square().mean().backward()
    freeze_batch_norm(model)
    before = state(model)
    optimizer.step()
    assert not {name for name in changed(model, before) if name.startswith(("1.", "5."))}
    assert "0.weight" in changed(model, before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_frozen_too_and_apart_from_the_original(way: str):
    model = network()
    handle = freeze_batch_norm(model, "1")
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    handle.remove()
    assert is_frozen(twin[1]) and not is_frozen(model[1])
    before = state(twin)
    train(twin, adamw(twin))
    assert not {name for name in changed(twin, before) if name.startswith("1.")}
    assert "5.running_mean" in changed(twin, before)


def test_the_state_dict_is_that_of_batch_norm():
    model = network()
    keys = list(model.state_dict())
    freeze_batch_norm(model)
    assert list(model.state_dict()) == keys
    model.load_state_dict(network().state_dict(), strict=True)


# the way back


def test_removed_everything_is_as_it_was():
    model = network()
    model[1].bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    handle = freeze_batch_norm(model)
    model.train()
    handle.remove()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(module.training for module in model.modules())
    before = state(model)
    train(model, adamw(model))
    assert set(before) - changed(model, before) == {"1.bias"}


def test_removed_in_evaluation_the_layer_stays_in_evaluation():
    model = network()
    handle = freeze_batch_norm(model)
    model.eval()
    handle.remove()
    assert not any(module.training for module in model.modules())


def test_removing_twice_does_not_undo_what_came_in_between():
    model = network()
    handle = freeze_batch_norm(model)
    handle.remove()
    model[1].weight.requires_grad_(False)
    model[1].eval()
    handle.remove()
    assert not model[1].weight.requires_grad
    assert not model[1].training


def test_layers_can_be_frozen_one_handle_after_the_other():
    model = network()
    first, second = freeze_batch_norm(model, "1"), freeze_batch_norm(model, "5")
    first.remove()
    assert not is_frozen(model[1]) and is_frozen(model[5])
    second.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())


# kinds of layers


def test_a_layer_in_two_places_is_listed_once_and_meant_by_either_name():
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), norm)
    assert freeze_batch_norm(model, "3").names == ("1",)
    before = state(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert changed(model, before) == {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, momentum=None),
        nn.SyncBatchNorm(3),
        StochNorm2d(3, p=0.5),
    ],
    ids=lambda layer: f"{layer}",
)
def test_every_subclass_of_batch_norm_can_be_frozen(layer: nn.Module):
    model = nn.Sequential(layer)
    layer.train()
    layer.running_mean.add_(0.5)  # type: ignore[operator, union-attr]
    assert freeze_batch_norm(model).names == ("0",)
    before = state(model)
    x = batch(0)
    expected = copy.deepcopy(model).eval()(x)
    assert torch.equal(model.train()(x), expected)
    assert not changed(model, before)


def test_a_model_that_is_one_norm():
    norm = nn.BatchNorm1d(3)
    handle = freeze_batch_norm(norm)
    assert handle.names == ("",)
    norm.train()(torch.randn(5, 3))
    assert norm.num_batches_tracked == 0
    with pytest.raises(ValueError, match="frozen already: the model itself; call remove"):
        freeze_batch_norm(norm)
    norm.eval()
    handle.remove()
    assert not norm.training  # a layer that is the model itself keeps the mode it has


class NormWithDropout(nn.BatchNorm2d):
    """A norm that holds another layer, as timm's norm-and-activation does."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Dropout(0.5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.drop(super().forward(input))


def test_a_layer_inside_a_frozen_norm_keeps_its_mode():
    model = nn.Sequential(NormWithDropout(3))
    freeze_batch_norm(model)
    output = model.train()(torch.ones(8, 3, 6, 6))
    assert 0.3 < (output == 0).float().mean() < 0.7
    assert model[0].num_batches_tracked == 0  # type: ignore[index]


# what is refused; nothing is changed then


def untouched(model: nn.Module) -> bool:
    return all(module.training and not is_frozen(module) for module in model.modules())


def test_a_pattern_that_matches_nothing_lists_the_names():
    model = network()
    with pytest.raises(ValueError, match=r"'layer1\.\*' matches no batch norm; their names: 1, 2\.0\.bn, 2\.1\.bn, 5$"):
        freeze_batch_norm(model, ["2.*", "layer1.*"])
    with pytest.raises(ValueError, match="'0' matches no batch norm"):  # a convolution has this name
        freeze_batch_norm(model, "0")
    with pytest.raises(ValueError, match='layers names no pattern; give at least one, "\\*" for all'):
        freeze_batch_norm(model, [])
    assert untouched(model)


def test_a_long_list_of_names_is_cut():
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(15)))
    with pytest.raises(ValueError, match=r"their names: 0, 1, .*, 11 and 3 more$"):
        freeze_batch_norm(model, "x")


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.BatchNorm2d(3, track_running_stats=False), "1"), (nn.LazyBatchNorm2d(), "1")]
)
def test_a_norm_without_statistics_cannot_be_frozen(layer: nn.Module, name: str):
    model = nn.Sequential(nn.BatchNorm2d(3), layer)
    with pytest.raises(ValueError, match=f"no running statistics to freeze in {name}: .*name the other layers"):
        freeze_batch_norm(model)
    assert untouched(model)
    assert freeze_batch_norm(model, "0").names == ("0",)


def test_a_lazy_norm_that_has_seen_data_can_be_frozen():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(batch(0))
    assert freeze_batch_norm(model).names == ("0",)


def test_freezing_twice_is_refused():
    model = network()
    freeze_batch_norm(model, "1")
    with pytest.raises(ValueError, match=r"frozen already: 1; call remove\(\) of the handle that froze them"):
        freeze_batch_norm(model)
    assert not is_frozen(model[5])


def test_a_model_without_batch_norm():
    with pytest.raises(ValueError, match="Sequential has no batch norm to freeze"):
        freeze_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.InstanceNorm1d(2)))
    with pytest.raises(TypeError, match="freeze_batch_norm needs a torch module, got list"):
        freeze_batch_norm([nn.BatchNorm1d(2)])  # type: ignore[arg-type]
