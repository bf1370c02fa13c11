"""A grid of runs: every flag takes several values, each run is a process of its own, what is done is not done again.

    python run_experiments.py --dry_run
    python run_experiments.py --datasets Demo Clinc150 --embedding_models Qwen/Qwen3-Embedding-0.6B --lr 1e-4 1e-3 \
        --optimize_with_gold --parallel 2

Typing the same command again finishes the grid. Knows no flag of an experiment: it takes them from the dataclass.
"""

from __future__ import annotations

import csv
import io
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_utils import write_atomically
from errors import RunError, UserError, run_command
from experiment_config import (
    FOLDER_NAME,
    NOT_NEGATIVE,
    OneLineParser,
    Rule,
    add_flags,
    fields,
    flag,
    parse_values,
    parse_words,
)
from experiment_grid import DEFAULT_AXES, Grid, PlannedRun, find_completed, is_completed, plan_grid
from grid_file import PLURALS, Cells, read_grid_file
from job_runner import Job, JobRunner, Outcome, SlotFlags, Slots, find_slots
from results import VARIANTS, RunFolder, aligned, read_json
from run_setup import check_run

SCRIPT = Path(__file__).resolve().parent / "embedding_adaptation.py"


@dataclass(frozen=True)
class GridFlags(SlotFlags):
    """The grid's own flags."""

    grid: str | None = flag(
        None,
        "YAML file with named grids and exclusions; behind it the names of those to run, all when left out",
        Rule(bool, "a file, and names of grids in it", several=True),
    )
    dry_run: bool = flag(False, "show the runs, their commands and what they will ask; starts and writes nothing")
    experiment_prefix: str | None = flag(None, "what the names of all runs begin with", FOLDER_NAME)
    overwrite: bool = flag(False, "repeat runs that are done, too")
    continue_on_error: bool = flag(False, "go on after a run has failed; else those running finish and no other starts")
    retries: int = flag(0, "more tries of a run that died by a signal or for lack of memory", NOT_NEGATIVE)


def main() -> None:
    """Plan the grid, show it or run it, sum it up."""
    started = time.time()
    flags, cells = read_command(sys.argv[1:])
    grid = plan_grid(cells, flags.experiment_prefix)
    completed = {} if flags.overwrite else find_completed(grid.runs, flags.experiment_prefix)
    problems = check_grid(grid, completed)
    if flags.dry_run:
        show(grid, completed, problems)
        return
    if problems:
        raise UserError("\n".join(problems))
    for note in grid.notes:
        print(f"note: {note}", file=sys.stderr)
    outcomes, interrupted = run_grid(grid, completed, flags)
    table = Path(grid.runs[0].config.output_dir) / f"{flags.experiment_prefix or timestamp(started)}_grid.csv"
    keep_summary(table, grid, outcomes, completed)
    print_summary(grid, outcomes, completed)
    print(f"\nsummary: {table}")
    sys.stdout.flush()
    if interrupted:
        raise KeyboardInterrupt
    if failed := sum(outcome.state == "failed" for outcome in outcomes.values()):
        raise RunError(f"{failed} of {len(grid.runs)} runs failed; the same command repeats them and goes on")


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
    own_names = {field.name for field in fields(GridFlags)}
    axes = {name: values or ["True"] for name, values in words.items() if name not in own_names}
    file, *names = words.pop("grid", [None])
    given = {name: " ".join([values] if isinstance(values, str) else values) for name, values in words.items()}
    values, problems = parse_values({name: text for name, text in given.items() if name in own_names}, GridFlags)
    cells = [Cells(axes)]
    try:
        if file is not None:
            cells = [Cells(own.axes | axes, own.exclusions, own.where) for own in read_grid_file(file, names)]
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return GridFlags(**values), cells


def check_grid(grid: Grid, completed: Mapping[str, Path]) -> list[str]:
    """What would keep runs from starting, a line each; looks at files and the environment, loads and asks nothing."""
    # What is looked at are names and switches, so that runs which differ in numbers alone are checked once.
    different = {}
    for run in grid.runs:
        if run.name not in completed:
            different.setdefault(tuple(v for v in vars(run.config).values() if isinstance(v, str | bool)), run.config)
    problems: dict[str, None] = {}
    for config in different.values():
        try:
            check_run(config)
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    return list(problems)


def command_of(run: PlannedRun) -> tuple[str, ...]:
    """The command line of one run: what was given for the grid, and the run's name."""
    given = {**run.given, "experiment_name": run.name}
    words = [sys.executable, str(SCRIPT)]
    for name in (field.name for field in fields() if field.name in given):
        value = given[name]
        words += [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
    return tuple(words)


def show(grid: Grid, completed: Mapping[str, Path], problems: Sequence[str]) -> None:
    """Print what would be done."""
    from grid_costs import count_costs

    to_do = [run for run in grid.runs if run.name not in completed]
    lines = [["run", *grid.varying, "state"]]
    for run in grid.runs:
        folder = completed.get(run.name)
        state = "to do" if folder is None else "done" if folder == run.folder else f"done: {folder}"
        lines.append([run.name, *(run.varies.get(name, "-") for name in grid.varying), state])
    print(aligned(lines, left=len(lines[0])))
    if to_do:
        print("\ncommands:")
    for run in to_do:
        print(shlex.join(command_of(run)))

    lines = [["dataset", "runs", "to do", "queries", "documents"]]
    for facts in {run.dataset.identity: run.dataset for run in grid.runs}.values():
        own = [run for run in grid.runs if run.dataset.identity == facts.identity]
        counts = len(own), sum(run.name not in completed for run in own), facts.queries, facts.documents
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
    print(f"\n{len(grid.runs)} runs: {len(completed)} done, {len(to_do)} to do with {queries:,} queries")
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
    grid: Grid, completed: Mapping[str, Path], flags: GridFlags
) -> tuple[dict[str, Outcome], bool]:
    """Run what is not done; returns the outcomes by name, and whether the user stopped the work.

    Raises:
        UserError: the GPUs asked for are not there.
    """
    runs = {run.name: run for run in grid.runs if run.name not in completed}
    slots = find_slots(flags, wants_gpu=any(map(uses_gpu, runs.values())))
    jobs = [Job(run.name, command_of(run), uses_gpu(run), fills(run, slots)) for run in runs.values()]
    if slots.gpus and (named := [run for run in runs.values() if run.config.device.startswith("cuda:")]):
        raise UserError(f"--device: got {named[0].config.device}; each run sees one GPU, choose among them with --gpus")

    def begin(job: Job) -> Path | None:
        run = runs[job.name]
        if not flags.overwrite and is_completed(run.folder, run.digest):  # another grid was sooner
            return None
        folder = RunFolder(run.folder)
        folder.check()
        run.folder.mkdir(parents=True, exist_ok=True)
        return folder.log_path

    def describe(job: Job, outcome: Outcome) -> str:
        if outcome.state == "completed":
            return f"{job.name}  {means_of(runs[job.name].folder)}  {outcome.seconds:.1f} s"
        return f"{job.name}  {outcome.reason}" + (f"  (log: {outcome.log})" if outcome.log else "")

    runner = JobRunner(
        jobs,
        slots,
        begin,
        describe,
        retries=flags.retries,
        continue_on_error=flags.continue_on_error,
        warm=[entry for run in grid.runs if run.name in completed for entry in fills(run, slots)],
    )
    if completed:
        runner.say(f"{'skipped':<11}{len(completed)} of {len(grid.runs)} runs, which are done")
    outcomes = runner.run()
    return {job.name: outcome for job, outcome in outcomes.items()}, runner.interrupted


def uses_gpu(run: PlannedRun) -> bool:
    """Whether a run takes a GPU where there is one."""
    return run.config.device not in ("cpu", "mps")


def fills(run: PlannedRun, slots: Slots) -> tuple[tuple[str, Any], ...]:
    """What a run puts into caches: answers, and vectors.

    Answers that two runs ask for at the same moment would be paid for twice. Vectors are embedded with all cores there
    are; several GPUs share the work.
    """
    entries = [(run.answers, run.sample)] if run.answers else []
    if not (slots.gpus and uses_gpu(run)):
        entries.append((run.vectors, None))
    return tuple(entries)


def maps_of(folder: Path) -> dict[str, float]:
    """Mean average precision of each variant of a run."""
    means = read_json(folder / "summary.json").get("means", {})
    return {variant: own["map"] for variant, own in means.items() if isinstance(own.get("map"), float | int)}


def means_of(folder: Path) -> str:
    """One run's figures in a few words."""
    maps = {variant: f"{value:.4f}" for variant, value in maps_of(folder).items()}
    parts = []
    for before, after, name in (
        ("embeddings", "optimized_embeddings", "map"),
        ("hyde", "optimized_hyde_embeddings", "HyDE"),
    ):
        if figures := [maps[variant] for variant in (before, after) if variant in maps]:
            parts.append(f"{name} {' → '.join(figures)}")
    return ", ".join(parts)


# --- After the last run ----------------------------------------------------------------------------------------------


def timestamp(seconds: float) -> str:
    """The time as part of a file name."""
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(seconds))


def keep_summary(path: Path, grid: Grid, outcomes: Mapping[str, Outcome], completed: Mapping[str, Path]) -> None:
    """Write what became of each run: state, figures, seconds, why it failed, the command to repeat it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    about = ("tries", "gpu", "seconds", "reason", "folder", "log", "hash", "command")
    figures = [f"map_{variant}" for variant in VARIANTS]
    writer.writerow(["run", "state", "dataset", "embedding_model", *grid.varying, *figures, *about])
    for run in grid.runs:
        folder = completed.get(run.name, run.folder)
        outcome = outcomes.get(run.name) or Outcome("skipped")
        maps = maps_of(folder) if outcome.state in ("completed", "skipped") else {}
        writer.writerow(
            [
                *(run.name, outcome.state, run.dataset.name, run.config.embedding_model),
                *(run.varies.get(name, "") for name in grid.varying),
                *(f"{maps[variant]:.6f}" if variant in maps else "" for variant in VARIANTS),
                *(outcome.tries, outcome.gpu or "", f"{outcome.seconds:.2f}" if outcome.tries else "", outcome.reason),
                *(folder, outcome.log or "", run.digest, shlex.join(command_of(run))),
            ]
        )
    content = text.getvalue().encode("utf-8", "surrogateescape")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content))


def print_summary(grid: Grid, outcomes: Mapping[str, Outcome], completed: Mapping[str, Path]) -> None:
    """Print the figures of the runs that are done, and what became of the others; failures last."""
    states: dict[str, list[PlannedRun]] = {}
    for run in grid.runs:
        outcome = outcomes.get(run.name)
        states.setdefault(outcome.state if outcome else "skipped", []).append(run)
    done = states.get("completed", []) + states.get("skipped", [])
    if done:
        print("\n" + figures_table(grid, done, completed))
    if skipped := states.get("skipped"):
        print(f"\nskipped, as they were done ({len(skipped)}):")
        for run in skipped:
            print(f"  {completed.get(run.name, run.folder)}")
    for state, heading in (
        ("busy", "another process is at them"),
        ("not started", "not started"),
        ("interrupted", "interrupted"),
    ):
        if runs := states.get(state):
            print(f"\n{heading} ({len(runs)}):")
            for run in runs:
                print(f"  {run.name}")
    if failed := states.get("failed"):
        print(f"\nfailed ({len(failed)}):")
    for run in failed or []:
        outcome = outcomes[run.name]
        print(f"  {run.name}\n    {outcome.reason}\n    log: {outcome.log}\n    repeat: {shlex.join(command_of(run))}")


def figures_table(grid: Grid, runs: Iterable[PlannedRun], completed: Mapping[str, Path]) -> str:
    """Mean average precision of the variants, a line a run, in the grid's order."""
    runs = sorted(runs, key=grid.runs.index)
    maps = {run.name: maps_of(completed.get(run.name, run.folder)) for run in runs}
    others = [variant for variant in VARIANTS if variant != "embeddings" and any(variant in m for m in maps.values())]
    header = ["dataset", "embedding model", *grid.varying, "map"]
    lines = [header + [word for variant in others for word in (VARIANTS[variant], "change")]]
    for run in runs:
        own = maps[run.name]
        line = [run.dataset.name, run.config.embedding_model, *(run.varies.get(name, "-") for name in grid.varying)]
        line.append(f"{own['embeddings']:.4f}" if "embeddings" in own else "-")
        for variant in others:
            both = variant in own and "embeddings" in own
            line += [f"{own[variant]:.4f}", f"{own[variant] - own['embeddings']:+.4f}"] if both else ["-", "-"]
        lines.append(line)
    return aligned(lines, left=2)


if __name__ == "__main__":
    run_command(main)
