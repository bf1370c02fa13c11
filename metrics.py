"""Ranking metrics: scores and relevance in, arrays of metrics out. Knows nothing else.

The residual metrics leave out the documents that a teacher has scored: they show what refinement taught about documents
nobody scored, which putting the scored ones in order cannot do.

All of them follow from the ranks of the relevant documents, so a query's candidates are never put in order: of those
that score at least as well as the last relevant one the values are sorted, and the rank of a document is how many score
higher, plus how many of the same score come before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CUTOFFS = (5, 10, 15, 20, 30, 40, 50)
METRICS = (
    "map",
    "roc_auc",
    *(f"{name}_at_{k}" for name in ("precision", "recall", "match") for k in CUTOFFS),
    "ndcg_at_10",
    "mrr",
    "residual_map",
    "residual_recall_at_50",
)
RESIDUAL_METRICS = METRICS[-2:]
P_MRR = "p_mrr"  # where a dataset has pairs of queries


def ranks_of(scores: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank some documents of one query among all.

    Args:
        scores: float [n], higher is better, finite.
        positions: int [R], which documents.

    Returns:
        int64 [R], their ranks from 0, ties broken by position; and float64 [R], how many documents each is better than,
        a tie counting half, with itself too.
    """
    values = scores[positions]
    # What scores less than all of them need not be in order.
    head = np.sort(scores[scores >= values.min()]) if len(values) else scores[:0]
    less = len(scores) - len(head)
    below = less + np.searchsorted(head, values, side="left")
    not_above = less + np.searchsorted(head, values, side="right")
    ranks = len(scores) - not_above
    for i in np.flatnonzero(not_above - below > 1):
        ranks[i] += np.count_nonzero(scores[: positions[i]] == values[i])
    return ranks, (below + not_above) / 2


def average_precision(ranks: np.ndarray, n_relevant: int | None = None) -> float:
    """Mean, over the relevant documents, of the precision at their rank; ``ranks`` int [R], from 0, ascending.

    Where a ranking is cut, ``n_relevant`` is how many relevant documents there are, and those not found count 0.
    """
    precisions = np.arange(1, len(ranks) + 1) / (ranks + 1)
    return float(precisions.sum() / (len(ranks) if n_relevant is None else n_relevant))


def query_metrics(scores: np.ndarray, relevant: np.ndarray, scored: np.ndarray | None = None) -> dict[str, float]:
    """All metrics of one query.

    ``map`` is average precision over the whole ranking: the mean, over the relevant documents, of the precision at
    their rank. ``precision_at_k`` divides by k, also where there are fewer than k candidates. ``ndcg_at_10`` has gain
    1 and discount log2(rank + 1) (Järvelin and Kekäläinen 2002). ``roc_auc`` counts ties half. ``residual_map`` and
    ``residual_recall_at_50`` are those of the ranking without the documents in ``scored``.

    Args:
        scores: float [n], the candidates' scores in document order, finite.
        relevant: int [R], positions of the relevant ones among them.
        scored: int [K], positions of those that a teacher has scored; None where there is no teacher.

    Returns:
        A value for each name in ``METRICS``; all NaN without relevant documents, ``roc_auc`` NaN without others, the
        residual metrics NaN without a teacher, and where no relevant document is left.
    """
    n_relevant, n_other = len(relevant), len(scores) - len(relevant)
    if n_relevant == 0:
        return dict.fromkeys(METRICS, math.nan)
    scored_too = relevant if scored is None else np.concatenate([relevant, scored])
    all_ranks, better_than = ranks_of(scores, scored_too)
    ranks = np.sort(all_ranks[:n_relevant])
    # Among the relevant themselves each pair counts once and each document half with itself: R²/2 in all.
    in_order = float(better_than[:n_relevant].sum())
    auc = (in_order - n_relevant**2 / 2) / (n_relevant * n_other) if n_other else math.nan
    left = np.empty(0) if scored is None else residual_ranks(ranks, np.sort(all_ranks[n_relevant:]))
    return {
        "map": average_precision(ranks),
        "roc_auc": auc,
        **_at_cutoffs(ranks, n_relevant, CUTOFFS),
        "ndcg_at_10": ndcg(ranks, n_relevant, 10),
        "mrr": 1 / (int(ranks[0]) + 1),
        "residual_map": average_precision(left) if len(left) else math.nan,
        "residual_recall_at_50": float(np.mean(left < 50)) if len(left) else math.nan,
    }


def _at_cutoffs(ranks: np.ndarray, n_relevant: int, cutoffs: Sequence[int]) -> dict[str, float]:
    """Precision, recall and match at each cutoff, from the ranks (from 0, ascending) of relevant documents."""
    found = {k: int(np.searchsorted(ranks, k)) for k in cutoffs}
    return {
        **{f"precision_at_{k}": found[k] / k for k in cutoffs},
        **{f"recall_at_{k}": found[k] / n_relevant for k in cutoffs},
        **{f"match_at_{k}": float(found[k] > 0) for k in cutoffs},
    }


def ndcg(ranks: np.ndarray, n_relevant: int, k: int) -> float:
    """nDCG of the first ``k`` with gain 1 and discount log2(rank + 1); ``ranks`` int [R], from 0, of relevant ones."""
    discounts = 1 / np.log2(np.arange(k) + 2)
    return float(discounts[ranks[ranks < k]].sum() / discounts[: min(k, n_relevant)].sum())


def cut_metric_names(depth: int) -> tuple[str, ...]:
    """The metrics of a ranking that is cut at ``depth``, each named after what it looks at."""
    cutoffs = [k for k in CUTOFFS if k < depth]
    return (
        f"map_at_{depth}",
        *(f"{name}_at_{k}" for name in ("precision", "recall", "match") for k in (*cutoffs, depth)),
        *(f"ndcg_at_{k}" for k in sorted({min(10, depth), depth})),
        f"mrr_at_{depth}",
        f"residual_map_at_{depth}",
        f"residual_recall_at_{depth}",
    )


def cut_metrics(
    ranks: np.ndarray, n_relevant: int, depth: int, residual: np.ndarray | None = None, n_left: int = 0
) -> dict[str, float]:
    """All metrics of one query whose ranking is cut: what lies deeper counts as not found.

    ``map_at_d`` is the sum of the precisions at the relevant documents found, over the number of all relevant ones, so
    never above ``map``. The residual metrics are those of the ranking without scored documents, cut at the same depth.

    Args:
        ranks: int [F], of the relevant documents among the results, from 0, ascending.
        n_relevant: how many there are in the corpus.
        depth: results a query.
        residual: int [G], ranks of relevant documents, ascending, in the ranking without those that a teacher has
            scored; None where there is no teacher.
        n_left: how many relevant documents no teacher has scored.

    Returns:
        A value for each of :func:`cut_metric_names`; NaN as in :func:`query_metrics`.
    """
    names = cut_metric_names(depth)
    if n_relevant == 0:
        return dict.fromkeys(names, math.nan)
    found = {
        f"map_at_{depth}": average_precision(ranks, n_relevant),
        **_at_cutoffs(ranks, n_relevant, (*(k for k in CUTOFFS if k < depth), depth)),
        **{f"ndcg_at_{k}": ndcg(ranks, n_relevant, k) for k in (min(10, depth), depth)},
        f"mrr_at_{depth}": 1 / (int(ranks[0]) + 1) if len(ranks) else 0.0,
    }
    known = residual is not None and n_left > 0
    found[f"residual_map_at_{depth}"] = average_precision(residual, n_left) if known else math.nan
    found[f"residual_recall_at_{depth}"] = len(residual) / n_left if known else math.nan
    return {name: found[name] for name in names}


def residual_ranks(ranks: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """The ranks that documents have when others are taken out.

    Args:
        ranks: int [R], from 0, ascending.
        scored: int [K], the ranks that are taken out, ascending; some may be among ``ranks``.

    Returns:
        int64 [at most R], ascending.
    """
    left = ranks[~np.isin(ranks, scored)]
    return left - np.searchsorted(scored, left)


def p_mrr(original: np.ndarray, changed: np.ndarray) -> float:
    """How well a ranking follows a change of the instruction: p-MRR of FollowIR (Weller et al., arXiv 2403.15246).

    For a document that the changed instruction makes irrelevant, with ranks ``o`` and ``c`` from 1: ``c/o − 1`` where
    the document came nearer to the top (``o > c``), else ``1 − o/c``; the mean over such documents. From −1 (each came
    to the top) over 0 (nothing moved) to 1 (each went to the bottom).

    Args:
        original: int [R], the documents' ranks from 0 for the query with the original instruction.
        changed: int [R], the same documents' for the changed one.
    """
    o, c = original + 1.0, changed + 1.0
    return float(np.mean(np.where(o > c, c / o - 1, 1 - o / c)))


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
