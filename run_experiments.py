"""A grid of runs: every flag takes several values, each run is a process of its own, what is done is not done again.

    python run_experiments.py --dry_run
    python run_experiments.py --datasets Demo Clinc150 --embedding_models Qwen/Qwen3-Embedding-0.6B --lr 1e-4 1e-3 \
        --optimize_with_gold --parallel 2

Typing the same command again finishes the grid. Knows no flag of an experiment: it takes them from the dataclass.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_utils import write_atomically
from errors import FolderBusy, RunError, UserError, run_command
from experiment_config import (
    NOT_EMPTY,
    NOT_NEGATIVE,
    OneLineParser,
    Rule,
    add_flags,
    command_words,
    fields,
    flag,
    folder_name,
    parse_values,
    parse_words,
)
from experiment_grid import DEFAULT_AXES, Grid, PlannedRun, check_configs, find_completed, in_order, plan_grid
from grid_file import PLURALS, Cells, read_grid_file
from job_runner import Beginning, Entry, Job, JobRunner, Outcome, SlotFlags, Slots, counted, find_slots
from results import LOG, TABLE_METRICS, VARIANTS, RunFolder, aligned, read_json
from run_setup import is_done

SCRIPT = Path(__file__).resolve().parent / "embedding_adaptation.py"


@dataclass(frozen=True)
class GridFlags(SlotFlags):
    """The grid's own flags."""

    grid: str | None = flag(None, "YAML file with named grids and exclusions", NOT_EMPTY)
    only: str | None = flag(
        None, "names of the grids in the file that are to be run; all when left out", Rule(bool, "names", several=True)
    )
    dry_run: bool = flag(False, "show the runs, their commands and what they will ask; starts and writes nothing")
    experiment_prefix: str | None = flag(None, "what the names of all runs begin with", folder_name(100))
    overwrite: bool = flag(False, "repeat runs that are done, too")
    continue_on_error: bool = flag(False, "go on after a run has failed; else those running finish and no other starts")
    retries: int = flag(0, "more tries of a run that died by a signal or for lack of memory", NOT_NEGATIVE)


def main() -> None:
    """Plan the grid, show it or run it, sum it up."""
    started = time.time()
    flags, cells = read_command(sys.argv[1:])
    if flags.dry_run:
        os.environ["HF_HUB_OFFLINE"] = "1"  # a preview asks nobody
    grid = plan_grid(cells, flags.experiment_prefix)
    completed = {} if flags.overwrite else find_completed(grid.runs, flags.experiment_prefix)
    to_do = [run for run in grid.runs if run.folder not in completed]
    problems = check_grid(to_do, flags)
    if flags.dry_run:
        show(grid, completed, problems)
        return
    if problems:
        raise UserError("\n".join(problems))
    for note in grid.notes:
        print(f"note: {note}", file=sys.stderr)
    outcomes, interrupted = run_grid(to_do, len(completed), flags)
    outcomes |= {folder: Outcome("skipped") for folder in completed}
    print_summary(grid, outcomes, completed)
    keep_summary(summary_path(grid, flags, started), grid, outcomes, completed)
    if interrupted:
        raise KeyboardInterrupt
    if failed := sum(outcome.state == "failed" for outcome in outcomes.values()):
        what = f"{failed} of {counted(len(grid.runs), 'run')} failed"
        raise RunError(f"{what}; the same command runs again what is not done")


# --- Before the first run --------------------------------------------------------------------------------------------


def read_command(argv: Sequence[str]) -> tuple[GridFlags, list[Cells]]:
    """The grid's own flags, and the grids that are to be run; flags of the command line replace those of a file.

    Raises:
        UserError: a line for each thing that is wrong with the grid's own flags or the file.
    """
    parser = OneLineParser(
        description="Run a grid of experiments: every flag of an experiment takes several values.",
        usage="%(prog)s [--flag VALUE ...]",
        allow_abbrev=False,
    )
    add_flags(parser.add_argument_group("the grid"), of=GridFlags)
    axes_group = parser.add_argument_group(
        "the experiments", "each takes several values; words that belong together have commas between them (0.15,0.6)"
    )
    defaults = {name: " ".join(values) for name, values in DEFAULT_AXES.items()}
    add_flags(axes_group, aliases=PLURALS, axes=True, defaults=defaults)
    words = parse_words(parser, argv)
    own_names = [field.name for field in fields(GridFlags)]
    given = {name: words.pop(name) for name in own_names if name in words}
    axes = {name: [None if word == "null" else word for word in values] for name, values in words.items()}
    values, problems = parse_values(given, GridFlags)
    if "experiment_prefix" in given and "experiment_name" in axes:
        problems.append("--experiment_prefix: begins names that the grid makes; give it or --experiment_name, not both")
    if "only" in given and "grid" not in given:
        problems.append("--only: names grids of a file, which --grid gives")
    cells = [Cells(axes)]
    try:
        if file := values.get("grid"):
            names = values["only"].split(",") if values.get("only") else []
            cells = [Cells(own.axes | axes, own.exclusions, own.where) for own in read_grid_file(file, names)]
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return GridFlags(**values), cells


def check_grid(to_do: Sequence[PlannedRun], flags: GridFlags) -> list[str]:
    """What would keep runs from starting, a line each; looks at files and the environment, loads and asks nothing."""
    problems = check_configs(run.config for run in to_do)
    checks: list[Callable[[], Any]] = [RunFolder(run.folder).check for run in to_do if run.folder.exists()]
    if flags.gpus:
        checks.append(lambda: find_slots(flags, wants_gpu=any(map(uses_gpu, to_do))))
    for check in checks:
        try:
            check()
        except FolderBusy:
            continue  # another grid is at it
        except UserError as error:
            problems.append(str(error))
    return problems


def command_of(run: PlannedRun) -> tuple[str, ...]:
    """The command line of one run: what was given for the grid, and the run's name."""
    return sys.executable, str(SCRIPT), *command_words({**run.given, "experiment_name": run.name})


def show(grid: Grid, completed: Mapping[Path, Path], problems: Sequence[str]) -> None:
    """Print what would be done."""
    from grid_costs import count_costs

    to_do = [run for run in grid.runs if run.folder not in completed]
    lines = [["run", *grid.varying, "state"]]
    for run in grid.runs:
        folder = completed.get(run.folder)
        state = "to do" if folder is None else "done" if folder == run.folder else f"done: {folder}"
        lines.append([run.name, *map(run.shown, grid.varying), state])
    print(aligned(lines, left=len(lines[0])))
    if to_do:
        print("\ncommands:")
    for run in in_order(to_do):
        print(shlex.join(command_of(run)))

    lines = [["dataset", "runs", "to do", "queries", "documents"]]
    for facts in {run.dataset.identity: run.dataset for run in grid.runs}.values():
        own = [run for run in grid.runs if run.dataset.identity == facts.identity]
        counts = len(own), sum(run.folder not in completed for run in own), facts.queries, facts.documents
        lines.append([facts.name, *(f"{count:,}" for count in counts)])
    print("\n" + aligned(lines, left=1))

    costs = count_costs(to_do)
    lines = [["asked for", "dataset", "model", "at most", "cached", "not known"]]
    for cost in costs:
        cached = "?" if cost.unknown and not cost.cached else f"{cost.cached:,}"
        unknown = ", ".join(cost.unknown) or "-"
        lines.append([cost.what, cost.dataset, cost.model, f"{cost.at_most:,}", cached, unknown])
    if costs:
        print("\n" + aligned(lines, left=3))
    queries = sum(run.dataset.queries for run in to_do)
    runs = counted(len(grid.runs), "run")
    print(f"\n{runs}: {len(completed)} done, {len(to_do)} to do with {queries:,} queries")
    for what in dict.fromkeys(cost.what for cost in costs):
        own = [cost for cost in costs if cost.what == what]
        known = "at least " if any(cost.unknown for cost in own) else ""
        print(f"{what}: {sum(c.at_most for c in own):,} at most, {known}{sum(c.cached for c in own):,} of them cached")
    for note in grid.notes:
        print(f"note: {note}")
    for problem in problems:
        print(f"before these runs can start: {problem}", file=sys.stderr)


# --- Running ---------------------------------------------------------------------------------------------------------


def run_grid(
    to_do: Sequence[PlannedRun], done: int, flags: GridFlags
) -> tuple[dict[Path, Outcome], bool]:
    """Run what is to do; returns the outcomes by folder, and whether the user stopped the work.

    Raises:
        UserError: the GPUs asked for are not there.
    """
    slots = find_slots(flags, wants_gpu=any(map(uses_gpu, to_do)))
    if slots.gpus and (named := [run for run in to_do if run.config.device.startswith("cuda:")]):
        raise UserError(f"--device: got {named[0].config.device}; each run sees one GPU, choose among them with --gpus")
    runs = {Job(run.name, command_of(run), uses_gpu(run), fills(run, slots)): run for run in in_order(to_do)}

    def begin(job: Job) -> Beginning | None:
        run = runs[job]
        folder = RunFolder(run.folder)
        files = folder.claim()
        if not flags.overwrite and is_done(run.config, run.digest, run.folder):  # another grid was sooner
            folder.release()
            return None
        return Beginning(tuple(dict.fromkeys((folder.log_path, run.folder / LOG))), files, folder.release)

    def describe(job: Job, outcome: Outcome) -> str:
        if outcome.state in ("completed", "skipped"):
            return f"{job.name}  {figures_of(runs[job].folder)}  {outcome.seconds:.1f} s"
        return f"{job.name}  {outcome.reason}" + (f"  (log: {outcome.log})" if outcome.log else "")

    runner = JobRunner(
        list(runs), slots, begin, describe, retries=flags.retries, continue_on_error=flags.continue_on_error
    )
    if done:
        runner.say(f"{'skipped':<11} {done} of {counted(done + len(to_do), 'run')}, as they are done")
    outcomes = {runs[job].folder: outcome for job, outcome in runner.run().items()}
    return outcomes, runner.interrupted


def uses_gpu(run: PlannedRun) -> bool:
    """Whether a run takes a GPU where there is one."""
    return run.config.device not in ("cpu", "mps")


def fills(run: PlannedRun, slots: Slots) -> tuple[Entry, ...]:
    """What a run puts into caches for others.

    Answers that two runs ask for at the same moment would be paid for twice. Vectors are embedded with all cores there
    are; several GPUs share the work.
    """
    shared = slots.gpus and uses_gpu(run)
    caches = {kind: entry for kind, entry in run.caches.items() if not (shared and kind == "vectors")}
    return tuple(Entry((kind, cache), part) for kind, (cache, part) in caches.items())


def means_of(folder: Path, metric: str = "map") -> dict[str, float]:
    """One metric of each variant of a run."""
    means = read_json(folder / "summary.json").get("means", {})
    return {variant: own[metric] for variant, own in means.items() if isinstance(own.get(metric), float | int)}


def figures_of(folder: Path) -> str:
    """A run's figures in a few words."""
    maps = {variant: f"{value:.4f}" for variant, value in means_of(folder).items()}
    parts = []
    for before, after, name in (
        ("embeddings", "optimized_embeddings", "map"),
        ("hyde", "optimized_hyde_embeddings", "HyDE"),
    ):
        if figures := [maps[variant] for variant in (before, after) if variant in maps]:
            parts.append(f"{name} {' → '.join(figures)}")
    return ", ".join(parts)


# --- After the last run ----------------------------------------------------------------------------------------------


def summary_path(grid: Grid, flags: GridFlags, started: float) -> Path:
    """Where the summary is kept; one without a prefix never replaces another."""
    output_dir = Path(grid.runs[0].config.output_dir)
    if flags.experiment_prefix:
        return output_dir / f"{flags.experiment_prefix}_grid.csv"
    name = time.strftime("%Y%m%d-%H%M%S", time.localtime(started))
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(path for end in endings if not (path := output_dir / f"{name}{end}_grid.csv").exists())


def keep_summary(
    path: Path, grid: Grid, outcomes: Mapping[Path, Outcome], completed: Mapping[Path, Path]
) -> None:
    """Write what became of each run; rows that another grid with the same prefix left there stay."""
    rows = {}
    try:
        if path.exists():
            with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = {row.get("folder", ""): row for row in csv.DictReader(file)}
        for run in grid.runs:
            row = summary_row(run, outcomes[run.folder], completed.get(run.folder, run.folder), grid.varying)
            rows.pop(str(run.folder), None)
            rows[row["folder"]] = row
        text = io.StringIO()
        writer = csv.DictWriter(text, dict.fromkeys(name for row in rows.values() for name in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        content = text.getvalue().encode("utf-8", "surrogateescape")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
    except (OSError, csv.Error, ValueError) as error:
        print(f"warning: {path} cannot be written ({getattr(error, 'strerror', None) or error})", file=sys.stderr)
    else:
        print(f"\nsummary: {path}", flush=True)


def summary_row(run: PlannedRun, outcome: Outcome, folder: Path, varying: Sequence[str]) -> dict[str, Any]:
    """A line of the summary: what the run is, what became of it, its figures, the command to repeat it."""
    row: dict[str, Any] = {"run": run.name, "state": outcome.state, "dataset": run.dataset.name}
    row |= {"embedding_model": run.config.embedding_model} | {name: run.shown(name) for name in varying}
    done = outcome.state in ("completed", "skipped")
    summary = read_json(folder / "summary.json") if done else {}
    for metric in TABLE_METRICS:
        means = means_of(folder, metric) if done else {}
        row |= {f"{metric}_{name}": f"{means[name]:.6f}" if name in means else "" for name in VARIANTS}
    usage = summary.get("language_models", {}).values()
    row["calls"] = sum(own.get("calls", 0) for own in usage) if done else ""
    row["cost"] = "" if summary.get("cost") is None else summary["cost"]
    row["seconds"] = f"{outcome.seconds:.2f}" if outcome.tries else summary.get("seconds", {}).get("total", "")
    row |= {"tries": outcome.tries, "gpu": outcome.gpu or "", "reason": outcome.reason, "folder": str(folder)}
    row |= {"log": folder / LOG if done else outcome.log or "", "hash": run.digest}
    return row | {"command": shlex.join(command_of(run))}


def print_summary(grid: Grid, outcomes: Mapping[Path, Outcome], completed: Mapping[Path, Path]) -> None:
    """Print the figures of the runs that are done, and what became of the others; failures last."""
    states: dict[str, list[PlannedRun]] = {}
    for run in grid.runs:
        states.setdefault(outcomes[run.folder].state, []).append(run)
    done = [run for run in grid.runs if outcomes[run.folder].state in ("completed", "skipped")]
    if done:
        print("\n" + figures_table(grid, done, completed))
    for state, heading in (
        ("skipped", "skipped, as they were done"),
        ("busy", "another process is at them"),
        ("not started", "not started"),
        ("interrupted", "interrupted"),
    ):
        if runs := states.get(state):
            print(f"\n{heading} ({len(runs)}):")
            for run in runs:
                print(f"  {completed.get(run.folder, run.folder)}")
    if failed := states.get("failed", []):
        print(f"\nfailed ({len(failed)}):")
    for run in failed:
        outcome = outcomes[run.folder]
        log = f"    log: {outcome.log}\n" if outcome.log else ""
        print(f"  {run.folder}\n    {outcome.reason}\n{log}    repeat: {shlex.join(command_of(run))}")


def figures_table(grid: Grid, runs: Iterable[PlannedRun], completed: Mapping[Path, Path]) -> str:
    """Mean average precision of the variants, a line a run."""
    maps = {run.folder: means_of(completed.get(run.folder, run.folder)) for run in runs}
    others = [variant for variant in VARIANTS if variant != "embeddings" and any(variant in m for m in maps.values())]
    header = ["dataset", "embedding model", *grid.varying, "map"]
    lines = [header + [word for variant in others for word in (VARIANTS[variant], "change")]]
    for run in runs:
        own = maps[run.folder]
        line = [run.dataset.name, run.config.embedding_model, *map(run.shown, grid.varying)]
        line.append(f"{own['embeddings']:.4f}" if "embeddings" in own else "-")
        for variant in others:
            both = variant in own and "embeddings" in own
            line += [f"{own[variant]:.4f}", f"{own[variant] - own['embeddings']:+.4f}"] if both else ["-", "-"]
        lines.append(line)
    return aligned(lines, left=2)


if __name__ == "__main__":
    run_command(main)
