"""Ranking metrics: scores and relevance in, arrays of metrics out. Knows nothing else.

All of them follow from the ranks of the relevant documents, so a query's candidates are sorted by value once and never
put in order: the rank of a document is how many score higher, plus how many of the same score come before it.
"""

from __future__ import annotations

import math

import numpy as np

CUTOFFS = (5, 10, 15, 20, 30, 40, 50)
METRICS = (
    "map",
    "roc_auc",
    *(f"{name}_at_{k}" for name in ("precision", "recall", "match") for k in CUTOFFS),
    "ndcg_at_10",
    "mrr",
)


def relevant_ranks(scores: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, float]:
    """Rank the relevant documents of one query.

    Args:
        scores: float [n], higher is better, finite.
        relevant: int [R], positions of the relevant documents.

    Returns:
        int64 [R], their ranks from 0, ascending, ties broken by position; and how many (relevant, other) pairs are in
        the right order, a tie counting half, other relevant documents counting too.
    """
    ascending = np.sort(scores)
    values = scores[relevant]
    below = np.searchsorted(ascending, values, side="left")
    not_above = np.searchsorted(ascending, values, side="right")
    ranks = len(scores) - not_above
    for i in np.flatnonzero(not_above - below > 1):
        ranks[i] += np.count_nonzero(scores[: relevant[i]] == values[i])
    return np.sort(ranks), float((below + not_above).sum()) / 2


def query_metrics(scores: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """All metrics of one query.

    ``map`` is average precision over the whole ranking: the mean, over the relevant documents, of the precision at
    their rank. ``precision_at_k`` divides by k, also where there are fewer than k candidates. ``ndcg_at_10`` has gain
    1 and discount log2(rank + 1) (Järvelin and Kekäläinen 2002). ``roc_auc`` counts ties half.

    Args:
        scores: float [n], the candidates' scores in document order, finite.
        relevant: int [R], positions of the relevant ones among them.

    Returns:
        A value for each name in ``METRICS``; all NaN without relevant documents, ``roc_auc`` NaN without others.
    """
    n_relevant, n_other = len(relevant), len(scores) - len(relevant)
    if n_relevant == 0:
        return dict.fromkeys(METRICS, math.nan)
    ranks, in_order = relevant_ranks(scores, relevant)
    # Among the relevant themselves each pair counts once and each document half with itself: R²/2 in all.
    auc = (in_order - n_relevant**2 / 2) / (n_relevant * n_other) if n_other else math.nan
    found = {k: int(np.searchsorted(ranks, k)) for k in CUTOFFS}
    discounts = 1 / np.log2(np.arange(10) + 2)
    return {
        "map": float(np.mean(np.arange(1, n_relevant + 1) / (ranks + 1))),
        "roc_auc": auc,
        **{f"precision_at_{k}": found[k] / k for k in CUTOFFS},
        **{f"recall_at_{k}": found[k] / n_relevant for k in CUTOFFS},
        **{f"match_at_{k}": float(found[k] > 0) for k in CUTOFFS},
        "ndcg_at_10": float(discounts[ranks[ranks < 10]].sum() / discounts[: min(10, n_relevant)].sum()),
        "mrr": 1 / (int(ranks[0]) + 1),
    }


def mean_metrics(rows: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean of each metric (float [Q]) over the queries that have it; NaN where none has."""
    return {name: mean_known(values) for name, values in rows.items()}


def mean_known(values: np.ndarray) -> float:
    """Mean of the values (float [Q]) that are not NaN; NaN where none is."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan


def top_documents(scores: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The documents at given ranks.

    Args:
        scores: float [n], higher is better, finite.
        ranks: int [K], each from 0 to n - 1.

    Returns:
        int64 [K], positions in ``scores``; ties are broken by position.
    """
    if not len(ranks):
        return np.empty(0, dtype=np.int64)
    depth = int(ranks.max()) + 1
    if depth * 4 > len(scores):
        return np.argsort(-scores, kind="stable")[ranks]
    # Everything that scores at least as well as the depth-th value, in document order: a stable sort of these is
    # the head of the stable sort of all.
    least = np.partition(scores, len(scores) - depth)[len(scores) - depth]
    head = np.flatnonzero(scores >= least)
    return head[np.argsort(-scores[head], kind="stable")][ranks]
