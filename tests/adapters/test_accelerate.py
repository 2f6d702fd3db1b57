"""Accelerate's loop: updates counted right under accumulation, skipped ones left out, resumed to the bit, compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import decaycast as dc
from decaycast.core.schedule import linear

REASON = "accelerate is not installed: pip install 'decaycast[accelerate]'"
adapter = pytest.importorskip("decaycast.adapters.accelerate", reason=REASON, exc_type=ImportError)
accelerate = pytest.importorskip("accelerate", reason=REASON)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STEPS = 12
INPUTS = torch.randn(16 * STEPS, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = (INPUTS[:, 0] > 0).long()
SETTINGS = {"start": 0.4, "measure_every": 1, "refractory": 0.5}


def network(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).double()


def make_optimizer(net: torch.nn.Module, weight_decay: Any = 0.3) -> torch.optim.Optimizer:
    decays = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.5)


class Run:
    """A loop of accelerate over 12 updates of 16 samples, in `pieces` micro-batches each."""

    def __init__(
        self, kind: str, pieces: int = 1, seed: int = 0, weight_decay: Any = 0.3, compiled: bool = False
    ) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=pieces)
        self.net, self.kind, self.pieces = network(seed), kind, pieces
        self.model, self.optimizer = self.accelerator.prepare(self.net, make_optimizer(self.net, weight_decay))
        if compiled:
            self.model = torch.compile(self.model, backend="eager")
        self.decays: list[list[float]] = []
        if kind == "schedule":
            self.scheduler = adapter.AcceleratedWeightDecay(self.accelerator, self.optimizer, linear(STEPS))
        else:
            self.scheduler = adapter.AcceleratedAutoL2(self.accelerator, self.optimizer, **SETTINGS)

    def train(self, start: int = 0, stop: int = STEPS, overflow: Any = ()) -> Run:
        for update in range(start, stop):
            rows = slice(16 * update, 16 * update + 16)
            for inputs, labels in zip(INPUTS[rows].chunk(self.pieces), LABELS[rows].chunk(self.pieces), strict=True):
                self._micro_batch(inputs, labels, update in overflow)
        return self

    def _micro_batch(self, inputs: torch.Tensor, labels: torch.Tensor, skip: bool) -> None:
        with self.accelerator.accumulate(self.model):
            output = self.model(inputs)
            loss = functional.cross_entropy(output, labels)
            self.accelerator.backward(loss)
            if self.kind == "autol2":
                self.scheduler.step(loss, (output.argmax(1) != labels).double().mean())
            if self.accelerator.sync_gradients and not skip:
                self.decays.append([float(group["weight_decay"]) for group in self.optimizer.param_groups])
            # what AcceleratedOptimizer does where its scaler found an overflow
            self.optimizer._is_overflow = skip
            if not skip:
                self.optimizer.step()
            if self.kind == "schedule":
                self.scheduler.step()
            self.optimizer.zero_grad()


def plain_loop(kind: str, steps: Any = range(STEPS)) -> tuple[Any, list[list[float]]]:
    net = network()
    optimizer = make_optimizer(net)
    scheduler: Any = (
        dc.WeightDecayScheduler(optimizer, linear(STEPS)) if kind == "schedule" else dc.AutoL2(optimizer, **SETTINGS)
    )
    used = []
    for update in steps:
        rows = slice(16 * update, 16 * update + 16)
        output = net(INPUTS[rows])
        loss = functional.cross_entropy(output, LABELS[rows])
        optimizer.zero_grad()
        loss.backward()
        if kind == "autol2":
            scheduler.step(loss, (output.argmax(1) != LABELS[rows]).double().mean())
        used.append([float(group["weight_decay"]) for group in optimizer.param_groups])
        optimizer.step()
        if kind == "schedule":
            scheduler.step()
    return net, used


def assert_same(ours: Any, theirs: Any, tolerance: float = 0.0) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("kind", ["schedule", "autol2"])
def test_it_does_what_a_plain_loop_does(kind: str, pieces: int):
    expected, used = plain_loop(kind)
    run = Run(kind, pieces).train()
    assert run.decays == used and len({decay for decay, _ in used}) > 1
    assert {decay for _, decay in used} == {0.0}
    assert_same(run.net, expected, 1e-12)


@pytest.mark.parametrize("kind", ["schedule", "autol2"])
def test_a_skipped_update_does_not_count(kind: str):
    skipped = {3, 4, 8}
    _, used = plain_loop(kind, [update for update in range(STEPS) if update not in skipped])
    run = Run(kind, 2).train(overflow=skipped)
    assert run.decays == used
    state = run.scheduler.state_dict()
    assert state["last_step" if kind == "schedule" else "steps"] == STEPS - len(skipped)


def test_a_scaler_that_overflows_is_seen():
    class Overflowing(torch.amp.GradScaler):
        pass

    parameter = torch.nn.Parameter(torch.ones(2))
    accelerator = accelerate.Accelerator(cpu=True)
    plain = torch.optim.SGD([parameter], lr=0.1, weight_decay=0.5)
    prepared = accelerate.optimizer.AcceleratedOptimizer(plain, scaler=Overflowing("cpu", init_scale=4.0))
    scheduler = adapter.AcceleratedWeightDecay(accelerator, prepared, linear(10))
    counts = []
    for factor in (1.0, float("inf"), 1.0):
        prepared.scaler.scale(parameter.sum() * factor).backward()
        prepared.step()
        scheduler.step()
        prepared.zero_grad()
        counts.append(scheduler.last_step)
    assert counts == [1, 1, 2]


@pytest.mark.parametrize("kind", ["schedule", "autol2"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, kind: str):
    whole = Run(kind, 2).train()
    first = Run(kind, 2).train(stop=5)
    first.accelerator.save_state(str(tmp_path))
    assert isinstance(json.loads((tmp_path / "decaycast_0.json").read_text()), dict)
    again = Run(kind, 2, seed=5, weight_decay=9.0)  # what the constructor got must not matter
    again.accelerator.load_state(str(tmp_path))
    again.train(start=5)
    assert first.decays + again.decays == whole.decays
    assert_same(again.net, whole.net)


def test_two_are_kept_apart(tmp_path: Path):
    run = Run("schedule")
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=1.0)
    second = adapter.AcceleratedWeightDecay(run.accelerator, run.accelerator.prepare(other), linear(100))
    run.train(stop=3)
    run.accelerator.save_state(str(tmp_path))
    run.scheduler.load_state_dict({"last_step": 0, "initial_weight_decay": [0.3, 0.0]})
    second.load_state_dict({"last_step": 9, "initial_weight_decay": [1.0]})
    run.accelerator.load_state(str(tmp_path))
    assert (run.scheduler.last_step, second.last_step) == (3, 0)


def test_a_state_that_was_saved_without_it_is_refused(tmp_path: Path):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(network())
    accelerator.save_state(str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"decaycast_0.json is missing: the state was saved without AcceleratedWeightDecay"
    ):
        Run("schedule").accelerator.load_state(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["schedule", "autol2"])
def test_a_compiled_model_trains_alike(kind: str):
    torch._dynamo.reset()
    weight_decay = torch.tensor(0.3, dtype=torch.float64)
    run, plain = Run(kind, 2, weight_decay=weight_decay, compiled=True), Run(kind, 2).train()
    held = run.optimizer.param_groups[0]["weight_decay"]  # prepare() has put a copy in its place
    run.train()
    torch._dynamo.reset()
    assert run.decays == plain.decays
    assert run.optimizer.param_groups[0]["weight_decay"] is held and isinstance(held, torch.Tensor)
    assert_same(run.net, plain.net, 1e-12)


def test_the_optimizer_has_to_be_prepared_first():
    accelerator, plain = accelerate.Accelerator(cpu=True), make_optimizer(network())
    for make in (
        lambda o: adapter.AcceleratedWeightDecay(accelerator, o, linear(3)),
        lambda o: adapter.AcceleratedAutoL2(accelerator, o),
    ):
        with pytest.raises(
            TypeError, match=r"expected the optimizer that accelerator.prepare\(...\) returns, got SGD; prepare it"
        ):
            make(plain)
    with pytest.raises(TypeError, match=r"expected an accelerate.Accelerator, got NoneType"):
        adapter.AcceleratedAutoL2(None, plain)


def test_the_wrong_optimizer_is_refused():
    accelerator = accelerate.Accelerator(cpu=True)
    adam = accelerator.prepare(torch.optim.Adam(network().parameters(), weight_decay=0.1))
    with pytest.raises(ValueError, match="Adam couples weight decay into an adaptive step"):
        adapter.AcceleratedAutoL2(accelerator, adam)


def test_loss_and_error_are_needed_where_it_measures():
    run = Run("autol2")
    with pytest.raises(
        ValueError, match="AutoL2 measures at this update: give loss and error of each of its micro-batches"
    ):
        run.scheduler.step()
