"""What decays and why: the rule, the two libraries' rules, wrappers, shared and frozen parameters, and the printed table."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from decaycast.core.param_groups import assert_no_decay, decay_groups, explain_param_groups
from decaycast.core.timescale import effective_rate


class OwnNorm(nn.Module):
    """A norm that is no nn.LayerNorm, under a name without "norm"."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x


class RMSNorm(OwnNorm):
    """The same by type."""


class Vision(nn.Module):
    """A small vision transformer's cast of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.bn1 = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([nn.ModuleDict({"norm1": RMSNorm(8), "mlp": nn.Linear(8, 8)}) for _ in range(3)])
        self.ln_f = OwnNorm(8)
        self.table = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10)


def optimizer_over(model: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, **options)


def row_of(table, name):
    return next(row for row in table.rows if name in row.names)


def test_the_rule_sees_what_each_library_misses():
    model = Vision()
    table = explain_param_groups(model, optimizer_over(model))
    advised = {row.names[0]: row.advised for row in table.rows}
    assert {name for name, value in advised.items() if value} == {
        "patch_embed.weight", "head.weight", *(f"blocks.{i}.mlp.weight" for i in range(3)),
    }  # fmt: skip
    assert [name for name, value in advised.items() if value is None] == ["table.weight"]
    assert table.missed_by("timm") == ["pos_embed", "cls_token"]
    assert table.missed_by("hugging_face") == [
        "pos_embed", "cls_token", "logit_scale", "bn1.weight", *(f"blocks.{i}.norm1.weight" for i in range(3)), "ln_f.weight",
    ]  # fmt: skip


def test_rates_and_groups_are_those_of_the_optimizer():
    model = Vision()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=1e-3)
    table = explain_param_groups(model, optimizer)
    assert {row.group: row.rate for row in table.rows} == dict(enumerate(effective_rate(optimizer)))
    assert table.wrong() == [] and {row.names[0] for row in table.rows if row.decays} >= {"head.weight", "table.weight"}


def test_what_has_no_fixed_shrink_has_no_rate():
    model = nn.Linear(2, 2)
    table = explain_param_groups(model, torch.optim.Adam(model.parameters(), weight_decay=0.1))
    assert all(math.isnan(row.rate) and row.decays for row in table.rows)
    assert "nan" in str(table)


@pytest.mark.parametrize("said", [{"pos_embed", "head.weight"}, ["pos_embed", "head.*"], "head.weight"])
@pytest.mark.parametrize("as_method", [True, False])
def test_what_the_model_says_is_honoured(said, as_method):
    model = Vision()
    model.no_weight_decay = (lambda: said) if as_method else said  # type: ignore[assignment]
    table = explain_param_groups(model, optimizer_over(model))
    assert row_of(table, "head.weight").why == "no_weight_decay names it"
    assert not row_of(table, "head.weight").timm and row_of(table, "head.weight").hugging_face


def test_what_a_part_says_goes_by_its_place():
    model = nn.Sequential(nn.Linear(2, 2), Vision())
    model[1].no_weight_decay = lambda: {"head.weight"}  # type: ignore[assignment]
    table = explain_param_groups(model, optimizer_over(model))
    assert row_of(table, "1.head.weight").advised is False
    assert row_of(table, "0.weight").advised is True
    assert row_of(table, "1.head.weight").timm  # timm asks the model only


def test_more_names_can_be_given():
    model = Vision()
    table = explain_param_groups(model, optimizer_over(model), no_decay=["table.*"])
    assert row_of(table, "table.weight").advised is False
    groups = decay_groups(model, 0.1, no_decay=["table.*"])
    assert any(tensor is model.table.weight for tensor in groups[1]["params"])


def test_wrappers_are_looked_through():
    model = Vision()
    model.no_weight_decay = lambda: {"head.weight"}  # type: ignore[assignment]
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    plain, through = (explain_param_groups(m, optimizer_over(model)) for m in (model, wrapped))
    assert plain == through  # type: ignore[comparison-overlap]


def test_shared_frozen_and_forgotten_parameters_are_told():
    model = nn.ModuleDict(
        {"first": nn.Linear(3, 3, bias=False), "second": nn.Linear(3, 3, bias=False), "third": nn.Linear(3, 3)}
    )
    model["second"].weight = model["first"].weight
    model["third"].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([model["first"].weight, torch.zeros(2, requires_grad=True)], lr=0.1, weight_decay=0.1)
    table = explain_param_groups(model, optimizer)
    assert [row.names for row in table.rows] == [("first.weight", "second.weight"), ("third.weight",), ("third.bias",)]
    assert [row.wrong for row in table.rows] == ["", "", "not in the optimiser"]
    assert table.strangers == 1
    text = str(table)
    assert "first.weight = second.weight" in text and "frozen" in text
    assert "1 take gradients but are not in the optimiser: third.bias" in text
    assert "1 tensors of the optimiser are not in the model" in text


def test_layers_alike_are_one_line():
    model = Vision()
    text = str(explain_param_groups(model, optimizer_over(model)))
    assert "blocks.*.norm1.weight (3)" in text and "blocks.0" not in text.splitlines()[5]
    assert "timm's rule would decay pos_embed, cls_token" in text
    assert "Hugging Face's rule would decay pos_embed, cls_token, logit_scale, bn1.weight and 4 more" in text
    assert len(text.splitlines()) < 25


def test_a_long_table_ends():
    model = nn.Sequential(*(nn.Linear(1, width) for width in range(1, 80)))
    assert "more lines; `rows` has all" in str(explain_param_groups(model, optimizer_over(model)))


def test_the_summary_counts_every_value_once():
    model = Vision()
    table = explain_param_groups(model, torch.optim.AdamW(decay_groups(model, 0.1)))
    counted = sum(math.prod(row.shape) for row in table.rows)
    assert counted == sum(tensor.numel() for tensor in model.parameters())


def test_assertion_lists_what_decays():
    model = Vision()
    with pytest.raises(
        AssertionError, match=r"parameters decay and should not:\n  pos_embed: weight_decay 0.1 \(by its name"
    ):
        assert_no_decay(model, optimizer_over(model))
    assert_no_decay(model, torch.optim.AdamW(decay_groups(model, 0.1)))


def test_assertion_on_names_of_ones_own():
    model = Vision()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1))
    assert_no_decay(model, optimizer, ["pos_embed", "blocks.*.norm1.weight"])
    with pytest.raises(AssertionError, match=r"1 parameters decay and should not:\n  head.weight: weight_decay 0.1"):
        assert_no_decay(model, optimizer, ["head.*"])
    with pytest.raises(ValueError, match=r"'heads.weight' fits no parameter of Vision; for example 'pos_embed'"):
        assert_no_decay(model, optimizer, ["heads.weight"])


def test_groups_train_what_is_not_frozen():
    model = Vision()
    model.head.requires_grad_(False)
    groups = decay_groups(model, 0.1)
    found = {id(tensor) for group in groups for tensor in group["params"]}
    assert found == {id(tensor) for tensor in model.parameters() if tensor.requires_grad}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    only_matrix = nn.Linear(2, 2, bias=False)
    assert len(decay_groups(only_matrix, 0.1)) == 1


def test_bad_input_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        explain_param_groups(nn.ReLU(), optimizer_over(model))
    with pytest.raises(ValueError, match="the optimiser has no parameter of this model; build it over"):
        explain_param_groups(nn.Linear(2, 2), optimizer_over(model))
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight_decay has to be finite and >= 0, got"):
            decay_groups(model, value)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Linear has no parameter that takes gradients; unfreeze some first"):
        decay_groups(model, 0.1)
    with pytest.raises(ValueError, match="rule has to be 'timm' or 'hugging_face', got 'keras'"):
        explain_param_groups(model, optimizer_over(model)).missed_by("keras")
