"""Milvus as the place where a corpus lives: filled, searched, run over; embedded in a file and behind an address."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import MINILM, ROOT, run_script, write_folder_dataset
from llm_endpoint import MODEL

from dataset_loaders import corpus_stretches, dataset_facts
from errors import RunError, UserError
from experiment_config import build_config
from instruction_templates import read_templates, templates_for
from mapped_vectors import unit_length
from ranking import ExactCorpus, sampled_ranks
from retrieval_dataset import DatasetFacts, RetrievalDataset, pairs_to_matrix
from run_setup import check_run, load_data, make_embedder
from store_filling import fill_store
from stored_corpora import corpus_to_store, find_corpus
from vector_store import MOST_BYTES, VectorStore, check_store

RUN, EMBED, SEARCH = "embedding_adaptation.py", "embed_all_documents.py", "search.py"
pytest.importorskip("pymilvus", reason="needs pymilvus and milvus-lite: pip install -r requirements-scale.txt")


def error_of(arguments, **more):
    done = run_script(*arguments, check=False, **more)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


# --- The store itself ---


def made_up(n=500, dimension=16, version="1"):
    rng = np.random.default_rng(3)
    ids = [f"d{i}" for i in range(n)]
    ids[:6] = ['a "quoted" one', "it's", "Ünï–cödé 文", "back\\slash", "bell\x07", "tab\tand\nnew line"]
    texts = [f"text {i}" for i in range(n)]
    texts[1] = "ü" * MOST_BYTES
    vectors = unit_length(rng.standard_normal((n, dimension)).astype(np.float32))
    facts = DatasetFacts("made-up", "search", None, 0, n, version, version)
    return corpus_to_store(facts, {"model": "m"}, "{text}", dimension), ids, texts, vectors


def fill(store, corpus, ids, texts, vectors, start=0, end=None):
    part = slice(start, end)
    return store.insert(corpus, start, ids[part], texts[part], vectors[part], lambda _: None)


@contextlib.contextmanager
def served(folder):
    """Milvus behind an address: Milvus Lite's own server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "milvus-lite", "server", "--data-dir", folder, "--port", port]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"milvus:http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("is_server", [False, True])
def test_what_is_filled_is_found(tmp_path, is_server):
    corpus, ids, texts, vectors = made_up()
    with served(tmp_path / "served") if is_server else contextlib.nullcontext(f"milvus:{tmp_path / 'a.db'}") as spec:
        with VectorStore(spec) as store:
            assert store.corpora() == []
            assert store.prepare(corpus) == 0
            assert fill(store, corpus, ids, texts, vectors) == 1  # a text that is too long
            store.finish(corpus)
        with VectorStore(spec) as store:
            assert store.corpora() == [corpus] and find_corpus(store.spec, store.corpora(), corpus.embedder, "{text}", None) == corpus
            rows, _ = store.search(corpus.collection, vectors[:3], 500)
            assert rows[:, 0].tolist() == [0, 1, 2]
            if not is_server:  # there the index approximates
                exact = vectors[:3] @ vectors.T
                assert np.array_equal(rows, np.argsort(-exact, axis=1, kind="stable"))
            found = store.fetch(corpus.collection, range(500), ["document_id", "text", "vector"])
            assert [found[i]["document_id"] for i in range(500)] == ids
            assert found[1]["text"] == "ü" * (MOST_BYTES // 2) and found[2]["text"] == texts[2]
            assert np.allclose([found[i]["vector"] for i in range(500)], vectors)
            assert store.places(corpus.collection, [*ids, "nobody"]) == {name: i for i, name in enumerate(ids)}
            with pytest.raises(RunError, match="has no document 500"):
                store.fetch(corpus.collection, [3, 500], ["text"])


def test_filling_goes_on_and_another_version_has_its_own_collection(tmp_path):
    corpus, ids, texts, vectors = made_up()
    with VectorStore(f"milvus:{tmp_path / 'a.db'}") as store:
        store.prepare(corpus)
        fill(store, corpus, ids, texts, vectors, 0, 200)  # and then it is killed
        with pytest.raises(UserError, match="nothing complete"):
            find_corpus(store.spec, store.corpora(), corpus.embedder, "{text}", None)
        with pytest.raises(RunError, match="200 of 500 documents"):
            store.finish(corpus)
        fill(store, corpus, ids, texts, vectors, store.prepare(corpus))
        store.finish(corpus)
        assert store.count(corpus.collection) == 500
        newer, *_ = made_up(300, version="2")
        assert store.prepare(newer) == 0
        assert store.corpora() == [corpus]  # nobody searches half of it
        fill(store, newer, ids[:300], texts[:300], vectors[:300])
        store.finish(newer)
        assert find_corpus(store.spec, store.corpora(), corpus.embedder, "{text}", "made-up", "1") == corpus
        assert find_corpus(store.spec, store.corpora(), corpus.embedder, "{text}", "made-up", "2") == newer
        with pytest.raises(UserError, match="several versions of made-up"):
            find_corpus(store.spec, store.corpora(), corpus.embedder, "{text}", "made-up")
        with pytest.raises(UserError, match=r"holds made-up as it was \([35]00 documents\)"):
            find_corpus(store.spec, store.corpora(), corpus.embedder, "{text}", "made-up", "3")
        store._client.drop_collection(corpus.collection)  # as people do
        assert store.corpora() == [newer]


def test_samples_and_figures_are_those_of_the_exact_corpus(tmp_path):
    from store_corpus import StoreCorpus, StoredTexts

    corpus, ids, texts, vectors = made_up()
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((7, 16)).astype(np.float32)
    relevance = pairs_to_matrix([(int(q), int(d)) for q, d in zip(rng.integers(0, 6, 90), rng.integers(0, 500, 90), strict=True)], 7, 500)
    with VectorStore(f"milvus:{tmp_path / 'a.db'}") as store:
        store.prepare(corpus)
        fill(store, corpus, ids, texts, vectors)
        names = ["made-up", ids, [f"q{i}" for i in range(7)], relevance, "search"]
        exact = ExactCorpus(vectors, RetrievalDataset(names[0], texts, names[1], names[2], names[2], *names[3:]))
        lazy = (StoredTexts(store, corpus, field) for field in ("text", "document_id"))
        stored = StoreCorpus(store, corpus, RetrievalDataset(names[0], *lazy, names[2], names[2], *names[3:]), 500)
        draw = partial(sampled_ranks, total_scores=12, scores_from_top=7, seed=42)
        sampled = exact.sample(queries, draw)
        assert np.array_equal(stored.sample(queries, draw), sampled)
        assert np.array_equal(stored.sample(queries, draw, sampled), exact.sample(queries, draw, sampled))
        assert np.allclose(stored.vectors(sampled), exact.vectors(sampled), atol=1e-6)
        assert np.allclose(stored.spread(100), exact.spread(100), atol=1e-6)
        said = np.where(rng.random(sampled.shape) < 0.2, np.nan, rng.integers(0, 3, sampled.shape)).astype(np.float32)
        scored = pairs_to_matrix([(q, int(d)) for q, row in enumerate(sampled) for d in row], 7, 500)
        for first in (None, (sampled, said)):
            whole, cut = exact.measure(queries, scored, first), stored.measure(queries, scored, first)
            for name in ("map", "mrr", "residual_map"):
                assert np.allclose(whole[name], cut[f"{name}_at_500"], equal_nan=True), name
            for name in ("ndcg_at_10", "precision_at_10", "recall_at_50", "match_at_5"):
                assert np.allclose(whole[name], cut[name], equal_nan=True), name
        shallow = StoreCorpus(store, corpus, stored.dataset, 30)
        assert set(shallow.sample(queries, lambda n: sampled_ranks(n, 20, 5, 1)).ravel()) <= set(exact.sample(queries, lambda n: np.arange(30)).ravel())
        figures = shallow.measure(queries)
        assert "map" not in figures and (figures["map_at_30"] <= whole["map"] + 1e-9)[:6].all()
        assert np.isnan(figures["residual_map_at_30"]).all()
        assert stored.vectors(np.empty((7, 0), dtype=np.int64)).shape == (7, 0, 16)
        # What the teacher saw in a later round may lie beyond the first results: it comes first all the same, and the
        # residual ranking is as deep as the ranking.
        deep = exact.sample(queries, lambda n: np.arange(20, 60))
        said, scored = np.tile(np.arange(40, 0, -1, dtype=np.float32), (7, 1)), pairs_to_matrix([(q, int(d)) for q, row in enumerate(deep) for d in row], 7, 500)
        written = {}
        cut = shallow.measure(queries, scored, (deep, said), lambda rows, documents, scores: written.update({rows.start: documents}))
        assert np.array_equal(written[0], deep[:, :30])
        residual, place = exact.measure(queries, scored)["residual_map"], np.argsort(-(unit_length(queries.copy()) @ vectors.T), axis=1, kind="stable")
        for q in range(6):
            left = [d for d in place[q] if d not in deep[q]][:30]
            relevant = set(exact.dataset.relevance[[q]].indices) - set(deep[q].tolist())
            hits = np.flatnonzero([d in relevant for d in left])
            expected = np.sum(np.arange(1, len(hits) + 1) / (hits + 1)) / len(relevant) if relevant else np.nan
            assert cut["residual_map_at_30"][q] == pytest.approx(expected, nan_ok=True) and not expected > residual[q] + 1e-9


# --- Runs ---


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory, minilm_cache):
    spec = f"milvus:{tmp_path_factory.mktemp('store') / 'demo.db'}"
    done = run_script(EMBED, "--datasets", "Demo", "--embedding_models", MINILM, "--cache_dir", minilm_cache, "--vector_store", spec)
    assert "338 documents in milvus:" in done.stdout
    assert "Traceback" not in done.stderr
    return spec


def test_a_run_over_a_store_is_an_exact_run_that_is_cut(tmp_path, demo_store, minilm_cache, endpoint):
    shared = ["--dataset", "Demo", "--embedding_model", MINILM, "--cache_dir", minilm_cache, "--output_dir", tmp_path]
    shared += ["--reranker_model", "gold-noisy", "--refinement_method", "centred_ridge", "--prf_weight", "0.2", "--feedback_rounds", "2"]
    run_script(RUN, *shared, "--experiment_name", "exact")
    done = run_script(RUN, *shared, "--experiment_name", "stored", "--vector_store", demo_store, "--search_depth", "338", "--save_tensors")
    assert "map_at_338" in done.stdout and "roc_auc" not in done.stdout
    exact, stored = (json.loads((tmp_path / name / "summary.json").read_text())["means"] for name in ("exact", "stored"))
    for variant in ("embeddings", "reranked", "optimized_embeddings"):
        assert stored[variant]["map_at_338"] == pytest.approx(exact[variant]["map"], abs=1e-4), variant
        assert stored[variant]["residual_map_at_338"] == pytest.approx(exact[variant]["residual_map"], abs=1e-4), variant
    raw = [pq.read_table(tmp_path / name / "embeddings_raw_scores.parquet").to_pandas() for name in ("exact", "stored")]
    for column in ("topic", "document_id", "document", "gold_label"):
        assert raw[0][column].astype(str).tolist() == raw[1][column].astype(str).tolist()
    assert np.allclose(raw[0].score, raw[1].score, atol=1e-5)
    assert np.allclose(raw[0].reranker_score, raw[1].reranker_score, equal_nan=True)
    # As few results as scores, and both from two rankings: nothing is left for pseudo feedback to look at.
    few = ["--search_depth", "20", "--computation_types", "optimized,gated_hyde", "--raw_scores", "scored", "--experiment_name", "few"]
    assert "map_at_20" in run_script(RUN, *shared, *few, "--hyde_model", MODEL, "--vector_store", demo_store, env=endpoint().environment()).stdout
    table = run_script("report.py", tmp_path / "stored", "--metric", "map_at_338", "--out", tmp_path / "report").stdout
    assert f"{stored['optimized_embeddings']['map_at_338']:.4f}" in table


def test_the_documents_need_not_be_here(tmp_path, minilm_cache):
    folder = tmp_path / "demo"  # its vectors are Demo's
    shutil.copytree(ROOT / "data" / "demo", folder)
    spec = f"milvus:{tmp_path / 'a.db'}"
    shared = ["--vector_store", spec, "--cache_dir", minilm_cache]
    run_script(EMBED, "--datasets", folder, "--embedding_models", MINILM, *shared)
    run = [RUN, "--dataset", folder, "--embedding_model", MINILM, *shared, "--optimize_with_gold", "--output_dir", tmp_path / "out"]
    run_script(*run, "--experiment_name", "with")
    (folder / "corpus.jsonl").rename(folder / "elsewhere")
    run_script(*run, "--experiment_name", "without", "--raw_scores_depth", "7")
    results = [(tmp_path / "out" / name / "optimized_embeddings_results.csv").read_text().splitlines() for name in ("with", "without")]
    assert [line.split(",")[:20] for line in results[0]] == [line.split(",")[:20] for line in results[1]]
    raw = pq.read_table(tmp_path / "out" / "without" / "embeddings_raw_scores.parquet").to_pandas()
    assert raw.groupby("topic", observed=True).score.size().tolist() == [20] * 26  # seven, and those the teacher saw

    config = build_config({"dataset": str(folder), "embedding_model": MINILM, "vector_store": spec, "cache_dir": str(minilm_cache)})
    prompts, embedder = read_templates(config.instruction_templates), make_embedder(config, "cpu")
    facts = dataset_facts(str(folder), "data", needs_corpus=False)
    with VectorStore(spec) as store:
        with (folder / "qrels" / "test.tsv").open("a") as file:
            file.write("q1\tnobody\t1\n".replace("q1", load_data(config, prompts, facts, embedder, store)[0].query_ids[0]))
        with pytest.raises(UserError, match=r"qrels/test.tsv:\d+: document 'nobody' is not in the vector store"):
            load_data(config, prompts, facts, embedder, store)
        write_folder_dataset(folder, {"d0": "another"}, {"q0": "corpus"}, [("q0", "d0", 1)])
        with pytest.raises(UserError, match=r"holds demo as it was \(338 documents\) and not as it is now"):
            load_data(config, prompts, dataset_facts(str(folder), "data"), embedder, store)


def test_filling_a_corpus_of_many_stretches_goes_on_and_complains(tmp_path, minilm_cache, demo_store, monkeypatch):
    monkeypatch.setattr("store_filling.corpus_stretches", partial(corpus_stretches, size=100))
    monkeypatch.setattr("vector_store.REQUEST_BYTES", 4 * 384 * 10)
    folder = tmp_path / "demo"
    shutil.copytree(ROOT / "data" / "demo", folder)
    config = build_config({"dataset": str(folder), "embedding_model": MINILM, "cache_dir": str(minilm_cache)})
    embedder, prompts = make_embedder(config, "cpu"), read_templates(config.instruction_templates)
    templates, facts = (templates_for(prompts, MINILM, dataset_facts(str(folder), "data")), dataset_facts(str(folder), "data"))
    with VectorStore(f"milvus:{tmp_path / 'a.db'}") as store:
        corpus, inserted = corpus_to_store(facts, embedder.setup, templates.document, 384), []
        store.prepare(corpus)
        insert = store.insert

        def killed(corpus, first, ids, *others):
            inserted.append((first, len(ids)))
            if first >= 200 and len(inserted) < 4:
                insert(corpus, first, ids[:50], *(own[:50] for own in others[:2]), others[2])
                raise KeyboardInterrupt
            return insert(corpus, first, ids, *others)

        monkeypatch.setattr(store, "insert", killed)
        with pytest.raises(KeyboardInterrupt):
            fill_store(store, config, embedder, prompts)
        assert store.corpora() == [] and store.count(corpus.collection) == 250
        assert fill_store(store, config, embedder, prompts) == store.corpora()[0] == corpus
        assert inserted == [(0, 100), (100, 100), (200, 100), (240, 60), (300, 38)]
        with VectorStore(demo_store) as whole:
            rows = [own.fetch(own.corpora()[0].collection, range(338), ["text"]) for own in (store, whole)]
        assert rows[0] == rows[1]
        assert fill_store(store, config, embedder, prompts) == corpus and len(inserted) == 5
        lines = (folder / "corpus.jsonl").read_text().splitlines()
        for last, message in ((lines[7], "occurs twice"), (json.dumps({"_id": "x" * 70_000, "text": "a"}), "longer than a store takes")):
            (folder / "corpus.jsonl").write_text("\n".join([*lines, last]) + "\n")
            with pytest.raises(UserError, match=message):
                fill_store(store, config, embedder, prompts)


def test_one_query_before_and_after(tmp_path, demo_store, minilm_cache, endpoint):
    service = endpoint()
    command = [SEARCH, "--vector_store", demo_store, "--embedding_model", MINILM, "--reranker_model", MODEL, "--cache_dir", tmp_path]
    command += ["--lr", "1e-3", "--results", "7", "the", "brake slips"]
    found = json.loads(run_script(*command, "--json", env=service.environment()).stdout)
    assert found["query"] == "the brake slips" and found["scored"] == 20 and found["calls"] in (19, 20)
    assert [entry["rank"] for entry in found["before"]] == [entry["rank_before"] for entry in found["before"]] == list(range(1, 8))
    assert all(0 <= entry["teacher_score"] <= 1 for entry in found["before"])
    cosines = [entry["cosine"] for entry in found["after"]]
    assert cosines == sorted(cosines, reverse=True) and len(found["after"]) == 7
    assert [entry["document_id"] for entry in found["after"]] != [entry["document_id"] for entry in found["before"]]
    asked = service.stats()["distinct"]
    shown = run_script(*command, env=service.environment(COLUMNS="120")).stdout
    assert service.stats()["distinct"] == asked  # everything was kept
    assert "20 documents scored, 0 calls" in shown and max(map(len, shown.splitlines())) <= 120
    assert f"{found['after'][0]['teacher_score'] or 0:.2f}" in shown


# --- What is wrong ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vector_store": "chroma:a.db"}, "--vector_store: got 'chroma:a.db', must be milvus:FILE.db or milvus:http://HOST:PORT"),
        ({"vector_store": "milvus:http://root:password@host:19530"}, "(a password goes into MILVUS_TOKEN in the environment)"),
        ({"vector_store": "milvus:http://host:port"}, "must be milvus:FILE.db"),
        ({"vector_store": "milvus:a.txt"}, "--vector_store: got 'milvus:a.txt', must be"),
        ({"vector_store": "milvus:a.db", "search_depth": "10"}, "--search_depth: got 10, must be at least --total_scores, which is 20"),
        ({"search_depth": "20000"}, "--search_depth: got '20000', must be a whole number from 1 to 16384"),
        ({"vector_store": "milvus:nowhere.db"}, "nowhere.db is not there; embed_all_documents.py"),
        ({"vector_store": "milvus:nowhere.db", "dataset": "ArgKP21"}, "ArgKP21 ranks only some documents for each query"),
        ({"vector_store": "milvus:nowhere.db", "reranker_model": "bm25"}, "bm25 reads the whole corpus"),
        ({"raw_scores": "some"}, "--raw_scores: got 'some', must be one of all, scored, none"),
    ],
)
def test_a_mistake_is_told_before_any_work(tmp_path, flags, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"dataset": "Demo", "embedding_model": MINILM, "reranker_model": "gold-noisy", **flags}
    with pytest.raises(UserError) as caught:
        check_run(build_config(given))
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_stores_that_cannot_be_had(tmp_path, demo_store, minilm_cache):
    with VectorStore(demo_store) as store, pytest.raises(UserError, match=r"does not hold Banking77 with m, .*; it holds Demo with"):
        find_corpus(store.spec, store.corpora(), {"model": "m"}, "{text}", "Banking77")
    with pytest.raises(UserError, match=r"milvus:http://127.0.0.1:9 cannot be opened .* is the server there\?"):
        VectorStore("milvus:http://127.0.0.1:9")
    run = [RUN, "--dataset", "Demo", "--embedding_model", MINILM, "--optimize_with_gold", "--cache_dir", minilm_cache, "--output_dir", tmp_path]
    with VectorStore(demo_store):
        status, line = error_of([*run, "--vector_store", demo_store])
    assert status == 2 and line.endswith("is it open in another process, or no store?")
    assert not list(tmp_path.iterdir())
    status, line = error_of([SEARCH, "--vector_store", demo_store, "--embedding_model", MINILM, "--reranker_model", "bm25", "x"])
    assert status == 2 and "bm25 needs a whole dataset" in line
    status, line = error_of([SEARCH, "--embedding_model", MINILM])
    assert (status, line) == (2, "error: --vector_store: must name a store, such as milvus:FILE.db")


def test_without_milvus_asking_for_it_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(UserError, match=r"--vector_store needs Milvus: pip install -r requirements-scale.txt"):
        check_store("milvus:a.db")


def test_without_milvus_and_ray_everything_else_runs(tmp_path, minilm_cache):
    for name in ("pymilvus", "milvus_lite", "ray", "grpc", "faiss"):
        (tmp_path / "path" / name).mkdir(parents=True)
        (tmp_path / "path" / name / "__init__.py").write_text("raise ImportError('not installed')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "path")}
    flags = ["--embedding_models", MINILM, "--cache_dir", minilm_cache, "--output_dir", tmp_path / "out", "--optimize_with_gold"]
    done = run_script("run_experiments.py", "--datasets", "Demo", *flags, env=env)
    assert "completed" in done.stderr
