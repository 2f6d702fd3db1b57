"""The rules of timm and of Hugging Face as `core.param_groups` tells them, beside the packages."""

from __future__ import annotations

import pytest
import torch
from tests.core.test_param_groups import Vision
from torch import nn

from decaycast.core.param_groups import explain_param_groups


class Said(Vision):
    """A model that names what should not decay, as timm's do."""

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}


def models() -> list[nn.Module]:
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    return [
        Vision(),
        Said(),
        nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)),
        nn.ModuleDict({"norm": encoder, "x": encoder.linear1}),
    ]


@pytest.mark.parametrize("model", models())
def test_hugging_face(model: nn.Module):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    table = explain_param_groups(model, torch.optim.AdamW(model.parameters()))
    assert {row.names[0] for row in table.rows if row.hugging_face} == decayed & {row.names[0] for row in table.rows}


@pytest.mark.timm
@pytest.mark.parametrize("model", models())
def test_timm(model: nn.Module):
    optim = pytest.importorskip(
        "timm.optim", reason="timm needs an environment of its own: make test-timm", exc_type=ImportError
    )
    said = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = optim.param_groups_weight_decay(model, 0.1, no_weight_decay_list=said)
    decayed = {id(tensor) for group in groups if group["weight_decay"] for tensor in group["params"]}
    names = {name for name, tensor in model.named_parameters() if id(tensor) in decayed}
    table = explain_param_groups(model, torch.optim.AdamW(model.parameters()))
    assert {row.names[0] for row in table.rows if row.timm} == names
