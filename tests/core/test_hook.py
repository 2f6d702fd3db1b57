"""The seam: a plain hook changes nothing, a chain goes in order, and state goes round."""

from __future__ import annotations

import pytest
import torch

from decaycast.core.hook import Hook, StepContext, chain


class Recorder(Hook):
    """Writes down what it is asked, and marks what passes through."""

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log, self.seen = name, log, 0

    def prepare(self, model):
        return torch.nn.Sequential(model, torch.nn.Identity())

    def on_batch(self, step, batch):
        return (*batch, self.name)

    def on_step(self, step, context):
        self.seen += 1
        self.log.append((self.name, "step", step))

    def on_measure(self, step, row):
        self.log.append((self.name, "measure", step, row["lr"]))

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def context(output: torch.Tensor, target: torch.Tensor) -> StepContext:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    return StepContext(loss=torch.tensor(1.0), output=output, target=target, optimizer=optimizer)


def test_a_hook_that_overrides_nothing_changes_nothing():
    hook, model, batch = Hook(), torch.nn.Linear(2, 2), (torch.zeros(1), torch.ones(1))
    assert hook.prepare(model) is model
    assert hook.on_batch(3, batch) is batch
    assert hook.on_step(3, context(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))) is None
    assert hook.on_measure(3, {}) is None
    assert hook.state_dict() == {}
    assert hook.load_state_dict({}) is None


def test_one_hook_needs_no_chain():
    hook = Hook()
    assert chain(hook) is hook


def test_an_empty_chain_is_a_plain_hook():
    hook, batch = chain(), object()
    assert hook.on_batch(0, batch) is batch
    assert hook.state_dict() == {"hooks": []}


def test_a_chain_goes_in_order():
    log: list = []
    both = chain(Recorder("a", log), Recorder("b", log))
    model = torch.nn.Linear(2, 2)
    prepared = both.prepare(model)
    assert prepared[0][0] is model  # b wrapped what a returned
    assert both.on_batch(0, ("batch",)) == ("batch", "a", "b")
    both.on_step(4, context(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)))
    both.on_measure(5, {"lr": 0.1})
    assert log == [("a", "step", 4), ("b", "step", 4), ("a", "measure", 5, 0.1), ("b", "measure", 5, 0.1)]


def test_a_chains_state_goes_round():
    old = chain(Recorder("a", []), chain(Recorder("b", []), Recorder("c", [])))
    for _ in range(3):
        old.on_step(0, context(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)))
    fresh = chain(Recorder("a", []), chain(Recorder("b", []), Recorder("c", [])))
    fresh.load_state_dict(old.state_dict())
    assert fresh.state_dict() == {"hooks": [{"seen": 3}, {"hooks": [{"seen": 3}, {"seen": 3}]}]}


def test_a_state_of_another_chain_is_refused():
    with pytest.raises(ValueError, match="the state holds 1 hooks but this chain has 2; resume with the same hooks"):
        chain(Hook(), Hook()).load_state_dict({"hooks": [{}]})


def test_error_is_the_share_of_wrong_predictions():
    output = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 5.0], [9.0, 1.0, 5.0]])
    assert float(context(output, torch.tensor([0, 1, 2, 1])).error()) == 0.25
    # class probabilities (mixup) are compared by their own largest entry
    mixed = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.3, 0.7], [0.0, 0.4, 0.6], [0.0, 0.9, 0.1]])
    assert float(context(output, mixed).error()) == 0.5
