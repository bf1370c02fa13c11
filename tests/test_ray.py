"""A Ray cluster of two nodes on this machine: the same bits as without it, and what a lost worker or node costs."""

import contextlib
import functools
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run_script, write_folder_dataset
from test_job_runner import is_alive, wait_until_gone

import embedders
import ray_embedding
from cache_utils import VectorCache, text_keys
from dataset_loaders import corpus_stretches, load_dataset
from devices import SlotFlags
from embedders import TextEmbedder
from errors import RunError, UserError
from experiment_config import build_config
from instruction_templates import fill_templates, read_templates, templates_for
from job_runner import Beginning, Job, JobRunner
from ray_cluster import NodePlace, joined
from ray_embedding import Piece
from ray_executor import RayTasks, with_absolute_paths
from run_setup import make_embedder

try:
    import ray
    from ray.cluster_utils import Cluster
except ImportError:
    ray = None
needs_ray = pytest.mark.skipif(ray is None, reason="needs Ray: pip install -r requirements-scale.txt")
GRID, EMBED = "run_experiments.py", "embed_all_documents.py"
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    for attempt in range(3):
        started = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        try:
            started.add_node(**NODE)
            break
        except Exception:  # Ray gives a node half a minute to come up, which a busy machine may not keep
            started.shutdown()
            if attempt == 2:
                raise
    yield started
    started.shutdown()


@pytest.fixture
def member(cluster):
    """This process as a member of the cluster; gives the ``ray`` module."""
    with joined(cluster.address) as module:
        yield module


# --- Without Ray, and what is wrong ---


def test_without_ray_nothing_else_is_affected(small_folder, tmp_path):
    (tmp_path / "path" / "ray").mkdir(parents=True)
    (tmp_path / "path" / "ray" / "__init__.py").write_text("raise ImportError('no Ray here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "path")}
    grid = ["--datasets", small_folder, "--embedding_models", "some/model", "--optimize_with_gold"]
    call = functools.partial(run_script, cwd=tmp_path, env=environment, check=False)
    assert call(GRID, *grid, "--dry_run").returncode == 0
    for script in (GRID, EMBED):
        done = call(script, *grid[:4], "--executor", "ray", *grid[4:] * (script == GRID))
        assert done.returncode == 2
        assert done.stderr == "error: --executor ray needs Ray: pip install -r requirements-scale.txt\n"


@pytest.mark.parametrize("script", [GRID, EMBED])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ray_address", "host:6379"], "--ray_address: is for --executor ray"),
        (["--executor", "ray", "--gpus", "0"], "--gpus: cannot be used with --executor ray, which gives out the cluster's GPUs"),
        (["--executor", "slurm"], "--executor: got 'slurm', must be one of local, ray"),
    ],
)
def test_flags_that_do_not_go_together(script, flags, message, tmp_path):
    done = run_script(script, "--datasets", "Demo", "--embedding_models", "some/model", *flags, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


@needs_ray
def test_a_cluster_that_is_not_there_is_told_in_a_line(tmp_path):
    for address, message in (
        ("127.0.0.1:9", "cannot be joined ("),
        ("ray://127.0.0.1:9", "cannot be joined (127.0.0.1:9: Connection refused)"),
        ("nowhere", "is no address of a cluster, such as host:6379 or ray://host:10001"),
    ):
        with pytest.raises(UserError) as caught, joined(address):
            pass
        assert str(caught.value).startswith(f"--ray_address: {address} {message}")
        assert "\n" not in str(caught.value)


def test_paths_are_those_of_any_working_directory(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {"dataset": "Demo", "embedding_model": "./model", "reranker_model": "CrossEncoder/model", "output_dir": "out"}
    words = with_absolute_paths(given, build_config(given))
    assert words["dataset"] == "Demo" and "instruction_templates" not in words
    assert words["embedding_model"] == str(tmp_path / "model")
    assert words["reranker_model"] == f"CrossEncoder/{tmp_path / 'model'}"
    assert [words[name] for name in ("output_dir", "cache_dir")] == [str(tmp_path / "out"), str(tmp_path / "cache")]
    assert with_absolute_paths(words, build_config(words)) == words


# --- Grids ---


def contents(folder):
    """All files of a grid's runs, without what depends on when they ran."""
    found = {}
    for path in folder.glob("*/*"):
        if path.suffix in (".csv", ".parquet"):
            found[str(path.relative_to(folder))] = path.read_bytes()
        elif path.suffix == ".json":
            content = json.loads(path.read_text())
            volatile = ("started", "seconds", "peak_memory_mb")
            found[str(path.relative_to(folder))] = {k: v for k, v in content.items() if k not in volatile}
    return found


@needs_ray
def test_a_grid_gives_the_same_files_as_without_ray(cluster, small_folder, tiny_models, tmp_path):
    places = [f"--{name}_dir={tmp_path / name}" for name in ("output", "cache", "data")]
    run_script(EMBED, "--dataset", small_folder, "--embedding_model", tiny_models["bert"], places[1])  # summaries count it
    grid = ["--datasets", small_folder, "--embedding_models", tiny_models["bert"], "--optimize_with_gold", *places]
    grid += ["--lr", "1e-3", "1e-2", "--experiment_prefix=x"]
    run_script(GRID, *grid, "--parallel=2", cwd=tmp_path)
    local = contents((tmp_path / "output").rename(tmp_path / "local"))
    ray_flags = ["--executor", "ray", "--ray_address", cluster.address]
    done = run_script(GRID, *grid, *ray_flags, cwd=tmp_path)
    assert done.stderr.count("completed") == 2
    assert len(local) == 2 * (2 + 3 * 2)  # two JSON files a run, two files a variant
    assert contents(tmp_path / "output") == local
    again = run_script(GRID, *grid, *ray_flags, cwd=tmp_path)
    assert "skipped     2 of 2 runs, as they are done" in again.stderr


WORK = """
import os, pathlib, sys, time
sys.path.insert(0, {root!r})
from errors import run_command
def main():
    with open(sys.argv[1], "a") as file:
        file.write(f"{{os.getpid()}} {{os.getppid()}} {{os.environ.get('OMP_NUM_THREADS')}} {{os.environ.get('API_KEY')}}\\n")
    time.sleep(float(sys.argv[2]))
    print("done")
run_command(main)
"""


def starts(tmp_path, name):
    """The starts of a job so far: (process, its parent, threads, key)."""
    path = tmp_path / f"{name}.starts"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(what, seconds=30):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


def run_jobs(module, tmp_path, seconds, meanwhile):
    """Run jobs on the cluster, and something else in a thread; returns their outcomes by name and the runner."""
    (tmp_path / "work.py").write_text(WORK.format(root=str(ROOT)))
    jobs = {name: Job(name, (str(tmp_path / "work.py"), str(tmp_path / f"{name}.starts"), str(s))) for name, s in seconds.items()}
    tasks = RayTasks(module, SlotFlags())
    runner = JobRunner(list(jobs.values()), tasks, lambda job: Beginning((tmp_path / f"{job.name}.log",)), lambda job, _: job.name)
    thread = threading.Thread(target=meanwhile)
    thread.start()
    outcomes = {job.name: outcome for job, outcome in runner.run().items()}
    thread.join()
    return outcomes, runner


@needs_ray
def test_what_is_lost_is_started_again_and_nothing_else(cluster, monkeypatch, tmp_path):
    """A worker is killed, later a node is removed: both jobs run again, elsewhere, and use up no try."""
    monkeypatch.setenv("API_KEY", "secret")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    third = cluster.add_node(**NODE)

    def harm():
        wait_for(lambda: all(starts(tmp_path, name) for name in "abc"))
        process, worker, *_ = starts(tmp_path, "a")[0]
        os.kill(int(worker), signal.SIGKILL)
        wait_until_gone([int(process)], 10)
        cluster.remove_node(third)

    with joined(cluster.address) as module:
        outcomes, _ = run_jobs(module, tmp_path, dict(a=1.5, b=1.5, c=1.5, d=0), harm)
    assert {outcome.state for outcome in outcomes.values()} == {"completed"}
    assert len(starts(tmp_path, "a")) == outcomes["a"].tries == 2
    assert sum(len(starts(tmp_path, name)) for name in "abcd") in (5, 6)  # the removed node may have held the first again
    assert (tmp_path / "a.log").read_text().endswith("--- try 2 ---\ndone\n")
    assert {tuple(start[2:]) for name in "abcd" for start in starts(tmp_path, name)} == {("None", "secret")}


@needs_ray
def test_ctrl_c_reaches_the_nodes(member, tmp_path):
    def interrupt():
        wait_for(lambda: starts(tmp_path, "a") and starts(tmp_path, "b"))
        os.kill(os.getpid(), signal.SIGINT)

    outcomes, runner = run_jobs(member, tmp_path, dict(a=60, b=60, c=60), interrupt)
    assert runner.interrupted
    assert [outcome.state for outcome in outcomes.values()] == ["interrupted", "interrupted", "not started"]
    assert "interrupted: what was finished is kept" in (tmp_path / "a.log").read_text()
    assert not any(is_alive(int(starts(tmp_path, name)[0][0])) for name in "ab")


# --- Embedding ---


@pytest.fixture
def corpus(tmp_path, tiny_models, monkeypatch):
    """A folder of texts, some of them twice and far apart, in several stretches of many pieces; returns its flags."""
    monkeypatch.setattr(embedders, "CHUNK_TEXTS", 40)
    monkeypatch.setattr(embedders, "STRETCH", 500)
    monkeypatch.setattr(ray_embedding, "corpus_stretches", functools.partial(corpus_stretches, size=500))
    documents = {f"d{i}": f"{'brake lake ' * (i % 10)}number {i % 1100}" for i in range(1600)}
    folder = write_folder_dataset(tmp_path / "corpus", documents, {"q": "a brake"}, [("q", "d1", 1)])
    flags = {"dataset": str(folder), "embedding_model": str(tiny_models["qwen3"]), "device": "cpu"}
    return build_config({**flags, "cache_dir": str(tmp_path / "cache")})


def texts_of(config):
    dataset = load_dataset(config.dataset, config.data_dir)
    return fill_templates(templates_for(read_templates(config.instruction_templates), config.embedding_model, dataset), dataset)


def embedded_here(config, folder):
    """The vectors that this process gives."""
    config = build_config({"dataset": config.dataset, "embedding_model": config.embedding_model, "cache_dir": str(folder)})
    embedder, texts = make_embedder(config, "cpu"), texts_of(config)
    return embedder.embed(texts.documents, "document"), embedder.embed(texts.queries, "query")


def assert_same_vectors(config, tmp_path):
    """What lies in the cache is what this process gives, to the last bit, and each text was embedded once."""
    embedder, texts = make_embedder(config, "cpu"), texts_of(config)
    found = embedder.embed(texts.documents, "document"), embedder.embed(texts.queries, "query")
    assert embedder.counts["embedded"] == 0
    assert len(embedder.cache) == len(set(texts.documents)) + 1
    for own, other in zip(found, embedded_here(config, tmp_path / "here"), strict=True):
        assert np.array_equal(own, other)


@needs_ray
def test_a_lost_worker_and_a_lost_node_cost_their_pieces_only(cluster, corpus, tmp_path, monkeypatch, caplog):
    teams = []
    original = ray_embedding.Workers.__init__
    monkeypatch.setattr(ray_embedding.Workers, "__init__", lambda self, *own: (teams.append(self), original(self, *own))[0])
    third = cluster.add_node(**NODE)
    caplog.set_level("INFO")
    folder = VectorCache(corpus.cache_dir, TextEmbedder(make_embedder(corpus, "cpu").source, corpus.cache_dir).setup).folder

    def shards():
        return len(list(folder.glob("*.keys.npy"))) if folder.exists() else 0

    def harm():
        wait_for(lambda: shards() >= 2, 60)
        os.kill(next(iter(teams[0].processes.values()))[0], signal.SIGKILL)
        with contextlib.suppress(Exception):
            cluster.remove_node(third)

    thread = threading.Thread(target=harm)
    thread.start()
    with joined(cluster.address) as module:
        line = ray_embedding.embed_dataset(module, corpus, SlotFlags())
        thread.join()
        assert "lost a worker" in caplog.text
        assert line.startswith("corpus, ") and " 1601 texts embedded" not in line
        again = ray_embedding.embed_dataset(module, corpus, SlotFlags())
    assert "0 texts embedded, 1601 were there" in again and len(teams) == 1
    assert_same_vectors(corpus, tmp_path)


@needs_ray
def test_without_a_shared_directory_the_vectors_travel(member, corpus, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(ray_embedding, "probe_file", lambda folder: contextlib.nullcontext("/nowhere/at/all"))
    ray_embedding.embed_dataset(member, corpus, SlotFlags(parallel=1))
    assert "does not see the cache, its vectors travel here" in caplog.text
    assert_same_vectors(corpus, tmp_path)


@needs_ray
def test_a_node_with_another_model_is_told_in_a_line(member, corpus, monkeypatch):
    def another(config, device):
        embedder = make_embedder(config, device)
        embedder.setup["identity"] = "folder of somebody else"
        return embedder

    monkeypatch.setattr(ray_embedding, "make_embedder", another)
    with pytest.raises(UserError, match=r"is another model there.*identity") as caught:
        ray_embedding.embed_dataset(member, corpus, SlotFlags(parallel=1))
    assert "\n" not in str(caught.value)


@pytest.fixture
def idle_workers(corpus):
    """Workers of a cluster that is none, and a place there; losing them needs no Ray."""
    nothing = SimpleNamespace(kill=lambda actor: None, nodes=list, exceptions=None)
    workers = ray_embedding.Workers(nothing, corpus, SlotFlags(), make_embedder(corpus, "cpu"), "probe")
    return workers, NodePlace("id", 0, 1, 0)


def lose(workers, place, preparing=None, given=()):
    worker = ray_embedding._Worker(None, place, "somewhere", preparing, dict(enumerate(given)))
    workers._workers.append(worker)
    workers._lose(worker, lambda *_: None, "killed")


def test_a_piece_that_has_lost_three_workers_is_an_error_and_who_waits_behind_it_is_not_to_blame(idle_workers):
    workers, place = idle_workers
    guilty, innocent = (Piece(text_keys([name], "document"), [name], "document") for name in ("guilty", "innocent"))
    for _ in range(2):
        lose(workers, place, given=[guilty, innocent])
    with pytest.raises(RunError, match=r"a piece of 1 document texts, the first 'guilty'.*3 workers.*somewhere: killed.*kept"):
        lose(workers, place, given=[guilty, innocent])
    assert (guilty.losses, innocent.losses) == (3, 0)


def test_where_no_worker_can_start_there_is_an_error(idle_workers):
    workers, place = idle_workers
    for _ in range(2):
        lose(workers, place, preparing="preparation")
    with pytest.raises(RunError, match="no worker can start; on node somewhere: killed"):
        lose(workers, place, preparing="preparation")


def test_stretches_are_the_corpus(small_folder):
    whole = load_dataset(str(small_folder), "data")
    for size in (7, 60, 1000):
        parts = list(corpus_stretches(str(small_folder), "data", size))
        assert [i for ids, _ in parts for i in ids] == whole.document_ids
        assert [text for _, texts in parts for text in texts] == whole.documents
        assert {len(ids) for ids, _ in parts[:-1]} <= {size}
    assert sum(len(ids) for ids, _ in corpus_stretches("Demo", "data", 100)) == 338
    (small_folder / "corpus.jsonl").write_text('{"_id": "a", "text": "b"}\n{"_id": "c"}\n')
    with pytest.raises(UserError, match=r"corpus.jsonl:2: expected '_id' and 'text'"):
        list(corpus_stretches(str(small_folder), "data"))
