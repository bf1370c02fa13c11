"""The tables of a report, for a terminal, Markdown, LaTeX, CSV and the page. Computes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from report_axes import ANY, Runs
from report_comparisons import ALPHA, Averages, Comparison
from results import VARIANTS, aligned, csv_text
from significance import resamples_for
from words import counted, number, one_line, p_value, percent, signed

UP, DOWN = "* better", "* worse"
LONG_TABLE = 45  # lines; more do not fit a page of LaTeX


# --- Cells -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table for people, in whatever form.

    Attributes:
        title: one line.
        header: names of columns.
        lines: cells, each one line of text.
        left: how many columns, from the first, hold names.
        starts: the lines before which a new group starts.
        notes: what its marks mean, a sentence each.
        kinds: of each line: "baseline", "better", "worse" (significantly so) or ""; empty where there are no kinds.
    """

    title: str
    header: list[str]
    lines: list[list[str]]
    left: int
    starts: tuple[int, ...]
    notes: list[str]
    kinds: list[str] = field(default_factory=list)


def main_table(rows: Sequence[Comparison], runs: Runs, baseline: str, metric: str) -> Table:
    """The main table: of each dataset, embedding model and what embedding depends on, the baseline first."""
    header = ["dataset", "embedding model", *runs.axes, "query", "n", metric, "change", "%", "95 % interval"]
    header += ["better/equal/worse", "p", "p (Holm)", ""]
    lines, starts, kinds, last_dataset = [], [], [], None
    for row in rows:
        if row.run.dataset != last_dataset:
            starts.append(len(lines))
        last_dataset = row.run.dataset
        kind = "baseline" if row.is_baseline else _kind(row)
        names = [row.run.dataset, row.run.model, *runs.settings(row.run, row.variant, baseline), row.query]
        lines.append([*map(one_line, names), str(row.queries), number(row.mean), *_compared(row)])
        kinds.append(kind)
    title = f"Mean {metric} against the {VARIANTS[baseline]} query"
    notes = _notes(rows, runs, baseline, metric)
    return Table(title, header, lines, 3 + len(runs.axes), tuple(starts), notes, kinds)


def _kind(row: Comparison) -> str:
    return ("worse", "", "better")[1 + row.direction] if row.significant else ""


def _compared(row: Comparison) -> list[str]:
    """The cells behind the mean."""
    if row.is_baseline:
        return [""] * 7
    low, high = row.change_interval
    interval = "-" if math.isnan(low) else f"{signed(low)} to {signed(high)}"
    counts = f"{row.better}/{row.equal}/{row.worse}"
    mark = {"better": UP, "worse": DOWN, "": ""}[_kind(row)]
    return [signed(row.change), percent(row.relative), interval, counts, p_value(row.p), p_value(row.p_holm), mark]


def _notes(rows: Sequence[Comparison], runs: Runs, baseline: str, metric: str) -> list[str]:
    """What the main table's columns and marks mean, and what it cannot tell."""
    tested = [row for row in rows if not math.isnan(row.p)]
    resamples = resamples_for(len(tested), ALPHA)
    notes = [
        f"n: queries that have the metric. {metric}: mean over them. change: against the {VARIANTS[baseline]} query of "
        "the same run, with its 95 % bootstrap interval over queries in pairs, not corrected for the number of rows.",
        f"p: paired randomisation test, two-sided, up to {resamples:,} random sign patterns; Holm: corrected for the "
        f"{counted(len(tested), 'test')} of this table; {UP}, {DOWN}: corrected p below {ALPHA}.",
    ]
    needed = math.ceil(1 + math.log2(len(tested) / ALPHA)) if tested else 0
    if any(row.queries < needed for row in tested):
        notes.append(f"With fewer than {needed} queries even the clearest row hardly gets below {ALPHA} here.")
    if len(tested) >= ALPHA * resamples:
        notes.append("With so many tests no corrected p can be below the limit: report on fewer runs at once.")
    if any(run.is_oracle for row in rows for run in row.runs):
        notes.append("(oracle): the teacher was the gold labels, which no real teacher equals.")
    if any(run.is_simulated for row in rows for run in row.runs):
        notes.append("(simulated): the teacher was gold-noisy, gold labels with mistakes put in; no real teacher.")
    if runs.is_residual:
        notes.append(
            f"{metric} leaves out what a run's teacher has scored: runs whose figures of the original query differ are "
            "about different documents, and are not to be compared."
        )
    if any(ANY in runs.settings(row.run, row.variant, baseline) for row in rows):
        notes.append(f"{ANY}: the query does not depend on this setting.")
    return [one_line(note) for note in (*notes, *runs.notes)]


def averages_table(averages: Averages, runs: Runs, metric: str) -> Table:
    """Averages over datasets beside the rank order."""
    n_datasets, n_systems = len(averages.queries), len(averages.rows)
    header = ["embedding model", *runs.axes, "query", f"mean {metric}", "mean change", "Borda points", "rank"]
    lines = [
        [*map(one_line, (row.model, *row.settings, row.query)), *(number(row.mean), signed(row.change)),
         *(f"{row.points:g}", str(row.rank))]
        for row in averages.rows
    ]  # fmt: skip
    of_datasets = ", ".join(f"{one_line(name)} ({n} queries)" for name, n in averages.queries.items())
    notes = [
        f"Means of the means on {n_datasets} datasets, each over the queries that all these systems have: "
        f"{of_datasets}. A dataset with large figures or changes weighs more, so read the rank order beside them.",
        f"Borda points: how many of the {counted(n_systems - 1, 'other system')} a system beats on a dataset, ties "
        "half, summed.",
    ]
    return Table(f"Mean {metric} over {n_datasets} datasets", header, lines, 2 + len(runs.axes), (0,), notes)


def usage_table(runs: Runs) -> Table | None:
    """Calls, tokens and cost of language models; None where none was asked."""
    lines = [
        [*map(one_line, (run.dataset, run.model, *map(run.setting, runs.axes), role)), *_used(used)]
        for run in runs.records
        for role, used in run.language_models.items()
    ]
    header = ["dataset", "embedding model", *runs.axes, "role", "calls", "tokens read", "tokens written"]
    header += ["answers from the cache", "cost", "spared by the cache"]
    notes = ["Calls, tokens and cost of each run's own; answers from the cache were paid for by an earlier run."]
    return Table("Language models", header, lines, 3 + len(runs.axes), (), notes) if lines else None


def _used(used: dict[str, float | None]) -> list[str]:
    counts = [f"{int(used.get(key) or 0)}" for key in ("calls", "input_tokens", "output_tokens", "cached_answers")]
    costs = (used.get(key) for key in ("cost", "cost_spared_by_the_cache"))
    return counts + ["" if cost is None else f"{cost:.4f}" for cost in costs]


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
    return re.sub(r"([\\|*_`<\[~$&#])", r"\\\1", text)


def _markdown_cells(cells: Sequence[str]) -> list[str]:
    return [_markdown(cell) for cell in cells]


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$",
    "[": "{[}", "*": "{*}",  # else the end of the line before would take them for its options
}  # fmt: skip


def as_latex(table: Table) -> str:
    """A table for a paper; needs the packages that its first line names."""
    columns = f"{{{'l' * table.left}{'r' * (len(table.header) - table.left)}}}"
    header = ["\\toprule", _latex_line(table.header, table.left), "\\midrule"]
    body = []
    for i, line in enumerate(table.lines):
        if i and i in table.starts:
            body.append("\\midrule")
        body.append(_latex_line(line, table.left))
    caption = f"\\caption{{{_latex(table.title)}}}"
    notes = ["\\par\\smallskip", f"{{\\footnotesize {_latex(' '.join(table.notes))}\\par}}"]
    if len(table.lines) > LONG_TABLE:
        lines = ["% \\usepackage{booktabs,longtable,pdflscape}", "\\begin{landscape}", "\\scriptsize"]
        lines += ["\\setlength{\\tabcolsep}{2.5pt}", "\\setlength{\\LTcapwidth}{\\linewidth}"]
        lines += [f"\\begin{{longtable}}{columns}", f"{caption}\\\\", *header, "\\endfirsthead", *header, "\\endhead"]
        return "\n".join([*lines, *body, "\\bottomrule", "\\end{longtable}", *notes, "\\end{landscape}", ""])
    lines = ["% \\usepackage{booktabs,graphicx}", "\\begin{table}", "\\centering", caption]
    lines += ["\\resizebox{\\textwidth}{!}{%", f"\\begin{{tabular}}{columns}", *header, *body, "\\bottomrule"]
    return "\n".join([*lines, "\\end{tabular}}", *notes, "\\end{table}", ""])


def _latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def _latex_line(cells: Sequence[str], left: int) -> str:
    escaped = [_latex(cell) for cell in cells]
    # A minus sign is one in mathematics only.
    figures = [re.sub(r"[+-]\d[\d.]*", r"$\g<0>$", cell) for cell in escaped[left:]]
    return " & ".join(escaped[:left] + figures) + r" \\"


MAIN_COLUMNS = ("queries", "mean", "mean_low", "mean_high", "change", "change_low", "change_high", "relative_change",
                "better", "equal", "worse", "p", "p_holm", "significant", "runs", "folder")  # fmt: skip


def main_csv(rows: Sequence[Comparison], runs: Runs, baseline: str, metric: str) -> str:
    """The main table for programs: full precision, empty cells for settings that do not matter and for nothing."""
    lines: list[list[object]] = [["dataset", "embedding_model", *runs.axes, "variant", "query", "baseline", "metric"]]
    lines[0] += MAIN_COLUMNS
    for row in rows:
        settings = ["" if own == ANY else own for own in runs.settings(row.run, row.variant, baseline)]
        lines.append([row.run.dataset, row.run.model, *settings, row.variant, row.query, baseline, metric])
        lines[-1] += [*_figures(row), len(row.runs), str(row.run.folder)]
    return _csv(lines)


def _figures(row: Comparison) -> list[object]:
    compared = [row.change, *row.change_interval, row.relative, row.better, row.equal, row.worse, row.p, row.p_holm]
    compared = [""] * 10 if row.is_baseline else [*compared, row.significant]
    return [row.queries, row.mean, *row.interval, *compared]


def averages_csv(averages: Averages, runs: Runs) -> str:
    """The averages for programs; a setting that the query does not depend on is empty."""
    lines: list[list[object]] = [["embedding_model", *runs.axes, "variant", "query", "datasets", "mean", "change"]]
    lines[0] += ["borda_points", "rank"]
    for row in averages.rows:
        settings = ["" if setting == ANY else setting for setting in row.settings]
        figures = [len(averages.queries), row.mean, row.change, row.points, row.rank]
        lines.append([row.model, *settings, row.variant, row.query, *figures])
    return _csv(lines)


def _csv(lines: Sequence[Sequence[object]]) -> str:
    return csv_text([_cell(cell) for cell in line] for line in lines)


def _cell(value: object) -> object:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.9g}"
