"""Scoring, drawing and measuring block by block."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import write_folder_dataset

import ranking
from cache_utils import VectorCache, text_keys
from dataset_loaders import load_dataset
from mapped_vectors import MappedVectors, document_vectors, unit_length
from metrics import METRICS
from ranking import ExactCorpus, Measures, sample_documents, sampled_ranks, score_blocks
from raw_scores import RawScoresWriter
from retrieval_dataset import pairs_to_matrix


def random_dataset(folder, n_documents=90, n_queries=11, with_candidates=False, seed=0):
    rng = np.random.default_rng(seed)
    documents = {f"d{i}": f"text {i}" for i in range(n_documents)}
    queries = {f"q{j}": f"query {j}" for j in range(n_queries)}
    qrels = {(f"q{rng.integers(n_queries)}", f"d{rng.integers(n_documents)}") for _ in range(80)}
    candidates = None
    if with_candidates:
        candidates = sorted(qrels | {(f"q{rng.integers(n_queries - 1)}", f"d{rng.integers(n_documents)}") for _ in range(300)})
        candidates = [pair for pair in candidates if pair[0] not in ("q3", "q10")]  # queries without any candidate
    write_folder_dataset(folder, documents, queries, [(*pair, 1) for pair in sorted(qrels)], candidates)
    vectors = [rng.standard_normal((n, 24)).astype(np.float32) for n in (n_queries, n_documents)]
    return load_dataset(str(folder), "unused"), vectors[0], unit_length(vectors[1])


def scored_csr(dataset, sampled):
    pairs = [(int(query), int(sampled[query, k])) for query, k in np.argwhere(sampled >= 0)]
    return pairs_to_matrix(pairs, len(dataset.queries), len(dataset.documents))


def whole_ranking(dataset, queries, documents, path):
    """Samples, metrics and raw scores, as a run makes them."""
    sampled = sample_documents(queries, documents, dataset, lambda n: sampled_ranks(n, 12, 5, 42))
    teacher = np.where(sampled >= 0, sampled * 0.5, np.nan).astype(np.float32)
    measures, n_blocks = Measures(dataset, scored_csr(dataset, sampled)), 0
    with RawScoresWriter(path, dataset) as raw:
        for rows, scores in score_blocks(queries, documents, dataset.repeats):
            measures.add(rows, scores)
            n_blocks += 1
            raw.write(rows, None, scores, sampled[rows], teacher[rows])
    return sampled, measures.result(), n_blocks


@pytest.mark.parametrize("with_candidates", [False, True])
def test_block_by_block_is_as_in_one_piece(tmp_path, monkeypatch, with_candidates):
    dataset, queries, documents = random_dataset(tmp_path / "data", with_candidates=with_candidates)
    sampled, metrics, n_blocks = whole_ranking(dataset, queries, documents, tmp_path / "whole.parquet")
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 3 * len(documents))
    monkeypatch.setattr(ranking, "MOST_BLOCK_SCORES", 0)
    monkeypatch.setattr("raw_scores.ROW_GROUP", 100)
    in_blocks = whole_ranking(dataset, queries, documents, tmp_path / "blocks.parquet")
    assert (n_blocks, in_blocks[2]) == (1, 4)
    assert np.array_equal(in_blocks[0], sampled)
    for name in METRICS:
        assert np.allclose(in_blocks[1][name], metrics[name], equal_nan=True), name
    whole, pieces = (pq.read_table(tmp_path / f"{name}.parquet").to_pandas() for name in ("whole", "blocks"))
    assert pq.ParquetFile(tmp_path / "blocks.parquet").num_row_groups > 1
    for column in ("topic", "document_id", "document", "gold_label"):
        assert whole[column].astype(str).tolist() == pieces[column].astype(str).tolist()
    assert np.allclose(whole.score, pieces.score, atol=1e-6)
    assert np.array_equal(whole.reranker_score, pieces.reranker_score, equal_nan=True)


def test_raw_scores_say_what_was_ranked(tmp_path):
    dataset, queries, documents = random_dataset(tmp_path / "data", with_candidates=True)
    sampled, _, _ = whole_ranking(dataset, queries, documents, tmp_path / "raw.parquet")
    raw = pq.read_table(tmp_path / "raw.parquet").to_pandas()
    assert len(raw) == dataset.candidates.nnz
    for row in raw.itertuples():
        query, document = dataset.topics.index(row.topic), int(row.document_id[1:])
        assert row.document == f"text {document}"
        assert row.gold_label == dataset.relevance[query, document]
        assert row.score == pytest.approx(documents[document] @ queries[query] / np.linalg.norm(queries[query]), abs=1e-5)
        assert (document in sampled[query]) == (row.reranker_score == document * 0.5)


def test_a_query_without_candidates_is_left_out(tmp_path):
    dataset, queries, documents = random_dataset(tmp_path / "data", with_candidates=True)
    sampled, metrics, _ = whole_ranking(dataset, queries, documents, tmp_path / "raw.parquet")
    assert (sampled[3] == -1).all()
    assert np.isnan(metrics["map"][[3, 10]]).all()
    assert np.isfinite(metrics["map"][[0, 1, 2]]).all()


def test_texts_are_stored_once_a_row_group_and_only_where_they_occur(tmp_path, monkeypatch):
    monkeypatch.setattr("raw_scores.ROW_GROUP", 30)
    rng = np.random.default_rng(0)
    documents = {f"d{i}": rng.bytes(1000).hex() for i in range(300)}
    queries = {f"q{j}": f"query {j}" for j in range(30)}
    candidates = [(f"q{j}", f"d{i}") for j in range(30) for i in range(j, j + 3)]
    write_folder_dataset(tmp_path / "data", documents, queries, [("q0", "d0", 1)], candidates)
    dataset = load_dataset(str(tmp_path / "data"), "unused")
    vectors = [rng.standard_normal((n, 8)).astype(np.float32) for n in (30, 300)]
    whole_ranking(dataset, vectors[0], unit_length(vectors[1]), tmp_path / "raw.parquet")
    metadata = pq.ParquetFile(tmp_path / "raw.parquet").metadata
    sizes = [metadata.row_group(i).column(2).total_uncompressed_size for i in range(metadata.num_row_groups)]
    assert len(sizes) <= 3
    assert sum(sizes) < 40 * 2000  # 32 different documents occur, some in two row groups


def test_equal_documents_get_the_very_same_score(tmp_path):
    rng = np.random.default_rng(1)
    documents = {f"d{i}": f"text {i % 500}" for i in range(1003)}
    write_folder_dataset(tmp_path / "data", documents, {"q0": "a", "q1": "b", "q2": "c"}, [("q0", "d3", 1)])
    dataset = load_dataset(str(tmp_path / "data"), "unused")
    different = unit_length(rng.standard_normal((500, 4096)).astype(np.float32))
    vectors = different[np.arange(1003) % 500]
    queries = rng.standard_normal((3, 4096)).astype(np.float32)
    for _, scores in score_blocks(queries, vectors, dataset.repeats):
        assert np.array_equal(scores[:, 500:1000], scores[:, :500])
        assert np.array_equal(scores[:, 1000:], scores[:, :3])


@pytest.mark.parametrize("with_candidates", [False, True])
def test_mapped_vectors_rank_as_those_in_memory(tmp_path, monkeypatch, with_candidates):
    dataset, queries, vectors = random_dataset(tmp_path / "data", with_candidates=with_candidates)
    monkeypatch.setattr(ranking, "MOST_BLOCK_SCORES", 4 * len(vectors))
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 1)
    rng = np.random.default_rng(5)
    lengths = rng.uniform(0.5, 3, (len(vectors), 1)).astype(np.float32)
    lengths[7] = 0  # a text without a direction
    keys = text_keys(dataset.documents, "document")
    cache = VectorCache(tmp_path / "cache", {"model": "m"})
    for part in np.array_split(rng.permutation(len(vectors)), 7):  # shards in any order, with others' vectors among them
        mixed = np.concatenate([keys[part], text_keys([f"other {i}" for i in part[::2]], "document")])
        order = rng.permutation(len(mixed)) if part[0] % 2 else np.arange(len(mixed))
        own = np.concatenate([(vectors * lengths)[part], rng.standard_normal((len(mixed) - len(part), 24)).astype(np.float32)])
        cache.add(mixed[order], own[order])
    in_memory = document_vectors(cache, keys)
    monkeypatch.setattr("mapped_vectors.MOST_IN_MEMORY", 0)
    mapped = document_vectors(cache, keys)
    assert isinstance(in_memory, np.ndarray) and isinstance(mapped, MappedVectors)
    some = rng.integers(0, len(vectors), (3, 4, 2))
    assert np.allclose(mapped[some], in_memory[some], atol=1e-6)
    assert mapped.shape == in_memory.shape == (len(mapped), 24)
    corpora = [ExactCorpus(documents, dataset) for documents in (in_memory, mapped)]
    samples = [corpus.sample(queries, lambda n: sampled_ranks(n, 12, 5, 42)) for corpus in corpora]
    assert np.array_equal(*samples)
    assert np.allclose(*(corpus.spread(20) for corpus in corpora), atol=1e-6)
    whole, pieces = (corpus.measure(queries, scored_csr(dataset, samples[0])) for corpus in corpora)
    for name in METRICS:
        assert np.allclose(whole[name], pieces[name], equal_nan=True), name
    with pytest.raises(KeyError, match="1 of 91 vectors"):
        document_vectors(cache, np.concatenate([keys, text_keys(["nobody"], "document")]))


@pytest.mark.parametrize("with_candidates", [False, True])
def test_raw_scores_may_be_limited(tmp_path, with_candidates):
    dataset, queries, documents = random_dataset(tmp_path / "data", with_candidates=with_candidates)
    corpus = ExactCorpus(documents, dataset)
    sampled = corpus.sample(queries, lambda n: sampled_ranks(n, 12, 5, 42))
    teacher = np.where(sampled >= 0, sampled * 0.5, np.nan).astype(np.float32)
    teacher[:, 3] = np.nan  # shown, and not scored
    tables = {}
    for which, depth in (("all", None), ("all", 8), ("all", 1000), ("scored", None)):
        path = tmp_path / f"{which}{depth}.parquet"
        with RawScoresWriter(path, dataset, which, depth) as raw:
            corpus.measure(queries, keep=lambda rows, found, scores, raw=raw: raw.write(rows, found, scores, sampled[rows], teacher[rows]))
        table = pq.read_table(path).to_pandas()
        tables[which, depth] = table.astype({name: str for name in ("topic", "document_id", "document")})
    whole = tables["all", None]
    assert tables["all", 1000].equals(whole)
    seen = {(dataset.topics[query], dataset.document_ids[document]) for query, row in enumerate(sampled) for document in row if document >= 0}
    is_seen = np.array([pair in seen for pair in zip(whole.topic, whole.document_id, strict=True)])
    assert tables["scored", None].equals(whole[is_seen].reset_index(drop=True))
    first = whole.groupby("topic").score.rank(ascending=False, method="first") <= 8
    assert tables["all", 8].equals(whole[is_seen | first].reset_index(drop=True))


def test_ranks_the_teacher_sees():
    assert sampled_ranks(7, 20, 20, 42).tolist() == list(range(7))
    assert sampled_ranks(100, 5, 5, 42).tolist() == [0, 1, 2, 3, 4]
    drawn = sampled_ranks(100, 10, 4, 42)
    assert drawn[:4].tolist() == [0, 1, 2, 3]
    assert len(set(drawn)) == 10 and drawn[4:].min() >= 4 and drawn.max() < 100
    assert sampled_ranks(100, 10, 4, 42).tolist() == drawn.tolist() != sampled_ranks(100, 10, 4, 43).tolist()
    assert sampled_ranks(100, 3, 0, 1).tolist() != [0, 1, 2]
