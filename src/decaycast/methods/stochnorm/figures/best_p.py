"""The paper's ablation of p: is an intermediate probability best where data are fewest?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from decaycast.core.experiment import Panel, Row, Run, Size, Verdict
from decaycast.core.seeds import common_seeds, mean_trace
from decaycast.core.standing import Question, answer
from decaycast.methods.stochnorm.figures.reading import (
    ByFraction,
    BySeed,
    by_arm,
    gains,
    in_points,
    interval_trace,
    mean,
    probabilities,
    setup,
)
from decaycast.methods.stochnorm.figures.recipe import train_arm
from decaycast.methods.stochnorm.figures.runs import JUDGED, PAPER, PLANS, PROBABILITIES, SEEDS, Plan, stochnorm

ENDS = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class BestProbability:
    """Accuracy over p with the fewest data; the runs are some of those of `stochnorm/fine-tuning`."""

    name: str = "stochnorm/p"
    title: str = "Which probability is best"
    claim: str = "An intermediate p is best: with the fewest data p = 0.5 beats both ends, p = 0 and p = 1 (plain)."
    source: str = f"{PAPER}, section 4, ablation of the selection probability"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_arm

    def runs(self, size: Size) -> list[Run]:
        """Every p, plain fine-tuning among them, at the smallest fraction."""
        plan = self.plans[size]
        return plan.runs([stochnorm(p) for p in (*PROBABILITIES, 1.0)], [min(plan.fractions)])

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Accuracy and loss over p, and each p's distance to p = 0.5."""
        by_p = _fewest(rows)
        if not by_p:
            return []
        panels = [_level_panel(by_p, "accuracy", setup(rows)), _difference_panel(by_p), _level_panel(by_p, "loss", "")]
        return [panel for panel in panels if panel.traces and panel.traces[0].x]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when, in pairs of seed with 95 % intervals, p = 0.5 lies above p = 0 and above p = 1; five seeds at least.

        Not held when one of these is ruled out: see `decaycast.core.standing`.
        """
        by_p = _fewest(rows)
        arms = {stochnorm(p): {0.0: of_seed} for p, of_seed in by_p.items()}
        found = {end: gains(arms, stochnorm(JUDGED), over=stochnorm(end)).get(0.0, {}) for end in ENDS}
        if min(len(values) for values in found.values()) < 2:
            reason = f"needs p = 0, {JUDGED:g} and 1 at the smallest fraction, with {SEEDS} seeds each"
            return Verdict(outcome="not enough data", reason=reason)
        questions = [
            Question(name=f"p = {JUDGED:g} over p = {end:g}", values=list(values.values()))
            for end, values in found.items()
        ]
        seeds = common_seeds(by_p.values())
        means = {p: mean([of_seed[s].final["accuracy"] for s in seeds]) for p, of_seed in by_p.items() if seeds}
        words = f"Means of {len(seeds)} seeds: " + ", ".join(f"{value:.2%} at p = {p:g}" for p, value in means.items())
        return answer(questions, least=SEEDS, words=words, numbers={f"p = {p:g}": value for p, value in means.items()})


def _fewest(rows: Sequence[Row]) -> dict[float, BySeed]:
    """Rows by p, rising, and by seed, at the smallest fraction there is."""
    arms = by_arm(rows)
    chosen: dict[float, ByFraction] = {p: arms[stochnorm(p)] for p in probabilities(arms)}
    if not chosen:
        return {}
    few = min(fraction for fractions in chosen.values() for fraction in fractions)
    return {p: fractions[few] for p, fractions in chosen.items() if few in fractions}


def _level_panel(by_p: Mapping[float, BySeed], name: str, words: str) -> Panel:
    seeds = common_seeds(by_p.values())
    levels = [[of_seed[s].final[name] for s in seeds] for of_seed in by_p.values()]
    return Panel(
        title=f"Test {name} by p",
        x_label="p, probability of batch statistics (1 is plain)",
        y_label=f"test {name} after the last step",
        traces=[mean_trace(f"mean over {len(seeds)} seeds", list(by_p), levels)] if seeds else [],
        caption=f"At the smallest share of the data. Band: one standard error. {words}".strip(),
    )


def _difference_panel(by_p: Mapping[float, BySeed]) -> Panel:
    arms = {stochnorm(p): {0.0: of_seed} for p, of_seed in by_p.items()}
    found = {p: gains(arms, stochnorm(p), over=stochnorm(JUDGED)).get(0.0, {}) for p in by_p if p != JUDGED}
    shown = [p for p, values in found.items() if values]
    return Panel(
        title=f"Each p against p = {JUDGED:g}",
        x_label="p, probability of batch statistics (1 is plain)",
        y_label="points of accuracy above p = 0.5",
        traces=[interval_trace("difference in pairs of seed", shown, [in_points(found[p]) for p in shown])],
        caption="Bands are 95 % intervals. The claim wants both ends below 0.",
    )
