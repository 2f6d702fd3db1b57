"""What the kernels cost: closed form against the matrix products it needs, empirical kernel against the textbook's.

    python bench/kernel.py            # about ten minutes of one core, and 7 GB of memory for the textbook's Jacobian
    python bench/kernel.py --quick    # sizes a tenth as large, to see that it runs

One torch thread. Times are processor seconds, which other processes on the machine disturb little; the two sides alternate
and the table has medians of the rounds' ratios. Peak memory: each side in a fresh process, growth of the resident peak over
what was resident before the call, so the result itself is included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

from decaycast.core.kernel import ntk
from decaycast.core.ntk import empirical_ntk
from decaycast.lab.provenance import provenance
from machine import fresh, memory_bytes, seconds

RESULTS = Path(__file__).parent / "results"
FEATURES, WIDTH, OUTPUTS = 64, 512, 10  # of the empirical kernel's MLP, two hidden layers
DEPTH = 3  # hidden layers of the closed form
VARIANTS = {
    "ReLU": {"activation": "relu"},
    "ReLU, bias": {"activation": "relu", "bias_variance": 0.1},
    "erf, bias": {"activation": "erf", "bias_variance": 0.1},
}


# closed form


def half_product(x: torch.Tensor, rows: int = 256) -> torch.Tensor:
    """The products that a symmetric kernel needs: rows times the rows from there on."""
    out = x.new_empty(len(x), len(x))
    for i in range(0, len(x), rows):
        torch.mm(x[i : i + rows], x[i:].T, out=out[i : i + rows, i:])
    return out


def closed_form(n: int, features: int, dtype: torch.dtype, rounds: int) -> list[dict]:
    """Ratios of one input size; the products are repeated in every round."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, features, generator=generator).to(dtype) for _ in range(2))
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        base = {"whole": seconds(lambda: x @ y.T), "half": seconds(lambda: half_product(x))}
        for name, options in VARIANTS.items():
            same = seconds(lambda options=options: ntk(x, depth=DEPTH, **options))
            cross = seconds(lambda options=options: ntk(x, y, depth=DEPTH, **options))
            times.setdefault((name, "x with itself / one n x n product"), []).append(same / base["whole"])
            times.setdefault((name, "x with itself / half of it"), []).append(same / base["half"])
            times.setdefault((name, "x with y / one n x n product"), []).append(cross / base["whole"])
    shape = {"n": n, "features": features, "dtype": str(dtype).removeprefix("torch."), "rounds": rounds}
    return [
        {
            **shape,
            "network": name,
            "what": what,
            "ratio": statistics.median(found),
            "low": min(found),
            "high": max(found),
        }
        for (name, what), found in times.items()
    ]


# empirical kernel


def network() -> nn.Module:
    torch.manual_seed(0)
    sizes = (FEATURES, WIDTH, WIDTH)
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, OUTPUTS))


def textbook(model: nn.Module, x: torch.Tensor, mode: str) -> torch.Tensor:
    """The whole Jacobian, then its product with itself, as tutorials have it."""
    theta = {name: value.detach() for name, value in model.named_parameters()}
    jacobian = vmap(jacrev(lambda p, sample: functional_call(model, p, (sample,))), (None, 0))(theta, x)
    letters = "iap,jbp->ijab" if mode == "full" else "iap,jap->ij"
    return sum(torch.einsum(letters, value.flatten(2), value.flatten(2)) for value in jacobian.values())


def child(side: str, mode: str, n: int) -> dict:
    """Time and memory of one call in this (fresh) process."""
    torch.set_num_threads(1)
    model, x = network(), torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(1))
    calls: dict[str, Callable[[int], torch.Tensor]] = {
        "textbook": lambda count: textbook(model, x[:count], mode),
        "structured": lambda count: empirical_ntk(model, x[:count], mode=mode, route="structured"),
        "generic": lambda count: empirical_ntk(model, x[:count], mode=mode, route="generic"),
    }
    calls[side](8)  # libraries set themselves up at the first call
    before = memory_bytes("VmRSS")
    kept: list[torch.Tensor] = []
    spent = seconds(lambda: kept.append(calls[side](n)))
    peak = memory_bytes("VmHWM") - before
    trace = torch.einsum("iiaa->", kept[0]) if mode == "full" else kept[0].trace()
    result_bytes = kept[0].numel() * kept[0].element_size()
    return {"seconds": spent, "peak_bytes": peak, "result_bytes": result_bytes, "check": float(trace)}


def empirical(mode: str, n: int, sides: tuple[str, ...], rounds: int) -> dict:
    """Seconds and peaks of all sides, in alternating rounds."""
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            runs[side].append(fresh(__file__, side, mode, str(n)))
    row: dict = {"mode": mode, "n": n, "outputs": OUTPUTS, "runs": runs}
    for side, found in runs.items():
        row[side] = {key: statistics.median(run[key] for run in found) for key in found[0]}
    checks = [row[side]["check"] for side in sides]
    if max(checks) - min(checks) > 1e-3 * max(checks):
        raise RuntimeError(f"the sides disagree about the kernel's trace: {checks}")
    return row


# the page


def lines_of(result: dict) -> list[str]:
    lines = [
        "# Kernels",
        "",
        f"Closed form: NTK of {DEPTH} hidden layers, n x n with n = {result['closed form'][0]['n']:,}, in units of the time",
        "of the matrix product of its inputs. Median of the rounds [smallest, largest]; processor time, one thread. Aim: <= 2.",
        "",
        "| dtype | features | network | x, x / whole product | x, x / half product | x, y / whole product |",
        "|-|-|-|-|-|-|",
    ]
    rows = result["closed form"]
    for dtype, features, name in dict.fromkeys((r["dtype"], r["features"], r["network"]) for r in rows):
        cells = [r for r in rows if (r["dtype"], r["features"], r["network"]) == (dtype, features, name)]
        text = " | ".join(f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in cells)
        lines.append(f"| {dtype} | {features:,} | {name} | {text} |")
    lines += [
        "",
        "`half product`: only the blocks on and above the diagonal, which is all that a symmetric kernel needs.",
        "",
        f"Empirical kernel: MLP {FEATURES}-{WIDTH}-{WIDTH}-{OUTPUTS}, float32. The textbook makes the whole Jacobian",
        "and multiplies it with itself. Aim at n = 512: >= 3 times faster at a quarter of the peak memory or less. Peaks",
        "include the result.",
        "",
        "| mode | n | route | seconds | textbook / ours | peak, MB | ours / textbook | result, MB |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for row in result["empirical"]:
        base = row.get("textbook")
        for side in ("textbook", "structured", "generic"):
            if side in row:
                r = row[side]
                faster = f"{base['seconds'] / r['seconds']:.1f}" if base and side != "textbook" else ""
                smaller = f"{r['peak_bytes'] / base['peak_bytes']:.3f}" if base and side != "textbook" else ""
                lines.append(
                    f"| {row['mode']} | {row['n']:,} | {side} | {r['seconds']:.2f} | {faster} | "
                    f"{r['peak_bytes'] / 1e6:,.0f} | {smaller} | {r['result_bytes'] / 1e6:,.0f} |"
                )
    return [*lines, "", "Rounds, versions and machine: `kernel.json`."]


def main() -> None:
    """Measure, write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "MODE", "N"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(asked.child[0], asked.child[1], int(asked.child[2]))))
        return
    torch.set_num_threads(1)
    n, few, many = (512, 64, 200) if asked.quick else (4096, 512, 2000)
    sides = ("textbook", "structured", "generic")
    result = {
        "provenance": provenance(),
        "closed form": [
            row
            for dtype in (torch.float32, torch.float64)
            for features in (784, 3072)
            for row in closed_form(n, features, dtype, rounds=3)
        ],
        "empirical": [
            empirical("trace", few, sides, rounds=3),
            # the textbook's full kernel takes ten times as long as its trace: a smaller one shows the ratio
            empirical("full", few // 4, sides, rounds=2),
            empirical("full", few, sides[1:2], rounds=2),
            empirical("full", many, sides[1:2], rounds=1),
            empirical("trace", many, sides[1:2], rounds=1),
        ],
    }
    lines = lines_of(result)
    if not asked.quick:
        (RESULTS / "kernel.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "kernel.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
