"""What a folder of runs says: does refinement help, where, by how much, and is it real? Tables, pictures, one page.

    python report.py output                             # all runs below; writes output/report/index.html
    python report.py output/night1_grid.csv --metric ndcg_at_10 --out night1_report

Reads what runs wrote; loads no model. Runs that are damaged or half written are listed and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import math
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from report_comparisons import Averages, Comparison, average, compare, headline
from report_details import closest_variant, read_details
from report_page import DetailedRun, described_run, render
from report_pictures import PictureBook
from report_runs import RunRecord, find_run_folders, metrics_of, read_runs
from report_tables import (
    Table,
    as_latex,
    as_markdown,
    as_text,
    averages_csv,
    averages_table,
    main_csv,
    main_table,
    usage_table,
)
from results import VARIANTS, read_json, write_json
from run_log import start_logging
from words import counted, one_line, phrases

logger = logging.getLogger(__name__)
PAGE, MANIFEST, FIGURES = "index.html", "report.json", "figures"
MADE_BY = "report.py of test-time query refinement"
OWN_FILES = re.compile(  # names of files that a report may have and another one not
    r"averages\.(txt|md|tex|csv)|figures/(tokens|ablation_.*|heat_map_.*|detail\d+_.*)\.(png|svg)"
)
SAID_ON_TERMINAL = 10  # lines of each kind; the page has all


@dataclasses.dataclass(frozen=True)
class ReportFlags:
    """The flags of this command."""

    baseline: str = flag(
        "embeddings",
        "the variant of the query that the others are compared with, by the name of its files ("
        + ", ".join(f"{name} = {words}" for name, words in VARIANTS.items()) + ")",
        one_of(*VARIANTS),
    )  # fmt: skip
    metric: str = flag("map", "what is compared: a metric of the result files", NOT_EMPTY)
    out: str = flag("output/report", "folder of the report", NOT_EMPTY)
    details: int = flag(3, "how many runs are shown in detail: of each dataset in turn best, worst, next", NOT_NEGATIVE)


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
    check_out(out)
    runs = read_all(paths, flags)
    mark(out)
    read, left_out = counted(len(runs.records), "run"), counted(len(runs.left_out), "folder")
    logger.info("%s read, %s left out: %.1f s", read, left_out, _since(started))

    rows = compare(runs, flags.baseline)
    averages, ablations = average(runs, flags.baseline), find_ablations(runs, flags.baseline)
    found = Findings(runs, rows, averages, ablations, headline(rows, VARIANTS[flags.baseline]))
    logger.info("compared: %.1f s", _since(started))

    tables = make_tables(found, flags)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=out) as folder:  # a report is replaced whole, or not at all
        write_tables(Path(folder), tables, found, flags)
        missing = write_page(Path(folder), tables, found, flags)
        publish(Path(folder), out)
    logger.info("pictures and page written: %.1f s", _since(started))
    say(out, tables, found, missing)


def _since(started: float) -> float:
    return time.perf_counter() - started


# --- What is asked, and what there is --------------------------------------------------------------------------------


def read_command(argv: Sequence[str]) -> tuple[list[Path], ReportFlags]:
    """Where the runs are, and the flags.

    Raises:
        UserError: a line for each thing that is wrong.
    """
    parser = OneLineParser("Tables, pictures and one page of what runs found.", words="[RUNS ...] ")
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


def check_out(out: Path) -> None:
    """Say before any work when the report could not be written.

    Raises:
        UserError: the folder cannot be written, or holds something else than a report.
    """
    check_writable("--out", out)
    if is_folder(out) and any(out.iterdir()) and read_json(out / MANIFEST).get("made_by") != MADE_BY:
        raise UserError(f"--out: {out} holds something else than a report of this program; choose another folder")


def mark(out: Path) -> None:
    """Make the folder, and mark it as a report's before anything else is written there.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        (out / FIGURES).mkdir(parents=True, exist_ok=True)
        if not (out / MANIFEST).exists():
            write_json(out / MANIFEST, {"made_by": MADE_BY})
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror})") from None


def publish(made: Path, out: Path) -> None:
    """Put a whole report into its place; take away what an earlier one had and this one has not, and no other files."""
    files = [path.relative_to(made) for path in sorted(made.rglob("*")) if path.is_file()]
    for name in files:
        os.replace(made / name, out / name)
    for path in (*out.iterdir(), *(out / FIGURES).iterdir()):
        name = path.relative_to(out)
        if name not in files and OWN_FILES.fullmatch(str(name)) and path.is_file():
            path.unlink(missing_ok=True)


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
    runs = comparable(*read_runs(folders, flags.metric), flags.baseline, flags.metric)
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


def write_tables(out: Path, tables: dict[str, Table], found: Findings, flags: ReportFlags) -> None:
    """Write each table in all forms, and what the report is about."""
    texts = {}
    for name, table in tables.items():
        texts |= {f"{name}.txt": as_text(table), f"{name}.md": as_markdown(table), f"{name}.tex": as_latex(table)}
    texts["main_table.csv"] = main_csv(found.rows, found.runs, flags.baseline, flags.metric)
    if "averages" in tables:
        texts["averages.csv"] = averages_csv(found.averages, found.runs)
    for name, text in texts.items():
        (out / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    content = {"made_by": MADE_BY, "command": sys.argv, "flags": dataclasses.asdict(flags), "headline": found.headline}
    content["runs"] = [str(run.folder) for run in found.runs.records]
    content["left_out"] = {str(own.folder): own.reason for own in found.runs.left_out}
    write_json(out / MANIFEST, content)


def write_page(out: Path, tables: dict[str, Table], found: Findings, flags: ReportFlags) -> list[str]:
    """Draw all pictures, write the page; returns what could not be shown."""
    runs = found.runs
    (out / FIGURES).mkdir()
    book = PictureBook(out / FIGURES, runs, flags.metric, flags.baseline)
    page: dict[str, Any] = {"main": tables["main_table"], "averages": tables.get("averages")}
    page |= {"bars": book.bars(found.rows), "ablations": book.ablations(found.ablations)}
    page["details"] = []
    for i, run in enumerate(in_detail(runs, flags), 1):
        own = read_details(run, flags.baseline, flags.metric)
        change = f"{flags.metric}, {VARIANTS[flags.baseline]} → {run.query_name(own.variant)}"
        page["details"].append(DetailedRun(run_name(run, runs), own, book.details(own, f"detail{i}"), change))
    datasets, usage = len({run.dataset for run in runs.records}), usage_table(runs)
    html = render(
        **page,
        title=f"Query refinement: {flags.metric} of {counted(len(runs.records), 'run')}",
        counts=f"{counted(len(runs.records), 'run')} on {counted(datasets, 'dataset')}.",
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        command=shlex.join(["python", "report.py", *sys.argv[1:]]),
        headline=found.headline,
        metric=flags.metric,
        not_averaged=found.averages.refused,
        refused=found.ablations.refused,
        how_chosen=f"{len(page['details'])} of {counted(len(runs.records), 'run')}: of each dataset in turn the one "
        "with the largest change, then the one with the smallest, and so on; those with an oracle come last. "
        "--details N shows more.",
        price=book.price(),
        usage=usage,
        described=[described_run(run, run_name(run, runs)) for run in runs.records],
        left_out=runs.left_out,
    )
    (out / PAGE).write_text(html, encoding="utf-8")
    return [f"{own.name}: {line}" for own in page["details"] for line in own.details.missing]


def run_name(run: RunRecord, runs: Runs) -> str:
    """Dataset, embedding model and settings of a run."""
    return one_line(", ".join([run.dataset, run.model, *phrases(runs.named(run))]))


def in_detail(runs: Runs, flags: ReportFlags) -> list[RunRecord]:
    """The runs to look at closely: of each dataset in turn those with the largest and the smallest change.

    An oracle's come behind those of real teachers.
    """

    def change(run: RunRecord) -> float:
        return run.mean(closest_variant(run, flags.baseline)) - run.mean(flags.baseline)

    rankings: dict[str, list[RunRecord]] = {}
    for is_oracle in (False, True):
        of_dataset: dict[str, list[RunRecord]] = {}
        for run in sorted(runs.records, key=lambda run: run.dataset):
            if run.is_oracle == is_oracle and len(run.values) > 1 and math.isfinite(change(run)):
                of_dataset.setdefault(run.dataset, []).append(run)
        for dataset, own in of_dataset.items():
            best_first = sorted(own, key=change, reverse=True)
            both_ends = (best_first.pop(0 if i % 2 == 0 else -1) for i in range(len(own)))
            rankings.setdefault(dataset, []).extend(both_ends)
    in_turn = (run for turn in itertools.zip_longest(*rankings.values()) for run in turn if run is not None)
    return list(itertools.islice(in_turn, flags.details))


def say(out: Path, tables: dict[str, Table], found: Findings, missing: Sequence[str]) -> None:
    """Print the result: tables, what they come to, what was left out, and where the page is."""
    print()
    for table in tables.values():
        print(as_text(table))
    print("\n".join(found.headline))
    left_out = [f"{own.folder}: {own.reason}" for own in found.runs.left_out]
    for what, lines in (
        ("not averaged", found.averages.refused),
        ("not shown", [*found.ablations.refused, *missing]),
        (f"left out ({len(left_out)})", left_out),
    ):
        if lines:
            print(f"\n{what}:", *lines[:SAID_ON_TERMINAL], sep="\n  ")
        if len(lines) > SAID_ON_TERMINAL:
            print(f"  and {len(lines) - SAID_ON_TERMINAL} more, which the page lists")
    print(f"\nreport: {out / PAGE}")


if __name__ == "__main__":
    run_command(main)
