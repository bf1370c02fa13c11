"""Rounds of feedback, their controls, and the teachers that need no model."""

import dataclasses
import json
import math

import numpy as np
import pytest
from conftest import MINILM, ROOT, run_script, write_folder_dataset
from test_ranking import random_dataset

from dataset_loaders import load_dataset
from errors import UserError
from experiment_config import build_config
from feedback import (
    Start,
    ask_teacher,
    choose_start,
    in_turn,
    next_documents,
    ranks_for_teacher,
    refine,
    scored_documents,
    share,
)
from free_rerankers import BM25Reranker, GoldReranker, NoisyGoldReranker
from mapped_vectors import unit_length
from metrics import P_MRR, RESIDUAL_METRICS, query_metrics
from ranking import ExactCorpus, Measures, put_scored_first, sample_documents


def flags(**given):
    return build_config({name: str(value) for name, value in given.items()})


def test_the_studys_figures_are_those_of_runs(tmp_path, minilm_cache, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from method_study import measure

    settings = {"refinement_method": "centred_ridge", "prf_weight": 0.3, "feedback_rounds": 3, "total_scores": 10}
    found = measure("Demo", "unused", str(minilm_cache), settings)["refined"]
    given = {"dataset": "Demo", "embedding_model": MINILM, "reranker_model": "gold-noisy", "cache_dir": minilm_cache}
    given |= {"output_dir": tmp_path, "experiment_name": "run", **settings}
    run_script("embedding_adaptation.py", *(f"--{name}={value}" for name, value in given.items()))
    means = json.loads((tmp_path / "run" / "summary.json").read_text())["means"]
    assert found == {name: pytest.approx(means["optimized_embeddings"][name], abs=1e-9) for name in found}
    assert means["reranked"]["residual_map"] == means["embeddings"]["residual_map"]


# --- Which documents ---


@pytest.mark.parametrize("rounds", range(1, 8))
def test_rounds_share_the_scores(rounds):
    shares = [share(20, rounds, number) for number in range(rounds)]
    assert sum(shares) == 20 and max(shares) - min(shares) <= 1 and shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("with_candidates", [False, True])
@pytest.mark.parametrize(("total", "top", "rounds"), [(12, 12, 4), (13, 5, 3), (200, 200, 7)])
def test_rounds_of_an_unmoved_query_see_its_ranking_and_no_document_twice(tmp_path, with_candidates, total, top, rounds):
    dataset, queries, documents = random_dataset(tmp_path, with_candidates=with_candidates)
    config = flags(total_scores=total, scores_from_top=top, feedback_rounds=rounds)
    starts = {"embeddings": Start.unscored(queries)}
    for number in range(rounds):
        samples = next_documents({"embeddings": queries}, starts, ExactCorpus(documents, dataset), config, number)
        scores = ask_teacher(GoldReranker(), dataset, samples)
        starts["embeddings"] = starts["embeddings"].with_scores(samples["embeddings"], scores["embeddings"])
    whole = sample_documents(queries, documents, dataset, lambda n: np.arange(min(n, total)))
    for row, expected, n in zip(starts["embeddings"].sampled, whole, dataset.candidate_counts(), strict=True):
        seen = row[row >= 0]
        assert len(set(seen.tolist())) == len(seen) == min(n, total)
        if top == total:
            assert seen.tolist() == expected[expected >= 0].tolist()


def test_rounds_draw_other_ranks():
    config = flags(total_scores=20, scores_from_top=0, feedback_rounds=4)
    draws = [set(ranks_for_teacher(config, number, 6000).tolist()) for number in range(4)]
    assert len(set.union(*draws)) == 20


def test_parameters_that_lead_nowhere_are_told(tmp_path):
    dataset, queries, documents = random_dataset(tmp_path)
    sampled = sample_documents(queries, documents, dataset, lambda n: np.arange(6))
    start = Start(queries, sampled, GoldReranker().score(dataset, sampled))
    config = flags(refinement_method="rocchio", prf_weight=0.3)
    config = dataclasses.replace(config, prf_weight=1e39)
    with pytest.raises(UserError, match=r"--rocchio_alpha, --prf_weight: refined queries are not finite numbers"):
        refine(start, ExactCorpus(documents, dataset), config, "cpu", bounded=True, statistics=None, trajectory=False)


def test_scores_that_are_no_shares_are_scaled_for_a_ridge(tmp_path):
    dataset, queries, documents = random_dataset(tmp_path)
    sampled = sample_documents(queries, documents, dataset, lambda n: np.arange(6))
    shares = np.random.default_rng(0).uniform(0, 1, sampled.shape).astype(np.float32)

    def moved(scores, bounded, method="ridge"):
        start = Start(queries, sampled, scores.astype(np.float32))
        settings = {"bounded": bounded, "statistics": None, "trajectory": False}
        return refine(start, ExactCorpus(documents, dataset), flags(refinement_method=method), "cpu", **settings).vectors.numpy()

    logits = 9 * shares - 4
    assert np.array_equal(moved(shares, None), moved(shares, True))
    assert np.array_equal(moved(logits, None), moved(logits, False))
    assert np.allclose(moved(logits, False), moved(shares, False), atol=1e-5)
    assert np.array_equal(moved(logits, None, "adam_kl"), moved(logits, True, "adam_kl"))  # as in the paper


def test_two_samples_in_turn():
    first, second = np.array([[1, 2, 3, 4], [1, 2, 3, -1], [5, -1, -1, -1]]), np.array([[9, 1, 8, 7], [1, 2, 3, -1], [6, 5, -1, -1]])
    assert in_turn(first, second).tolist() == [[1, 9, 2, 3], [1, 2, 3, -1], [5, 6, -1, -1]]


def test_what_starts_share_is_scored_as_by_themselves(tmp_path):
    dataset, queries, documents = random_dataset(tmp_path)
    samples = {
        "embeddings": sample_documents(queries, documents, dataset, lambda n: np.arange(6)),
        "hyde": sample_documents(-queries, documents, dataset, lambda n: np.arange(9)),
    }
    found = ask_teacher(NoisyGoldReranker(0.2, 0.1, 3), dataset, samples)
    for name, sampled in samples.items():
        assert found[name].shape == sampled.shape
        assert np.array_equal(found[name], NoisyGoldReranker(0.2, 0.1, 3).score(dataset, sampled))


# --- Controls ---


def test_reranking_moves_scored_documents_only():
    rng = np.random.default_rng(0)
    scores = rng.uniform(-1, 1, (3, 12)).astype(np.float32)
    before = scores.copy()
    sampled = np.array([[4, 2, 7, -1], [0, 1, 2, 3], [5, 6, -1, -1]])
    said = np.array([[0.2, 0.9, math.nan, math.nan], [0.5, 0.5, 0.5, 0.5], [-3.0, 40.0, math.nan, math.nan]], dtype=np.float32)
    put_scored_first(scores, sampled, said)
    order = np.argsort(-scores, axis=1, kind="stable")
    assert order[0, :2].tolist() == [2, 4]
    assert order[1, :4].tolist() == np.argsort(-before[1, :4], kind="stable").tolist()  # equal: as the cosines say
    assert order[2, :2].tolist() == [6, 5]
    for row, first in enumerate((2, 4, 2)):
        rest = [document for document in np.argsort(-before[row], kind="stable") if document not in order[row, :first]]
        assert order[row, first:].tolist() == rest
    assert scores.max() <= 3 and np.unique(scores[1]).size == 12


@pytest.mark.parametrize("with_candidates", [False, True])
def test_residual_metrics_of_the_control_are_those_of_the_original(tmp_path, with_candidates):
    dataset, queries, documents = random_dataset(tmp_path, with_candidates=with_candidates)
    sampled = sample_documents(queries, documents, dataset, lambda n: np.arange(min(n, 15)))
    start = Start(queries, sampled, NoisyGoldReranker(0.3, 0.2, 0).score(dataset, sampled))
    scored = scored_documents([start], dataset)
    original = ExactCorpus(documents, dataset).measure(queries, scored)
    measures = Measures(dataset, scored)
    block = unit_length(queries.copy()) @ documents.T
    put_scored_first(block, start.sampled, start.teacher_scores)
    measures.add(slice(0, len(queries)), block)
    for name in RESIDUAL_METRICS:
        assert np.array_equal(measures.result()[name], original[name], equal_nan=True)
    assert not np.array_equal(measures.result()["map"], original["map"], equal_nan=True)
    assert np.isnan(ExactCorpus(documents, dataset).measure(queries)["residual_map"]).all()  # without a teacher


def test_documents_without_a_score_are_not_taken_out(tmp_path):
    dataset, queries, _ = random_dataset(tmp_path)
    start = Start(queries, np.tile([3, 4, -1], (11, 1)), np.tile(np.float32([0.5, math.nan, math.nan]), (11, 1)))
    other = Start(queries, np.tile([4, 3], (11, 1)), np.tile(np.float32([math.nan, 0.1]), (11, 1)))
    assert scored_documents([start, other], dataset).toarray().sum(axis=0).nonzero()[0].tolist() == [3]
    assert scored_documents([], dataset) is None
    assert scored_documents([Start.unscored(queries)], dataset) is None


def test_p_mrr_of_pairs_of_queries(tmp_path):
    documents = {f"d{i}": f"text {i}" for i in range(6)}
    queries = {"7-og": "a", "7-changed": "b", "alone-og": "c", "8-changed": "d", "8-og": "e"}
    qrels = [("7-og", "d0", 1), ("7-og", "d1", 1), ("7-changed", "d1", 1), ("8-og", "d2", 1), ("8-changed", "d2", 1)]
    judged = [(q, f"d{i}") for q in queries for i in range(6)]
    for candidates in (None, judged):
        folder = write_folder_dataset(tmp_path / str(candidates is None), documents, queries, qrels, candidates)
        dataset = load_dataset(str(folder), "unused")
        assert [[dataset.query_ids[q] for q in pair] for pair in dataset.query_pairs] == [["7-og", "7-changed"], ["8-og", "8-changed"]]
        scores = np.tile(np.float32([6, 5, 4, 3, 2, 1]), (5, 1))
        scores[1] = [3.5, 6, 5, 4, 2, 1]  # d0 falls from rank 1 to 4
        measures = Measures(dataset)
        measures.add(slice(0, 5), scores)
        found = measures.result()[P_MRR]
        assert found[dataset.query_ids.index("7-changed")] == pytest.approx(1 - 1 / 4)
        assert np.isnan(found).sum() == 4  # nothing changed in pair 8


def test_a_dataset_without_pairs_has_no_p_mrr(tmp_path):
    dataset, queries, documents = random_dataset(tmp_path)
    assert P_MRR not in ExactCorpus(documents, dataset).measure(queries)


# --- Where a gated query starts ---


def test_a_gated_query_starts_from_what_goes_along_with_the_teacher():
    rng = np.random.default_rng(1)
    documents = unit_length(rng.standard_normal((40, 16)).astype(np.float32))
    original, hyde = (rng.standard_normal((4, 16)).astype(np.float32) for _ in range(2))
    sampled = np.tile(np.arange(20), (4, 1))
    said = np.empty((4, 20), dtype=np.float32)
    said[0] = documents[:20] @ hyde[0]  # agrees with HyDE
    said[1] = 3 * (documents[:20] @ original[1]) - 7  # agrees with the original, in another unit
    said[2] = 0.5  # says nothing
    said[3] = math.nan
    said[3, 4] = 1.0
    said[0, 5:9] = math.nan
    assert choose_start(original, hyde, ExactCorpus(documents, None), sampled, said).tolist() == [True, False, False, False]
    assert not choose_start(original, original, ExactCorpus(documents, None), sampled, said).any()


# --- Teachers ---


def test_the_noisy_teacher_is_wrong_as_often_as_it_is_told(tmp_path):
    dataset, _queries, _documents = random_dataset(tmp_path, n_documents=400, n_queries=40)
    sampled = np.tile(np.arange(400), (40, 1))
    truth = GoldReranker().score(dataset, sampled)
    exact = NoisyGoldReranker(0.0, 0.0, 1).score(dataset, sampled)
    assert np.allclose(exact, np.where(truth == 1, 0.9, 0.1))
    assert np.allclose(NoisyGoldReranker(1.0, 0.0, 1).score(dataset, sampled), np.where(truth == 1, 0.1, 0.9))
    flipped = NoisyGoldReranker(0.1, 0.0, 1).score(dataset, sampled) != exact
    assert 0.09 < flipped.mean() < 0.11  # 16,000 pairs: four standard deviations are 0.0095
    noise = NoisyGoldReranker(0.0, 0.08, 1).score(dataset, sampled) - exact
    assert 0.078 < noise.std() < 0.082 and abs(noise.mean()) < 0.003


def test_the_noisy_teacher_says_the_same_of_a_pair_wherever_it_stands(tmp_path):
    dataset, _queries, _documents = random_dataset(tmp_path)
    rng = np.random.default_rng(0)
    sampled = np.array([rng.permutation(90)[:30] for _ in range(11)])
    sampled[3, 20:] = -1
    teacher = NoisyGoldReranker(0.3, 0.1, 7)
    together = teacher.score(dataset, sampled)
    assert np.isnan(together[3, 20:]).all() and np.isfinite(together[4]).all()
    assert np.array_equal(np.hstack([teacher.score(dataset, sampled[:, :7]), teacher.score(dataset, sampled[:, 7:])]), together, equal_nan=True)
    assert np.array_equal(teacher.score(dataset, sampled[:, ::-1]), together[:, ::-1], equal_nan=True)
    assert np.array_equal(teacher.score(dataset, np.stack([sampled, sampled]))[1], together, equal_nan=True)
    assert not np.array_equal(NoisyGoldReranker(0.3, 0.1, 8).score(dataset, sampled), together, equal_nan=True)


def plain_bm25(query, documents, k1=1.5, b=0.75):
    """Lucene's variant (Robertson and Zaragoza 2009, less the factor k1 + 1), over words that are given apart."""
    average = np.mean([len(own) for own in documents])
    scores = np.zeros(len(documents))
    for word in query:
        n = sum(word in own for own in documents)
        idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
        for i, own in enumerate(documents):
            f = own.count(word)
            scores[i] += idf * f / (f + k1 * (1 - b + b * len(own) / average))
    return scores


def test_bm25_is_its_formula_with_statistics_over_the_whole_corpus(tmp_path):
    rng = np.random.default_rng(2)
    words = ["lake", "brake", "hotel", "rain", "key", "lock", "child", "bicycle"]
    texts = [[words[i] for i in rng.integers(0, 7, rng.integers(1, 12))] for _ in range(30)]
    asked = [["lake", "hotel"], ["rain", "rain", "key"], ["bicycle"], ["zebra"]]
    queries = {f"q{i}": " ".join(own) + (" of the" if i else "") for i, own in enumerate(asked)}
    folder = write_folder_dataset(tmp_path, {f"d{i}": " ".join(own) for i, own in enumerate(texts)}, queries | {"q4": "of the"}, [("q0", "d1", 1)])
    dataset = load_dataset(str(folder), "unused")
    sampled = np.array([rng.permutation(30)[:9] for _ in range(5)])
    sampled[1, 6:] = -1
    found = BM25Reranker().score(dataset, sampled)
    for query, own in enumerate(asked):
        expected = plain_bm25(own, texts)
        for column, document in enumerate(sampled[query]):
            assert (math.isnan(found[query, column]) if document < 0 else found[query, column] == pytest.approx(expected[document], abs=1e-5))
    assert not found[4].any()  # nothing but stop words


def test_bm25_of_a_corpus_without_words(tmp_path):
    folder = write_folder_dataset(tmp_path, {"a": "of", "b": "…"}, {"q": "lake"}, [("q", "a", 1)])
    found = BM25Reranker().score(load_dataset(str(folder), "unused"), np.array([[1, 0]]))
    assert found.tolist() == [[0.0, 0.0]]


def test_metrics_of_scored_documents_are_those_of_the_candidates(tmp_path):
    dataset, queries, documents = random_dataset(tmp_path, with_candidates=True)
    sampled = sample_documents(queries, documents, dataset, lambda n: np.arange(min(n, 4)))
    scored = scored_documents([Start(queries, sampled, np.where(sampled >= 0, 1.0, np.nan))], dataset)
    found = ExactCorpus(documents, dataset).measure(queries, scored)
    query = 0
    candidates = dataset.candidates.indices[: dataset.candidates.indptr[1]]
    own = unit_length(queries.copy())[query] @ documents[candidates].T
    relevant = np.flatnonzero(np.isin(candidates, dataset.relevance.indices[: dataset.relevance.indptr[1]]))
    places = np.flatnonzero(np.isin(candidates, sampled[query]))
    assert found["residual_map"][query] == pytest.approx(query_metrics(own, relevant, places)["residual_map"], nan_ok=True)
