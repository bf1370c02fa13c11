"""The page: a whole report in one self-contained HTML file. Jinja escapes; the layout is report_page.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from report_axes import Runs
from report_comparisons import Comparison
from report_details import QueryChange, RunDetails
from report_figures import clip, language_models
from report_pictures import Picture
from report_runs import RunRecord
from report_tables import Table, number, signed, variant_name
from results import VARIANTS

TEMPLATE = Path(__file__).resolve().parent / "report_page.html"
USAGE = ("calls", "input_tokens", "output_tokens", "cached_answers")


@dataclass(frozen=True)
class DetailedRun:
    """A run in detail, as the page shows it."""

    name: str
    pictures: list[Picture]
    missing: list[str]
    has_queries: bool
    metric: str
    baseline: str
    variant: str
    helped: list[QueryChange]
    hurt: list[QueryChange]


def detailed_run(own: RunDetails, name: str, pictures: list[Picture], baseline: str, metric: str) -> DetailedRun:
    """Put together what the page says of a run in detail."""
    has_queries = bool(own.helped or own.hurt) or bool(own.separation)
    names = (metric, VARIANTS[baseline], VARIANTS[own.variant])
    return DetailedRun(name, pictures, own.missing, has_queries, *names, own.helped, own.hurt)


def render(**parts: Any) -> str:
    """Fill the template; what is missing is an error, and all text is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals |= {"clip": clip, "number": number, "signed": signed}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(parts)
    return text.encode("utf-8", "replace").decode("utf-8")


def usage_table(runs: Runs) -> Table | None:
    """Calls, tokens and cost of language models; None where none was asked."""
    lines, starts = [], []
    for run in runs.records:
        dataset, model, settings = runs.key(run)
        for role, used in language_models(run).items():
            cost = "" if used.get("cost") is None else f"{used['cost']:.4f}"
            lines.append([dataset, model, *settings, role, *(f"{int(used.get(key) or 0)}" for key in USAGE), cost])
    header = ["dataset", "embedding model", *runs.axes, "role", "calls", "tokens read", "tokens written"]
    header += ["answers from the cache", "cost"]
    notes = ["Calls and tokens of this run's own; answers from the cache were paid for by an earlier run."]
    return Table("Language models", header, lines, 3 + len(runs.axes), tuple(starts), notes) if lines else None


def described_run(run: RunRecord, name: str) -> dict[str, str]:
    """A run's settings and where its figures come from."""
    versions = ", ".join(f"{package} {version}" for package, version in (run.config.get("versions") or {}).items())
    seconds = (run.summary.get("seconds") or {}).get("total")
    facts = [
        f"started {run.config.get('started', 'at a time not known')}",
        f"{seconds:.1f} s" if isinstance(seconds, int | float) else "",
        f"teacher {run.setting('teacher')}",
        f"{(run.summary.get('teacher') or {}).get('missing') or 0} scores missing",
        f"device {run.config.get('device')}",
        f"dataset fingerprint {run.facts['dataset']}",
        f"model {run.facts['model']}",
        versions,
    ]
    config = json.dumps(run.config, indent=2, ensure_ascii=False)
    return {"name": name, "folder": str(run.folder), "facts": "; ".join(filter(None, facts)), "config": config}


def headline(rows: Sequence[Comparison], baseline: str) -> list[str]:
    """Does it help: a sentence for each variant."""
    lines = []
    for variant in VARIANTS:
        own = [row for row in rows if row.variant == variant and not row.is_baseline and row.queries]
        if not own:
            continue
        up, down = [row for row in own if row.change > 0], [row for row in own if row.change < 0]
        names = " or ".join(dict.fromkeys(map(variant_name, own)))
        lines.append(
            f"{names} against {VARIANTS[baseline]}: higher in {len(up)} of {len(own)} "
            f"comparison{'s' if len(own) > 1 else ''} (significantly in {sum(row.significant for row in up)}), "
            f"lower in {len(down)} (significantly in {sum(row.significant for row in down)})."
        )
    return lines
