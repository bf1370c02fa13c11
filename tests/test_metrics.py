"""Metrics against ir_measures and scikit-learn, with and without ties."""

import math

import ir_measures
import numpy as np
import pytest
from ir_measures import AP, RR, P, R, Success, nDCG
from sklearn.metrics import roc_auc_score

from metrics import (
    CUTOFFS,
    METRICS,
    RESIDUAL_METRICS,
    cut_metric_names,
    cut_metrics,
    mean_metrics,
    p_mrr,
    query_metrics,
    top_documents,
)

MEASURES = {
    "map": AP,
    "mrr": RR,
    "ndcg_at_10": nDCG @ 10,
    **{f"precision_at_{k}": P @ k for k in CUTOFFS},
    **{f"recall_at_{k}": R @ k for k in CUTOFFS},
    **{f"match_at_{k}": Success @ k for k in CUTOFFS},
}


def by_ir_measures(scores, relevant):
    """Ties are broken by document order: ir_measures gets the stable ranking as distinct scores."""
    order = np.argsort(-scores, kind="stable")
    run = {"q": {f"d{document:06d}": float(len(scores) - rank) for rank, document in enumerate(order)}}
    qrels = {"q": {f"d{document:06d}": 1 for document in relevant}}
    found = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
    return {name: found[measure] for name, measure in MEASURES.items()}


@pytest.mark.parametrize("n", [2, 7, 12, 60, 500])
@pytest.mark.parametrize("distinct", [1, 3, 25, None])
@pytest.mark.parametrize("seed", range(3))
def test_agree_with_ir_measures_and_scikit_learn(n, distinct, seed):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal(n).astype(np.float32)
    if distinct:
        scores = rng.choice(rng.standard_normal(distinct), n).astype(np.float32)
    relevant = np.sort(rng.choice(n, rng.integers(1, n), replace=False))
    found = query_metrics(scores, relevant)
    for name, expected in by_ir_measures(scores, relevant).items():
        assert found[name] == pytest.approx(expected, abs=1e-9), name
    labels = np.isin(np.arange(n), relevant)
    assert found["roc_auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert list(found) == list(METRICS)


@pytest.mark.parametrize("depth", [1, 7, 20, 50, 200])
@pytest.mark.parametrize("seed", range(3))
def test_a_cut_ranking_agrees_with_ir_measures(depth, seed):
    rng = np.random.default_rng(seed)
    order, relevant = rng.permutation(200), rng.choice(200, 30, replace=False)
    ranks = np.flatnonzero(np.isin(order[:depth], relevant))
    found = cut_metrics(ranks, len(relevant), depth)
    run = {"q": {f"d{document}": float(-rank) for rank, document in enumerate(order[:depth])}}
    qrels = {"q": {f"d{document}": 1 for document in relevant}}
    expected = {f"map_at_{depth}": AP @ depth, f"ndcg_at_{depth}": nDCG @ depth, f"mrr_at_{depth}": RR @ depth}
    cutoffs = [k for k in CUTOFFS if k < depth] + [depth]
    expected |= {f"{name}_at_{k}": measure @ k for name, measure in (("precision", P), ("recall", R), ("match", Success)) for k in cutoffs}
    figures = ir_measures.calc_aggregate(list(expected.values()), qrels, run)
    for name, measure in expected.items():
        assert found[name] == pytest.approx(figures[measure], abs=1e-9), name
    assert list(found) == list(cut_metric_names(depth))
    assert all(math.isnan(value) for value in cut_metrics(ranks[:0], 0, depth).values())


def test_residual_metrics_of_a_cut_ranking():
    # relevant: ranks 0, 3 and 5, and two that were not found; ranks 0 and 1 are scored, and one of those not found
    found = cut_metrics(np.array([0, 3, 5]), 5, 10, np.array([1, 3]), n_left=3)
    assert found["residual_map_at_10"] == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert found["residual_recall_at_10"] == pytest.approx(2 / 3)
    assert math.isnan(cut_metrics(np.array([0]), 1, 10, np.array([], dtype=int), n_left=0)["residual_map_at_10"])


def test_without_relevant_documents_there_is_no_metric_and_no_part_in_the_mean():
    empty = query_metrics(np.array([0.3, 0.1], dtype=np.float32), np.array([], dtype=int))
    assert all(math.isnan(value) for value in empty.values())
    assert mean_metrics({"map": np.array([0.5, math.nan, 1.0])}) == {"map": 0.75}
    assert math.isnan(mean_metrics({"map": np.array([math.nan])})["map"])


def test_without_irrelevant_documents_only_the_auc_is_undefined():
    found = query_metrics(np.array([0.3, 0.1], dtype=np.float32), np.array([0, 1]))
    assert math.isnan(found.pop("roc_auc"))
    assert found["map"] == 1.0
    assert found["precision_at_5"] == pytest.approx(2 / 5)


@pytest.mark.parametrize("n", [1, 5, 300])
@pytest.mark.parametrize("distinct", [1, 4, None])
def test_top_documents_are_the_head_of_a_stable_sort(n, distinct):
    rng = np.random.default_rng(n)
    scores = rng.standard_normal(n).astype(np.float32)
    if distinct:
        scores = rng.choice(rng.standard_normal(distinct), n).astype(np.float32)
    whole = np.argsort(-scores, kind="stable")
    for ranks in (np.arange(min(n, 20)), rng.permutation(n), np.array([], dtype=int)):
        assert np.array_equal(top_documents(scores, ranks), whole[ranks])


@pytest.mark.parametrize("distinct", [1, 5, None])
@pytest.mark.parametrize("seed", range(6))
def test_residual_metrics_are_those_of_the_ranking_without_the_scored_documents(distinct, seed):
    rng = np.random.default_rng(seed)
    n = 150
    scores = rng.standard_normal(n).astype(np.float32)
    if distinct:
        scores = rng.choice(rng.standard_normal(distinct), n).astype(np.float32)
    relevant = np.sort(rng.choice(n, 40, replace=False))
    scored = np.sort(rng.choice(n, 20, replace=False))
    found = query_metrics(scores, relevant, scored)
    left = np.setdiff1d(np.arange(n), scored)
    rest = query_metrics(scores[left], np.flatnonzero(np.isin(left, relevant)))
    assert found["residual_map"] == pytest.approx(rest["map"], abs=1e-12)
    assert found["residual_recall_at_50"] == pytest.approx(rest["recall_at_50"], abs=1e-12)
    assert {m: found[m] for m in METRICS[:-2]} == {m: query_metrics(scores, relevant)[m] for m in METRICS[:-2]}


def test_residual_metrics_need_a_teacher_and_something_left_to_find():
    scores, relevant = np.array([0.3, 0.1, 0.2], dtype=np.float32), np.array([0, 2])
    for scored in (None, np.array([0, 2]), np.array([0, 1, 2])):
        assert all(math.isnan(query_metrics(scores, relevant, scored)[name]) for name in RESIDUAL_METRICS)
    nothing_scored = query_metrics(scores, relevant, np.array([], dtype=int))
    assert nothing_scored["residual_map"] == nothing_scored["map"]


@pytest.mark.parametrize(
    ("original", "changed", "expected"),
    [
        # As published: MRR_og / MRR_new - 1 where the rank got better (R_og > R_new), else 1 - MRR_new / MRR_og.
        (1, 1, 0.0),
        (1, 2, 1 - (1 / 2) / (1 / 1)),
        (1, 100, 1 - (1 / 100) / (1 / 1)),
        (10, 1, (1 / 10) / (1 / 1) - 1),
        (4, 5, 1 - (1 / 5) / (1 / 4)),
        (5, 4, (1 / 5) / (1 / 4) - 1),
    ],
)
def test_p_mrr_is_as_published(original, changed, expected):
    assert p_mrr(np.array([original - 1]), np.array([changed - 1])) == pytest.approx(expected, abs=1e-12)


def test_p_mrr_is_a_mean_over_documents():
    assert p_mrr(np.array([0, 9, 4]), np.array([1, 0, 4])) == pytest.approx((0.5 - 0.9 + 0) / 3)
