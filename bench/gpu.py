"""What needs a GPU: many networks at once, StochNorm, WRN-28-10's step, the L2 paper's WRN experiment at fewer epochs.

    python bench/gpu.py --data-dir <data folder>        # at most 8 minutes; run it again until it ends with exit code 0
    python bench/gpu.py --status                          # what is done, what is left
    python bench/gpu.py --smoke                           # every piece in seconds on any machine; numbers that mean nothing

The set is cut into pieces. What is done stands in `bench/results/gpu.json`, written after each piece, so that a command that
is stopped or killed loses one piece at most; exit code 3 says that pieces are left. The experiment's arms keep checkpoints and
may take several commands. Only torch, numpy, `decaycast.core` and `decaycast.methods` are needed.

Each ratio is of two sides that take turns in one process; the spread is the quartiles of the rounds. Times are wall clock
between synchronisations of the device.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_experiment import experiment
from gpu_networks import cifar10
from gpu_speed import OUT_OF_MEMORY, SMOKE, Result, Sizes, norms, replicas, wrn_step

RESULTS = Path(__file__).parent / "results"
DONE, LEFT = 0, 3


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Something that is measured in one go, or, where it can pause, in several."""

    name: str
    seconds: float
    """More than it should take: it is not begun with less time left."""
    measure: Callable[[float], Result | None]
    """monotonic time by which to stop -> result, or None if it had to pause."""


def pieces(sizes: Sizes, work: Path, data_dir: Path | None) -> list[Piece]:
    """All pieces in order, the cheap ones first."""
    found = [
        Piece(name=f"stochnorm {name}", seconds=60, measure=partial(norms, dtype, sizes))
        for name, dtype in {"bfloat16": torch.bfloat16, "float32": torch.float32}.items()
    ]
    found += [
        Piece(name=f"replicas {kind} {count}", seconds=90, measure=partial(replicas, kind, count, sizes))
        for kind in ("FC", "CNN")
        for count in sizes.replicas
    ]
    found.append(Piece(name="wrn step", seconds=420, measure=partial(wrn_step, sizes)))
    arms = {**{f"{decay:g}": decay for decay in sizes.decays}, "AutoL2": None}
    return found + [
        Piece(name=f"experiment {name}", seconds=120, measure=partial(_on_data, decay, sizes, work, data_dir))
        for name, decay in arms.items()
    ]


def _on_data(decay: float | None, sizes: Sizes, work: Path, data_dir: Path | None, deadline: float) -> Result | None:
    if data_dir is None and sizes is not SMOKE:
        raise FileNotFoundError("the experiment needs CIFAR-10: give --data-dir, a folder with cifar-10-batches-bin")
    if data_dir is not None:
        data: Any = cifar10(data_dir)
    else:
        generator = torch.Generator().manual_seed(0)
        part = (torch.randn(sizes.samples, 3, 32, 32, generator=generator), torch.arange(sizes.samples) % 10)
        data = (part, part, part)
    work.mkdir(parents=True, exist_ok=True)
    return experiment(decay, sizes, work, data, deadline)


def machine(sizes: Sizes) -> dict[str, str]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name() if sizes.device == "cuda" else "cpu"
    return {
        "device": name,
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def read_state(path: Path, sizes: Sizes) -> dict[str, Any]:
    """What is done so far; anew where the file is of other sizes or another device."""
    fresh = {"provenance": machine(sizes), "sizes": json.loads(json.dumps(asdict(sizes))), "pieces": {}}
    if not path.is_file():
        return fresh
    state = json.loads(path.read_text(encoding="utf-8"))
    if state["sizes"] != fresh["sizes"] or state["provenance"]["device"] != fresh["provenance"]["device"]:
        raise SystemExit(f"{path} holds results of other sizes or another device; move it away to start anew")
    # what failed may be mended by now (data that were missing), but not what did not fit
    kept = {
        name: result
        for name, result in state["pieces"].items()
        if result.get("failure", OUT_OF_MEMORY) == OUT_OF_MEMORY
    }
    return {**state, "pieces": kept}


def write_state(path: Path, state: dict[str, Any], left: list[str]) -> None:
    """The JSON with its headlines, then put in place of the old one."""
    found = [each for result in state["pieces"].values() for each in result.get("headlines", [result])]
    keys = ("what", "value", "low", "high", "aim")
    state["headlines"] = [{key: each[key] for key in keys if key in each} for each in found if "value" in each]
    failed = [f"{each['what']}: {each['failure']}" for each in found if "failure" in each]
    state["left"] = [*failed, *left]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def work_through(todo: list[Piece], state: dict[str, Any], path: Path, deadline: float) -> list[str]:
    """Measure pieces until the time is up; the names of those that are left."""
    todo = [piece for piece in todo if piece.name not in state["pieces"]]
    while todo:
        piece = todo[0]
        if time.monotonic() + piece.seconds > deadline:
            break
        began = time.monotonic()
        result = attempt(piece, deadline)
        if result is None:
            break  # it goes on from its checkpoint
        state["pieces"][piece.name] = {**result, "seconds": time.monotonic() - began}
        todo = todo[1:]
        write_state(path, state, [each.name for each in todo])
        print(f"{piece.name}: {state['pieces'][piece.name]['seconds']:.0f} s", flush=True)
    return [piece.name for piece in todo]


def attempt(piece: Piece, deadline: float) -> Result | None:
    """Its result; a piece that fails is recorded with its reason, and the others are still measured."""
    try:
        return piece.measure(deadline - 30)
    except Exception as error:
        return {"what": piece.name, "failure": f"{type(error).__name__}: {error}"[:300]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Measure for some minutes; 0 when all is done, 3 when pieces are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="to stop after [8]")
    parser.add_argument(
        "--state", type=Path, help="the JSON [bench/results/gpu.json; with --smoke a file in the work folder]"
    )
    parser.add_argument("--work", type=Path, default=Path("build/gpu"), help="folder of checkpoints")
    parser.add_argument("--data-dir", type=Path, help="folder with cifar-10-batches-bin, for the experiment")
    parser.add_argument("--epochs", type=int, default=12, help="of the experiment [12; the paper's 200]")
    parser.add_argument("--smoke", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--status", action="store_true", help="what is done and what is left")
    asked = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * asked.minutes
    sizes = SMOKE if asked.smoke else Sizes(epochs=asked.epochs)
    path = asked.state or (asked.work / "smoke.json" if asked.smoke else RESULTS / "gpu.json")
    if sizes.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device; --smoke shows on the CPU that everything runs", file=sys.stderr)
        return 2
    todo, state = pieces(sizes, asked.work, asked.data_dir), read_state(path, sizes)
    left = [piece.name for piece in todo if piece.name not in state["pieces"]]
    if not asked.status:
        left = work_through(todo, state, path, deadline)
    print(f"{len(todo) - len(left)} of {len(todo)} pieces done" + (f"; left: {', '.join(left)}" if left else ""))
    return LEFT if left else DONE


if __name__ == "__main__":
    raise SystemExit(main())
