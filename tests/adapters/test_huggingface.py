"""The Trainer's callbacks on a small text classifier made from a config: against a plain loop, resumed, compiled, refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import decaycast as dc
from decaycast.core.schedule import linear
from decaycast.methods.label_noise.method import LabelNoise

REASON = "the Hugging Face Trainer is not installed: pip install 'decaycast[hf]'"
adapter = pytest.importorskip("decaycast.adapters.huggingface", reason=REASON, exc_type=ImportError)
auto = pytest.importorskip("decaycast.adapters.huggingface_autol2", reason=REASON, exc_type=ImportError)
noise = pytest.importorskip("decaycast.adapters.huggingface_noise", reason=REASON, exc_type=ImportError)
transformers = pytest.importorskip("transformers", reason=REASON)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

STEPS, LR, DECAY = 12, 0.02, 0.5
TOKENS = torch.randint(2, 30, (96, 12), generator=torch.Generator().manual_seed(1))
LABELS = ((TOKENS < 10).sum(1) > (TOKENS > 22).sum(1)).long()  # more early than late letters?


def classifier(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.DistilBertConfig(
        vocab_size=30, dim=16, n_heads=2, n_layers=1, hidden_dim=24, max_position_embeddings=16, num_labels=2,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return transformers.AutoModelForSequenceClassification.from_config(config).double()


class Watched(transformers.Trainer):
    """Notes the labels that are trained on and the weight decay of each update."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.seen: list[torch.Tensor] = []
        self.decays: list[list[float]] = []
        self.evaluated: list[torch.Tensor] = []
        super().__init__(*args, **settings)

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(TOKENS)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
        (self.seen if model.training else self.evaluated).append(inputs["labels"].clone())
        return super().compute_loss(model, inputs, *args, **settings)

    def create_optimizer(self, *args: Any) -> Any:
        optimizer = super().create_optimizer(*args)
        if not any(hook is self._note for hook in optimizer._optimizer_step_pre_hooks.values()):
            optimizer.register_step_pre_hook(self._note)
        return optimizer

    def _note(self, optimizer: Any, *_: Any) -> None:
        self.decays.append([float(group["weight_decay"]) for group in optimizer.param_groups])


def trainer(
    folder: Path, *callbacks: Any, seed: int = 0, weight_decay: float = DECAY, kind: Any = Watched, **settings: Any
) -> Any:
    """SGD over STEPS updates of 16 samples, in their order."""
    size = settings.pop("size", 16)
    plain = {
        "max_steps": STEPS, "per_device_train_batch_size": size, "learning_rate": LR, "weight_decay": weight_decay,
        "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no",
    }  # fmt: skip
    args = transformers.TrainingArguments(output_dir=str(folder), **plain | settings)
    data = [{"input_ids": tokens, "labels": label} for tokens, label in zip(TOKENS, LABELS, strict=True)]
    made = kind(classifier(seed), args, train_dataset=data, eval_dataset=data[:32], callbacks=list(callbacks))
    # transformers (5.0, 5.23) takes this model for one that scales its loss for accumulation, which it does not
    made.model_accepts_loss_kwargs = False
    return made


def plain_loop(drive: Any, steps: int = STEPS) -> tuple[Any, list[list[float]]]:
    """The same training by hand; ``drive(optimizer)`` gives what is called before and after each update."""
    model = classifier().train()
    names = {name for name, p in model.named_parameters() if p.ndim < 2}  # biases and layer norms: what HF leaves alone
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in names], "weight_decay": DECAY},
        {"params": [p for name, p in model.named_parameters() if name in names], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=LR)
    before, after = drive(optimizer)
    used = []
    for step in range(steps):
        rows = slice(16 * step % 96, 16 * step % 96 + 16)
        logits = model(input_ids=TOKENS[rows]).logits
        loss = functional.cross_entropy(logits, LABELS[rows])
        optimizer.zero_grad()
        loss.backward()
        before(loss.detach(), (logits.argmax(1) != LABELS[rows]).double().mean())
        used.append([float(group["weight_decay"]) for group in optimizer.param_groups])
        optimizer.step()
        after()
    return model, used


def nothing(*_: Any) -> None:
    pass


def assert_same(ours: Any, theirs: Any, tolerance: float = 0.0) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# against a plain loop


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_schedule_does_what_it_does_in_a_plain_loop(tmp_path: Path, pieces: int):
    def drive(optimizer: Any) -> Any:
        return nothing, dc.WeightDecayScheduler(optimizer, linear(STEPS)).step

    expected, used = plain_loop(drive)
    callback = adapter.WeightDecayCallback("linear")
    run = trainer(tmp_path, callback, size=16 // pieces, gradient_accumulation_steps=pieces)
    run.train()
    assert run.decays == used and len(used) == STEPS
    assert {decay for _, decay in used} == {0.0}
    assert callback.get_last_wd() == [0.0, 0.0]
    assert_same(run.model, expected, 1e-10)


SETTINGS = {"start": 0.5, "measure_every": 1, "refractory": 0.2}


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("average", [True, False])
def test_autol2_does_what_it_does_in_a_plain_loop(tmp_path: Path, pieces: int, average: bool):
    made: list[dc.AutoL2] = []

    def drive(optimizer: Any) -> Any:
        made.append(dc.AutoL2(optimizer, **SETTINGS))
        return made[0].step, nothing

    expected, used = plain_loop(drive)
    settings = {"gradient_accumulation_steps": pieces, "average_tokens_across_devices": average}
    run = auto.AutoL2Callback(**SETTINGS).attach(trainer(tmp_path, size=16 // pieces, **settings))
    run.train()
    assert made[0].rule.decays, "the test needs a decay"
    assert run.decays == used
    assert {decay for _, decay in used} == {0.0}
    assert_same(run.model, expected, 1e-10)


def test_without_an_error_the_loss_alone_decides(tmp_path: Path):
    def drive(optimizer: Any) -> Any:
        scheduler = dc.AutoL2(optimizer, **SETTINGS)
        return (
            lambda loss, error: scheduler.step(loss, loss / (1 + loss))
        ), nothing  # another error that follows the loss

    _, used = plain_loop(drive)
    run = auto.AutoL2Callback(error=None, **SETTINGS).attach(trainer(tmp_path))
    run.train()
    assert run.decays == used and len({decay for decay, _ in used}) > 1


def test_label_smoothing_in_the_trainer_is_no_obstacle(tmp_path: Path):
    run = auto.AutoL2Callback(**SETTINGS).attach(trainer(tmp_path, label_smoothing_factor=0.1))
    noise.LabelNoiseCallback(0.2, 2).attach(run)
    run.train()
    assert len(run.decays) == STEPS


def test_the_clock_of_efolds_knows_the_learning_rates_to_come(tmp_path: Path):
    callback = auto.AutoL2Callback(clock="efolds", budget_efolds=0.8, measure_every=10**6)
    run = callback.attach(trainer(tmp_path, lr_scheduler_type="linear", warmup_steps=3))
    run.train()
    rates = [LR * min(step / 3, (STEPS - step) / (STEPS - 3)) for step in range(STEPS)]
    assert callback.held.rule.horizon == pytest.approx(sum(rates), rel=1e-9)
    spent = sum(rate * decay for rate, (decay, _) in zip(rates, run.decays, strict=True))
    assert spent == pytest.approx(callback.held.rule.efolds, rel=1e-9) and 0.75 < spent < 0.8 + 1e-9


# label noise and the log


@pytest.mark.parametrize("pieces", [1, 2])
def test_training_labels_are_noisy_and_evaluation_labels_clean(tmp_path: Path, pieces: int):
    callback = noise.LabelNoiseCallback(0.3, 2, generator=torch.Generator().manual_seed(4))
    run = callback.attach(trainer(tmp_path, size=16 // pieces, gradient_accumulation_steps=pieces))
    run.train()
    run.evaluate()
    by_hand = LabelNoise(0.3, 2, torch.Generator().manual_seed(4))
    clean = torch.cat([LABELS, LABELS]).split(16 // pieces)
    assert all(torch.equal(seen, by_hand(labels)) for seen, labels in zip(run.seen, clean, strict=True))
    assert torch.equal(torch.cat(run.evaluated), LABELS[:32])


def test_the_log_is_in_what_the_trainer_logs(tmp_path: Path):
    run = adapter.DecayLogCallback().attach(
        trainer(tmp_path, adapter.WeightDecayCallback("linear"), logging_strategy="steps", logging_steps=5)
    )
    run.train()
    rows = [row for row in run.state.log_history if "reg/efolds" in row]
    assert [row["step"] for row in rows] == [5, 10]
    fn = linear(STEPS)
    for row in rows:
        last = row["step"] - 1  # the update just made
        assert row["reg/weight_decay"] == pytest.approx(DECAY * fn(last))
        spent = dc.efolds(lr=lambda t: LR * fn(t), weight_decay=DECAY, steps=last)
        assert row["reg/efolds"] == pytest.approx(spent, rel=1e-9)
        assert row["reg/tau"] == pytest.approx(1 / (LR * DECAY * fn(last) * STEPS))


# resumed


MAKERS = {
    "schedule": lambda run: run.add_callback(adapter.WeightDecayCallback("linear")),
    "function": lambda run: run.add_callback(adapter.WeightDecayCallback(linear(STEPS))),
    "autol2": lambda run: auto.AutoL2Callback(**SETTINGS).attach(run),
    "efolds": lambda run: auto.AutoL2Callback(clock="efolds").attach(run),
    "label noise": lambda run: noise.LabelNoiseCallback(0.3, 2).attach(run),
    "log": lambda run: adapter.DecayLogCallback().attach(run),
}


@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, kind: str, rebuilt: bool):
    if rebuilt and kind == "function":
        pytest.skip("a function cannot be in JSON: refused, see below")
    saving = {"save_strategy": "steps", "save_steps": 5, "logging_strategy": "steps", "logging_steps": 1}
    torch.manual_seed(7)
    whole = trainer(tmp_path / "a", **saving)
    MAKERS[kind](whole)
    whole.train()
    torch.manual_seed(8)
    again = trainer(
        tmp_path / "b", seed=5, weight_decay=9.0, restore_callback_states_from_checkpoint=rebuilt, **saving
    )  # what the constructor got must not matter
    MAKERS[kind](again)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert again.decays == whole.decays[5:]
    assert all(torch.equal(a, b) for a, b in zip(again.seen, whole.seen[5:], strict=True))
    assert_same(again.model, whole.model)
    if kind == "log":
        keys = ("step", "reg/efolds", "reg/tau")
        rows = [
            [[row[key] for key in keys] for row in run.state.log_history if "reg/tau" in row] for run in (again, whole)
        ]
        assert rows[0] == rows[1] and len(rows[0]) == STEPS


def test_what_is_saved_is_json(tmp_path: Path):
    run = auto.AutoL2Callback(**SETTINGS).attach(trainer(tmp_path, save_strategy="steps", save_steps=5))
    run.train()
    saved = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["AutoL2Callback"]["attributes"]["saved"]["steps"] == 5
    assert saved["AutoL2Callback"]["args"] == SETTINGS


def test_a_checkpoint_without_the_callback_starts_it_afresh(tmp_path: Path):
    trainer(tmp_path / "a", save_strategy="steps", save_steps=5).train()
    run = trainer(tmp_path / "b", adapter.WeightDecayCallback("linear"), save_strategy="steps", save_steps=10)
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert run.decays[0] == [DECAY, 0.0] and len(run.decays) == STEPS - 5


# skipped updates, compiled


def skipping(run: Any, skipped: set[int]) -> Any:
    """Make the prepared optimiser skip some of the updates, as the scaler does on overflow."""
    prepared = type(run.accelerator.prepare(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)))
    made = prepared.step
    count = iter(range(10**6))

    def step(self: Any, closure: Any = None) -> None:
        self._is_overflow = next(count) in skipped
        if not self._is_overflow:
            made(self, closure)

    return prepared, step


@pytest.mark.parametrize("kind", ["schedule", "autol2"])
def test_an_update_that_was_skipped_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    def drive(optimizer: Any) -> Any:
        if kind == "schedule":
            return nothing, dc.WeightDecayScheduler(optimizer, linear(STEPS)).step
        return dc.AutoL2(optimizer, start=0.5, measure_every=1, refractory=1e6).step, nothing

    _, used = plain_loop(drive)
    run = trainer(tmp_path)
    settings = {"start": 0.5, "measure_every": 1, "refractory": 1e6}
    callback = adapter.WeightDecayCallback("linear") if kind == "schedule" else auto.AutoL2Callback(**settings)
    callback.attach(run) if kind == "autol2" else run.add_callback(callback)
    monkeypatch.setattr(*(lambda pair: (pair[0], "step", pair[1]))(skipping(run, {2, 3, 7})))
    run.train()
    assert run.decays == used[: STEPS - 3]
    count = callback.held.last_step if kind == "schedule" else callback.held.steps
    assert count == STEPS - 3


@pytest.mark.slow
def test_a_compiled_model_trains_alike(tmp_path: Path):
    def run(compiled: bool) -> Any:
        torch._dynamo.reset()
        torch.manual_seed(3)
        settings = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        made = trainer(tmp_path, adapter.WeightDecayCallback("linear"), **settings)
        noise.LabelNoiseCallback(0.3, 2).attach(made).train()
        torch._dynamo.reset()
        return made

    compiled, plain = run(True), run(False)
    assert compiled.decays == plain.decays and len(plain.decays) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(compiled.seen, plain.seen, strict=True))
    assert_same(compiled.model, plain.model, 1e-10)


# refused


def test_a_rebuilt_callback_without_its_function_says_so(tmp_path: Path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    trainer(tmp_path / "a", adapter.WeightDecayCallback(linear(STEPS)), **saving).train()
    run = trainer(
        tmp_path / "b", adapter.WeightDecayCallback(linear(STEPS)), restore_callback_states_from_checkpoint=True
    )
    with pytest.raises(ValueError, match="WeightDecayCallback has no schedule; where restore_callback_states_from"):
        run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))


def test_autol2_that_was_not_attached_says_so(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"AutoL2Callback does not see the loss: use AutoL2Callback\(...\).attach"):
        trainer(tmp_path, auto.AutoL2Callback()).train()


@pytest.mark.parametrize(
    "make", [auto.AutoL2Callback, adapter.DecayLogCallback, lambda: noise.LabelNoiseCallback(0.1, 2)]
)
def test_only_a_trainer_can_be_attached_to(make: Any):
    with pytest.raises(TypeError, match="attach expects a transformers.Trainer, got Linear"):
        make().attach(torch.nn.Linear(1, 1))


def test_the_wrong_optimizer_is_refused_when_training_begins(tmp_path: Path):
    model = classifier()
    coupled = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    args = copy.copy(trainer(tmp_path).args)
    data = [{"input_ids": TOKENS[0], "labels": LABELS[0]}]
    run = transformers.Trainer(model, args, train_dataset=data, optimizers=(coupled, None))
    with pytest.raises(ValueError, match="Adam couples weight decay into an adaptive step"):
        auto.AutoL2Callback().attach(run).train()
    without = torch.optim.Rprop(model.parameters())
    run = transformers.Trainer(model, args, train_dataset=data, optimizers=(without, None))
    run.add_callback(adapter.WeightDecayCallback("linear"))
    with pytest.raises(ValueError, match="parameter group 0 has no 'weight_decay'; use an optimizer that decays"):
        run.train()
    with pytest.raises(ValueError, match="every parameter group has weight_decay 0, so AutoL2 has nothing to set"):
        auto.AutoL2Callback().attach(trainer(tmp_path, weight_decay=0.0)).train()


def test_before_the_optimizer_exists():
    for callback in (adapter.WeightDecayCallback("linear"), auto.AutoL2Callback()):
        with pytest.raises(RuntimeError, match=r"gets its optimizer in trainer.train\(\); there is none yet"):
            callback.get_last_wd()


def test_outputs_that_do_not_classify_are_refused():
    with pytest.raises(
        ValueError, match=r"logits of shape \(2, 5, 3\) and labels of shape \(2, 5\) do not classify whole"
    ):
        auto.wrong_share(torch.zeros(2, 5, 3), torch.zeros(2, 5).long())


def test_wrong_settings_show_at_once():
    with pytest.raises(ValueError, match="factor must be > 1"):
        auto.AutoL2Callback(factor=0.5)
    with pytest.raises(ValueError, match="flip"):
        noise.LabelNoiseCallback(0.9, 2)


def test_inputs_without_labels_are_refused(tmp_path: Path):
    run = noise.LabelNoiseCallback(0.1, 2).attach(trainer(tmp_path))
    with pytest.raises(TypeError, match="a mapping with 'labels', got a mapping with"):
        run.training_step(run.model, {"input_ids": TOKENS[:2]})
