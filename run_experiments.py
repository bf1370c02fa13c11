"""A grid of runs: every flag takes several values, each run is a process of its own, what is done is not done again.

    python run_experiments.py --dry_run
    python run_experiments.py --datasets Demo Clinc150 --embedding_models Qwen/Qwen3-Embedding-0.6B --lr 1e-4 1e-3 \
        --optimize_with_gold --parallel 2

Typing the same command again finishes the grid. Knows no flag of an experiment: it takes them from the dataclass.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices import SlotFlags, Slots, check_slot_flags, find_slots
from errors import RunError, UserError, is_folder, problems_of, run_command
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
from experiment_grid import DEFAULT_AXES, SCRIPT, PlannedRun, check_configs, find_completed, in_order, plan_grid
from grid_file import PLURALS, Cells, read_grid_file
from grid_summary import figures_of, keep_summary, print_summary, summary_path
from job_runner import Beginning, Entry, Executor, Job, JobRunner, Outcome
from local_processes import LocalProcesses
from ray_cluster import check_for_ray
from results import LOG, RunFolder
from run_setup import is_done
from words import counted


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
        from grid_preview import show

        show(grid, completed, problems)
        return
    if problems:
        raise UserError("\n".join(problems))
    for note in grid.notes:
        print(f"note: {note}", file=sys.stderr)
    outcomes, interrupted = run_grid(to_do, len(completed), flags)
    outcomes |= {folder: Outcome("skipped") for folder in completed}
    kept = keep_summary(summary_path(grid, flags.experiment_prefix, started), grid, outcomes, completed)
    print_summary(grid, outcomes, completed)
    if kept:
        print(f"\nsummary: {kept}", flush=True)
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
    parser = OneLineParser("Run a grid of experiments: every flag of an experiment takes several values.")
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
    problems += check_slot_flags(values)
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
    checks: list[Callable[[], Any]] = [RunFolder(run.folder).check_content for run in to_do if is_folder(run.folder)]
    if flags.executor == "ray":
        checks.append(lambda: check_for_ray([run.config.device for run in to_do]))
    elif flags.gpus or any(run.config.device.startswith("cuda:") for run in to_do):  # else nobody need be asked
        checks.append(lambda: slots_for(to_do, flags))
    return check_configs(run.config for run in to_do) + problems_of(checks)


# --- Running ---------------------------------------------------------------------------------------------------------


def run_grid(
    to_do: Sequence[PlannedRun], done: int, flags: GridFlags
) -> tuple[dict[Path, Outcome], bool]:
    """Run what is to do; returns the outcomes by folder, and whether the user stopped the work.

    Raises:
        UserError: the GPUs asked for, or the cluster, are not there.
    """
    with find_executor(to_do, flags) as (executor, has_gpus):
        return run_by(executor, {job_for(run, has_gpus, flags): run for run in in_order(to_do)}, done, flags)


@contextlib.contextmanager
def find_executor(to_do: Sequence[PlannedRun], flags: GridFlags) -> Iterator[tuple[Executor, bool]]:
    """Where the runs run, and whether there are GPUs.

    Raises:
        UserError: the GPUs asked for, or the cluster, are not there.
    """
    if flags.executor == "ray" and to_do:
        from ray_executor import ray_tasks

        folders = {f"--{name}": [getattr(run.config, name) for run in to_do] for name in ("output_dir", "cache_dir")}
        with ray_tasks(flags, folders) as tasks:
            yield tasks, tasks.places.have_gpus
    else:
        slots = slots_for(to_do, flags)
        with LocalProcesses(slots) as processes:
            yield processes, bool(slots.gpus)


def job_for(run: PlannedRun, has_gpus: bool, flags: GridFlags) -> Job:
    """A run as a job: its command as the executor wants it."""
    command = run.command
    if flags.executor == "ray":
        from ray_executor import with_absolute_paths

        given = with_absolute_paths(run.given, run.config)
        command = SCRIPT.name, *command_words({**given, "experiment_name": run.name})
    return Job(run.name, command, uses_gpu(run), fills(run, has_gpus))


def run_by(
    executor: Executor, runs: dict[Job, PlannedRun], done: int, flags: GridFlags
) -> tuple[dict[Path, Outcome], bool]:
    """Run what is to do by an executor; returns as :func:`run_grid`."""

    def begin(job: Job) -> Beginning | None:
        run = runs[job]
        folder = RunFolder(run.folder)
        files = folder.claim()
        if not flags.overwrite and is_done(run.config, run.digest, run.folder):  # another grid was sooner
            folder.release()
            return None
        if flags.executor == "ray":  # the lock cannot travel: the run takes it again, and only adds to the log
            folder.log_path.write_bytes(b"")
            folder.release()
            files = {}
        # A completed run's log stays until the new one is done; the run itself then renames its own.
        return Beginning(tuple(dict.fromkeys((folder.log_path, run.folder / LOG))), files, folder.release)

    def describe(job: Job, outcome: Outcome) -> str:
        if outcome.state in ("completed", "skipped"):
            return f"{job.name}  {figures_of(runs[job].folder)}  {outcome.seconds:.1f} s"
        if outcome.state == "busy":
            return f"{job.name}  for another process that is at it"
        return f"{job.name}  {outcome.reason}" + (f"  (log: {outcome.log})" if outcome.log else "")

    runner = JobRunner(
        list(runs),
        executor,
        begin,
        describe,
        retries=flags.retries,
        continue_on_error=flags.continue_on_error,
    )
    if done:
        runner.say(f"{'skipped':<11} {done} of {counted(done + len(runs), 'run')}, as they are done")
    outcomes = {runs[job].folder: outcome for job, outcome in runner.run().items()}
    return outcomes, runner.interrupted


def slots_for(runs: Sequence[PlannedRun], flags: GridFlags) -> Slots:
    """The places there are for these runs.

    Raises:
        UserError: the GPUs asked for are not there, or a run asks for one by its number.
    """
    slots = Slots(1) if flags.executor == "ray" else find_slots(flags, wants_gpu=any(map(uses_gpu, runs)))
    if slots.gpus and (named := [run for run in runs if run.config.device.startswith("cuda:")]):
        raise UserError(f"--device: got {named[0].config.device}; each run sees one GPU, choose among them with --gpus")
    return slots


def uses_gpu(run: PlannedRun) -> bool:
    """Whether a run takes a GPU where there is one."""
    return run.config.device not in ("cpu", "mps")


def fills(run: PlannedRun, has_gpus: bool) -> tuple[Entry, ...]:
    """What a run puts into caches for others.

    Answers that two runs ask for at the same moment would be paid for twice. Vectors are embedded with all cores there
    are; several GPUs share the work.
    """
    shared = has_gpus and uses_gpu(run)
    caches = {kind: entry for kind, entry in run.caches.items() if not (shared and kind == "vectors")}
    return tuple(Entry((kind, cache), part) for kind, (cache, part) in caches.items())


if __name__ == "__main__":
    run_command(main)
