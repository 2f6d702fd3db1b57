"""Runs that differ in numbers alone, trained as one batched program: the executor `replicas`.

Small networks leave a processor waiting for Python; K of them in one program wait once (`decaycast.core.replica_training`). Runs
are batched when their configs agree in everything but `BATCHED` and their seeds. Whether that pays, and for how many at a time,
is measured on the machine at hand with the runs at hand, before each group is trained, and said: in the log and to `note`.

The rows are those of `decaycast.lab.trial.train_run` up to rounding: in float32 a curve begins equal to about 1e-6 and
drifts off it as fast as this training amplifies rounding (as it does on another machine). Provenance says how many were trained
together (``batched``), and `seconds` is a run's share of the batch's time.

A batch stores a row whenever a run of it ends. A killed batch has stored nothing of the runs that had not ended: the next call
trains them again from their beginning.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as functional

from decaycast.core.experiment import Row, Run
from decaycast.core.measure import COLUMNS
from decaycast.core.replica_batches import ShuffledBatches
from decaycast.core.replica_training import Outcome, ReplicaTraining, evaluate_replicas
from decaycast.core.replicas import Replicas
from decaycast.core.train import DivergedError
from decaycast.lab.execute import Execute, OnRow, Train, describe_error, in_process, processes, together
from decaycast.lab.provenance import provenance
from decaycast.lab.trial import DEFAULTS, Trial, train_run

BATCHED = ("lr", "weight_decay", "momentum", "schedule", "rule", "refractory", "budget_efolds", "stop")
"""Settings in which the runs of one batch may differ, beside the seed."""
LEAST_GAIN = 1.1
"""Batching has to be measured this many times as fast before it is chosen: measurements are noisy, and ties go to one by one."""
_FIRST_TRY = 8
_PROBE_SHARE = 0.03  # of the time that the group would take one by one: what may be spent on measuring
_PROBE_STEPS = 10
_PIECE_STEPS = 100  # between looks at what has ended
_SAMPLES_AT_ONCE = 500  # evaluated, as a trial does

_log = logging.getLogger(__name__)
Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a group of runs is to be trained."""

    at_once: int
    """Runs per batch; 1 for one by one."""
    ratio: float
    """Seconds of one by one over seconds batched, as measured for the best batch size that was tried; NaN if none was."""


def replicas(*, at_once: int | None = None, workers: int = 1, note: Callable[[str], None] | None = None) -> Execute:
    """An executor that trains runs in batches where that is faster, and one by one where not.

    What cannot be batched (a training of its own, a config that no other run shares, a run that cannot start) is trained
    one by one. So are the runs of a batch that fails as a whole.

    Args:
        at_once: runs per batch; None to measure, for each group of runs, how many are best and whether any are.
        workers: processes for the runs that are trained one by one; batching is chosen only where it beats that many.
        note: called with a sentence per group that says how it is trained and what was measured.

    Raises:
        ValueError: `at_once` or `workers` below 1.
    """
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once must be at least 1, got {at_once}; leave it out to have it measured")
    separate = in_process if workers == 1 else processes(workers)

    def execute(runs: Sequence[Run], train: Train, on_row: OnRow) -> None:
        """Train `runs`, batched or with `train`; `on_row` gets each row as it arrives."""
        groups, others = group_runs(runs, train)
        for options, group in groups:
            choice = (
                _guarded_choice(group, options, workers) if at_once is None else Choice(at_once=at_once, ratio=math.nan)
            )
            _say(note, _describe(group, choice, workers))
            if choice.at_once == 1:
                others += group
                continue
            for batch in _evenly(group, choice.at_once):
                others += _train_batch(batch, options, on_row, note)
        separate(others, train, on_row)

    return execute


def group_runs(runs: Sequence[Run], train: Train) -> tuple[list[tuple[Options, list[Run]]], list[Run]]:
    """Runs that can be batched, by what they have to agree in, and the others.

    Returns:
        Groups of two runs or more, each with the options of its trials (``data_dir``, ``device``) and in the order of their
        stops, longest first, so that those of one batch end together; and the runs to be trained by `train`.
    """
    groups: dict[Any, tuple[Options, list[Run]]] = {}
    others = []
    for run in runs:
        options = _options(train, run)
        if options is None or not set(run.config) <= set(DEFAULTS):
            others.append(run)
            continue
        config = {**DEFAULTS, **run.config}
        shared = tuple(repr(value) for name, value in config.items() if name not in BATCHED)
        groups.setdefault((shared, tuple(options.items())), (options, []))[1].append(run)
    for _, group in groups.values():
        group.sort(key=_stop, reverse=True)
    others += [run for _, group in groups.values() if len(group) == 1 for run in group]
    return [entry for entry in groups.values() if len(entry[1]) > 1], others


def choose_batch(runs: Sequence[Run], *, workers: int = 1, **options: Any) -> Choice:
    """Measure how many of `runs` (one group, see `group_runs`) to train at once; 1 where batching does not pay.

    The first steps of one trial and of batches of 8, 16, 32, ... are timed, evaluations included, until a larger batch is no
    longer 5 % faster per run, or 3 % of what the group takes one by one is spent. The trials measured on are thrown away.

    Args:
        runs: at least two.
        workers: how many runs the rival trains at a time.
        options: of the trials, ``data_dir`` and ``device``.

    Raises:
        Exception: whatever building or training a trial raises.
    """
    began = time.perf_counter()
    separate = _separate_seconds(runs[0], options)
    allowed = _PROBE_SHARE * separate * len(runs) / workers
    best, size = Choice(at_once=1, ratio=0.0), min(_FIRST_TRY, len(runs))
    while True:
        ratio = separate / _batched_seconds(runs[:size], options)
        if ratio < 1.05 * best.ratio:
            break
        best = Choice(at_once=size, ratio=ratio)
        if size == len(runs) or 3 * (time.perf_counter() - began) > allowed:  # the next try costs about twice the last
            break
        size = min(2 * size, len(runs))
    return best if best.ratio >= LEAST_GAIN * workers else Choice(at_once=1, ratio=best.ratio)


class _Batch:
    """Trials of one group as one training."""

    def __init__(self, trials: Sequence[Trial], device: str, *, measure: bool = True) -> None:
        first = trials[0]
        self.parts = {
            name: tuple(tensor.to(device) for tensor in getattr(first.split, name))
            for name in ("train", "validation", "test")
        }
        stops = [_stop(trial.run) for trial in trials]
        measured = [{step for step in first.measure_at if step < stop} | {stop} for stop in stops]
        seeds = [trial.run.seed for trial in trials]
        self.training = ReplicaTraining(
            [trial.model for trial in trials],
            ShuffledBatches(*self.parts["train"], first.config["batch_size"], seeds),  # type: ignore[misc]
            functional.cross_entropy,
            [trial.optimizer for trial in trials],
            stop=stops,
            lr_schedules=[None if trial.config["schedule"] == "constant" else trial.schedule for trial in trials],
            hooks=[trial.hooks for trial in trials],
            evaluate=partial(self.evaluate, "validation"),
            evaluate_end=partial(self.evaluate, "test"),
            measure_at=measured if measure else None,
            device=device,
        )

    def evaluate(self, part: str, trained: Replicas) -> tuple[list[float], list[float]]:
        """Losses and accuracies on one part of the data."""
        inputs, target = (tensor.split(_SAMPLES_AT_ONCE) for tensor in self.parts[part])
        return evaluate_replicas(trained, zip(inputs, target, strict=True), functional.cross_entropy)


def _train_batch(runs: Sequence[Run], options: Options, on_row: OnRow, note: Any) -> list[Run]:
    """Train `runs` at once and hand out their rows; the runs without a row, to be trained one by one, are returned."""
    trials, left = _start(runs, options)
    if len(trials) < 2:
        return list(runs)
    batch, problem, handed_out = None, None, 0
    source = provenance(_device(options)) | {"batched": str(len(trials))}
    while problem is None and (batch is None or len(batch.training)):
        try:
            batch = batch or _Batch(trials, _device(options))
            batch.training.advance(batch.training.step + _PIECE_STEPS)
        except Exception as error:
            problem = error
            _log.info("a batch of %d failed", len(trials), exc_info=True)
        outcomes = batch.training.outcomes if batch else {}
        with together(on_row):
            for place, outcome in list(outcomes.items())[handed_out:]:
                on_row(_row(trials[place].run, outcome, source))
        handed_out = len(outcomes)
    if problem is not None:
        reason = describe_error(problem)
        _say(note, f"a batch of {len(trials)} runs failed ({reason}); the unfinished ones are trained one by one")
        left += [trial.run for place, trial in enumerate(trials) if place not in outcomes]
    return left


def _start(runs: Sequence[Run], options: Options) -> tuple[list[Trial], list[Run]]:
    """Trials, on the CPU, of the runs that can start, and the runs that cannot: their rows will say why."""
    trials, left = [], []
    for run in runs:
        try:
            trials.append(Trial(run, data_dir=options.get("data_dir")))
        except Exception:
            left.append(run)
    return trials, left


def _row(run: Run, outcome: Outcome, source: dict[str, str]) -> Row:
    """The row that `train_run`, or the executor around it, would make of this end."""
    status, reason = "done", ""
    final: dict[str, float] = {}
    if outcome.final is not None:
        final = dict(zip(("test_loss", "test_accuracy"), outcome.final, strict=True))
        if not all(math.isfinite(value) for value in final.values()):
            status, reason = "failed", f"the trained network's test loss is not finite: {final}"
    if outcome.error is not None:
        status, reason = "failed", describe_error(outcome.error)
    curve = {name: [row[name] for row in outcome.rows] for name in COLUMNS}
    if outcome.error is not None and not isinstance(outcome.error, DivergedError):
        curve = {}  # as where such an error ends a run of its own
    seconds = outcome.seconds
    return Row(run=run, status=status, reason=reason, curve=curve, final=final, seconds=seconds, provenance=source)


def _options(train: Train, run: Run) -> Options | None:
    """Settings of the trial that `train` would make of `run`; None where it does something else."""
    from decaycast.lab import figures  # which may offer this executor

    keywords: Options = {}
    while isinstance(train, partial):
        if train.args:
            return None
        keywords = {**train.keywords, **keywords}
        train = train.func
    if train is figures.train_planned and run.key not in keywords.pop("own", {}):
        return keywords
    known = train is train_run and set(keywords) <= {"data_dir", "device"}
    return keywords if known else None


def _guarded_choice(runs: Sequence[Run], options: Options, workers: int) -> Choice:
    try:
        return choose_batch(runs, workers=workers, **options)
    except Exception:  # a run that cannot start or be batched: one by one it gets the row that says so
        _log.info("measuring failed", exc_info=True)
        return Choice(at_once=1, ratio=math.nan)


def _separate_seconds(run: Run, options: Options) -> float:
    """Expected seconds of one run by itself."""
    trial = Trial(run, **options)
    measurements, trial.measure_at = len(trial.measure_at), []  # advance measures where it pauses
    trial.advance(2)
    one = min(_timed(lambda: trial.advance(trial.step + 1), trial.device) for _ in range(3))
    many = min(_timed(lambda: trial.advance(trial.step + 1 + _PROBE_STEPS), trial.device) for _ in range(3))
    step = max(many - one, 0.0) / _PROBE_STEPS
    return _stop(run) * step + measurements * max(one - step, 0.0)


def _batched_seconds(runs: Sequence[Run], options: Options) -> float:
    """Expected seconds of one run in a batch of `runs`."""
    trials = [Trial(run, data_dir=options.get("data_dir")) for run in runs]
    device, measurements = _device(options), len(trials[0].measure_at)
    batch = _Batch(trials, device, measure=False)
    training = batch.training
    training.advance(2)
    many = min(_timed(lambda: training.advance(training.step + _PROBE_STEPS), device) for _ in range(3))
    evaluation = min(_timed(lambda: batch.evaluate("validation", training.replicas), device) for _ in range(2))
    return (_stop(runs[0]) * many / _PROBE_STEPS + measurements * evaluation) / len(runs)


def _timed(work: Callable[[], object], device: str) -> float:
    """Seconds of the processor, which others on the machine disturb less; of the wall where they would not say the same."""
    on_cuda = torch.device(device).type == "cuda"
    clock = time.perf_counter if on_cuda or torch.get_num_threads() > 1 else time.process_time
    began = clock()
    work()
    if on_cuda:
        torch.cuda.synchronize(device)
    return clock() - began


def _device(options: Options) -> str:
    return str(options.get("device", "cpu"))


def _stop(run: Run) -> int:
    config = {**DEFAULTS, **run.config}
    return int(config["stop"] or config["steps"])


def _evenly(runs: Sequence[Run], at_once: int) -> list[list[Run]]:
    """`runs` in as few parts of at most `at_once` as possible, of nearly equal size."""
    count = math.ceil(len(runs) / at_once)
    cuts = [math.ceil(part * len(runs) / count) for part in range(count + 1)]
    return [list(runs[low:high]) for low, high in pairwise(cuts)]


def _describe(group: Sequence[Run], choice: Choice, workers: int) -> str:
    config = {**DEFAULTS, **group[0].config}
    what = f"{len(group)} runs of {config['model']} on {config['data']}, batch size {config['batch_size']}"
    rival = "one by one" if workers == 1 else f"in {workers} processes"
    batch = len(_evenly(group, choice.at_once)[0])
    measured = f"measured {choice.ratio / workers:.2g} times as fast as {rival}"
    if choice.at_once == 1:
        return f"{what}: {rival}" + ("" if math.isnan(choice.ratio) else f" (batched was {measured})")
    return f"{what}: {batch} at a time" + ("" if math.isnan(choice.ratio) else f", {measured}")


def _say(note: Callable[[str], None] | None, sentence: str) -> None:
    _log.info(sentence)
    if note is not None:
        note(sentence)
