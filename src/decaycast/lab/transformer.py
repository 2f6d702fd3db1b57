"""A small language model: decoder-only transformer over characters, pre-norm, learned positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import nn

HEAD_WIDTH = 32


class Transformer(nn.Module):
    """Scores of the next character at each place.

    Weights start as N(0, 1/fan_in), those that write into the residual stream smaller by sqrt(2*layers) (as in GPT-2:
    Radford et al. 2019), embeddings as N(0, 0.02^2); drawn from `seed` alone. Input and output weights are not tied.

    Args:
        context: longest text it sees, in characters.
        classes: characters of the alphabet.
        width: of the residual stream; attention heads are `HEAD_WIDTH` wide (one head below that).
        layers: attention and feed-forward pairs.
        seed: of the initial weights.
    """

    def __init__(self, context: int, classes: int, *, width: int, layers: int, seed: int) -> None:
        super().__init__()
        heads = max(1, width // HEAD_WIDTH)
        if width % heads:
            raise ValueError(
                f"a gpt's width must be a multiple of {HEAD_WIDTH} (or below {2 * HEAD_WIDTH}), got {width}"
            )
        self.characters, self.places = nn.Embedding(classes, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes, bias=False)
        _initialise(self, layers, torch.Generator().manual_seed(seed))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Scores of shape (n, classes, characters), as torch's cross-entropy takes them, for `codes` (n, characters)."""
        hidden = self.characters(codes) + self.places.weight[: codes.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden)).transpose(1, 2)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, length, width = x.shape
        split = self.attend(self.norm1(x)).view(count, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(count, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def _initialise(model: Transformer, layers: int, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                continue  # ones and zeros already
            if name.startswith(("characters", "places")):
                scale = 0.02
            else:
                scale = 1 / math.sqrt(parameter.shape[1])
                if name.endswith(("mix.weight", "down.weight")):
                    scale /= math.sqrt(2 * layers)
            parameter.normal_(0.0, scale, generator=generator)
