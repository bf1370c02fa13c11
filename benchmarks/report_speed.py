"""The report on a large grid: its time and memory, and its statistics against scipy's, one comparison at a time.

    python benchmarks/report_speed.py [--runs 200] [--queries 150] [--documents 15000]

Writes made-up runs with four variants each; those that are shown in detail have raw scores of all pairs, and tensors.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402
from synthetic_runs import write_run  # noqa: E402

from significance import BOOTSTRAP_RESAMPLES, bootstrap_interval, randomisation_test, resamples_for  # noqa: E402

DATASETS = ("One", "Two")
VARIANTS = ("embeddings", "optimized_embeddings", "hyde", "optimized_hyde_embeddings")
DETAILS = 3
BY_SCIPY = 20  # comparisons, of which the others' time follows


def write_runs(folder: Path, runs: int, queries: int, documents: int) -> int:
    """Write the runs; returns how many rows of raw scores there are."""
    size = {"queries": queries, "documents": documents, "variants": VARIANTS}
    for i in range(runs):
        lr, scores, dataset = 1e-5 * (1 + i // 8), 5 * (1 + i // 2 % 4), DATASETS[i % 2]
        detailed = i >= runs - DETAILS
        gain = 0.3 if detailed else 0.01
        write_run(folder / f"run{i}", dataset=dataset, lr=lr, total_scores=scores, scores_from_top=min(20, scores),
                  raw=detailed, tensors=detailed, gain=gain, **size)  # fmt: skip
    return DETAILS * len(VARIANTS) * queries * documents


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--queries", type=int, default=150)
    parser.add_argument("--documents", type=int, default=15_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = write_runs(Path(temporary) / "output", options.runs, options.queries, options.documents)
        print(f"{options.runs} runs x {len(VARIANTS)} variants x {options.queries} queries; {rows:,} raw scores")
        command = [sys.executable, str(ROOT / "report.py"), "output", "--details", str(DETAILS)]
        started = time.perf_counter()
        child = subprocess.Popen(command, cwd=temporary, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        page = Path(temporary) / "output" / "report" / "index.html"
        assert status == 0 and page.exists()
        print(f"report: {seconds:.1f} s, peak memory {used.ru_maxrss / 1024:.0f} MiB, "
              f"page {page.stat().st_size / 2**20:.1f} MiB")  # fmt: skip

    tests = options.runs * (len(VARIANTS) - 1)
    changes = np.random.default_rng(0).normal(0.01, 0.1, (options.queries, tests))
    resamples = resamples_for(tests)
    started = time.perf_counter()
    randomisation_test(changes, resamples)
    bootstrap_interval(changes)
    ours = time.perf_counter() - started
    started = time.perf_counter()
    for column in changes.T[:BY_SCIPY]:
        stats.permutation_test((column,), mean, permutation_type="samples", n_resamples=resamples, batch=10_000)
        stats.bootstrap((column,), np.mean, n_resamples=BOOTSTRAP_RESAMPLES, method="percentile")
    theirs = (time.perf_counter() - started) * tests / BY_SCIPY
    print(f"statistics of {tests} comparisons, {resamples:,} resamples: {ours:.2f} s; by scipy, one at a time, "
          f"{theirs:.0f} s ({BY_SCIPY} measured): {theirs / ours:.0f} x")  # fmt: skip


def mean(values: np.ndarray, axis: int) -> np.ndarray:
    """For scipy."""
    return values.mean(axis=axis)


if __name__ == "__main__":
    main()
