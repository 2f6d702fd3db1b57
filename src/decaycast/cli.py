"""The command line. Each verb reads its options, calls one function of the lab, and prints what came back."""

from __future__ import annotations

import enum
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.progress import Progress, TextColumn
    from rich.table import Table
except ImportError as _error:
    raise SystemExit(f"the command line needs typer and rich ({_error}): pip install 'decaycast[lab]'") from _error

from decaycast import cli_compare, cli_lab, cli_probe, cli_sweep
from decaycast.core import ranks
from decaycast.core.experiment import Row, Run, jsonable
from decaycast.core.names import choose
from decaycast.core.schedule import LR_NAMES
from decaycast.lab import data as datasets
from decaycast.lab.audit import Decaying, Report, audit_facts, parameter_table
from decaycast.lab.forecasting import Request, Result, find_weight_decay, recipe_config
from decaycast.lab.recipes.recipe import Facts, read_config, with_options
from decaycast.lab.recipes.rules import Plan
from decaycast.lab.resume import Keeper
from decaycast.lab.store import Store
from decaycast.lab.trial import OPTIMIZERS, RULES, make_optimizer, train_run
from decaycast.methods.l2.forecast import PRIOR_EFOLDS

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Regularisation that tunes itself, for PyTorch.")
out = Console()
notes = Console(stderr=True)
app.add_typer(cli_lab.app, name="lab")
app.command("probe-lr")(cli_probe.probe_lr)
app.command("sweep")(cli_sweep.sweep_command)
app.command("compare")(cli_compare.compare_command)


class Metric(enum.StrEnum):
    """What should be best at the end."""

    loss = "loss"
    accuracy = "accuracy"


DataOption = Annotated[str, typer.Option("--data", help="digits, mnist, fashion_mnist or cifar10")]
DirOption = Annotated[Path | None, typer.Option("--data-dir", help="folder of the data files (or DECAYCAST_DATA)")]
SizeOption = Annotated[int | None, typer.Option("--train-size", help="training samples; default: all")]
ModelOption = Annotated[str, typer.Option("--model", help="mlp-256x3, cnn-16, cnn-bn-16, wrn-10-1, ...")]
OptimizerOption = Annotated[str, typer.Option("--optimizer", help="sgd or adamw")]
LrOption = Annotated[float | None, typer.Option("--lr", help="learning rate [sgd: 0.02, adamw: 0.001]")]
MomentumOption = Annotated[float, typer.Option("--momentum", help="of sgd")]
ScheduleOption = Annotated[str, typer.Option("--schedule", help=f"of the learning rate: {', '.join(LR_NAMES)}")]
BudgetOption = Annotated[int, typer.Option("--budget", "--steps", help="optimiser steps of the full training")]
BatchOption = Annotated[int, typer.Option("--batch-size")]
SeedOption = Annotated[int, typer.Option("--seed")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
OutOption = Annotated[Path, typer.Option("--out", help="folder for the page and the store")]


@app.command()
def find(
    data: DataOption = "digits",
    budget: BudgetOption = 3000,
    model: ModelOption = "mlp-256x3",
    optimizer: OptimizerOption = "sgd",
    lr: LrOption = None,
    momentum: MomentumOption = 0.9,
    schedule: ScheduleOption = "cosine",
    batch_size: BatchOption = 64,
    train_size: SizeOption = None,
    metric: Annotated[Metric, typer.Option(help="what should be best at the end")] = Metric.loss,
    max_cost: Annotated[float, typer.Option(help="most full-run equivalents to spend")] = 0.3,
    verify: Annotated[bool, typer.Option("--verify", help="train a grid around the answer on fresh seeds")] = False,
    workers: Annotated[int, typer.Option(help="processes for --verify")] = 2,
    seed: SeedOption = 0,
    data_dir: DirOption = None,
    out_dir: OutOption = Path("decaycast-out"),
    as_json: JsonOption = False,
) -> None:
    """Forecast the best weight decay from a few short runs, and write a page about it."""
    if not 0 < max_cost <= 1:
        raise ValueError(f"--max-cost must be in (0, 1] full-run equivalents, got {max_cost}")
    request = Request(
        config=_config(data, train_size, model, optimizer, lr, momentum, schedule, budget, batch_size),
        metric=metric.value,
        max_cost=max_cost,
        seed=seed,
        verify=verify,
        workers=workers,
        data_dir=None if data_dir is None else str(data_dir),
        out=out_dir,
        command=shlex.join(["decaycast", *sys.argv[1:]]),
    )
    with _progress(as_json) as progress:
        task = progress.add_task("probing", total=max(1, round(budget * max_cost)), note="")

        done: dict[float, int] = {}

        def show(weight_decay: float, row: dict[str, float]) -> None:
            done[weight_decay] = int(row["step"])
            progress.update(task, completed=sum(done.values()), note=f"lambda {weight_decay:.3g}  {_numbers(row)}")

        result = find_weight_decay(request, on_row=show, say=lambda text: progress.update(task, description=text))
    out.print_json(json.dumps(result.to_dict())) if as_json else _print_result(result)


@app.command()
def train(
    data: DataOption = "digits",
    weight_decay: Annotated[float | None, typer.Option(help="lambda, autol2's start [0.0005; autol2: 0.1]")] = None,
    rule: Annotated[str, typer.Option(help=f"of the weight decay: {', '.join(RULES)}")] = "constant",
    budget_efolds: Annotated[
        float | None, typer.Option(help="of autol2-efolds, which sets lambda itself [1.3]")
    ] = None,
    budget: BudgetOption = 3000,
    model: ModelOption = "mlp-256x3",
    optimizer: OptimizerOption = "sgd",
    lr: LrOption = None,
    momentum: MomentumOption = 0.9,
    schedule: ScheduleOption = "cosine",
    batch_size: BatchOption = 64,
    train_size: SizeOption = None,
    seed: SeedOption = 0,
    data_dir: DirOption = None,
    store: Annotated[Path | None, typer.Option(help="keep the row in this store")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="a file to go on from, where it exists, and to keep up to date")
    ] = None,
    checkpoint_every: Annotated[float, typer.Option(help="seconds between checkpoints")] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Train once, with a progress bar of loss, accuracy, lambda and e-folds spent.

    Under torchrun all its ranks train one model together: each takes its share of every batch, and rank 0 reports.
    """
    choose(rule, RULES, "weight decay rule")
    decay = weight_decay if weight_decay is not None else {"autol2": 0.1}.get(rule, 5e-4)
    config = _config(data, train_size, model, optimizer, lr, momentum, schedule, budget, batch_size)
    chosen = {"weight_decay": _positive("weight decay", decay, zero=True), "rule": rule}
    if budget_efolds is not None:
        if rule != "autol2-efolds":
            raise ValueError(f"--budget-efolds belongs to --rule autol2-efolds, got --rule {rule}")
        chosen["budget_efolds"] = _positive("budget of e-folds", budget_efolds)
    run = Run(config={**config, **chosen}, seed=seed)
    with ranks.joined() as group:
        first = ranks.rank_in(group) == 0
        with _progress(as_json or not first) as progress:
            task = progress.add_task("training", total=budget, note="")
            row = train_run(
                run,
                data_dir=None if data_dir is None else str(data_dir),
                on_row=lambda r: progress.update(task, completed=int(r["step"]), note=_numbers(r)),
                group=group,
                keeper=Keeper(checkpoint, every_seconds=checkpoint_every, group=group) if checkpoint else None,
            )
    if first:
        _print_trained(row, rule, schedule, store, as_json)
    if row.status == "failed":
        raise typer.Exit(1)


def _print_trained(row: Row, rule: str, schedule: str, store: Path | None, as_json: bool) -> None:
    if rule == "autol2" and schedule != "constant" and not as_json:
        notes.print(
            "note: the paper's AutoL2 is made for a constant learning rate; under a falling one it does not match a tuned "
            "constant. Try --rule autol2-efolds"
        )
    if store is not None:
        with Store(store) as opened:
            opened.append(row)
    numbers = {name: values[-1] for name, values in row.curve.items() if values} | dict(row.final)
    if as_json:
        out.print_json(json.dumps({"status": row.status, "reason": row.reason, **jsonable(numbers)}))
    else:
        _print_numbers("trained" if row.status == "done" else f"failed: {row.reason}", numbers)


@app.command()
def audit(
    config: Annotated[
        Path | None,
        typer.Option("--config", help="a Trainer's arguments as JSON, or timm's args.yaml; options add to it"),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate (peak)")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="lambda, in the optimiser's own convention")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps of the run")] = None,
    epochs: Annotated[float | None, typer.Option(help="instead of --steps, with --samples and --batch-size")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw [sgd]")] = None,
    momentum: Annotated[float | None, typer.Option(help="of sgd [0]")] = None,
    schedule: Annotated[
        str | None, typer.Option(help=f"of the learning rate: {', '.join(LR_NAMES)} [constant]")
    ] = None,
    convention: Annotated[
        str | None, typer.Option(help="sgd, decoupled, relative, corrected [by the optimiser]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="samples (for text: sequences) per optimiser step")] = None,
    world_size: Annotated[int | None, typer.Option(help="devices, where the file does not say it")] = None,
    samples: Annotated[float | None, typer.Option(help="training samples in an epoch")] = None,
    tokens: Annotated[float | None, typer.Option(help="tokens of the whole run")] = None,
    parameters: Annotated[float | None, typer.Option(help="of the language model")] = None,
    sequence_length: Annotated[float | None, typer.Option(help="tokens in a sequence")] = None,
    new_steps: Annotated[float | None, typer.Option(help="carry the weight decay to a run of so many steps")] = None,
    new_batch_size: Annotated[float | None, typer.Option(help="... of this batch size")] = None,
    new_samples: Annotated[float | None, typer.Option(help="... on so many samples an epoch")] = None,
    width_factor: Annotated[float | None, typer.Option(help="... so many times as wide (muP)")] = None,
    model: Annotated[str | None, typer.Option(help="also list which parameters of this network decay")] = None,
    as_json: JsonOption = False,
) -> None:
    """Without training: e-folds, relaxation time, what each rule says about a recipe, and which parameters decay."""
    facts = with_options(
        Facts() if config is None else read_config(config, world_size),
        lr=lr,
        weight_decay=weight_decay,
        steps=steps,
        epochs=epochs,
        optimizer=optimizer,
        momentum=momentum,
        schedule=schedule,
        batch_size=batch_size,
    )
    report = audit_facts(
        facts,
        convention=convention,
        samples=samples,
        tokens=tokens,
        parameters=parameters,
        sequence_length=sequence_length,
        new_steps=new_steps,
        new_batch_size=new_batch_size,
        new_samples=new_samples,
        width_factor=width_factor,
    )
    rows = _decaying(model, report.plan) if model else []
    if as_json:
        out.print_json(json.dumps(jsonable({**report.to_dict(), "parameters": [vars(row) for row in rows]})))
    else:
        _print_audit(report, rows)


@app.command()
def data(data_dir: DirOption = None, as_json: JsonOption = False) -> None:
    """What data sets are there, which are missing, and how to get them."""
    found = datasets.availability(data_dir)
    if as_json:
        out.print_json(json.dumps([vars(item) for item in found]))
        return
    table = Table("data set", "status", "where or what to do")
    for item in found:
        table.add_row(item.name, item.status, item.where if item.status != "missing" else item.advice)
    out.print(table)


def main() -> None:
    """Entry point: known errors become one line on stderr and exit code 2, Ctrl-C becomes 130."""
    try:
        app()
    except SystemExit as ended:
        if ended.code == 130:  # typer has turned Ctrl-C into this
            notes.print("interrupted; finished runs are kept, and the same command goes on from them", soft_wrap=True)
        raise
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    notes.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
    notes.print(" ".join(str(error).split()), markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(2) from None


def _config(
    data: str,
    train_size: int | None,
    model: str,
    optimizer: str,
    lr: float | None,
    momentum: float,
    schedule: str,
    budget: int,
    batch_size: int,
) -> dict[str, Any]:
    choose(optimizer, OPTIMIZERS, "optimizer")
    rate = lr if lr is not None else {"sgd": 0.02, "adamw": 1e-3}[optimizer]
    return recipe_config(
        data=data,
        train_size=train_size,
        model=model,
        optimizer=optimizer,
        lr=_positive("learning rate", rate),
        momentum=_momentum(momentum) if optimizer == "sgd" else 0.0,
        schedule=schedule,
        steps=budget,
        batch_size=batch_size,
    )


def _positive(what: str, value: float, *, zero: bool = False) -> float:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"the {what} must be a finite number {'>= 0' if zero else '> 0'}, got {value}")
    return value


def _momentum(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"the momentum must be in [0, 1), got {value}")
    return value


def _decaying(model: str, plan: Plan) -> list[Decaying]:
    from decaycast.lab import models, text

    # which parameters decay is the same for every size of sample; a language model reads characters
    shape = (text.CONTEXT,) if model.startswith("gpt") else (3, 32, 32)
    network = models.build(model, shape, 10, seed=0)
    kind = "sgd" if plan.convention == "sgd" else "adamw"  # which parameters decay is the same in all others
    config = {"optimizer": kind, "lr": plan.peak, "weight_decay": plan.weight_decay, "momentum": plan.momentum}
    return parameter_table(network, make_optimizer(config, network.parameters()))


def _print_audit(report: Report, rows: list[Decaying]) -> None:
    found, plan = report.audit, report.plan
    tau = "infinite" if found.tau is None else f"{found.tau:.3g} of the run"
    tau += "" if report.tau_epochs is None else f" ({report.tau_epochs:.3g} epochs at the peak lr)"
    if report.source != "options":
        text = f"{report.source}: lr {plan.peak:g}, weight decay {plan.weight_decay:g} ({plan.convention}), {plan.schedule} lr"
        out.print(text, markup=False, highlight=False)
    out.print(f"[bold]{found.efolds:.3g} e-folds[/] of decay over {plan.steps} steps; relaxation time {tau}")
    out.print(found.advice)
    if found.usual_weight_decay is not None:
        guess = f"weight decay {found.usual_weight_decay:.3g} would spend {PRIOR_EFOLDS} e-folds"
        out.print(f"zero-cost guess: {guess}; `decaycast find` measures")
    if report.batch is not None:
        sizes = [report.batch[name] for name in ("tokens", "optimal_tokens", "critical_tokens")]
        out.print("batch {:.3g} tokens; Power Lines: best about {:.3g}, critical about {:.3g}".format(*sizes))
    _print_rules(report)
    if rows:
        table = Table("parameter", "shape", "kind", "weight decay")
        for row in rows:
            table.add_row(row.name, "x".join(map(str, row.shape)), row.kind, f"{row.weight_decay:g}")
        out.print(table)


def _print_rules(report: Report) -> None:
    table = Table("rule", "for", "weight decay", "x yours", "e-folds", "source")
    for said in report.rules:
        if said.weight_decay is not None:
            times = "" if said.times_yours is None else f"{said.times_yours:.3g}"
            table.add_row(said.rule, said.about, f"{said.weight_decay:.3g}", times, f"{said.efolds:.3g}", said.source)
    if table.row_count:
        out.print(table)
    lines = [f"{said.rule}: {'no answer, ' * (said.weight_decay is None)}{said.why}" for said in report.rules]
    for line in [*report.disagreements, *lines, *(f"note: {note}" for note in report.notes)]:
        out.print(line, markup=False, highlight=False)


def _progress(quiet: bool) -> Progress:
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=notes, transient=True, disable=quiet)


def _numbers(row: dict[str, float]) -> str:
    return (
        f"loss {row['validation_loss']:.3f}  acc {row['validation_accuracy']:.3f}  wd {row['weight_decay']:.2g}  "
        f"e-folds {row['efolds']:.2f}"
    )


def _print_numbers(title: str, numbers: dict[str, float]) -> None:
    table = Table("", "value", title=title)
    for name, value in numbers.items():
        table.add_row(name.replace("_", " "), f"{value:.5g}")
    out.print(table)


def _print_result(result: Result) -> None:
    found = result.forecast
    low, high = found.interval
    colour = {"trust": "green", "weak": "yellow", "refuse": "red"}[found.verdict]
    out.print(f"weight decay [bold]{found.weight_decay:.3g}[/]   90 % interval {low:.2g} to {high:.2g}")
    out.print(f"verdict      [bold {colour}]{found.verdict}[/]: {found.reason}")
    out.print(f"e-folds      {found.efolds:.3g} over {found.budget_steps} steps; cost {found.cost:.2f} full runs")
    if result.verification is not None:
        check = result.verification
        out.print(
            f"verified     regret {check.regret:.4g} +- {check.regret_stderr:.2g} in {check.metric.replace('_', ' ')} against "
            f"the best of {len(check.weight_decays)} weight decays ({check.seeds} seeds, {check.cost:.0f} full runs)"
        )
    out.print("page         ", end="")
    out.print(str(result.page), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
