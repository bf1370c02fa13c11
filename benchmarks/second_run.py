"""A second run, all vectors cached: wall time, peak memory, and where the time goes.

    python benchmarks/second_run.py [--dataset Clinc150] [--data_dir data] [--repeats 3]

The first run fills the cache. The floor printed beside it is a process that only imports torch and pyarrow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The paper's public code on the same job and a machine of the same size (2 cores): seconds, MB.
PUBLIC_CODE = {"Clinc150": (63.8, 5275), "Banking77": (39.4, 3269), "ArgKP21": (39.3, 813)}


def seconds_of(command: list[str]) -> float:
    """Wall time of one process."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - started


def main() -> None:
    """Run several times; report the quickest after the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="Clinc150")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--cache_dir", default="cache")
    parser.add_argument("--embedding_model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, str(ROOT / "embedding_adaptation.py"), "--optimize_with_gold"]
        for name in ("dataset", "data_dir", "cache_dir", "embedding_model"):
            command += [f"--{name}", str(getattr(args, name))]
        command += ["--output_dir", output, "--experiment_name", "run"]
        first = seconds_of(command)
        runs = []
        for _ in range(args.repeats):
            seconds = seconds_of(command)
            runs.append((seconds, json.loads((Path(output) / "run" / "summary.json").read_text())))
    later, summary = min(runs, key=lambda run: run[0])
    floor = min(seconds_of([sys.executable, "-c", "import torch, pyarrow.parquet, scipy.sparse"]) for _ in range(3))
    memory = summary["peak_memory_mb"]
    print(f"{args.dataset}: first run {first:.1f} s; second run {later:.2f} s, peak memory {memory} MiB")
    print(f"imports alone {floor:.2f} s: the second run takes {later / floor:.1f} x that")
    for step, value in summary["seconds"].items():
        print(f"  {step:<42} {value:6.2f} s")
    if args.dataset in PUBLIC_CODE:
        seconds, megabytes = PUBLIC_CODE[args.dataset]
        print(
            f"the paper's public code: {seconds} s, {megabytes} MB: {seconds / later:.0f} x the time, "
            f"{megabytes / memory:.0f} x the memory"
        )


if __name__ == "__main__":
    main()
