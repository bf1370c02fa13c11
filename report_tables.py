"""The tables of a report, for a terminal, Markdown, LaTeX, CSV and the page. Computes nothing."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from report_axes import Runs
from report_comparisons import ALPHA, Averages, Comparison
from results import VARIANTS, aligned

MARK = "*"


# --- Cells -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table for people, in whatever form.

    Attributes:
        title: one line.
        header: names of columns.
        lines: cells as text.
        left: how many columns, from the first, hold names.
        starts: the lines before which a new group starts.
    """

    title: str
    header: list[str]
    lines: list[list[str]]
    left: int
    starts: tuple[int, ...]
    notes: list[str]
    kinds: list[str] = field(default_factory=list)


def main_table(rows: Sequence[Comparison], runs: Runs, baseline: str, metric: str) -> Table:
    """The main table: of each dataset, model and setting the baseline first."""
    header = ["dataset", "embedding model", *runs.axes, "query", "n", metric, "change", "%", "95 % interval"]
    header += ["better/equal/worse", "p", "p (Holm)", ""]
    lines, starts, kinds, last_dataset = [], [], [], None
    for row in rows:
        dataset, model, _ = runs.key(row.run)
        if dataset != last_dataset:
            starts.append(len(lines))
        last_dataset = dataset
        settings = runs.common_settings(row.runs)
        lines.append([dataset, model, *settings, variant_name(row), str(row.queries), number(row.mean)])
        kinds.append("baseline" if row.is_baseline else "significant" if row.significant else "")
        if row.is_baseline:
            lines[-1] += ["", "", "", "", "", "", ""]
            continue
        low, high = row.change_interval
        lines[-1] += [signed(row.change), percent(row.relative), f"{signed(low)} to {signed(high)}"]
        lines[-1] += [f"{row.better}/{row.equal}/{row.worse}", p_value(row.p), p_value(row.p_holm)]
        lines[-1].append(MARK if row.significant else "")
    tests = sum(not math.isnan(row.p) for row in rows)
    notes = [
        f"n: queries. {metric}: mean over them. change: against the {VARIANTS[baseline]} query of the same run, with "
        "its 95 % bootstrap interval over queries in pairs.",
        f"p: paired randomisation test, two-sided; Holm: corrected for the {tests} tests of this table; "
        f"{MARK}: corrected p below {ALPHA}.",
    ]
    if any(row.run.is_oracle for row in rows):
        notes.append("(oracle): the teacher was the gold labels, which no real teacher equals.")
    if any(len(row.runs) > 1 for row in rows):
        notes.append("any: the query is the same with all these settings, and stands there once.")
    title = f"Mean {metric} against the {VARIANTS[baseline]} query"
    return Table(title, header, lines, 3 + len(runs.axes), tuple(starts), notes, kinds)


def variant_name(row: Comparison) -> str:
    """The variant as people read it; refined by an oracle is said so."""
    return VARIANTS[row.variant] + (" (oracle)" if row.run.is_oracle and row.variant.startswith("optimized") else "")


def averages_table(averages: Averages, runs: Runs, metric: str) -> Table:
    """Averages over datasets beside the rank order."""
    n_datasets, n_systems = len(averages.datasets), len(averages.rows)
    header = ["embedding model", *runs.axes, "query", f"mean {metric}", "mean change", "Borda points", "rank"]
    lines = [
        [*(row.model, *row.settings, VARIANTS[row.variant]), *(number(row.mean), signed(row.change)),
         *(f"{row.points:g}", str(row.rank))]
        for row in averages.rows
    ]
    notes = [
        f"Means over {n_datasets} datasets ({', '.join(averages.datasets)}): a dataset with large figures or large "
        "changes weighs more, so read the rank order beside them.",
        f"Borda points: how many of the {n_systems - 1} other systems a system beats on a dataset, ties half, summed.",
    ]
    return Table(f"Mean {metric} over {n_datasets} datasets", header, lines, 2 + len(runs.axes), (0,), notes)


def number(value: float) -> str:
    """Four digits."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def signed(value: float) -> str:
    """Four digits with a sign."""
    return "-" if math.isnan(value) else f"{value:+.4f}"


def percent(value: float) -> str:
    """A share as a percentage with a sign."""
    return "-" if math.isnan(value) else f"{100 * value:+.1f}"


def p_value(value: float) -> str:
    """Three digits, or how small it is at most."""
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


# --- Renderings ------------------------------------------------------------------------------------------------------


def as_text(table: Table) -> str:
    """Aligned columns for a terminal."""
    body = aligned([table.header, *table.lines], left=table.left).splitlines()
    for start in reversed(table.starts[1:]):
        body.insert(start + 1, "")
    return "\n".join([table.title, "", *body, "", *table.notes]) + "\n"


def as_markdown(table: Table) -> str:
    """A table as GitHub renders it."""
    rule = ["---"] * table.left + ["---:"] * (len(table.header) - table.left)
    lines = [_markdown_cells(table.header), rule, *map(_markdown_cells, table.lines)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"**{table.title}**\n\n{body}\n\n" + "\n".join(f"{_markdown(note)}<br>" for note in table.notes) + "\n"


def _markdown(text: str) -> str:
    for special in "\\|*_`<[":
        text = text.replace(special, "\\" + special)
    return text.replace("\n", " ")


def _markdown_cells(cells: Sequence[str]) -> list[str]:
    return [_markdown(cell) for cell in cells]


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "\n": " ",
    "[": "{[}",  # else the end of the line before would take it for its option
}  # fmt: skip


def as_latex(table: Table) -> str:
    """A table for a paper; needs the booktabs package."""
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        "\\small",
        f"\\caption{{{_latex(table.title)}. {_latex(' '.join(table.notes))}}}",
        f"\\begin{{tabular}}{{{'l' * table.left}{'r' * (len(table.header) - table.left)}}}",
        "\\toprule",
        _latex_line(table.header, table.left),
    ]
    for i, line in enumerate(table.lines):
        if i in table.starts:
            lines.append("\\midrule")
        lines.append(_latex_line(line, table.left))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def _latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def _latex_line(cells: Sequence[str], left: int) -> str:
    escaped = [_latex(cell) for cell in cells]
    # A minus sign is one in mathematics only.
    figures = [re.sub(r"[+-]\d[\d.]*", r"$\g<0>$", cell) for cell in escaped[left:]]
    return " & ".join(escaped[:left] + figures) + r" \\"


MAIN_COLUMNS = ("queries", "mean", "mean_low", "mean_high", "change", "change_low", "change_high", "relative_change",
                "better", "equal", "worse", "p", "p_holm", "significant", "folder")  # fmt: skip


def main_csv(rows: Sequence[Comparison], runs: Runs, baseline: str, metric: str) -> str:
    """The main table for programs: full precision, empty cells where there is nothing."""
    lines = [["dataset", "embedding_model", *runs.axes, "variant", "teacher", "baseline", "metric", *MAIN_COLUMNS]]
    places = {id(run): place for place, run in enumerate(runs.records)}
    of_runs = [(run, row) for row in rows for run in row.runs]
    for run, row in sorted(of_runs, key=lambda own: places[id(own[0])]):
        dataset, model, settings = runs.key(run)
        compared = [] if row.is_baseline else [row.change, *row.change_interval, row.relative, row.better, row.equal]
        compared += [] if row.is_baseline else [row.worse, row.p, row.p_holm, row.significant]
        line = [dataset, model, *settings, row.variant, run.setting("teacher"), baseline, metric, row.queries]
        line += [row.mean, *row.interval, *(compared or [""] * 10), run.folder]
        lines.append(line)
    return _csv(lines)


def averages_csv(averages: Averages, runs: Runs) -> str:
    """The averages for programs."""
    header = ["embedding_model", *runs.axes, "variant", "datasets", "mean", "change", "borda_points", "rank"]
    return _csv([header] + [
        [row.model, *row.settings, row.variant, len(averages.datasets), row.mean, row.change, row.points, row.rank]
        for row in averages.rows
    ])  # fmt: skip


def _csv(lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for line in lines:
        writer.writerow("" if isinstance(cell, float) and math.isnan(cell) else _cell(cell) for cell in line)
    return text.getvalue()


def _cell(value: object) -> object:
    return f"{value:.9g}" if isinstance(value, float) else value
