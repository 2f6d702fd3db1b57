"""Lightning's callbacks against a plain loop, an interrupted run against a whole one, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import decaycast as dc
from decaycast.core.schedule import cosine, linear
from decaycast.methods.label_noise.method import LabelNoise, TargetNoise
from decaycast.methods.label_noise.monitor import CurvatureMonitor
from decaycast.methods.large_lr.noise import activation_noises

REASON = "Lightning is not installed: pip install 'decaycast[lightning]'"
adapter = pytest.importorskip("decaycast.adapters.lightning", reason=REASON, exc_type=ImportError)
noise = pytest.importorskip("decaycast.adapters.lightning_noise", reason=REASON, exc_type=ImportError)
pl = pytest.importorskip("lightning.pytorch", reason=REASON)
callbacks = pytest.importorskip("lightning.pytorch.callbacks", reason=REASON)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]

STEPS = 12
INPUTS = torch.randn(96, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = (INPUTS[:, 0] + 0.8 * torch.randn(96, generator=torch.Generator().manual_seed(2)) > 0).long()


def network(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).double()


def groups(net: torch.nn.Module, weight_decay: Any) -> list[dict[str, Any]]:
    """Matrices decay, biases do not."""
    return [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(net: torch.nn.Module, weight_decay: Any = 0.3) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups(net, weight_decay), lr=0.05, momentum=0.5)


class Module(pl.LightningModule):
    def __init__(self, weight_decay: Any = 0.3, seed: int = 0) -> None:
        super().__init__()
        self.net, self.weight_decay = network(seed), weight_decay
        self.seen: list[torch.Tensor] = []
        self.decays: list[list[float]] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        self.seen.append(labels)
        output = self(inputs)
        self.log("train_acc", (output.argmax(1) == labels).double().mean())
        return functional.cross_entropy(output, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.seen.append(labels)
        self.log("val_loss", functional.cross_entropy(self(inputs), labels))

    def on_before_zero_grad(self, optimizer: Any) -> None:
        pass

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.decays.append([float(group["weight_decay"]) for group in optimizer.param_groups])

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.net, self.weight_decay)


def loader(size: int = 16) -> DataLoader:
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=size)


def trainer(folder: Path, *callbacks: Any, steps: int = STEPS, **settings: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, **quiet | settings
    )


def plain_loop(
    steps: int = STEPS, size: int = 16, drive: Any = None, weight_decay: Any = 0.3
) -> tuple[Any, list[list[float]]]:
    """The same training by hand; ``drive(optimizer)`` gives (before, after): what is called around each update."""
    net = network()
    optimizer = make_optimizer(net, weight_decay)
    before, after = drive(optimizer)
    used = []
    batches = [batch for _ in range(steps) for batch in loader(size)]
    for inputs, labels in batches[:steps]:
        output = net(inputs)
        loss = functional.cross_entropy(output, labels)
        optimizer.zero_grad()
        loss.backward()
        before(loss.detach(), 1 - (output.argmax(1) == labels).double().mean())
        optimizer.step()
        used.append([float(group["weight_decay"]) for group in optimizer.param_groups])
        after()
    return net, used


def nothing(*_: Any) -> None:
    pass


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module, rtol: float = 0.0) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


# against a plain loop


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_schedule_does_what_it_does_in_a_plain_loop(tmp_path: Path, pieces: int):
    def drive(optimizer: Any) -> Any:
        return nothing, dc.WeightDecayScheduler(optimizer, linear(STEPS)).step

    expected, used = plain_loop(drive=drive)
    module, callback = Module(), adapter.WeightDecayCallback(linear(STEPS))
    trainer(tmp_path, callback, accumulate_grad_batches=pieces).fit(module, loader(16 // pieces))
    assert module.decays == used and len(used) == STEPS
    assert {decay for _, decay in used} == {0.0}
    assert callback.get_last_wd() == [0.0, 0.0]
    assert_same(module.net, expected, rtol=0.0 if pieces == 1 else 1e-12)


def test_a_schedule_by_name_takes_the_length_of_the_fit(tmp_path: Path):
    by_name, by_hand = Module(), Module()
    trainer(tmp_path, adapter.WeightDecayCallback("cosine")).fit(by_name, loader())
    trainer(tmp_path, adapter.WeightDecayCallback(cosine(STEPS))).fit(by_hand, loader())
    assert by_name.decays == by_hand.decays
    assert by_name.decays[0] == [0.3, 0.0] and by_name.decays[-1][0] < 0.01


SETTINGS = {"start": 0.4, "measure_every": 2, "refractory": 0.1}


@pytest.mark.parametrize("pieces", [1, 4])
def test_autol2_does_what_it_does_in_a_plain_loop(tmp_path: Path, pieces: int):
    made: list[dc.AutoL2] = []

    def drive(optimizer: Any) -> Any:
        made.append(dc.AutoL2(optimizer, **SETTINGS))
        return made[0].step, nothing

    expected, used = plain_loop(24, drive=drive)
    module, callback = Module(), adapter.AutoL2Callback(accuracy="train_acc", **SETTINGS)
    trainer(tmp_path, callback, steps=24, accumulate_grad_batches=pieces).fit(module, loader(16 // pieces))
    assert made[0].rule.decays, "the test needs a decay"
    assert module.decays == used
    assert {decay for _, decay in used} == {0.0}
    assert_same(module.net, expected, rtol=0.0 if pieces == 1 else 1e-12)


def test_without_an_accuracy_the_loss_alone_decides(tmp_path: Path):
    def drive(optimizer: Any) -> Any:
        auto = dc.AutoL2(optimizer, **SETTINGS)
        return (lambda loss, error: auto.step(loss, loss / (1 + loss))), nothing  # another error that follows the loss

    _, used = plain_loop(24, drive=drive)
    module = Module()
    trainer(tmp_path, adapter.AutoL2Callback(**SETTINGS), steps=24).fit(module, loader())
    assert module.decays == used and len({decay for decay, _ in used}) > 1


class Scheduled(Module):
    interval = "step"

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.net)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4 if self.interval == "step" else 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_the_clock_of_efolds_knows_the_learning_rates_to_come(tmp_path: Path, interval: str):
    callback, module = adapter.AutoL2Callback(clock="efolds", budget_efolds=0.8, measure_every=10**6), Scheduled()
    module.interval = interval
    trainer(tmp_path, callback).fit(module, loader())
    every = 4 if interval == "step" else 6
    rates = [0.05 * 0.5 ** (step // every) for step in range(STEPS)]
    assert callback.held.rule.horizon == pytest.approx(sum(rates) / (1 - 0.5), rel=1e-12)
    spent = sum(rate / (1 - 0.5) * decay for rate, (decay, _) in zip(rates, module.decays, strict=True))
    assert spent == pytest.approx(callback.held.rule.efolds, rel=1e-12)
    assert 0.75 < spent <= 0.8


def test_the_loss_is_unscaled_under_16_bit_precision(tmp_path: Path):
    plugins = pytest.importorskip("lightning.pytorch.plugins")
    seen = []

    class Watched(adapter.AutoL2Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.extend(pair.tolist() for pair in self._micro)
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module = Module()
    module.net = module.net.float()
    data = DataLoader(TensorDataset(INPUTS.float(), LABELS), batch_size=16)
    trainer(tmp_path, Watched("train_acc", measure_every=1), steps=1, plugins=[plugin]).fit(module, data)
    first = INPUTS[:16].float()
    expected = functional.cross_entropy(network().float()(first), LABELS[:16]).item()
    assert seen[0][0] == pytest.approx(expected, rel=0.01)
    assert 0 <= seen[0][1] <= 1


# resumed


def resumed(folder: Path, make: Any) -> tuple[Any, Any]:
    """(the module of a run that goes on from the checkpoint of another's first half, that other's module)."""

    def saving() -> Any:
        keep = callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, save_on_train_epoch_end=True)
        # by max_epochs: with max_steps Lightning 2.6 itself repeats a batch after a checkpoint at the end of an epoch
        return trainer(folder, make(), keep, enable_checkpointing=True, steps=-1, max_epochs=2)

    torch.manual_seed(7)
    whole = Module()
    saving().fit(whole, loader())
    torch.manual_seed(8)
    second = Module(weight_decay=9.0, seed=5)  # what the constructor got must not matter
    saving().fit(second, loader(), ckpt_path=folder / f"step={STEPS // 2}.ckpt")
    second.decays, second.seen = whole.decays[: STEPS // 2] + second.decays, whole.seen[: STEPS // 2] + second.seen
    return second, whole


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapter.WeightDecayCallback(linear(STEPS)),
        lambda: adapter.AutoL2Callback("train_acc", **SETTINGS),
        lambda: adapter.AutoL2Callback(clock="efolds", steps=STEPS),
        lambda: noise.LabelNoiseCallback(0.3, 2),
    ],
    ids=["schedule", "autol2", "efolds", "label noise"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, make: Any):
    second, whole = resumed(tmp_path, make)
    assert second.decays == whole.decays and len(whole.decays) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(second.seen, whole.seen, strict=True))
    assert_same(second.net, whole.net)


def test_a_resumed_monitor_and_log_go_on(tmp_path: Path):
    rows, logged = [], []

    class Kept(adapter.DecayLogCallback):
        def build(self, trainer: Any, module: Any, optimizer: Any) -> Any:
            log = super().build(trainer, module, optimizer)
            log.log = lambda step, values: logged.append((step, values))
            return log

    def make() -> Any:
        callback = noise.CurvatureCallback(loader(), functional.cross_entropy, every=4, network="net")
        rows.append(callback)
        return callback

    resumed(tmp_path, make)
    whole, second = ([[row["step"], row["trace"]] for row in callback.rows] for callback in rows)
    assert second == whole and [step for step, _ in whole] == [0, 4, 8]
    resumed(tmp_path / "log", lambda: Kept(every=1))
    assert logged[STEPS // 2 : STEPS] == logged[STEPS:] and [step for step, _ in logged[:STEPS]] == list(range(STEPS))


# compiled


class Silent(Module):
    """Without `self.log`, which torch 2.13 cannot trace in Lightning 2.6, with callbacks or without."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_a_compiled_module_trains_alike(tmp_path: Path):
    def run(compiled: bool) -> Any:
        torch._dynamo.reset()
        torch.manual_seed(3)
        module = Silent(weight_decay=torch.tensor(0.3, dtype=torch.float64))
        given = torch.compile(module, backend="eager") if compiled else module
        both = [adapter.WeightDecayCallback(linear(STEPS)), noise.LabelNoiseCallback(0.3, 2)]
        trainer(tmp_path, *both).fit(given, loader())
        torch._dynamo.reset()
        return module

    compiled, plain = run(True), run(False)
    assert compiled.decays == plain.decays and plain.decays[3] == [0.3 * (1 - 3 / STEPS), 0.0]
    assert_same(compiled.net, plain.net, rtol=1e-12)


def test_a_tensor_weight_decay_is_filled_in_place(tmp_path: Path):
    weight_decay = torch.tensor(0.5, dtype=torch.float64)
    module = Module(weight_decay=weight_decay)
    trainer(tmp_path, adapter.WeightDecayCallback(linear(2 * STEPS))).fit(module, loader())
    assert weight_decay.item() == pytest.approx(0.25)
    assert module.optimizers().param_groups[0]["weight_decay"] is weight_decay


# label noise, activation noise, curvature, the log


def test_training_labels_are_noisy_and_validation_labels_clean(tmp_path: Path):
    callback = noise.LabelNoiseCallback(0.3, 2, generator=torch.Generator().manual_seed(4))
    module = Module()
    trainer(tmp_path, callback, num_sanity_val_steps=0).fit(module, loader(), loader())
    by_hand = LabelNoise(0.3, 2, torch.Generator().manual_seed(4))
    batches = [labels for _, labels in loader()]
    expected = []
    for _ in range(2):  # two epochs of six updates, each followed by a validation
        expected += [by_hand(labels) for labels in batches] + batches
    assert len(module.seen) == len(expected) == 24
    assert all(torch.equal(seen, wanted) for seen, wanted in zip(module.seen, expected, strict=True))
    assert "training_step" not in vars(module)


def test_any_noise_with_its_state_will_do(tmp_path: Path):
    class Regression(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen.append(batch["labels"])
            return functional.mse_loss(self(batch["inputs"])[:, 0], batch["labels"])

    module = Regression()
    data = DataLoader([{"inputs": x, "labels": x[1]} for x in INPUTS], batch_size=16)
    trainer(tmp_path, noise.LabelNoiseCallback(noise=TargetNoise(0.5)), steps=2).fit(module, data)
    distance = (torch.cat(module.seen) - INPUTS[:32, 1]).abs()
    torch.testing.assert_close(distance, torch.full_like(distance, 0.5))


class FailsError(Exception):
    pass


def test_the_module_is_given_back_after_an_error(tmp_path: Path):
    class Fails(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise FailsError

    module = Module()
    three = [noise.LabelNoiseCallback(0.3, 2), noise.ActivationNoiseCallback(0.4, report=None), Fails()]
    with pytest.raises(FailsError):
        trainer(tmp_path, *three).fit(module, loader())
    assert "training_step" not in vars(module) and not activation_noises(module)
    assert len(module.seen) == 1


def test_activation_noise_is_there_in_training_alone_and_falls(tmp_path: Path, capsys: Any):
    levels = []

    class Watched(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            (layer,) = activation_noises(self).values()
            levels.append(layer.std)
            same = torch.equal(self(batch[0]), self(batch[0]))
            assert same == (layer.std == 0)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert torch.equal(self(batch[0]), self(batch[0]))

    module = Watched()
    keys = list(module.state_dict())
    trainer(tmp_path, noise.ActivationNoiseCallback(0.4, linear(6)), accumulate_grad_batches=2, steps=8).fit(
        module, loader(), loader()
    )
    expected = [0.4 * max(0.0, 1 - update / 6) for update in range(8) for _ in range(2)]
    assert levels == pytest.approx(expected)
    assert "1 of 1 places" in capsys.readouterr().out
    assert list(module.state_dict()) == keys and not activation_noises(module)


def test_the_level_of_activation_noise_is_restored(tmp_path: Path):
    seen = []

    class Watched(noise.ActivationNoiseCallback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(next(iter(self.held._noises.values())).std)

    resumed(tmp_path, lambda: Watched(0.4, "linear", report=None))
    assert seen[STEPS // 2 : STEPS] == seen[STEPS:] and seen[0] == 0.4 and 0 < seen[-1] < 0.05


def test_the_monitor_measures_what_it_measures_elsewhere(tmp_path: Path):
    callback = noise.CurvatureCallback(loader(), functional.cross_entropy, every=5)
    trainer(tmp_path, callback, accumulate_grad_batches=2).fit(Module(), loader())
    assert [row["step"] for row in callback.rows] == [0, 5, 10]
    monitor, net = CurvatureMonitor(loader(), functional.cross_entropy), network()
    monitor.prepare(net)
    row = monitor.measure(0, make_optimizer(net))
    for name in ("trace", "top_eigenvalue", "regularizer", "lr"):
        assert callback.rows[0][name] == pytest.approx(row[name], rel=1e-12)


def test_the_log_reaches_the_loggers_and_adds_up(tmp_path: Path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")

    rows: list[tuple[Any, dict[str, float]]] = []

    class Kept(loggers.CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if "reg/efolds" in metrics:
                rows.append((step, dict(metrics)))

    both = [adapter.DecayLogCallback(every=5), adapter.WeightDecayCallback(linear(STEPS))]
    trainer(tmp_path, *both, logger=Kept(tmp_path)).fit(Module(), loader())
    assert [step for step, _ in rows] == [0, 5, 10, 11]
    fn = linear(STEPS)
    for step, values in rows:
        spent = dc.efolds(lr=lambda t: 0.05 * fn(t), weight_decay=0.3, steps=step, momentum=0.5) if step else 0.0
        assert values["reg/efolds"] == pytest.approx(spent, abs=1e-12)
        assert values["reg/weight_decay"] == pytest.approx(0.3 * fn(step))
        assert values["reg/tau"] == pytest.approx(1 / (0.05 * 0.3 * fn(step) / 0.5 * STEPS))


# refused


class Several(Module):
    def configure_optimizers(self) -> Any:
        return [make_optimizer(self.net[:1]), make_optimizer(self.net[2:])]


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Adam(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), weight_decay=0.1)


class NoDecay(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.Rprop(self.net.parameters())


@pytest.mark.parametrize(
    ("module", "callback", "message"),
    [
        (Manual, lambda: adapter.WeightDecayCallback("linear"), "WeightDecayCallback needs automatic optimization"),
        (Manual, lambda: adapter.AutoL2Callback(), "AutoL2Callback needs automatic optimization: in manual"),
        (Manual, lambda: noise.LabelNoiseCallback(0.1, 2), "LabelNoiseCallback needs automatic optimization"),
        (Adam, lambda: adapter.AutoL2Callback(), "Adam couples weight decay into an adaptive step"),
        (NoDecay, lambda: adapter.WeightDecayCallback("linear"), "parameter group 0 has no 'weight_decay'"),
        (Module, lambda: adapter.AutoL2Callback("acc"), r"training_step logs no 'acc' \(but train_acc\); add self.log"),
        (Module, lambda: adapter.WeightDecayCallback("linea"), "unknown schedule 'linea'; did you mean 'linear'"),
    ],
)
def test_what_does_not_fit_is_refused_when_training_starts(tmp_path: Path, module: Any, callback: Any, message: str):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callback()).fit(module(), loader())


def test_several_optimizers_are_refused():
    optimizers = [make_optimizer(network()), make_optimizer(network())]
    base = pytest.importorskip("decaycast.adapters.lightning_base")

    class Two:
        pass

    two = Two()
    two.optimizers, two.automatic_optimization = optimizers, True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="AutoL2Callback needs exactly one optimizer, but configure_optimizers gave 2"):
        base.only_optimizer(two, two, "AutoL2Callback")


def test_before_the_optimizer_exists(tmp_path: Path):
    for callback in (adapter.WeightDecayCallback("linear"), adapter.AutoL2Callback()):
        with pytest.raises(RuntimeError, match=r"gets its optimizer in trainer.fit\(...\); there is none yet"):
            callback.get_last_wd()


def test_a_wrong_setting_shows_at_once():
    with pytest.raises(ValueError, match="factor must be > 1"):
        adapter.AutoL2Callback(factor=0.5)
    with pytest.raises(ValueError, match="start cannot be given with clock='efolds'"):
        adapter.AutoL2Callback(clock="efolds", start=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'begin'"):
        adapter.AutoL2Callback(begin=0.5)
    with pytest.raises(TypeError, match="give either flip and num_classes, or noise="):
        noise.LabelNoiseCallback()
    with pytest.raises(TypeError, match="give either flip and num_classes, or noise="):
        noise.LabelNoiseCallback(0.1, 2, noise=TargetNoise(0.1))


def test_a_fit_without_end_has_no_named_schedule(tmp_path: Path):
    endless = trainer(tmp_path, adapter.WeightDecayCallback("linear"), steps=-1, max_epochs=-1)
    with pytest.raises(ValueError, match=r"the Trainer expects inf updates; give it max_steps or max_epochs"):
        endless.fit(Module(), loader())


def test_noise_finds_no_place(tmp_path: Path):
    class Linear(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(5, 2)).double()

    with pytest.raises(ValueError, match="no activation in this model can get noise"):
        trainer(tmp_path, noise.ActivationNoiseCallback(0.1)).fit(Linear(), loader())
