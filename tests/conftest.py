"""Fixtures: real data where it lies, tiny models made here, and the scripts run as a user runs them."""

import itertools
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from llm_endpoint import KEY, digest_of, share

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and none may wait for it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two test files run at once; see job_runner.py
for variable in ("BASE_URL", "API_KEY", "OPENAI_BASE_URL", "OPENAI_API_KEY"):  # no test may spend a developer's money
    os.environ.pop(variable, None)


def run_script(script, *arguments, cwd=ROOT, check=True, **options):
    """Run one of the project's scripts in a process of its own, as on a command line."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)
    if check and done.returncode != 0:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def write_folder_dataset(folder, documents, queries, qrels, candidates=None, yaml_text=None):
    """Write a dataset folder; documents and queries are {id: text}, qrels is [(query, document, score)]."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines = [json.dumps({"_id": i, "text": text}) for i, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    rows = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(rows) + "\n")
    if candidates is not None:
        (folder / "candidates.tsv").write_text("\n".join(["query-id\tcorpus-id", *map("\t".join, candidates)]) + "\n")
    if yaml_text is not None:
        (folder / "dataset.yaml").write_text(yaml_text)
    return folder


@pytest.fixture(scope="session")
def shared_datasets():
    """The real upstream files of three datasets."""
    if not (SHARED / "datasets").is_dir():
        pytest.skip(f"needs the upstream dataset files in {SHARED / 'datasets'}, which are not part of the project")
    return SHARED / "datasets"


@pytest.fixture(scope="session")
def golden():
    """Reference figures of the paper's public code."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"needs the reference figures in {SHARED / 'golden'}, which are not part of the project")
    return SHARED / "golden"


@pytest.fixture(scope="session")
def minilm_cache():
    """Vectors of the real model, kept between test runs; the keys hold everything that makes a vector."""
    return ROOT / "cache" / "tests"


WORDS = [
    *("the", "a", "of", "to", "bicycle", "brake", "battery", "lake", "hotel", "rain"),
    *("key", "lock", "child", "late", "early", "morning", "never", "always", "with", "without"),
]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Random models of the default models' architectures, saved as sentence-transformers folders: {name: path}."""
    import torch
    from tiny_models import save_tiny_models

    torch.manual_seed(0)
    return save_tiny_models(tmp_path_factory.mktemp("models"))


def write_small_folder(folder):
    """A dataset folder of 60 documents and 6 queries, 5 relevant documents each."""
    documents = {f"d{i}": f"{WORDS[i % 20]} {WORDS[(i * 7) % 20]} number {i}" for i in range(60)}
    queries = {f"q{j}": f"{WORDS[j]} {WORDS[j + 3]}" for j in range(6)}
    qrels = [(f"q{j}", f"d{i}", 1) for j in range(6) for i in range(j, 60, 12)]
    return write_folder_dataset(folder, documents, queries, qrels)


@pytest.fixture
def small_folder(tmp_path):
    """See :func:`write_small_folder`."""
    return write_small_folder(tmp_path / "small")


class RunningEndpoint:
    """A local OpenAI-compatible endpoint in a process of its own; see llm_endpoint.py for what it can be told to do."""

    def __init__(self, *options):
        command = [sys.executable, str(ROOT / "tests" / "llm_endpoint.py"), *map(str, options)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.filtered = dict(itertools.pairwise(command)).get("--filtered", "0")
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def stats(self):
        with urllib.request.urlopen(f"{self.url}/stats") as response:
            return json.load(response)

    def is_filtered(self, messages):
        """Whether the content filter refuses this prompt."""
        return share(digest_of(messages)) < float(self.filtered)

    def environment(self, **more):
        return {**os.environ, "BASE_URL": self.url, "API_KEY": KEY, **more}


@pytest.fixture
def endpoint():
    """Start endpoints with the given options: ``endpoint("--latency", 0.1)``; they end with the test."""
    started = []

    def start(*options):
        started.append(RunningEndpoint(*options))
        return started[-1]

    yield start
    for one in started:
        one.close()
