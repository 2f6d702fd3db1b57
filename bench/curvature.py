"""The trace of the Hessian to a standard error of 2 %, beside curvlinops, hessian-eigenthings and PyHessian.

    pip install -e . -r bench/requirements-curvature.txt   # in an environment of its own
    python bench/curvature.py            # about ten minutes of one core
    python bench/curvature.py --quick    # the small network with few repetitions, nothing written

One torch thread; processor seconds; sides alternate, medians of the rounds. Ours stops by itself. The peers are told a number of
products, and have no rule that stops them at a standard error, so each is given what it needs, by its best estimator:

* small network: Hutchinson's number follows from the variance of a probe; of Hutch++ and XTrace the smallest of a grid whose root
  mean square error over repetitions is at most 2 % of the trace. The time is that of the whole call.
* ResNet-18: a product takes seconds, and at this state hundreds are needed by any estimator, so nothing is run to the end: the
  table has the time of one product, which is what the libraries differ in.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from decaycast.core import trace as own
from decaycast.core.curvature import Curvature
from decaycast.lab.provenance import provenance
from machine import seconds
from stochnorm import resnet18

RESULTS = Path(__file__).parent / "results"
ERROR = 0.02
PEERS = ("curvlinops-for-pytorch", "hessian-eigenthings", "PyHessian")
Batches = list[tuple[Tensor, Tensor]]
loss_fn = nn.functional.cross_entropy


# what is measured on


def digits(count: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    return torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> nn.Module:
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        some = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        loss_fn(model(x[some]), y[some]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def small_network() -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    x, y = digits(400)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return trained(model, x, y, 300, 0.05), [(x, y)]


def large_network() -> tuple[nn.Module, Batches]:
    x, y = digits(512)
    x = nn.functional.interpolate(x.view(-1, 1, 8, 8), scale_factor=4).expand(-1, 3, -1, -1).contiguous()
    model = resnet18("BatchNorm2d")
    model[-1] = nn.Linear(512, 10)
    trained(model.train(), x, y, 60, 0.003).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean, of the data that is measured on
    with torch.no_grad():
        for some in x.split(128):
            model(some)
    return model.eval(), list(zip(x.split(128), y.split(128), strict=True))


# the sides: each a function (model, batches, products, seed) -> trace


def ours(model: nn.Module, batches: Batches, products: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    return own.hessian_trace(model, loss_fn, batches, ERROR, generator=generator, max_probes=products).value


def curvlinops(estimator: str) -> Callable[[nn.Module, Batches, int, int], float]:
    def call(model: nn.Module, batches: Batches, products: int, seed: int) -> float:
        import curvlinops as library

        torch.manual_seed(seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        operator = library.HessianLinearOperator(
            model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False
        )
        return float(getattr(library, estimator)(operator, products))

    return call


def eigenthings(method: str) -> Callable[[nn.Module, Batches, int, int], float]:
    def call(model: nn.Module, batches: Batches, products: int, seed: int) -> float:
        from hessian_eigenthings import HessianOperator, trace

        operator = HessianOperator(model, batches, lambda model, batch: loss_fn(model(batch[0]), batch[1]))
        return float(trace(operator, num_matvecs=products, method=method, seed=seed).estimate)

    return call


def pyhessian(model: nn.Module, batches: Batches, products: int, seed: int) -> float:
    from pyhessian import hessian

    torch.manual_seed(seed)
    data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
    operator = hessian(model, nn.CrossEntropyLoss(), cuda=False, **data)
    found = operator.trace(maxIter=products, tol=-1.0)  # no rule but the number
    model.zero_grad()
    return float(sum(found) / len(found))


HUTCHINSON = {
    "curvlinops, Hutchinson": curvlinops("hutchinson_trace"),
    "hessian-eigenthings, Hutchinson": eigenthings("hutchinson"),
    "PyHessian, Hutchinson": pyhessian,
}
HUTCHPP = {
    "curvlinops, Hutch++": curvlinops("hutchpp_trace"),
    "hessian-eigenthings, Hutch++": eigenthings("hutch++"),
}
XTRACE = {"curvlinops, XTrace": curvlinops("xtrace")}


def small(repetitions: int, rounds: int) -> list[dict]:
    """Whole calls on the small network."""
    model, batches = small_network()
    curvature = Curvature(model, loss_fn, batches)
    probes = own._Probes(own._Basis(curvature))
    for _ in range(10):
        probes.add(own._signs((20, curvature.size), curvature, None))
    true = own.estimate_trace(curvature, 0.001, torch.Generator().manual_seed(1), 5000).total
    hutchinson = math.ceil(probes.variance() / (ERROR * true.value) ** 2)
    needed = dict.fromkeys(HUTCHINSON, hutchinson)
    for name, call in {**HUTCHPP, **XTRACE}.items():
        for products in (18, 24, 30, 36, 42, 48, 60, 72, 90):
            found = [call(model, batches, products, seed) for seed in range(repetitions)]
            if math.sqrt(sum((each - true.value) ** 2 for each in found) / repetitions) <= ERROR * true.value:
                needed[name] = products
                break
    sides = {"ours": ours, **HUTCHINSON, **HUTCHPP, **XTRACE}
    found = [
        own.hessian_trace(model, loss_fn, batches, ERROR, generator=torch.Generator().manual_seed(s))
        for s in range(repetitions)
    ]
    needed["ours"] = statistics.median(each.probes for each in found)
    errors = [each.value / true.value - 1 for each in found]
    times: dict[str, list[float]] = {side: [] for side in needed}
    for seed in range(rounds + 1):
        for side, found_times in times.items():
            products = 300 if side == "ours" else needed[side]
            found_times.append(seconds(lambda side=side, n=products, seed=seed: sides[side](model, batches, n, seed)))
    rows = [
        {"side": side, "products": needed[side], "seconds": statistics.median(spent[1:]), "rounds": spent[1:]}
        for side, spent in times.items()
    ]
    rows[[row["side"] for row in rows].index("ours")]["error"] = math.sqrt(sum(e * e for e in errors) / len(errors))
    return [{**row, "network": "MLP", "trace": true.value} for row in rows]


def large(rounds: int) -> list[dict]:
    """Seconds of one product of ResNet-18, and how many Hutchinson's estimator needs, whoever runs it."""
    model, batches = large_network()
    curvature = Curvature(model, loss_fn, batches)
    probes = own._Probes(own._Basis(curvature))
    probes.add(own._signs((6, curvature.size), curvature, torch.Generator().manual_seed(1)))
    value = probes.value()
    needed = math.ceil(probes.variance() / (ERROR * value) ** 2)
    vector = own._signs((1, curvature.size), curvature, None)
    sides: dict[str, Callable[[], object]] = {"ours": lambda: Curvature(model, loss_fn, batches).products(vector)}
    for name, call in HUTCHINSON.items():
        # two products in one call, so that what a library does once counts half
        sides[name.partition(",")[0]] = lambda call=call: call(model, batches, 2, 0)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, work in sides.items():
            times[side].append(seconds(work) / (1 if side == "ours" else 2))
    return [
        {
            "network": "ResNet-18",
            "side": side,
            "products": needed,
            "seconds": statistics.median(spent),
            "rounds": spent,
            "trace": value,
        }
        for side, spent in times.items()
    ]


# the page


def lines_of(result: dict) -> list[str]:
    lines = [
        "# Curvature",
        "",
        f"Trace of the Hessian to a standard error of {100 * ERROR:.0f} %; one thread, processor seconds, everything included.",
        "MLP 64-128-128-10 (26,122 parameters) on 400 digits, median of the rounds.",
        "Ours stops by itself; the peers were told how many products they need (`bench/curvature.py` says how that was found).",
        "Aim: not slower than the fastest peer.",
        "",
        "| network | library, estimator | products | seconds | seconds / ours |",
        "|-|-|-|-|-|",
    ]
    rows = [row for row in result["rows"] if row["network"] == "MLP"]
    large_rows = [row for row in result["rows"] if row["network"] != "MLP"]
    for row in rows:
        base = next(each for each in rows if each["side"] == "ours")
        ratio = row["seconds"] / base["seconds"]
        lines.append(
            f"| {row['network']} | {row['side']} | {row['products']:.0f} | {row['seconds']:.3g} | {ratio:.2f} |"
        )
    if large_rows:
        lines += [
            "",
            "ResNet-18 (11.2 million parameters, batch norm in evaluation mode) on 512 digits of 32 x 32 pixels, in batches of",
            f"128: one product of the Hessian. Hutchinson's estimator needs about {large_rows[0]['products']} of them.",
            "",
            "| library | seconds per product | / ours |",
            "|-|-|-|",
        ]
        first = large_rows[0]["seconds"]
        lines += [f"| {row['side']} | {row['seconds']:.2f} | {row['seconds'] / first:.2f} |" for row in large_rows]
    versions = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    return [*lines, "", f"Peers: {versions}. Rounds, versions and machine: `curvature.json`."]


def main() -> None:
    """Measure, write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small network with few repetitions, nothing written")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers' own
    rows = small(6, 2) if asked.quick else [*small(24, 5), *large(1)]
    result = {"provenance": provenance(), "peers": {name: metadata.version(name) for name in PEERS}, "rows": rows}
    lines = lines_of(result)
    if not asked.quick:
        (RESULTS / "curvature.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "curvature.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
