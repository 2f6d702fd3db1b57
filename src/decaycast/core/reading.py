"""How a model and its batches are read where curvature is measured: evaluation mode, no state changed, any kind of batch.

A batch is a pair (inputs, target), or a dict with an entry ``"labels"`` that goes to the model as a whole. Inputs are a tensor,
a tuple of arguments, or a dict of named ones. A batch counts by the first dimension of its first tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from decaycast.core.measure import check_labels
from decaycast.core.ntk_routes import plain_attention

Loss = Callable[[Any, Any], Tensor]


class Reader:
    """A model at the weights it has now, as a function of detached copies that share their memory.

    Args:
        model: any torch module; of a compiled or data-parallel one the module inside.

    Attributes:
        theta: name -> leaf that requires a gradient, one per parameter that does, in the order of ``named_parameters()``.
        device: of the parameters.
        dtype: the widest of the parameters' dtypes.

    Raises:
        ValueError: no parameter requires a gradient, or parameters on several devices.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = _plain(model)
        self.theta = _leaves(self.model)
        self._rest = {name: value.detach() for name, value in self.model.named_parameters() if name not in self.theta}
        self._rest |= {name: value.detach().clone() for name, value in self.model.named_buffers()}
        first, *others = self.theta.values()
        self.device, self.dtype = first.device, first.dtype
        for value in others:
            self.dtype = torch.promote_types(self.dtype, value.dtype)

    def output(self, batch: Any) -> tuple[Any, Any, int]:
        """What the model returns for a batch, with its graph; the target; and the number of samples.

        Raises:
            ValueError: a batch of another kind, of size 0, or with labels out of range.
        """
        inputs, target, count = _unpack(batch, self.device)
        with _reading(self.model), torch.enable_grad():
            output = functional_call(self.model, {**self._rest, **self.theta}, *_arguments(inputs))
        if isinstance(output, Tensor) and isinstance(target, Tensor):
            check_labels(output, target)
        return output, target, count


def _plain(model: nn.Module) -> nn.Module:
    """The module inside torch.compile or DistributedDataParallel: neither can be differentiated twice."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _leaves(model: nn.Module) -> dict[str, Tensor]:
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not found:
        raise ValueError(
            f"no parameter of {type(model).__name__} requires a gradient, so there is no curvature to measure; call "
            "requires_grad_() on those you want"
        )
    devices = {str(value.device) for value in found.values()}
    if len(devices) > 1:
        raise ValueError(
            f"the parameters lie on several devices ({', '.join(sorted(devices))}), and a product needs them on one; move the "
            "model"
        )
    return {name: value.detach().requires_grad_() for name, value in found.items()}


def reusable(batches: Iterable[Any]) -> Iterable[Any]:
    """Something that can be gone through again and again; an iterator, which cannot, becomes a list."""
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches has to be a list or loader of (inputs, target), got {type(batches).__name__}; use [batch]"
        )
    return list(batches) if isinstance(batches, Iterator) else batches


def _unpack(batch: Any, device: torch.device) -> tuple[Any, Any, int]:
    if isinstance(batch, Mapping):
        inputs, target = dict(batch), batch.get("labels")
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, target = batch
    else:
        raise ValueError(
            f"a batch must be a pair (inputs, target) or a dict with an entry 'labels', got {type(batch).__name__}; wrap the "
            "loader"
        )
    first = next(_tensors(inputs), None)
    if first is None or first.ndim == 0:
        raise ValueError(
            "the inputs of a batch hold no tensor with a dimension of samples; give tensors, or a dict of them"
        )
    if len(first) == 0:
        raise ValueError("a batch of size 0 has no mean loss; leave it out of batches")
    return _moved(inputs, device), _moved(target, device), len(first)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    return type(value)(_moved(part, device) for part in value) if type(value) in (tuple, list) else value


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), None


@contextlib.contextmanager
def _reading(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, put back module by module; layers in the form that can be differentiated twice."""
    modes = [(module, module.training) for module in model.modules()]
    # cuDNN's recurrent layers have no gradient in evaluation mode and no second one in any
    recurrent = any(isinstance(module, nn.RNNBase) for module, _ in modes)
    slow = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    model.eval()
    try:
        with plain_attention(), slow:
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training
