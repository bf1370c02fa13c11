"""What a grid costs beside its runs: planning a thousand, starting each, and what parallel runs gain.

    python benchmarks/grid_runs.py

The Demo dataset with the packaged all-MiniLM-L6-v2; its vectors are put into the cache first.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
VOLATILE = ("started", "seconds", "peak_memory_mb")


def call(folder: Path, *arguments: str) -> tuple[float, str]:
    """Run the grid's command in ``folder``; returns seconds and what it printed."""
    grid = [sys.executable, str(ROOT / "run_experiments.py"), "--datasets", "Demo", "--embedding_models", MODEL]
    folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    done = subprocess.run([*grid, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, done.stdout


def digest(folder: Path) -> str:
    """One hash over the results of all runs in a folder: every byte of CSV and parquet, and the JSON less its times."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("output/*/*")):
        content = path.read_bytes() if path.suffix in (".csv", ".parquet") else b""
        if path.suffix == ".json":
            content = json.dumps({k: v for k, v in json.loads(path.read_bytes()).items() if k not in VOLATILE}).encode()
        whole.update(f"{path.relative_to(folder)}\0".encode() + content)
    return whole.hexdigest()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=24, help="runs of the grid")
    parser.add_argument("--planned", type=int, default=1000, help="runs of the preview")
    parser.add_argument("--cache_dir", default=str(ROOT / "cache"), help="where the vectors are, or go")
    options = parser.parse_args()
    cache = f"--cache_dir={Path(options.cache_dir).resolve()}"
    axis = ["--optimize_with_gold", cache, "--num_steps", *map(str, range(1, options.runs + 1))]

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        embed = [sys.executable, str(ROOT / "embed_all_documents.py"), "--dataset", "Demo", "--embedding_model", MODEL]
        subprocess.run([*embed, cache], check=True, capture_output=True)
        os.environ.setdefault("BASE_URL", "http://127.0.0.1:9")  # a preview asks nothing
        for teacher in (["--optimize_with_gold"], ["--reranker_model", "LiteLLM/any"]):
            many = ["--random_seed", *map(str, range(options.planned))]
            seconds, shown = call(folder / "preview", "--dry_run", *teacher, cache, *many)
            print(f"preview of {options.planned} runs, {teacher[-1]}: {seconds:.2f} s, {len(shown.splitlines())} lines")

        one, _ = call(folder / "one", *axis, "--parallel", "1", "--experiment_prefix", "x")
        four, _ = call(folder / "four", *axis, "--parallel", "4", "--experiment_prefix", "x")
        with open(folder / "one" / "output" / "x_grid.csv", newline="") as file:
            own = sum(float(row["seconds"]) for row in csv.DictReader(file))
        print(f"{options.runs} runs, --parallel 1: {one:.1f} s, of it {own:.1f} s in the runs themselves")
        beside = 1000 * (one - own) / options.runs
        print(f"beside the runs' own time: {beside:.0f} ms a run, planning and summary included")
        print(f"--parallel 4: {four:.1f} s, ratio {one / four:.2f} ({os.cpu_count()} cores)")
        same = digest(folder / "one") == digest(folder / "four")
        print(f"result files of the two, byte for byte apart from times: {'the same' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
