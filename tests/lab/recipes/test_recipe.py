"""Configurations as people have them: what is read, what is assumed, and what is refused without running anything."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, PolynomialLR, SequentialLR

from decaycast.core.timescale import efolds
from decaycast.lab.recipes import conventions, lr_shapes
from decaycast.lab.recipes.config_files import MOST_BYTES, flat_yaml
from decaycast.lab.recipes.recipe import Facts, read_config, with_options

TRAINER = {
    "learning_rate": 6e-4,
    "weight_decay": 0.1,
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "warmup_ratio": 0.1,
    "max_steps": -1,
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "dataloader_drop_last": False,
    "lr_scheduler_kwargs": {},
    "accelerator_config": {"split_batches": False, "nested": [1, {"a": None}]},
    "label_names": None,
}
TIMM = """\
# written by a training script
aa: rand-m9-mstd0.5-inc1
amp: true
batch_size: 128
bn_eps: null
class_map: ''
cooldown_epochs: 10
epochs: 300
grad_accum_steps: 1
lr: null
lr_base: 0.1
lr_base_scale: ''
lr_base_size: 256
lr_cycle_limit: 1
lr_noise: null
min_lr: 1.0e-05
model_kwargs: {}
momentum: 0.9
opt: sgd
opt_kwargs: {}
ratio:
- 0.75
- 1.3333333333333333
sched: cosine
sched_on_updates: false
warmup_epochs: 5
warmup_lr: 1.0e-06
warmup_prefix: false
weight_decay: 2.0e-05
"""


def trainer(folder: Path, name: str = "args.json", **changes: object) -> Path:
    path = folder / name
    path.write_text(json.dumps({**TRAINER, **changes}))
    return path


def timm(folder: Path, *changes: tuple[str, str]) -> Path:
    text = TIMM
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "args.yaml"
    path.write_text(text)
    return path


# Hugging Face


def test_a_trainers_arguments(tmp_path: Path):
    facts = read_config(trainer(tmp_path), devices=2)
    assert (facts.lr, facts.weight_decay, facts.steps, facts.epochs) == (6e-4, 0.1, None, 2.0)
    assert facts.batch_size == 16 * 4 * 2 and facts.notes == ()
    assert facts.source == "Hugging Face arguments args.json" and facts.convention is not None
    assert facts.convention(facts.optimizer or "") == "decoupled"
    # 1001 samples: 32 loads of 32 samples, the last with 9; 8 steps of 4 loads
    assert facts.steps_per_epoch(1001) == 8
    rates = facts.rates_for(1000)
    ramp = [6e-4 * step / 100 for step in range(100)]
    assert rates[:100] == pytest.approx(ramp) and rates[100] == 6e-4 and rates[-1] == pytest.approx(6e-4 / 900)


def test_what_a_trainers_file_may_say_otherwise(tmp_path: Path):
    assert read_config(trainer(tmp_path, max_steps=500)).steps == 500
    dropped = read_config(trainer(tmp_path, dataloader_drop_last=True), devices=2)
    assert dropped.steps_per_epoch(1001) == 8 and dropped.steps_per_epoch(1024 + 31) == 8
    assert read_config(trainer(tmp_path, world_size=4)).batch_size == 256
    assert read_config(trainer(tmp_path, world_size=4), devices=8).batch_size == 512
    warm = read_config(trainer(tmp_path, warmup_steps=20)).rates_for(100)
    assert warm[10] == pytest.approx(3e-4) and warm[20] == 6e-4
    share = read_config(trainer(tmp_path, warmup_steps=0.25, warmup_ratio=None)).rates_for(100)
    assert share[25] == 6e-4 and share[24] == pytest.approx(6e-4 * 24 / 25)
    sgd = read_config(trainer(tmp_path, optim="sgd", optim_args="momentum=0.9, nesterov=True"))
    assert sgd.momentum == 0.9 and sgd.convention is not None and sgd.convention("sgd") == "sgd"
    assert read_config(trainer(tmp_path, optim="sgd")).momentum == 0.0


def test_what_is_assumed_is_noted(tmp_path: Path):
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"learning_rate": 1e-3, "per_device_train_batch_size": 8, "deepspeed": "ds.json"}))
    facts = read_config(path)
    assert (facts.schedule, facts.optimizer, facts.weight_decay) == ("linear", "adamw_torch", None)
    text = " | ".join(facts.notes)
    for words in (
        "one device is assumed; give --world-size",
        "optim is not in the file: 'adamw_torch'",
        "lr_scheduler_type is not in the file: 'linear'",
        "a DeepSpeed configuration is named in the file",
    ):
        assert words in text


# timm


def test_timms_arguments(tmp_path: Path):
    facts = read_config(timm(tmp_path), devices=8)
    assert facts.lr == pytest.approx(0.1 * 1024 / 256), "from the base rate and the batch"
    assert (facts.weight_decay, facts.momentum, facts.epochs, facts.batch_size) == (2e-5, 0.9, 310, 1024)
    assert facts.steps_per_epoch(1_281_167) == 1251, "the last, incomplete batch is dropped"
    rates = facts.rates_for(310 * 4)
    assert rates[:8] == pytest.approx([1e-6] * 4 + [1e-6 + (0.4 - 1e-6) / 5] * 4)
    assert rates[4 * 150] == pytest.approx(1e-5 + 0.5 * (0.4 - 1e-5)) and rates[-1] == 1e-5


def test_timms_base_rate_goes_with_the_root_for_adaptive_optimisers(tmp_path: Path):
    assert read_config(timm(tmp_path, ("opt: sgd", "opt: adamw")), devices=8).lr == pytest.approx(0.2)
    linear = timm(tmp_path, ("opt: sgd", "opt: adamw"), ("lr_base_scale: ''", "lr_base_scale: linear"))
    assert read_config(linear, devices=8).lr == pytest.approx(0.4)
    assert read_config(timm(tmp_path, ("lr: null", "lr: 5e-4"))).lr == 5e-4


def test_timms_arguments_as_json_are_the_same(tmp_path: Path):
    values = flat_yaml("args.yaml", TIMM)
    path = tmp_path / "args.json"
    path.write_text(json.dumps(values))
    one, other = read_config(path), read_config(timm(tmp_path))
    assert one.lr == other.lr and np.array_equal(one.rates_for(620), other.rates_for(620))


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (("opt_kwargs: {}", "opt_kwargs: [a, 1]"), "opt_kwargs may change the decay and is not read"),
        (("lr_cycle_limit: 1", "layer_decay: 0.75"), "layer_decay lowers the rate of the lower layers"),
    ],
)
def test_what_timms_file_says_beyond_the_audit_is_noted(tmp_path: Path, change: tuple[str, str], note: str):
    assert any(note in said for said in read_config(timm(tmp_path, change)).notes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sgd", "sgd"), ("momentum", "sgd"), ("adamw", "decoupled"), ("AdamW", "decoupled"), ("lion", "decoupled"),
        ("muon", "decoupled"), ("adan", "decoupled"), ("sgdw", "decoupled"), ("adamc", "corrected"), ("sgdc", "corrected"),
        ("lionc", "corrected"), ("lambcd", "corrected"),
    ],
)  # fmt: skip
def test_conventions_of_timm(name: str, kind: str):
    assert conventions.of_timm(name) == kind


@pytest.mark.parametrize("name", ["lamb", "lambc", "nlarc", "kron", "adamp", "lookahead_adamw", "new"])
def test_unknown_conventions_are_said_to_be_unknown(name: str):
    with pytest.raises(ValueError, match="is not known here; if its documentation says, give --convention"):
        conventions.of_timm(name)


@pytest.mark.parametrize("look_up", [conventions.of_timm, conventions.of_hugging_face])
@pytest.mark.parametrize("name", ["adam", "adagrad", "rmsprop"])
def test_coupled_adaptive_optimisers_are_refused_with_the_reason(look_up, name: str):
    with pytest.raises(ValueError, match=f"{name} couples weight decay into an adaptive step"):
        look_up(name)


def test_conventions_of_hugging_face():
    for name in ("adamw_torch", "adamw_hf", "adamw_bnb_8bit", "paged_adamw_8bit", "lion_32bit", "adafactor"):
        assert conventions.of_hugging_face(name) == "decoupled"
    assert conventions.of_hugging_face("sgd") == "sgd"
    with pytest.raises(ValueError, match="'schedule_free_adamw' is not known here"):
        conventions.of_hugging_face("schedule_free_adamw")


def test_no_name_has_two_conventions():
    tables = [
        conventions.TIMM_DECOUPLED,
        conventions.TIMM_CORRECTED,
        conventions.TIMM_SGD,
        conventions.COUPLED_ADAPTIVE,
    ]
    assert len(frozenset.union(*tables)) == sum(map(len, tables))


# schedules, against torch's own


def followed(make, steps: int, peak: float = 0.02) -> np.ndarray:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return np.array(rates)


def hugging_face(name: str, steps: int = 100, warmup_steps: int = 0, **options: object) -> np.ndarray:
    return lr_shapes.hugging_face(name, peak=0.02, steps=steps, warmup_steps=warmup_steps, options=options)


# some torch releases warn about what their own SequentialLR does
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_schedules_agree_with_torchs():
    assert hugging_face("cosine") == pytest.approx(followed(lambda o: CosineAnnealingLR(o, 100), 100))
    linear = followed(lambda o: LinearLR(o, 1.0, 0.0, 100), 100)
    assert hugging_face("linear") == pytest.approx(linear)
    assert hugging_face("cosine_with_restarts") == pytest.approx(hugging_face("cosine"))
    square = followed(lambda o: PolynomialLR(o, 100, 2.0), 100)
    assert hugging_face("polynomial", lr_end=0.0, power=2.0) == pytest.approx(square)
    low = followed(lambda o: CosineAnnealingLR(o, 100, eta_min=1e-3), 100)
    assert hugging_face("cosine_with_min_lr", min_lr=1e-3) == pytest.approx(low)
    assert hugging_face("cosine_with_min_lr", min_lr_rate=0.05) == pytest.approx(low)

    def warm(optimizer):
        pieces = [LinearLR(optimizer, 1e-9, 1.0, 20), CosineAnnealingLR(optimizer, 80)]
        return SequentialLR(optimizer, pieces, [20])

    chained = followed(warm, 100)
    assert hugging_face("cosine", warmup_steps=20) == pytest.approx(chained, abs=1e-9)


def test_schedules_by_hand():
    assert hugging_face("constant", 4, warmup_steps=2) == pytest.approx([0.02] * 4), "it has no warm-up"
    assert hugging_face("constant_with_warmup", 4, 2) == pytest.approx([0.0, 0.01, 0.02, 0.02])
    root = hugging_face("inverse_sqrt", 400, 100)
    assert root[[50, 100, 399]] == pytest.approx([0.01, 0.02, 0.02 / math.sqrt(399 / 100)])
    wsd = hugging_face("warmup_stable_decay", 10, 2, num_decay_steps=4, decay_type="linear")
    assert wsd == pytest.approx([0, 0.01, 0.02, 0.02, 0.02, 0.02, 0.02, 0.015, 0.01, 0.005])
    early = hugging_face("warmup_stable_decay", 10, 2, num_decay_steps=2, num_stable_steps=2, min_lr_ratio=0.1)
    assert early == pytest.approx([0.002, 0.011, 0.02, 0.02, 0.02, 0.011, 0.002, 0.002, 0.002, 0.002])
    rooted = hugging_face("warmup_stable_decay", 8, 2, num_decay_steps=4, decay_type="1-sqrt", warmup_type="cosine")
    assert rooted[[1, 5]] == pytest.approx([0.01, 0.02 * (1 - math.sqrt(0.25))])


def timm_rates(name: str, steps: int, epochs: float, **options: object) -> np.ndarray:
    usual = {"warmup_epochs": 0, "warmup_lr": 0.0, "warmup_prefix": False, "min_lr": 0.0, "cooldown_epochs": 0}
    usual |= {"decay_epochs": 2, "decay_rate": 0.1, "sched_on_updates": False}
    return lr_shapes.timm(name, peak=0.02, steps=steps, epochs=epochs, options={**usual, **options})


def test_timms_schedules_by_hand():
    assert timm_rates("step", 6, 6) == pytest.approx([0.02, 0.02, 0.002, 0.002, 2e-4, 2e-4])
    assert timm_rates("constant", 6, 3, warmup_epochs=1) == pytest.approx([0, 0, 0.02, 0.02, 0.02, 0.02])
    assert timm_rates("none", 3, 3, warmup_epochs=2) == pytest.approx([0.02] * 3)
    by_update = timm_rates("cosine", 100, 10, sched_on_updates=True)
    assert by_update == pytest.approx(followed(lambda o: CosineAnnealingLR(o, 100), 100))
    by_epoch = timm_rates("cosine", 100, 10)
    assert by_epoch == pytest.approx(by_update[::10].repeat(10))
    prefixed = timm_rates("cosine", 12, 10, warmup_epochs=2, warmup_prefix=True)
    assert prefixed == pytest.approx([0, 0.01, *by_epoch[::10]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hugging_face("reduce_lr_on_plateau"), "'reduce_lr_on_plateau' is not followed here, so its e-folds"),
        (
            lambda: hugging_face("linear", power=2),
            "lr_scheduler_kwargs of 'linear' has power, which is not known there",
        ),
        (lambda: hugging_face("cosine_with_min_lr"), "must have one of min_lr and min_lr_rate"),
        (lambda: hugging_face("polynomial", lr_end=0.5), "ends at lr_end = 0.5, not below lr = 0.02"),
        (lambda: hugging_face("warmup_stable_decay"), "must have num_decay_steps"),
        (lambda: hugging_face("warmup_stable_decay", 10, 5, num_decay_steps=8), "more than the 10 steps of the run"),
        (lambda: hugging_face("warmup_stable_decay", num_decay_steps=8, decay_type="exp"), "1-sqrt, not 'exp'"),
        (lambda: timm_rates("plateau", 3, 3), "'plateau' is not followed here.*followed are cosine, step"),
    ],
)
def test_schedules_that_are_not_followed(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


# options


def test_options_add_to_a_file_and_replace_what_it_says(tmp_path: Path):
    facts = with_options(read_config(trainer(tmp_path)), lr=1e-3, steps=100, schedule="constant", batch_size=7)
    assert (facts.lr, facts.steps, facts.weight_decay, facts.batch_size) == (1e-3, 100, 0.1, 7)
    assert facts.rates_for(3) == pytest.approx([1e-3] * 3) and facts.steps_per_epoch(15) == 3
    sgd = with_options(facts, optimizer="sgd", momentum=0.5)
    assert sgd.convention is not None and sgd.convention("sgd") == "sgd" and sgd.momentum == 0.5
    longer = with_options(read_config(trainer(tmp_path, max_steps=50)), epochs=7)
    assert longer.steps is None and longer.epochs == 7
    assert with_options(longer, epochs=7, steps=3).steps == 3
    assert with_options(Facts()) == Facts() and Facts(lr=0.1).rates_for(2) == pytest.approx([0.1, 0.1])
    assert Facts().steps_per_epoch(10) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"batch_size": 0}, "--batch-size must be a whole number >= 1, got 0"),
        ({"epochs": math.nan}, "--epochs must be a finite number > 0, got nan"),
        ({"epochs": math.inf}, "--epochs must be a finite number > 0, got inf"),
        ({"epochs": -1.0}, "--epochs must be a finite number > 0, got -1.0"),
    ],
)
def test_options_are_checked(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        with_options(Facts(), **options)


# files that are no recipe


class Evil:
    """Leaves a file behind when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["training_args.bin", "args.json", "args.yaml", "args"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(
        ValueError, match=r"is a pickle \(torch.save\); it is not read, because unpickling can run code"
    ):
        read_config(tmp_path / name)
    torch.save({"learning_rate": 0.1}, tmp_path / name)
    with pytest.raises(ValueError, match=r"args.to_json_string\(\)"):
        read_config(tmp_path / name)
    assert not (tmp_path / "ran").exists()


BROKEN = {
    "binary": (b"\xff\xfe\x00\x01" * 20, "is not a text file"),
    "zeros": (b'{"learning_rate": 1}\0', "is not a text file"),
    "huge": (b" " * (MOST_BYTES + 1), "more than 1,000,000 bytes: no training configuration is that large"),
    "empty": (b"", "is neither a Trainer's arguments"),
    "deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is nested too deeply|is not a JSON configuration"),
    "cut": (b'{"learning_rate": 0.1,', "is not a JSON configuration: "),
    "list": (b'[{"learning_rate": 0.1}]', "YAML|holds a list"),
    "nan": (b'{"learning_rate": NaN, "optim": "sgd"}', "is not a JSON configuration: NaN is no JSON number"),
    "twice": (b'{"optim": "sgd", "optim": "adamw_torch"}', "'optim' stands in it twice"),
    "long": (b'{"learning_rate": 1' + b"0" * 5000 + b"}", "is not a JSON configuration|must be a finite number"),
    "foreign": (b'{"model": "gpt2", "optim": "sgd"}', "is neither a Trainer's arguments"),
    "nested": (b"opt: sgd\nmodel_kwargs:\n  depth: 3\n", "line 3: 'depth: 3' is no 'key: value'; nested values"),
    "tag": (b"opt: !!python/object/apply:os.system ['true']\n", "line 1: .* is YAML beyond plain values"),
    "anchor": (b"opt: &a sgd\n", "line 1: '&a sgd' is YAML beyond plain values"),
    "flow": (b"opt: {a: 1}\n", "is YAML beyond plain values"),
    "inner list": (b"opt: sgd\nratio: [1, [2]]\n", "line 2: .* is YAML beyond plain values"),
    "block": (b"opt: |\n  sgd\n", "is YAML beyond plain values"),
    "twice in yaml": (b"opt: sgd\nopt: adamw\n", "line 2: 'opt' stands in the file twice"),
    "prose": (b"a good recipe is SGD\n", "line 1: 'a good recipe is SGD' is no 'key: value'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(tmp_path: Path, case: str):
    raw, message = BROKEN[case]
    path = tmp_path / "recipe.txt"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(path)
    assert "recipe.txt" in str(caught.value) and len(str(caught.value)) < 400


def test_a_json_file_that_is_no_object(tmp_path: Path):
    (tmp_path / "args.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="args.json holds a list, not an object"):
        read_config(tmp_path / "args.json")
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": "6e-4"}, "learning_rate must be a number, got the text '6e-4'; remove the quotes"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number >= 0, got -1"),
        ({"learning_rate": True}, "learning_rate must be a number, got bool"),
        ({"weight_decay": [0.1]}, "weight_decay must be a number, got list"),
        ({"weight_decay": 10**400}, "weight_decay must be a finite number >= 0, got inf"),
        ({"max_steps": 10.5}, "max_steps must be a whole number, got 10.5"),
        ({"max_steps": -2}, "max_steps must be a finite number >= -1, got -2"),
        ({"num_train_epochs": 0}, "num_train_epochs must be a finite number > 0, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a finite number >= 1, got 0"),
        ({"optim": 3}, "optim must be a name, got int"),
        ({"dataloader_drop_last": "yes"}, "dataloader_drop_last must be true or false, got str"),
        ({"optim": "sgd", "optim_args": "momentum=high"}, "optim_args names the momentum 'high', which is no number"),
        ({"lr_scheduler_kwargs": [1]}, "lr_scheduler_kwargs must be an object of names and numbers"),
        ({"lr_scheduler_kwargs": {"power": {}}}, "power must be a number, got dict"),
        ({"lr_scheduler_type": "greedy"}, "'greedy' is not followed here"),
    ],
    ids=str,
)
def test_values_that_make_no_sense(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        read_config(trainer(tmp_path, **changes)).rates_for(100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("weight_decay: 2.0e-05", "weight_decay: .nan"), "weight_decay must be a finite number >= 0, got nan"),
        (("weight_decay: 2.0e-05", "weight_decay: -.inf"), "weight_decay must be a finite number >= 0, got inf"),
        (("weight_decay: 2.0e-05", "weight_decay: '0.1'"), "weight_decay must be a number, got the text '0.1'"),
        (("lr_noise: null", "lr_noise: [0.4, 0.9]"), "lr_noise changes the schedule in a way that is not followed"),
        (("lr_cycle_limit: 1", "lr_cycle_limit: 3"), "lr_cycle_limit changes the schedule"),
        (("epochs: 300\n", "epochs: 0\n"), "epochs must be a finite number > 0, got 0"),
        (("epochs: 300\n", "epochs: null\n"), "has no epochs, by which its schedule counts; give --schedule"),
        (("sched: cosine", "sched: tanh"), "'tanh' is not followed here"),
        (("sched_on_updates: false", "sched_on_updates: 1"), "sched_on_updates must be true or false, got int"),
    ],
)  # fmt: skip
def test_values_of_timm_that_make_no_sense(tmp_path: Path, change: tuple[str, str], message: str):
    text = [change] if change[0] != "epochs: 300\n" else [("\n" + change[0], "\n" + change[1])]
    with pytest.raises(ValueError, match=message):
        read_config(timm(tmp_path, *text)).rates_for(310)


def test_flat_yaml_by_hand():
    text = (
        "---\na: 1 # one\nb: -2.5e-3\nc: 'it''s # no comment'\nd: \"x y\"\ne: ~\nf: False\ng: [1, two]\n"
        "h:\n  - 1\n  - x\ni:\nj: 1_000\n"
    )
    assert flat_yaml("x", text) == {
        "a": 1, "b": -2.5e-3, "c": "it's # no comment", "d": "x y", "e": None, "f": False, "g": [1, "two"], "h": [1, "x"],
        "i": None, "j": 1000,
    }  # fmt: skip


def test_e_folds_of_a_file_against_a_loop(tmp_path: Path):
    facts = read_config(trainer(tmp_path))
    total = 0.0
    for step in range(400):
        total += 0.1 * 6e-4 * (step / 40 if step < 40 else (400 - step) / 360)
    assert efolds(lr=facts.rates_for(400), weight_decay=0.1, steps=400, convention="decoupled") == pytest.approx(total)


@pytest.mark.parametrize("devices", [0, -2])
def test_a_number_of_devices_below_one(tmp_path: Path, devices: int):
    with pytest.raises(ValueError, match=f"--world-size must be a whole number >= 1, got {devices}"):
        read_config(trainer(tmp_path), devices=devices)


def test_a_warm_up_longer_than_the_run_as_a_share(tmp_path: Path):
    with pytest.raises(ValueError, match=r"warmup_ratio must be a share of the run in \[0, 1\], got 2"):
        read_config(trainer(tmp_path, warmup_ratio=2.0))


@pytest.mark.parametrize("name", sorted(lr_shapes.HUGGING_FACE))
def test_a_rate_of_zero_stays_zero(name: str):
    assert not lr_shapes.hugging_face(name, peak=0.0, steps=5, warmup_steps=1, options={}).any()
