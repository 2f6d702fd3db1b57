"""L2-SP against the penalty written into the loss, against the same optimiser on w - w0, and against closed forms."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaycast.core.decay import WeightDecayScheduler
from decaycast.core.timescale import effective_rate
from decaycast.methods.stochnorm.l2sp import L2SP

Params = list[torch.nn.Parameter]
Make = Callable[[Params], torch.optim.Optimizer]
DECAY = 0.3


def parameters(seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64)) for shape in ((4, 3), (4,))
    ]


def loss_of(weights: list[torch.Tensor], step: int) -> torch.Tensor:
    """A small regression whose batch changes from step to step; not linear in the weights."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return (torch.tanh(x @ weights[0].T + weights[1]) - x.mean(1, keepdim=True)).square().mean()


def train(params: Params, optimizer: torch.optim.Optimizer, objective, steps: int = 30, start: int = 0) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        objective(step).backward()
        optimizer.step()


def without_gradient(params: Params, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps with a gradient of exactly zero; without any, torch would skip the parameters."""
    for _ in range(steps):
        for weight in params:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


# route 1: the penalty in the loss, differentiated by autograd


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.8, "dampening": 0.5},
        {"momentum": 0.9, "maximize": True},
        {"momentum": 0.9, "foreach": True},
        {"momentum": 0.9, "foreach": False},
        {"momentum": 0.9, "fused": True},
        {"momentum": 0.9, "fused": True, "maximize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_sgd_is_the_penalty_in_the_loss(options: dict, tensors: bool):
    sign = -1.0 if options.get("maximize") else 1.0
    lr, decay = (torch.tensor(v, dtype=torch.float64) if tensors else v for v in (0.05, DECAY))
    if tensors and options.get("fused"):
        decay = DECAY  # torch's fused SGD wants a number
    ours, theirs = parameters(), parameters()
    optimizer = torch.optim.SGD(ours, lr=lr, weight_decay=decay, **options)
    L2SP(optimizer)
    train(ours, optimizer, lambda step: sign * loss_of(ours, step))

    start = [weight.detach().clone() for weight in theirs]

    def penalised(step: int) -> torch.Tensor:
        squares = sum((weight - w0).square().sum() for weight, w0 in zip(theirs, start))
        return sign * (loss_of(theirs, step) + DECAY / 2 * squares)

    train(theirs, torch.optim.SGD(theirs, lr=0.05, **options), penalised)
    close(ours, theirs)
    plain = parameters()
    train(
        plain, torch.optim.SGD(plain, lr=0.05, weight_decay=DECAY, **options), lambda step: sign * loss_of(plain, step)
    )
    assert (plain[0] - ours[0]).abs().max() > 0.05  # the decay matters here, and where it goes to


# route 2: the same optimiser, unrecentred, on u = w - w0


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=DECAY),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=DECAY),
    "adamw maximize": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=DECAY, maximize=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=DECAY, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=DECAY, fused=True),
    "adamw tensors": lambda p: torch.optim.AdamW(
        p,
        lr=torch.tensor(0.02, dtype=torch.float64),
        weight_decay=torch.tensor(DECAY, dtype=torch.float64),  # type: ignore[arg-type]
        foreach=False,
    ),
    "adamw rate of shape (1,)": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor([0.02], dtype=torch.float64), weight_decay=DECAY, foreach=False
    ),
    "adam decoupled": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=DECAY, decoupled_weight_decay=True),
    "nadam decoupled": lambda p: torch.optim.NAdam(p, lr=0.02, weight_decay=DECAY, decoupled_weight_decay=True),
    "radam decoupled": lambda p: torch.optim.RAdam(p, lr=0.02, weight_decay=DECAY, decoupled_weight_decay=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_runs_as_on_the_distance(name: str):
    ours = parameters()
    optimizer = OPTIMIZERS[name](ours)
    L2SP(optimizer)
    train(ours, optimizer, lambda step: loss_of(ours, step))

    start = [weight.detach() for weight in parameters()]
    shifted = [torch.nn.Parameter(torch.zeros_like(w0)) for w0 in start]

    def objective(step: int) -> torch.Tensor:
        return loss_of([w0 + u for w0, u in zip(start, shifted)], step)

    train(shifted, OPTIMIZERS[name](shifted), objective)
    assert shifted[0].abs().max() > 0.01
    close(ours, [w0 + u for w0, u in zip(start, shifted)], 1e-10)  # Adam divides by roots of tiny second moments


def test_muon_runs_as_on_the_distance():
    def run(weight: torch.nn.Parameter, recentre: bool) -> torch.Tensor:
        optimizer = torch.optim.Muon([weight], lr=0.1, weight_decay=DECAY)
        if recentre:
            L2SP(optimizer)
        for step in range(10):  # gradients that do not depend on the weights: inside, Muon rounds them to bfloat16
            weight.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.step()
        return weight.detach()

    w0 = parameters()[0].detach()
    close([run(parameters()[0], True)], [w0 + run(torch.nn.Parameter(torch.zeros_like(w0)), False)])


# closed forms without gradient: e-folds


@pytest.mark.parametrize(
    ("make", "per_step"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1), 0.002),
        (lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1), 0.002),
        (lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1, momentum=0.5), 0.004),
        (lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1, momentum=0.5, dampening=0.25), 0.003),
    ],
)
def test_after_so_many_efolds_that_much_of_the_distance_is_left(make: Make, per_step: float):
    params = parameters()
    optimizer = make(params)
    decay = L2SP(optimizer)
    with torch.no_grad():
        for weight in params:
            weight.mul_(1.5)
    assert decay.distance() == pytest.approx(0.5, rel=1e-14)
    without_gradient(params, optimizer, 1000)
    (rate,) = effective_rate(optimizer)
    assert rate == pytest.approx(per_step)
    assert decay.distance() == pytest.approx(0.5 * math.exp(-1000 * rate), rel=0.03)
    if not optimizer.param_groups[0].get("momentum"):
        assert decay.distance() == pytest.approx(0.5 * (1 - rate) ** 1000, rel=1e-10)


def test_with_momentum_the_asymptotic_rate_is_the_slow_root():
    params = [torch.nn.Parameter(torch.ones(1, dtype=torch.float64))]
    lr, decay, momentum = 0.002, 0.1, 0.9
    optimizer = torch.optim.SGD(params, lr=lr, weight_decay=decay, momentum=momentum)
    pulled = L2SP(optimizer)
    params[0].data += 1
    without_gradient(params, optimizer, 300)
    before = pulled.distance()
    without_gradient(params, optimizer, 1)
    trace = 1 + momentum - lr * decay  # heavy ball: z^2 - trace*z + momentum = 0
    slow = (trace + math.sqrt(trace**2 - 4 * momentum)) / 2
    assert pulled.distance() / before == pytest.approx(slow, rel=1e-9)
    # to first order the two differ by a share r*(b/(1-b) + 1/2), here 1.9 %
    assert effective_rate(optimizer)[0] == pytest.approx(-math.log(slow), rel=0.022)


@settings(max_examples=60, deadline=None)
@given(
    lr=st.floats(1e-3, 0.5),
    decay=st.floats(1e-3, 1.0),
    momentum=st.floats(0.0, 0.95),
    start=st.floats(-5.0, 5.0),
    moved=st.floats(-3.0, 3.0),
    gradients=st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=15),
    decoupled=st.booleans(),
)
def test_one_weight_follows_the_recurrence(lr, decay, momentum, start, moved, gradients, decoupled):
    weight = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    # b1 = b2 = 0 makes AdamW's step the sign of the gradient
    optimizer = (
        torch.optim.AdamW([weight], lr=lr, weight_decay=decay, betas=(0.0, 0.0), eps=0.0)
        if decoupled
        else torch.optim.SGD([weight], lr=lr, weight_decay=decay, momentum=momentum)
    )
    L2SP(optimizer)
    weight.data += moved
    distance, velocity = moved, 0.0
    for gradient in gradients:
        gradient = gradient if abs(gradient) > 1e-3 else 1.0
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        if decoupled:
            distance = (1 - lr * decay) * distance - lr * math.copysign(1, gradient)
        else:
            velocity = momentum * velocity + gradient + decay * distance
            distance -= lr * velocity
    assert weight.item() == pytest.approx(start + distance, rel=1e-10, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), decay=st.floats(1e-3, 10.0), decoupled=st.booleans())
def test_at_the_start_without_gradient_nothing_moves(seed: int, decay: float, decoupled: bool):
    params = parameters(seed)
    kind = torch.optim.AdamW if decoupled else torch.optim.SGD
    optimizer = kind(params, lr=0.05, weight_decay=decay)
    pulled = L2SP(optimizer)
    without_gradient(params, optimizer, 20)
    assert pulled.distance() < 1e-14


# what is pulled and what is not


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_new_head_decays_to_zero(kind: type):
    backbone, head = parameters()
    first = head.detach().clone()
    optimizer = kind([{"params": [backbone]}, {"params": [head], "weight_decay": 0.5}], lr=0.1, weight_decay=0.01)
    decay = L2SP(optimizer, free=iter([head]))
    before = backbone.detach().clone()
    without_gradient([backbone, head], optimizer, 50)
    close([head], [first * 0.95**50])
    close([backbone], [before])
    assert decay.distance() < 1e-15  # the head does not count


def test_one_free_tensor_need_not_be_in_a_list():
    backbone, head = parameters()
    optimizer = torch.optim.SGD([backbone, head], lr=0.1, weight_decay=0.5)
    L2SP(optimizer, free=head)
    first = head.detach().clone()
    without_gradient([backbone, head], optimizer, 1)
    close([head], [0.95 * first])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_groups_without_decay_and_parameters_without_gradient_stay(kind: type):
    moving, undecayed, frozen = *parameters(), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = kind(
        [{"params": [moving, frozen], "weight_decay": 0.5}, {"params": [undecayed], "weight_decay": 0.0}], lr=0.1
    )
    pulled = L2SP(optimizer)
    start = moving.detach().clone()
    with torch.no_grad():
        for weight in (moving, undecayed, frozen):
            weight.add_(1.0)
    expected = undecayed.detach().clone(), frozen.detach().clone()
    without_gradient([moving, undecayed], optimizer, 3)  # `frozen` has no gradient
    close([moving], [start + 0.95**3])
    assert torch.equal(undecayed, expected[0]) and torch.equal(frozen, expected[1])
    assert pulled.distance() > 0


def test_schedules_of_rate_and_decay_are_followed():
    params, shifted = parameters(), [torch.nn.Parameter(torch.zeros_like(weight)) for weight in parameters()]
    start = [weight.detach() for weight in parameters()]
    for ours, objective, recentre in (
        (params, lambda step: loss_of(params, step), True),
        (shifted, lambda step: loss_of([w0 + u for w0, u in zip(start, shifted)], step), False),
    ):
        optimizer = torch.optim.AdamW(ours, lr=0.05, weight_decay=1.0)
        if recentre:
            L2SP(optimizer)
        rates = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
        decays = WeightDecayScheduler(optimizer, lambda step: 0.0 if step in (3, 4) else 1 / (1 + step))
        for step in range(12):
            train(ours, optimizer, objective, steps=1, start=step)
            rates.step()
            decays.step()
    close(params, [w0 + u for w0, u in zip(start, shifted)], 1e-10)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_parameter_that_joins_is_held_where_it_is_when_first_seen(kind: type):
    first, late = parameters()
    optimizer = kind([first], lr=0.1, weight_decay=0.5)
    L2SP(optimizer)
    without_gradient([first], optimizer, 2)
    with torch.no_grad():
        late.fill_(3.0)
    optimizer.add_param_group({"params": [late]})
    without_gradient([first, late], optimizer, 1)  # seen here
    with torch.no_grad():
        late.fill_(5.0)
    without_gradient([first, late], optimizer, 1)
    close([late], [torch.full((4,), 3.0 + 2.0 * 0.95, dtype=torch.float64)])


# gradients, closures, scalers: what a step may bring with it


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"fused": True}], ids=str)
def test_gradients_are_after_the_step_what_they_were_before(options: dict):
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.05, weight_decay=DECAY, **options)
    L2SP(optimizer)
    loss_of(params, 0).backward()
    before = [(weight.grad, weight.grad.clone()) for weight in params if weight.grad is not None]
    optimizer.step()
    for weight, (same, values) in zip(params, before, strict=True):
        assert weight.grad is same
        assert torch.equal(same, values)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("way", ["positional", "keyword"])
def test_a_closure_gives_the_same_weights(name: str, way: str):
    losses = {}
    weights = {}
    for closing in (True, False):
        params = weights[closing] = parameters()
        optimizer = OPTIMIZERS[name](params)
        L2SP(optimizer)
        losses[closing] = []
        for step in range(8):

            def closure(step=step, params=params, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(params, step)
                loss.backward()
                return loss

            if closing:
                loss = optimizer.step(closure) if way == "positional" else optimizer.step(closure=closure)
            else:
                loss = closure()
                optimizer.step()
            losses[closing].append(loss.item())
    close(weights[True], weights[False], 1e-15)
    assert losses[True] == losses[False]


class TwoCalls(torch.optim.SGD):
    """An SGD that asks its closure twice, as methods with an inner ascent do; the name "SGD" stands in its line of classes."""

    def step(self, closure=None):  # type: ignore[override]
        assert closure is not None
        with torch.enable_grad():
            closure()
        return super().step(closure)


def test_a_closure_called_twice_is_pulled_once():
    weights = []
    for kind, gathers in ((TwoCalls, 1.0), (torch.optim.SGD, 2.0)):
        (weight, _) = parameters()
        optimizer = kind([weight], lr=0.1, weight_decay=0.5)
        L2SP(optimizer)
        weight.data += 1
        optimizer.zero_grad()

        def closure(weight=weight, gathers=gathers):
            loss = gathers * weight.sum()  # without zero_grad: two calls add up
            loss.backward()
            return loss

        optimizer.step(closure)
        weights.append(weight)
    close([weights[0]], [weights[1]])


def scaled_steps(make: Make, scales: bool, overflow_at: int | None = None) -> list[torch.Tensor]:
    params = [torch.nn.Parameter(weight.detach().float()) for weight in parameters()]
    optimizer = make(params)
    L2SP(optimizer)
    with torch.no_grad():
        for weight in params:
            weight.add_(0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scales)
    for step in range(6):
        if step == overflow_at and not scales:
            continue
        optimizer.zero_grad()
        loss = loss_of([weight.double() for weight in params], step).float()
        scaler.scale(loss).backward()
        if step == overflow_at:
            params[0].grad = torch.full_like(params[0], math.inf)
        scaler.step(optimizer)
        scaler.update()
    return [weight.detach() for weight in params]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflow_at", [None, 2])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_gradient_scaler_changes_nothing(kind: type, overflow_at: int | None, fused: bool):
    def make(params: Params) -> torch.optim.Optimizer:
        return kind(params, lr=0.05, weight_decay=DECAY, fused=fused)

    close(scaled_steps(make, True, overflow_at), scaled_steps(make, False, overflow_at), 1e-5)


class Breaks(torch.optim.SGD):
    """An SGD whose step can be made to fail."""

    broken = False

    def step(self, closure=None):  # type: ignore[override]
        if self.broken:
            raise RuntimeError("out of memory")
        return super().step(closure)


def test_a_step_that_broke_off_is_not_pulled_twice():
    (weight, _) = parameters()
    optimizer = Breaks([weight], lr=0.1, weight_decay=0.5)
    L2SP(optimizer)
    start = weight.detach().clone()
    weight.data += 1
    optimizer.broken = True
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.broken = False
    optimizer.step()
    close([weight], [start + 0.95])
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_w0_follows_the_model_to_another_dtype(kind: type, dtype: torch.dtype):
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.5)
    decay = L2SP(optimizer)
    start = model.weight.detach().clone()
    model.to(dtype)
    with torch.no_grad():
        model.weight.add_(1.0)
    without_gradient(list(model.parameters()), optimizer, 10)  # type: ignore[arg-type]
    assert model.weight.dtype == dtype
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(model.weight.double(), start + 0.95**10, rtol=0, atol=tolerance)
    assert decay.distance() > 0


def test_long_runs_in_float32_come_back_without_drift():
    weight = torch.nn.Parameter(torch.linspace(-2, 2, 101))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    decay = L2SP(optimizer)
    weight.data += 0.1
    without_gradient([weight], optimizer, 2_000)  # 20 e-folds: nothing is left but where float32's spacing stops it
    assert decay.distance() < 2**-24 / 0.01  # half a spacing over r


# distance


def test_the_distance_is_relative_over_all_that_is_held():
    a, b = torch.nn.Parameter(torch.tensor([3.0])), torch.nn.Parameter(torch.tensor([4.0, 0, 0], dtype=torch.bfloat16))
    decay = L2SP(torch.optim.SGD([{"params": [a], "weight_decay": 0.1}, {"params": [b]}], lr=0.1))
    assert decay.distance() == 0.0
    a.data -= 1.0
    b.data[1:] = -1.0  # its norm, the root of 2, is summed up in more than bfloat16
    assert decay.distance() == pytest.approx(math.sqrt(3) / 5)


def test_the_distance_from_zero():
    weight = torch.nn.Parameter(torch.zeros(3))
    decay = L2SP(torch.optim.SGD([weight], lr=0.1, weight_decay=0.1))
    assert decay.distance() == 0.0
    weight.data += 1
    assert decay.distance() == math.inf


# states


def test_a_resumed_run_is_pulled_to_the_first_start():
    make = OPTIMIZERS["sgd"]
    whole = parameters()
    optimizer = make(whole)
    L2SP(optimizer)
    train(whole, optimizer, lambda step: loss_of(whole, step), steps=20)

    params = parameters()
    optimizer = make(params)
    decay = L2SP(optimizer)
    train(params, optimizer, lambda step: loss_of(params, step), steps=9)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "l2sp": decay.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(weight.detach().clone()) for weight in params]
    optimizer = make(resumed)
    decay = L2SP(optimizer)
    optimizer.load_state_dict(saved["optimizer"])
    decay.load_state_dict(saved["l2sp"])
    train(resumed, optimizer, lambda step: loss_of(resumed, step), steps=11, start=9)
    close(resumed, whole, 0.0)


def test_a_loaded_state_is_a_copy_of_the_models_kind():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    decay = L2SP(torch.optim.SGD([weight], lr=0.1, weight_decay=0.1))
    saved = {"start": [torch.tensor([2.0, 0.0])]}
    decay.load_state_dict(saved)
    saved["start"][0].zero_()
    (start,) = decay.state_dict()["start"]
    assert start.dtype == torch.float64 and start.tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, r"no state of L2SP: missing \['start'\]"),
        (lambda state: {"start": state["start"][:1]}, "the state holds 1 parameters but the optimizer has 2"),
        (lambda state: {"start": [None, None]}, "parameter 0 is free in the state but not here"),
        (lambda state: {"start": [state["start"][0], torch.ones(4)]}, "parameter 1 is held in the state but not here"),
        (
            lambda state: {"start": [torch.ones(3, 4), None]},
            r"parameter 0 has shape \(4, 3\) but shape \(3, 4\) in the",
        ),
    ],
)
def test_a_state_of_something_else_is_refused_and_nothing_changes(change, message: str):
    params = parameters()
    decay = L2SP(torch.optim.SGD(params, lr=0.1, weight_decay=0.1), free=params[1:])
    assert decay.state_dict()["start"][1] is None
    before = copy.deepcopy(decay.state_dict())
    with pytest.raises(ValueError, match=message):
        decay.load_state_dict(change(decay.state_dict()))
    assert torch.equal(decay.state_dict()["start"][0], before["start"][0])


# an end, and what is refused


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_removed_the_optimizer_decays_to_zero_again(kind: type):
    params = parameters()
    optimizer = kind(params, lr=0.1, weight_decay=0.5)
    decay = L2SP(optimizer)
    without_gradient(params, optimizer, 2)
    decay.remove()
    decay.remove()
    before = [weight.detach().clone() for weight in params]
    without_gradient(params, optimizer, 2)
    close(params, [weight * 0.95**2 for weight in before])
    L2SP(optimizer)  # and may be recentred anew
    moved = [weight.detach().clone() for weight in params]
    without_gradient(params, optimizer, 2)
    close(params, moved)


def test_a_second_recentring_is_refused():
    optimizer = torch.optim.SGD(parameters(), lr=0.1, weight_decay=0.5)
    L2SP(optimizer)
    with pytest.raises(ValueError, match=r"recentred already; call remove\(\) of the first L2SP"):
        L2SP(optimizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: torch.optim.SGD(p, lr=0.1),
            "no parameter group of this SGD has a weight decay.*set weight_decay first",
        ),
        (lambda p: torch.optim.LBFGS(p), "no parameter group of this LBFGS has a weight decay"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "Adam couples weight decay into an adaptive step.*Use AdamW"),
        (lambda p: torch.optim.Adafactor(p, weight_decay=0.1), "what weight_decay means in Adafactor is not known"),
    ],
)
def test_an_optimizer_without_a_rate_is_refused(make: Make, message: str):
    optimizer = make(parameters())
    with pytest.raises(ValueError, match=message):
        L2SP(optimizer)


def test_decay_that_appears_in_a_coupled_adam_is_refused_at_the_step():
    params = parameters()
    optimizer = torch.optim.Adam(
        [{"params": params[:1], "decoupled_weight_decay": True, "weight_decay": 0.1}, {"params": params[1:]}]
    )
    L2SP(optimizer)
    without_gradient(params, optimizer, 1)
    optimizer.param_groups[1]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="Adam couples weight decay"):
        without_gradient(params, optimizer, 1)


def test_free_parameters_must_be_the_optimizers():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD([model.weight], lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"free parameter at position 1, of shape \(2,\), is not in the optimizer"):
        L2SP(optimizer, free=[model.weight, model.bias])
    with pytest.raises(ValueError, match="every parameter that decays is free, so there is nothing to recentre"):
        L2SP(optimizer, free=[model.weight])
    with pytest.raises(TypeError, match=r"got the module Linear; give its \.parameters\(\)"):
        L2SP(optimizer, free=model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="free takes parameters, got str at position 0"):
        L2SP(optimizer, free=["weight"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="L2SP needs a torch optimizer, got Linear"):
        L2SP(model)  # type: ignore[arg-type]
    L2SP(optimizer)  # a refused call left nothing behind
