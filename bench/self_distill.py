"""Kernel self-distillation beside refits with scikit-learn: time of all rounds, and test error of the automatic choice.

    python bench/self_distill.py            # about ten minutes of one core
    python bench/self_distill.py --quick    # small problems, to see that it runs; nothing written

One thread, processor seconds, the sides in alternation, medians of the repeats. RBF kernel, 8 standard normal inputs, gamma 1/8,
labels sin(x_1) plus noise. Sides of the first table: `KernelRidge` fitted anew in every round to its own predictions; the same
with the kernel matrix computed once and handed over; one fit of `KernelSelfDistillation`, with all rounds' coefficients.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from sklearn import datasets
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel
from threadpoolctl import threadpool_limits

from decaycast.lab.provenance import provenance
from decaycast.methods.self_distill import selection, solve, theory
from decaycast.methods.self_distill.estimator import MIXES, KernelSelfDistillation
from machine import seconds

RESULTS = Path(__file__).parent / "results"
ROUNDS, GAMMA, ALPHA = 10, 1 / 8, 1.0
SHIFTS = np.geomspace(1e-3, 10.0, 20)


def problem(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    inputs = rng.normal(size=(n, 8))
    return inputs, np.sin(inputs[:, 0]) + 0.5 * rng.normal(size=n)


def alternate(
    sides: dict[str, Callable[[], np.ndarray]], repeats: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Median processor seconds of every side, and what each returned last."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    results: dict[str, np.ndarray] = {}

    def run(side: str) -> None:
        results[side] = sides[side]()

    for _ in range(repeats):
        for side, found in times.items():
            found.append(seconds(lambda side=side: run(side)))
    return {side: statistics.median(found) for side, found in times.items()}, results


def difference(results: dict[str, np.ndarray], scale: float) -> float:
    """Largest difference from the first side, in units of `scale`."""
    first, *others = results.values()
    return max(float(np.abs(other - first).max()) for other in others) / scale


# constant lambda


def constant(n: int, repeats: int) -> dict:
    inputs, y = problem(n)

    def refits(**options: object) -> np.ndarray:
        given = rbf_kernel(inputs, gamma=GAMMA) if options["kernel"] == "precomputed" else inputs
        labels = y
        for _ in range(ROUNDS - 1):
            labels = KernelRidge(alpha=ALPHA, **options).fit(given, labels).predict(given)
        return KernelRidge(alpha=ALPHA, **options).fit(given, labels).dual_coef_

    def ours() -> np.ndarray:
        return KernelSelfDistillation(gamma=GAMMA, alpha=ALPHA, rounds=ROUNDS).fit(inputs, y).dual_coef_

    def route(name: str) -> np.ndarray:
        return solve.constant_duals(rbf_kernel(inputs, gamma=GAMMA), y, ALPHA, ROUNDS, route=name)[0][-1]

    sides: dict[str, Callable[[], np.ndarray]] = {
        "KernelRidge": lambda: refits(kernel="rbf", gamma=GAMMA),
        "KernelRidge, precomputed": lambda: refits(kernel="precomputed"),
        "KernelSelfDistillation": ours,
        **{name: lambda name=name: route(name) for name in ("cholesky", "lanczos")},
    }
    times, results = alternate(sides, repeats)
    model = KernelSelfDistillation(gamma=GAMMA, alpha=ALPHA, rounds=ROUNDS).fit(inputs, y)
    kernel, size = rbf_kernel(inputs, gamma=GAMMA), float(np.abs(y).max())
    values = {side: kernel @ dual for side, dual in results.items()}
    return {"n": n, "route": model.route_, "seconds": times, "difference": difference(values, size)}


# tolerance


def by_root_finding(kernel: np.ndarray, y: np.ndarray, tolerance: float) -> tuple[np.ndarray, int]:
    """The paper's rounds with a Cholesky factorisation for every value of c that is tried; multipliers, and factorisations."""
    n, labels, found, count = len(y), y, [], 0

    def fit(log_shift: float) -> np.ndarray:
        nonlocal count
        count += 1
        shift = math.exp(log_shift)
        factor = scipy.linalg.cho_factor(kernel + shift * np.eye(n), lower=True, overwrite_a=True, check_finite=False)
        return labels - shift * scipy.linalg.cho_solve(factor, labels, check_finite=False)

    def gap(log_shift: float) -> float:
        return math.log(float(((labels - fit(log_shift)) ** 2).mean()) / tolerance)

    largest = float(np.abs(kernel).sum(1).max())
    for _ in range(ROUNDS):
        ratio = math.sqrt(float((labels**2).mean()) / tolerance)
        top = math.log(largest / (ratio - 1.0))  # Prop. 2; from below by steps, as the smallest eigenvalue is not known
        low = top - 4.0
        while gap(low) > 0:
            low -= 4.0
        root = scipy.optimize.brentq(gap, low, top, xtol=1e-11)
        found.append(math.exp(root) / n)
        labels = fit(root)
    return np.array(found), count


def tolerance(n: int, repeats: int) -> dict:
    inputs, y = problem(n)
    kernel = rbf_kernel(inputs, gamma=GAMMA)
    eps = 0.004 * float((y**2).mean())
    counts: list[int] = []

    def peer() -> np.ndarray:
        found, count = by_root_finding(kernel, y, eps)
        counts.append(count)
        return found

    def ours() -> np.ndarray:
        model = KernelSelfDistillation(kernel="precomputed", tolerance=eps, rounds=ROUNDS).fit(kernel, y)
        return model.multipliers_

    times, results = alternate({"Cholesky in brentq": peer, "KernelSelfDistillation": ours}, repeats)
    gap = np.abs(results["KernelSelfDistillation"] / results["Cholesky in brentq"] - 1.0).max()
    return {"n": n, "seconds": times, "factorisations": counts[-1], "difference": float(gap)}


# a grid


def grid(n: int, repeats: int) -> dict:
    inputs, y = problem(n)
    kernel = rbf_kernel(inputs, gamma=GAMMA)
    later = np.broadcast_to(np.array(MIXES)[:, None], (len(MIXES), ROUNDS - 1))
    powers = selection.mix_powers(later)

    def scores_gcv(found: solve.Decomposition) -> np.ndarray:
        z = found.coefficients(y)
        return np.stack([selection.gcv(theory.mixed_filters(found.eigenvalues, shift, later), z) for shift in SHIFTS])

    def scores_loo(found: solve.Decomposition) -> np.ndarray:
        v, z = found.vectors.numpy(), found.coefficients(y)
        pure = selection.leave_one_out_rounds(v, found.eigenvalues, z, SHIFTS, ROUNDS)
        gram = pure @ pure.swapaxes(1, 2) / n
        return np.einsum("wtj,ljk,wtk->lwt", powers, gram, powers, optimize=True)

    found = solve.decompose(kernel)
    sides: dict[str, Callable[[], np.ndarray]] = {
        "eigh": lambda: np.linalg.eigh(kernel)[0],
        "eigh, all filters, GCV": lambda: scores_gcv(solve.decompose(kernel)),
        "eigh, all filters, leave-one-out": lambda: scores_loo(solve.decompose(kernel)),
        "all filters, GCV": lambda: scores_gcv(found),
        "all filters, leave-one-out": lambda: scores_loo(found),
    }
    times, results = alternate(sides, repeats)
    direct = direct_scores(kernel, y, float(SHIFTS[7]), MIXES[4], 3)
    gcv, loo = (float(results[f"all filters, {name}"][7, 4, 2]) for name in ("GCV", "leave-one-out"))
    gap = max(abs(gcv / direct[0] - 1.0), abs(loo / direct[1] - 1.0))
    return {"n": n, "filters": int(results["all filters, GCV"].size), "seconds": times, "difference": gap}


def direct_scores(kernel: np.ndarray, y: np.ndarray, shift: float, mix: float, rounds: int) -> tuple[float, float]:
    """GCV from the smoother as a matrix; leave-one-out of 5 points by refits of those, of the others as the class has it."""
    n = len(y)
    one = np.linalg.solve(kernel + shift * np.eye(n), kernel)
    smoother = one
    for _ in range(rounds - 1):
        smoother = one @ (mix * np.eye(n) + (1.0 - mix) * smoother)
    gcv = float(((y - smoother @ y) ** 2).mean() / (1.0 - np.trace(smoother) / n) ** 2)
    d, v = np.linalg.eigh(kernel)
    pure = selection.leave_one_out_rounds(v, d, v.T @ y, shift, rounds)
    missed = (selection.mix_powers([mix] * (rounds - 1)) @ pure)[-1]
    for i in range(5):
        others = np.arange(n) != i
        model = KernelSelfDistillation(kernel="precomputed", alpha=shift, rounds=rounds, mix=mix)
        model.fit(kernel[np.ix_(others, others)], y[others])
        missed[i] = y[i] - model.predict(kernel[i : i + 1, others])[0]
    return gcv, float((missed**2).mean())


# the automatic choice on real data


def real_sets() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What scikit-learn ships; where labels are classes, one measured feature is predicted from the others."""
    found = {}
    for name, load, target in (
        ("diabetes", datasets.load_diabetes, None),
        ("wine, alcohol", datasets.load_wine, 0),
        ("wine, colour", datasets.load_wine, 9),
        ("iris, petal width", datasets.load_iris, 3),
        ("iris, sepal width", datasets.load_iris, 1),
        ("breast cancer, symmetry", datasets.load_breast_cancer, 8),
        ("breast cancer, fractal dimension", datasets.load_breast_cancer, 9),
        ("linnerud, weight", datasets.load_linnerud, None),
    ):
        data = load()
        if target is None:
            found[name] = (data.data, np.asarray(data.target, dtype=float).reshape(len(data.data), -1)[:, 0])
        else:
            means = data.data[:, :10] if "cancer" in name else data.data
            found[name] = (np.delete(means, target, 1), means[:, target])
    return found


def chosen(name: str, inputs: np.ndarray, y: np.ndarray, splits: int) -> dict:
    """Log ratio of the test error to that of ridge tuned by GCV, over random splits 60/40."""
    sides = {
        "GCV": {"rounds": "auto", "mix": "auto", "alpha": "auto"},
        "leave-one-out": {"rounds": "auto", "mix": "auto", "alpha": "auto", "criterion": "leave_one_out"},
    }
    logs: dict[str, list[float]] = {side: [] for side in sides}
    distilled = dict.fromkeys(sides, 0)
    for split in range(splits):
        order = np.random.default_rng(split).permutation(len(y))
        train, test = np.split(order, [int(0.6 * len(y))])
        centre, spread = inputs[train].mean(0), inputs[train].std(0) + 1e-12
        x, shift = (inputs - centre) / spread, y[train].mean()

        def fit(options: dict, x=x, shift=shift, train=train, test=test) -> tuple[float, int]:
            model = KernelSelfDistillation(**options).fit(x[train], y[train] - shift)
            return float(((model.predict(x[test]) - (y[test] - shift)) ** 2).mean()), model.rounds_

        base, _ = fit({"alpha": "auto"})
        for side, options in sides.items():
            error, rounds = fit(options)
            logs[side].append(math.log(error / base))
            distilled[side] += rounds > 1
    row: dict = {"data": name, "train": int(0.6 * len(y)), "splits": splits}
    for side, found in logs.items():
        stderr = statistics.stdev(found) / math.sqrt(len(found))
        row[side] = {"log_ratio": statistics.fmean(found), "stderr": stderr, "distilled": distilled[side]}
    return row


# the page


def lines_of(result: dict) -> list[str]:
    lines = [
        "# Kernel self-distillation",
        "",
        f"{ROUNDS} rounds, one lambda. Processor seconds on one thread. Aim: refits take >= 12 times as long.",
        "",
        "| n | refits | refits, precomputed | one fit | route | ratio | to precomputed | Cholesky | Lanczos | difference |",
        "|-|-|-|-|-|-|-|-|-|-|",
    ]
    for row in result["constant"]:
        t = row["seconds"]
        own = t["KernelSelfDistillation"]
        lines.append(
            f"| {row['n']} | {t['KernelRidge']:.3f} | {t['KernelRidge, precomputed']:.3f} | {own:.3f} | {row['route']} "
            f"| {t['KernelRidge'] / own:.1f} | {t['KernelRidge, precomputed'] / own:.1f} "
            f"| {t['cholesky']:.3f} | {t['lanczos']:.3f} | {row['difference']:.0e} |"
        )
    lines += [
        "",
        "Time of all fits, and for refits of the predictions between them. Difference: largest between the values of the last",
        "round, over max |y|. Refits compute the kernel matrix twice a round unless it is precomputed, everything else once.",
        "",
        f"Tolerance, {ROUNDS} fits, kernel matrix given. Aim: >= 10 times. Difference: of the multipliers, relative.",
        "",
        "| n | Cholesky in brentq | factorisations | KernelSelfDistillation | ratio | difference |",
        "|-|-|-|-|-|-|",
    ]
    for row in result["tolerance"]:
        peer, own = row["seconds"].values()
        cells = f"{peer:.2f} | {row['factorisations']} | {own:.3f} | {peer / own:.1f} | {row['difference']:.0e}"
        lines.append(f"| {row['n']} | {cells} |")
    lines += [
        "",
        f"A grid of {len(SHIFTS)} lambda x {len(MIXES)} mixes x {ROUNDS} rounds, in units of one eigendecomposition. Aim: 1.3.",
        "Difference: of one score from a smoother in full and from refits, relative.",
        "",
        "| n | eigh, seconds | eigh + all filters + GCV | eigh + all filters + exact leave-one-out | difference |",
        "|-|-|-|-|-|",
    ]
    for row in result["grid"]:
        t = row["seconds"]
        shares = [1.0 + t[f"all filters, {name}"] / t["eigh"] for name in ("GCV", "leave-one-out")]
        lines.append(f"| {row['n']} | {t['eigh']:.3f} | {shares[0]:.2f} | {shares[1]:.2f} | {row['difference']:.0e} |")
    lines += [
        "",
        'Test error of `rounds="auto", mix="auto", alpha="auto"` against ridge tuned by GCV on the same grid: mean change over',
        "random 60/40 splits, plus or minus its standard error, and in how many splits anything but one fit was chosen.",
        "",
        "| data | training points | by GCV (default) | distilled | by leave-one-out | distilled |",
        "|-|-|-|-|-|-|",
    ]
    for row in result["chosen"]:
        cells = [
            f"{100 * math.expm1(row[side]['log_ratio']):+.1f} % ± {100 * row[side]['stderr']:.1f} "
            f"| {row[side]['distilled']} of {row['splits']}"
            for side in ("GCV", "leave-one-out")
        ]
        lines.append(f"| {row['data']} | {row['train']} | {cells[0]} | {cells[1]} |")
    return [*lines, "", "Versions and machine: `self_distill.json`."]


def main() -> None:
    """Measure, write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small problems, nothing written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    threadpool_limits(1)
    constant(200, 1)  # libraries set themselves up at the first call
    sizes = {200: 1} if quick else {1000: 7, 2000: 3, 5000: 2}
    smaller = {200: 1} if quick else {1000: 3, 2000: 1}
    result = {
        "provenance": provenance(),
        "constant": [constant(n, repeats) for n, repeats in sizes.items()],
        "tolerance": [tolerance(n, repeats) for n, repeats in smaller.items()],
        "grid": [grid(n, repeats + 2) for n, repeats in smaller.items()],
        "chosen": [chosen(name, x, y, 2 if quick else 20) for name, (x, y) in real_sets().items()],
    }
    lines = lines_of(result)
    if not quick:
        (RESULTS / "self_distill.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "self_distill.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
