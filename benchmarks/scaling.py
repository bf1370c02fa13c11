"""How cost grows with documents, dimensions, queries and scores; writes docs/scaling.md.

    python benchmarks/scaling.py [--record output/scaling.json]

Measures runs over synthetic corpora (``large_corpus.py``) and a Milvus store in a file (``store_speed.py``), about
seven minutes on two cores, up to a million documents; what it says of more is arithmetic on these figures. Measured
figures are kept in the record: delete it to measure again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import large_corpus  # noqa: E402
import store_speed  # noqa: E402

from ranking import BLOCK_QUERIES  # noqa: E402

DOCUMENTS = (10_000, 100_000, 1_000_000)
DIMENSIONS = (384, 1024, 4096)
QUERIES = (50, 200, 800)
SCORES = (20, 50, 100, 200)
USUAL = {"documents": 100_000, "dimension": 384, "queries": 200, "scores": 20}
FAR = 1_000_000_000
MANY_DIMENSIONS = 1024
DISK = 3e9  # bytes a second that a good drive reads; assumed
GPU_TEXTS = 1000  # short texts a second that a GPU embeds; assumed
GIB, TIB = 2**30, 2**40


class Record:
    """Measured figures by what was measured, kept in a JSON file as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured under a name, or is now."""
        if name not in self._figures:
            print(f"measuring {name}", file=sys.stderr, flush=True)
            self._figures[name] = measure()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._figures, indent=1))
        return self._figures[name]

    def run(self, **differs: int) -> dict[str, Any]:
        """A run over a synthetic corpus, ``USUAL`` but for what differs."""
        own = USUAL | differs
        flags = ("--total_scores", str(own["scores"]), "--scores_from_top", str(own["scores"]))
        name = "run " + " ".join(f"{key} {value}" for key, value in own.items())
        sizes = own["documents"], own["dimension"], own["queries"]
        return self.get(name, lambda: large_corpus.measure(*sizes, *flags))

    def store(self, documents: int) -> dict[str, float]:
        """A store with random vectors."""
        return self.get(f"store documents {documents}", lambda: store_speed.measure(documents, USUAL["dimension"]))


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def runs_table(record: Record, axis: str, values: Sequence[int], shows: Mapping[str, Callable[[dict], str]]) -> str:
    """Runs that differ in one thing."""
    found = [(f"{value:,}", record.run(**{axis: value})) for value in values]
    return table([axis, *shows], [[value, *(show(own) for show in shows.values())] for value, own in found])


def words(record: Record, reads: float) -> dict[str, str]:
    """What the page says."""
    ranking = {
        "run, s": lambda own: f"{own['wall']:.1f}",
        "peak memory, MiB": lambda own: f"{own['peak_mib']:,}",
        "one ranking, ms a query": lambda own: f"{own['ms_a_query']:.2f}",
    }
    floor = {n: 1000 * 4 * n * USUAL["dimension"] / reads for n in DOCUMENTS}
    by_documents = [
        [
            *(f"{n:,}", f"{4 * n * USUAL['dimension'] / 2**20:,.0f}"),
            *(show(record.run(documents=n)) for show in ranking.values()),
            f"{floor[n]:.2f}",
        ]
        for n in DOCUMENTS
    ]
    stores = [(n, record.store(n)) for n in DOCUMENTS]
    by_store = [
        [
            *(f"{n:,}", f"{own['fill']:.0f}", f"{own['disk_mib']:,.0f}", f"{own['peak_mib']:,.0f}"),
            *(f"{own['ms_at_20']:.1f}", f"{own['ms_at_1000']:.1f}"),
        ]
        for n, own in stores
    ]
    refine = {"refine all queries, s": lambda own: f"{own['refine']:.2f}", "run, s": lambda own: f"{own['wall']:.1f}"}
    store_header = ("documents", "fill, s", "on disk, MiB", "peak memory, MiB", "20 results, ms", "1,000 results, ms")
    return {
        "documents": table(["documents", "matrix, MiB", *ranking, "floor, ms"], by_documents),
        "dimensions": runs_table(record, "dimension", DIMENSIONS, ranking),
        "queries": runs_table(record, "queries", QUERIES, ranking),
        "scores": runs_table(record, "scores", SCORES, refine),
        "store": table(store_header, by_store),
        "bandwidth": f"{reads / 1e9:.0f} GB/s",
        **far_away(record, stores[-1][1]),
    }


def far_away(record: Record, store: Mapping[str, float]) -> dict[str, str]:
    """Arithmetic for a thousand times as many documents as were measured."""
    times = FAR / DOCUMENTS[-1]
    smallest, largest = (record.run(documents=n)["peak_mib"] * 2**20 for n in (DOCUMENTS[0], DOCUMENTS[-1]))
    block = 4 * BLOCK_QUERIES * DOCUMENTS[-1]  # the smallest run holds its vectors, the largest a block of cosines
    beside = (largest - block - smallest + 4 * DOCUMENTS[0] * USUAL["dimension"]) / DOCUMENTS[-1]
    vectors = {d: 4 * FAR * d for d in (USUAL["dimension"], MANY_DIMENSIONS)}
    links = 2 * 16 * 4  # of HNSW with M = 16: 32 neighbours of four bytes in the lowest layer, the others hardly count
    return {
        "vectors": " or ".join(f"{size / TIB:.1f} TiB at {d:,} dimensions" for d, size in vectors.items()),
        "hnsw": f"{(vectors[USUAL['dimension']] + links * FAR) / TIB:.1f} TiB",
        "codes": f"{USUAL['dimension'] / 4 * FAR / GIB:.0f} GiB",
        "flat_far": f"{store['ms_at_20'] * times / 1000:.0f} s",
        "fill_rate": f"{DOCUMENTS[-1] / store['fill']:,.0f}",
        "fill_far": f"{store['fill'] * times / 86400:.1f} days",
        "disk_far": f"{store['disk_mib'] * times * 2**20 / TIB:.1f} TiB",
        "bytes_beside": f"{beside:,.0f}",
        "memory_far": f"{beside * FAR / GIB:,.0f} GiB",
        "pass_far": f"{vectors[USUAL['dimension']] / DISK / 60:.0f} minutes",
        "disk_rate": f"{DISK / 1e9:.0f} GB/s",
        "gpu_rate": f"{GPU_TEXTS:,}",
        "gpu_days": f"{FAR / GPU_TEXTS / 86400:.1f} GPU-days",
        "driver": f"{32 * FAR / GIB:.0f} GiB",
        "block": f"{4 * FAR / GIB:.1f} GiB",
    }


def main() -> None:
    """Measure what is not on record, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", default=str(HERE.parent / "output" / "scaling.json"))
    parser.add_argument("--out", default=str(HERE.parent / "docs" / "scaling.md"))
    args = parser.parse_args()
    record = Record(Path(args.record))
    found = words(record, record.get("bandwidth", lambda: large_corpus.apart(large_corpus.bandwidth)))
    page = (HERE / "scaling_page.md").read_text()
    for name, text in found.items():
        page = page.replace(f"[[{name}]]", text)
    Path(args.out).write_text(page)
    print(page)


if __name__ == "__main__":
    main()
