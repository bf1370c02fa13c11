"""What a folder of runs says: does refinement help, where, by how much, and is it real? Tables, pictures, one page.

    python report.py output                             # all runs below; writes output/report/index.html
    python report.py output/night1_grid.csv --metric ndcg_at_10 --out night1_report

Reads what runs wrote; loads no model. Runs that are damaged or half written are listed and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache_utils import write_atomically
from errors import UserError, check_writable, is_folder, run_command
from experiment_config import (
    NOT_EMPTY,
    NOT_NEGATIVE,
    OneLineParser,
    add_flags,
    flag,
    one_of,
    parse_values,
    parse_words,
)
from report_ablations import Ablations, find_ablations
from report_axes import Runs, comparable
from report_comparisons import Averages, Comparison, average, compare
from report_details import closest_variant, read_details
from report_page import described_run, detailed_run, headline, render, usage_table
from report_pictures import PictureBook
from report_runs import RunRecord, find_run_folders, metrics_of, read_runs
from report_tables import Table, as_latex, as_markdown, as_text, averages_csv, averages_table, main_csv, main_table
from results import VARIANTS, read_json, write_json
from run_log import start_logging

logger = logging.getLogger(__name__)
PAGE, MANIFEST, FIGURES = "index.html", "report.json", "figures"
SAID_ON_TERMINAL = 10  # of the folders that were left out; the page lists all


@dataclasses.dataclass(frozen=True)
class ReportFlags:
    """The flags of this command."""

    baseline: str = flag("embeddings", "the variant of the query that the others are compared with", one_of(*VARIANTS))
    metric: str = flag("map", "what is compared: a metric of the result files", NOT_EMPTY)
    out: str = flag("output/report", "folder of the report", NOT_EMPTY)
    details: int = flag(3, "how many runs are shown in detail; the best of each dataset come first", NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the runs say, before anything is drawn."""

    runs: Runs
    rows: list[Comparison]
    averages: Averages
    ablations: Ablations
    headline: list[str]


def main() -> None:
    """Read the runs, compare them, write the report, print the table."""
    started = time.perf_counter()
    paths, flags = read_command(sys.argv[1:])
    start_logging()
    out = Path(flags.out)
    earlier = check_out(out)
    runs = read_all(paths, flags)
    logger.info("%d runs read, %d folders left out: %.1f s", len(runs.records), len(runs.left_out), _since(started))

    rows = compare(runs, flags.baseline)
    averages, ablations = average(runs, flags.baseline), find_ablations(runs, flags.baseline)
    found = Findings(runs, rows, averages, ablations, headline(rows, flags.baseline))
    logger.info("compared: %.1f s", _since(started))

    tables = make_tables(found, flags)
    files = write_tables(out, tables, found, flags)
    files += write_page(out, tables, found, flags)
    write_manifest(out, files, earlier, found, flags)
    logger.info("pictures and page written: %.1f s", _since(started))
    say(out, tables, found)


def _since(started: float) -> float:
    return time.perf_counter() - started


# --- What is asked, and what there is --------------------------------------------------------------------------------


def read_command(argv: Sequence[str]) -> tuple[list[Path], ReportFlags]:
    """Where the runs are, and the flags.

    Raises:
        UserError: a line for each thing that is wrong.
    """
    parser = OneLineParser(
        description="Tables, pictures and one page of what runs found.",
        usage="%(prog)s [RUNS ...] [--flag VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="*", action="append", default=argparse.SUPPRESS,
        help="folders with runs somewhere below, or _grid.csv files of run_experiments.py (default: output)",
    )  # fmt: skip
    add_flags(parser, of=ReportFlags)
    words = parse_words(parser, argv)
    paths = [Path(word) for word in words.pop("runs", [])] or [Path("output")]
    values, problems = parse_values(words, ReportFlags)
    if problems:
        raise UserError("\n".join(problems))
    return paths, ReportFlags(**values)


def check_out(out: Path) -> list[str]:
    """Say before any work when the report could not be written; returns the files of an earlier report there.

    Raises:
        UserError: the folder cannot be written, or holds something else than a report.
    """
    check_writable("--out", out)
    if not is_folder(out) or not any(out.iterdir()):
        return []
    files = read_json(out / MANIFEST).get("files")
    if not isinstance(files, list):
        raise UserError(f"--out: {out} holds something else than a report of this program; choose another folder")
    return [name for name in files if isinstance(name, str)]


def read_all(paths: Sequence[Path], flags: ReportFlags) -> Runs:
    """Read the runs, and leave out what cannot be compared.

    Raises:
        UserError: there is none, or none that can be reported.
    """
    folders = find_run_folders(paths)
    where = ", ".join(map(str, paths))
    if not folders:
        raise UserError(f"{where}: no run there; embedding_adaptation.py and run_experiments.py write them")
    metrics = metrics_of(folders)
    if metrics and flags.metric not in metrics:
        raise UserError(f"--metric: got {flags.metric!r}, must be one of {', '.join(metrics)}")
    runs = comparable(*read_runs(folders, flags.metric), flags.baseline)
    if not runs.records:
        reasons = [f"{own.folder}: {own.reason}" for own in runs.left_out]
        raise UserError("\n".join([f"{where}: no run there can be reported", *reasons[:SAID_ON_TERMINAL]]))
    return runs


# --- Files -----------------------------------------------------------------------------------------------------------


def make_tables(found: Findings, flags: ReportFlags) -> dict[str, Table]:
    """The tables by the names of their files."""
    tables = {"main_table": main_table(found.rows, found.runs, flags.baseline, flags.metric)}
    if found.averages.rows:
        tables["averages"] = averages_table(found.averages, found.runs, flags.metric)
    return tables


def write_tables(out: Path, tables: dict[str, Table], found: Findings, flags: ReportFlags) -> list[str]:
    """Write each table in all forms; returns the files' names."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {}
    for name, table in tables.items():
        texts |= {f"{name}.txt": as_text(table), f"{name}.md": as_markdown(table), f"{name}.tex": as_latex(table)}
    texts["main_table.csv"] = main_csv(found.rows, found.runs, flags.baseline, flags.metric)
    if "averages" in tables:
        texts["averages.csv"] = averages_csv(found.averages, found.runs)
    for name, text in texts.items():
        write_text(out / name, text)
    return list(texts)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    content = text.encode("utf-8", "surrogateescape")
    write_atomically(path, lambda file: file.write(content))


def write_page(out: Path, tables: dict[str, Table], found: Findings, flags: ReportFlags) -> list[str]:
    """Draw all pictures, write the page; returns the files' names."""
    runs = found.runs
    (out / FIGURES).mkdir(exist_ok=True)
    book = PictureBook(out / FIGURES, flags.metric, flags.baseline, lambda run: system_name(run, runs))
    page: dict[str, Any] = {"main": tables["main_table"], "averages": tables.get("averages")}
    page |= {"bars": book.bars(found.rows), "ablations": book.ablations(found.ablations)}
    page["details"] = []
    for i, run in enumerate(in_detail(runs, flags), 1):
        own = read_details(run, flags.baseline, flags.metric)
        pictures = book.details(own, f"detail{i}")
        page["details"].append(detailed_run(own, run_name(run, runs), pictures, flags.baseline, flags.metric))
    datasets = len({run.dataset for run in runs.records})
    html = render(
        **page,
        title=f"Query refinement: {flags.metric} of {_count(len(runs.records), 'run')}",
        counts=f"{_count(len(runs.records), 'run')} on {_count(datasets, 'dataset')}.",
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        command=shlex.join(["python", "report.py", *sys.argv[1:]]),
        headline=found.headline,
        not_averaged=found.averages.refused,
        refused=found.ablations.refused,
        how_chosen=f"{len(page['details'])} of {_count(len(runs.records), 'run')}: of each dataset in turn the one "
        f"whose refined queries have the highest mean {flags.metric}, so they flatter; --details N shows more.",
        price=book.price(runs.records),
        price_sentences=[] if usage_table(runs) else ["No language model was asked by these runs."],
        usage=usage_table(runs),
        described=[described_run(run, run_name(run, runs)) for run in runs.records],
        left_out=runs.left_out,
    )
    write_text(out / PAGE, html)
    return [*(str(path.relative_to(out)) for path in book.files), PAGE]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def system_name(run: RunRecord, runs: Runs) -> str:
    """Embedding model and settings of a run, as far as they tell runs apart."""
    settings = [f"{axis} {run.setting(axis)}" for axis in runs.axes]
    several = len({own.model for own in runs.records}) > 1
    return ", ".join([run.model, *settings] if several or not settings else settings)


def run_name(run: RunRecord, runs: Runs) -> str:
    """Dataset, embedding model and settings of a run."""
    return ", ".join([run.dataset, run.model, *(f"{axis} {run.setting(axis)}" for axis in runs.axes)])


def in_detail(runs: Runs, flags: ReportFlags) -> list[RunRecord]:
    """The runs to look at closely: of each dataset in turn the next one by the mean of its refined queries."""
    of_dataset: dict[str, list[RunRecord]] = {}
    for run in sorted(runs.records, key=lambda run: -run.mean(closest_variant(run, flags.baseline))):
        if len(run.values) > 1 and math.isfinite(run.mean(flags.baseline)):
            of_dataset.setdefault(run.dataset, []).append(run)
    turns = sorted((nth, dataset) for dataset, own in of_dataset.items() for nth in range(len(own)))
    return [of_dataset[dataset][nth] for nth, dataset in turns[: flags.details]]


def write_manifest(out: Path, files: list[str], earlier: list[str], found: Findings, flags: ReportFlags) -> None:
    """Say which files are the report's, and take those away that an earlier report left and this one has not."""
    for name in set(earlier) - set(files):
        path = out / name
        if path.resolve().is_relative_to(out.resolve()):
            path.unlink(missing_ok=True)
    write_json(
        out / MANIFEST,
        {
            "command": sys.argv,
            "flags": dataclasses.asdict(flags),
            "headline": found.headline,
            "files": files,
            "runs": [str(run.folder) for run in found.runs.records],
            "left_out": {str(own.folder): own.reason for own in found.runs.left_out},
        },
    )


def say(out: Path, tables: dict[str, Table], found: Findings) -> None:
    """Print the result: tables, what they come to, what was left out, and where the page is."""
    print()
    for table in tables.values():
        print(as_text(table))
    print("\n".join(found.headline))
    for what, lines in (("not averaged", found.averages.refused), ("not shown", found.ablations.refused)):
        if lines:
            print(f"\n{what}:", *lines, sep="\n  ")
    if left_out := found.runs.left_out:
        print(f"\nleft out ({len(left_out)}):")
        for own in left_out[:SAID_ON_TERMINAL]:
            print(f"  {own.folder}: {own.reason}")
        if len(left_out) > SAID_ON_TERMINAL:
            print(f"  and {len(left_out) - SAID_ON_TERMINAL} more, listed in the report")
    print(f"\nreport: {out / PAGE}")


if __name__ == "__main__":
    run_command(main)
