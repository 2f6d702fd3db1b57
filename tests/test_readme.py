"""The python blocks of the README and the docs run as printed, given what their reader already has."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name != "quickstart.md"  # its blocks need frameworks: test_quickstart.py
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


class MyTraining:
    """A stand-in for a reader's training: a noise-free loss that is lowest at a decay falling with the steps."""

    def __init__(self, weight_decay: float) -> None:
        self.weight_decay, self.steps, self.validation_losses = weight_decay, [], []

    def train_until(self, steps: int) -> None:
        for step in range(len(self.steps) * 10 + 10, steps + 1, 10):
            best = 1.3 / (0.2 * step)
            self.steps.append(step)
            self.validation_losses.append(1 / np.sqrt(step) + 0.01 * np.log(self.weight_decay / best) ** 2)


def what_a_reader_has() -> dict[str, object]:
    torch.manual_seed(0)
    inputs = torch.randn(256, 6)
    target = (inputs[:, :2].sum(1) > 0).long()
    return {
        "model": torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)),
        "train_loader": DataLoader(TensorDataset(inputs[:192], target[:192]), batch_size=16, shuffle=True),
        "val_loader": DataLoader(TensorDataset(inputs[192:], target[192:]), batch_size=64),
        "MyTraining": MyTraining,
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_runs(block: str):
    names, printed = what_a_reader_has(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "block", "exec"), names)
    talks = re.search(r"^print\(|StochNorm\.convert\(|insert_activation_noise\(", block, re.MULTILINE)
    assert bool(printed.getvalue()) == bool(talks)


def test_numbers_in_comments_are_right():
    checked = 0
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        for call, value in re.findall(r"^(dc\..*\))\s+# ([\d.]+)", block, re.MULTILINE):
            names = what_a_reader_has()
            exec("import decaycast as dc", names)
            assert eval(call, names) == pytest.approx(float(value.rstrip(".")), rel=1e-6)
            checked += 1
    assert checked == 3


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_there_are_exactly_two_commands_without_set_up():
    shell = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [line.split("#")[0].strip() for line in "".join(shell).splitlines()] == ["make demo", "make test"]
