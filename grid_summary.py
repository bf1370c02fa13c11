"""The end of a grid: what became of each run, printed for people and kept as a CSV file. Starts nothing."""

from __future__ import annotations

import csv
import itertools
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cache_utils import write_atomically
from experiment_grid import Grid, PlannedRun
from job_runner import Outcome
from llm_client import Usage
from results import LOG, TABLE_METRICS, VARIANTS, aligned, csv_text, read_json, table_metrics


def headline(summary: Mapping[str, Any]) -> str:
    """The name of a run's mean average precision: where its rankings are cut, it says so."""
    names = summary.get("means", {}).get("embeddings", {})
    return next((name for name in names if name.startswith("map_at_")), "map")


def means_of(summary: Mapping[str, Any], metric: str | None = None) -> dict[str, float]:
    """One metric of each variant of a run, from its ``summary.json``; None for its mean average precision."""
    means, metric = summary.get("means", {}), metric or headline(summary)
    return {variant: own[metric] for variant, own in means.items() if isinstance(own.get(metric), float | int)}


def figures_of(folder: Path) -> str:
    """A run's figures in a few words."""
    summary = read_json(folder / "summary.json")
    maps = {variant: f"{value:.4f}" for variant, value in means_of(summary).items()}
    parts = []
    for before, after, name in (
        ("embeddings", "optimized_embeddings", headline(summary)),
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
    return _free_path(output_dir / f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}_grid.csv")


def keep_summary(
    path: Path, grid: Grid, outcomes: Mapping[Path, Outcome], completed: Mapping[Path, Path]
) -> Path | None:
    """Write what became of each run; rows that another grid with the same prefix left there stay.

    Returns:
        where it is, or None where it cannot be written, which is said.
    """
    try:
        rows = _earlier_rows(path)
        if rows is None:  # somebody else's file
            path = _free_path(path)
        new = [summary_row(run, outcomes[run.folder], completed.get(run.folder, run.folder), grid) for run in grid.runs]
        # Rows of the same folder are replaced; those of a run that was not done also where it is done elsewhere now.
        folders = {Path(row["folder"]).resolve() for row in new}
        done = {row["hash"] for row in new if _has_figures(row)}
        kept = [
            row
            for row in rows or []
            if Path(row["folder"]).resolve() not in folders and (_has_figures(row) or row["hash"] not in done)
        ]
        names = list(dict.fromkeys(name for row in (*new, *kept) for name in row))
        lines = [[row.get(name, "") for name in names] for row in (*kept, *new)]
        content = csv_text([names, *lines]).encode("utf-8", "surrogateescape")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror})", file=sys.stderr)
        return None
    return path


def _has_figures(row: Mapping[str, Any]) -> bool:
    return any(value for name, value in row.items() if name.startswith("map_") and name.endswith("embeddings"))


def _earlier_rows(path: Path) -> list[dict[str, str]] | None:
    """The rows of a summary; none where there is no file, None where it is no summary."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            rows = list(csv.DictReader(file, restkey="", restval=""))
        except csv.Error:
            return None
    return rows if all({"run", "folder", "hash"} <= row.keys() and "" not in row for row in rows) else None


def _free_path(path: Path) -> Path:
    """The path, or the first like it with a number that nothing has."""
    named = (path.with_name(path.name.replace("_grid.csv", f"-{number}_grid.csv")) for number in itertools.count(2))
    return next(other for other in itertools.chain([path], named) if not other.exists())


def summary_row(run: PlannedRun, outcome: Outcome, folder: Path, grid: Grid) -> dict[str, Any]:
    """A line of the summary: what the run is, what became of it, its figures, the command to repeat it."""
    row: dict[str, Any] = {"run": run.name, "state": outcome.state, "dataset": run.dataset.name}
    row |= {"embedding_model": run.config.embedding_model} | {name: run.shown(name) for name in grid.varying}
    done = outcome.state in ("completed", "skipped")
    summary = read_json(folder / "summary.json") if done else {}
    cut = table_metrics(run.config.search_depth) if run.config.vector_store else ()
    for metric in (*TABLE_METRICS, *cut):
        means = means_of(summary, metric)
        row |= {f"{metric}_{name}": f"{means[name]:.6f}" if name in means else "" for name in VARIANTS}
    counts = summary.get("language_models", {}).values()
    usages = [Usage(**{field.name: own[field.name] for field in fields(Usage)}) for own in counts]
    row["calls"] = sum(usage.calls for usage in usages) if done else ""
    costs = [usage.as_dict(run.config.prices).get("cost") for usage in usages]
    row["cost"] = round(sum(costs), 6) if costs and None not in costs else ""
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
    folders = {run.folder: completed.get(run.folder, run.folder) for run in runs}
    maps = {folder: means_of(read_json(done / "summary.json")) for folder, done in folders.items()}
    others = [variant for variant in VARIANTS if variant != "embeddings" and any(variant in m for m in maps.values())]
    names = {headline(read_json(done / "summary.json")) for done in folders.values()}
    header = ["dataset", "embedding model", *grid.varying, " or ".join(sorted(names))]
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
