"""The end of a grid: what became of each run, printed for people and kept as a CSV file. Starts nothing."""

from __future__ import annotations

import csv
import io
import itertools
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_utils import write_atomically
from experiment_grid import Grid, PlannedRun
from job_runner import Outcome
from results import LOG, TABLE_METRICS, VARIANTS, aligned, read_json


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


def summary_path(grid: Grid, prefix: str | None, started: float) -> Path:
    """Where the summary is kept; one without a prefix never replaces another."""
    output_dir = Path(grid.runs[0].config.output_dir)
    if prefix:
        return output_dir / f"{prefix}_grid.csv"
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
    return row | {"command": shlex.join(run.command)}


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
        print(f"  {run.folder}\n    {outcome.reason}\n{log}    repeat: {shlex.join(run.command)}")


def figures_table(grid: Grid, runs: Sequence[PlannedRun], completed: Mapping[Path, Path]) -> str:
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
