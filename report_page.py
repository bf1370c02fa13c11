"""The page: a whole report in one self-contained HTML file. Jinja escapes; the layout is report_page.html."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from report_details import RunDetails
from report_pictures import Picture
from report_runs import RunRecord
from words import clip, number, shown, signed

TEMPLATE = Path(__file__).resolve().parent / "report_page.html"


@dataclass(frozen=True)
class DetailedRun:
    """A run in detail, as the page shows it: its name, its pictures, and what the queries' changes are between."""

    name: str
    details: RunDetails
    pictures: list[Picture]
    change: str


def render(**parts: Any) -> str:
    """Fill the template; what is missing is an error, and all text is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals |= {"clip": clip, "number": number, "signed": signed}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(parts)
    return text.encode("utf-8", "replace").decode("utf-8")


def described_run(run: RunRecord, name: str) -> dict[str, str]:
    """A run's settings and where its figures come from."""
    versions = ", ".join(f"{package} {version}" for package, version in (run.config.get("versions") or {}).items())
    total = run.seconds.get("total")
    facts = [
        f"started {run.config.get('started', 'at a time not known')}",
        "" if total is None else f"{total:.1f} s",
        f"teacher {run.setting('teacher')}",
        f"{shown((run.summary.get('teacher') or {}).get('missing') or 0)} scores missing",
        f"device {run.config.get('device')}",
        f"dataset fingerprint {run.facts['dataset']}",
        f"model {run.config['model']['identity']}",
        versions,
    ]
    config = json.dumps(run.config, indent=2, ensure_ascii=False)
    return {"name": name, "folder": str(run.folder), "facts": "; ".join(filter(None, facts)), "config": config}
