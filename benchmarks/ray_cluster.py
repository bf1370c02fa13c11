"""A Ray cluster of two nodes on this machine against local processes: the same bits, and what a loss costs.

    python benchmarks/ray_cluster.py --data_dir data

A grid of 12 runs on Demo, and 20,000 texts of Clinc150 and Banking77, with the packaged all-MiniLM-L6-v2; each without
Ray, on the cluster, with a worker killed in the middle, and with a node removed in the middle. Needs
requirements-scale.txt. The two nodes share this machine's cores, so nothing gets faster here.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from grid_runs import MODEL, digest

from cache_utils import VectorCache, text_keys
from dataset_loaders import load_dataset

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
Harm = Callable[[list[str]], None] | None  # gets the lines of a command's log so far
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


class Cluster:
    """Two nodes on this machine; the second can be removed and is then replaced for the next measurement."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as LocalCluster

        self._cluster = LocalCluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        self.flags = ["--executor", "ray", "--ray_address", self._cluster.address]
        self._second = self._cluster.add_node(**NODE)

    def remove_node(self) -> None:
        """Take the second node away, with all that runs on it."""
        self._cluster.remove_node(self._second)

    def repair(self) -> None:
        """Have two nodes again."""
        if len(self._cluster.list_all_nodes()) < 2:
            self._second = self._cluster.add_node(**NODE)
            time.sleep(3)

    def stop(self) -> None:
        """End it."""
        self._cluster.shutdown()


def call(script: str, *arguments: str, meanwhile: Callable[[list[str]], None] | None = None) -> tuple[float, list[str]]:
    """Run a script; returns its seconds and the lines of its log. ``meanwhile`` gets the lines as they come."""
    started, lines = time.perf_counter(), []
    command = [sys.executable, str(ROOT / script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    thread = threading.Thread(target=meanwhile or (lambda _: None), args=(lines,), daemon=True)
    thread.start()
    lines.extend(line.rstrip() for line in iter(process.stderr.readline, ""))
    status = process.wait()
    if status:
        raise SystemExit(f"{script} ended with {status}:\n" + "\n".join(lines[-20:]))
    return time.perf_counter() - started, lines


def wait_for(what: Callable[[], bool]) -> None:
    """Look again and again until it is so."""
    while not what():
        time.sleep(0.05)


# --- The corpus ------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, data_dir: str, size: int) -> list[str]:
    """A dataset folder with texts of two datasets; returns the texts."""
    texts = [text for name in ("Clinc150", "Banking77") for text in load_dataset(name, data_dir).documents][:size]
    (folder / "qrels").mkdir(parents=True)
    lines = (json.dumps({"_id": str(i), "text": text}) for i, text in enumerate(texts))
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "where is my card"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t0\t1\n")
    return texts


def shards(cache: Path) -> dict[str, int]:
    """The finished pieces in a cache: name to the time it was written."""
    return {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.keys.npy")}


def vectors_of(cache: Path, texts: list[str]) -> tuple[np.ndarray, int]:
    """The documents' vectors, and how many the cache holds in all."""
    (setup,) = cache.rglob("setup.json")
    stored = VectorCache(cache, json.loads(setup.read_text()))
    return stored.load(text_keys(texts, "document")), len(stored)


def embed(folder: Path, texts: list[str], name: str, flags: list[str], harm: Harm) -> None:
    """Embed the corpus into a cache of its own, doing harm after the first finished pieces; compare and print."""
    cache, before = folder / name, {}

    def meanwhile(lines: list[str]) -> None:
        wait_for(lambda: len(shards(cache)) >= 2)
        before.update(shards(cache))
        harm(lines)

    common = ["--dataset", str(folder / "corpus"), "--embedding_model", MODEL, "--cache_dir", str(cache)]
    seconds, lines = call("embed_all_documents.py", *common, *flags, meanwhile=meanwhile if harm else None)
    vectors, count = vectors_of(cache, texts)
    print(f"embedding {len(texts):,} texts, {name}: {seconds:.1f} s, {len(shards(cache))} pieces", end="")
    if (folder / "local").exists() and name != "local":
        same = np.array_equal(vectors, vectors_of(folder / "local", texts)[0])
        print(f"; vectors {'the same to the last bit' if same else 'DIFFERENT'}", end="")
    if harm:
        kept = all(shards(cache).get(piece) == written for piece, written in before.items())
        lost = [int(found[1]) for line in lines if (found := re.search(r"lost a worker .* (\d+) pieces go", line))]
        twice = count - len({*texts}) - 1
        print(f"; {len(before)} finished pieces {'kept' if kept else 'NOT KEPT'}, {sum(lost)} given to others", end="")
        print(f", {twice} texts stored twice", end="")
    print(flush=True)


def kill_embedder(lines: list[str]) -> None:
    """Kill the first worker that the log names."""
    (process, *_) = (int(found[1]) for line in lines if (found := re.search(r"process (\d+): ready", line)))
    os.kill(process, signal.SIGKILL)


# --- The grid --------------------------------------------------------------------------------------------------------


def running(folder: Path) -> list[tuple[int, int]]:
    """The runs of a grid that are running: (process, its parent)."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    own = (line.split(None, 2) for line in listed.splitlines())
    mark = f"--output_dir {folder / 'output'} "
    return [(int(p), int(q)) for p, q, what in own if "embedding_adaptation.py" in what and mark in f"{what} "]


def grid(folder: Path, name: str, flags: list[str], harm: Harm) -> None:
    """Run the grid in one and the same place, doing harm after three runs; compare with the first and print."""
    places = [f"--{kind}_dir={folder / kind}" for kind in ("output", "cache", "data")]
    axes = ["--lr", "1e-4", "1e-3", "1e-2", "--total_scores", "5", "10", "15", "20"]
    common = ["--datasets", "Demo", "--embedding_models", MODEL, "--optimize_with_gold", *axes, *places]

    def meanwhile(lines: list[str]) -> None:
        wait_for(lambda: sum(" completed " in line for line in lines) >= 3 and bool(running(folder)))
        harm(lines)

    started = meanwhile if harm else None
    seconds, lines = call("run_experiments.py", *common, "--experiment_prefix=x", *flags, meanwhile=started)
    (folder / "done").mkdir(exist_ok=True)
    (folder / "done" / name).mkdir()
    shutil.move(folder / "output", folder / "done" / name / "output")
    again = sum(bool(re.match(r"\S+ again ", line)) for line in lines)
    print(f"grid of 12 runs, {name}: {seconds:.1f} s, {again} started again", end="")
    if name != "local":
        same = digest(folder / "done" / name) == digest(folder / "done" / "local")
        print(f"; result files byte for byte apart from times: {'the same' if same else 'DIFFERENT'}", end="")
    print(flush=True)


# --- Both ------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data", help="where Clinc150 and Banking77 lie")
    parser.add_argument("--texts", type=int, default=20_000, help="size of the corpus")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = write_corpus(folder / "corpus", options.data_dir, options.texts)
        embed_demo = ["--dataset", "Demo", "--embedding_model", MODEL, "--cache_dir", str(folder / "cache")]
        call("embed_all_documents.py", *embed_demo)
        grid(folder, "local", ["--parallel", "2"], None)
        embed(folder, texts, "local", [], None)
        cluster = Cluster()
        try:
            grid(folder, "on the cluster", cluster.flags, None)
            grid(folder, "a worker killed", cluster.flags, lambda _: os.kill(running(folder)[0][1], signal.SIGKILL))
            grid(folder, "a node removed", cluster.flags, lambda _: cluster.remove_node())
            cluster.repair()
            embed(folder, texts, "on the cluster", cluster.flags, None)
            embed(folder, texts, "a worker killed", cluster.flags, kill_embedder)
            embed(folder, texts, "a node removed", cluster.flags, lambda _: cluster.remove_node())
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
