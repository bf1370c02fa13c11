"""How sure a difference between two rankings' figures is. Arrays in, arrays out; knows no run, no metric and no file.

Columns are treated together: one matrix of random signs, or of how often a resample holds each query, is multiplied
with all of them. The seed is fixed, so that the same figures give the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

SEED = 0
CONFIDENCE = 0.95
BOOTSTRAP_RESAMPLES = 10_000
LEAST_RESAMPLES, MOST_RESAMPLES = 9_999, 199_999  # of the randomisation test; 1 + R is round
RESAMPLES_A_TEST = 50  # how much finer than Holm's smallest threshold a p-value should be
MOST_DRAWS = 1 << 28  # resamples × queries: with very many queries fewer resamples do
CHUNK_CELLS = 1 << 22  # resamples × queries, or × columns, held at once: 32 MiB
CHUNK_COLUMNS = 256
MOST_EXACT = 14  # differences whose 2^14 patterns of signs are all gone through


def resamples_for(tests: int, alpha: float = 0.05) -> int:
    """How many resamples ``tests`` p-values need, so that Holm's correction can find the smallest significant.

    A p-value is at least ``1 / (1 + resamples)``, and Holm compares the smallest with ``alpha / tests``. There is a
    bound, so that with ``alpha × 200,000`` tests or more none can be significant.
    """
    wanted = int(np.ceil(RESAMPLES_A_TEST * tests / alpha)) - 1
    return min(max(wanted, LEAST_RESAMPLES), MOST_RESAMPLES)


def randomisation_test(differences: np.ndarray, resamples: int = LEAST_RESAMPLES) -> np.ndarray:
    """Two-sided p of the paired randomisation test: how often random signs alone give as large a mean difference.

    Under the null hypothesis either system could have had either figure of a query, so each difference's sign is a
    coin toss (Fisher 1935; for retrieval: Smucker, Allan and Carterette 2007). All sign patterns of the differences
    that are not 0 are gone through where they are few; else ``p = (1 + as large) / (1 + resamples)``, which is never 0.

    Args:
        differences: float64 [n, C], a row a query, a column a comparison; NaN where a comparison lacks the query.
        resamples: how many patterns to draw, at most.

    Returns:
        float64 [C], NaN for fewer than two queries.
    """
    n, n_columns = differences.shape
    p = np.full(n_columns, np.nan)
    tested = (~np.isnan(differences)).sum(axis=0) >= 2
    resamples = _affordable(resamples, n)
    differences = np.nan_to_num(differences)  # whatever the sign of a zero, it changes no sum
    not_zero = (differences != 0).sum(axis=0)
    exact = tested & (not_zero <= min(MOST_EXACT, np.log2(resamples + 1)))
    for column in np.flatnonzero(exact):
        own = differences[differences[:, column] != 0, column][:, None]
        p[column] = _as_large(own, _all_signs(len(own)))[0] / 2 ** len(own)
    drawn = np.flatnonzero(tested & ~exact)
    if len(drawn):
        p[drawn] = (1 + _as_large(differences[:, drawn], _random_signs(n, resamples))) / (1 + resamples)
    return p


def _as_large(differences: np.ndarray, patterns: Iterable[np.ndarray]) -> np.ndarray:
    """How many patterns of signs give as large a sum as there is, whichever its sign; int64 [C]."""
    n_columns = differences.shape[1]
    observed = np.abs(differences.sum(axis=0))
    observed -= 1e-10 * np.abs(differences).sum(axis=0)  # equal sums may differ in last bits
    as_large = np.zeros(n_columns, dtype=np.int64)
    for signs in patterns:
        for columns in _pieces(n_columns):
            as_large[columns] += (np.abs(signs @ differences[:, columns]) >= observed[columns]).sum(axis=0)
    return as_large


def _affordable(resamples: int, n: int) -> int:
    """How many resamples there are of n queries, so that many queries take no longer than few."""
    return min(resamples, max(999, MOST_DRAWS // max(n, 1)))


def _all_signs(n: int) -> Iterator[np.ndarray]:
    """All 2^n patterns of signs, float64 [some, n] at a time."""
    first = 0
    for size in _chunks(n, 2**n):
        yield 1.0 - 2.0 * ((np.arange(first, first + size)[:, None] >> np.arange(n)) & 1)
        first += size


def _random_signs(n: int, resamples: int) -> Iterator[np.ndarray]:
    """Random patterns of signs, float64 [some, n] at a time."""
    random = np.random.default_rng(SEED)
    for size in _chunks(n, resamples):
        yield np.where(random.random((size, n), dtype=np.float32) < 0.5, -1.0, 1.0)


def bootstrap_interval(values: np.ndarray, resamples: int = BOOTSTRAP_RESAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the mean over queries (Efron and Tibshirani 1993, chapter 13), 95 %.

    For paired differences the queries are resampled in pairs, since a row is a query.

    Args:
        values: float64 [n, C], a row a query; NaN where a column lacks the query: its mean is then over those that it
            has, of the ones drawn.
        resamples: how many sets of n queries to draw, with replacement, at most.

    Returns:
        lower and upper ends, float64 [C] each; NaN for fewer than two queries.
    """
    n, n_columns = values.shape
    low, high = np.full(n_columns, np.nan), np.full(n_columns, np.nan)
    there = ~np.isnan(values)
    tail = 100 * (1 - CONFIDENCE) / 2
    for columns in _pieces(n_columns) if n >= 2 else ():
        own, has = np.nan_to_num(values[:, columns]), there[:, columns].astype(np.float64)
        whole = bool(has.all())
        means = np.empty((_affordable(resamples, n), own.shape[1]))
        first = 0
        for counts in _random_counts(n, len(means)):
            rows = slice(first, first + len(counts))
            with np.errstate(invalid="ignore"):  # a resample may miss all queries that a column has
                means[rows] = (counts @ own) / (n if whole else counts @ has)
            first = rows.stop
        enough = has.sum(axis=0) >= 2
        means[:, ~enough] = 0
        ends = (np.percentile if whole else np.nanpercentile)(means, [tail, 100 - tail], axis=0)
        low[columns], high[columns] = np.where(enough, ends, np.nan)
    return low, high


def _random_counts(n: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each of n queries is drawn in n draws with replacement, float64 [some, n] at a time."""
    random = np.random.default_rng(SEED)
    for size in _chunks(n, resamples):
        drawn = random.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _chunks(n: int, resamples: int) -> Iterator[int]:
    """Sizes of pieces of the resamples that fit into memory."""
    size = max(1, CHUNK_CELLS // max(n, CHUNK_COLUMNS))
    for first in range(0, resamples, size):
        yield min(size, resamples - first)


def _pieces(n_columns: int) -> Iterator[slice]:
    for first in range(0, n_columns, CHUNK_COLUMNS):
        yield slice(first, min(first + CHUNK_COLUMNS, n_columns))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction for testing several hypotheses (Holm 1979).

    The i-th smallest of m p-values is multiplied by ``m − i + 1``; none may be below a smaller one's, nor above 1.
    Comparing the result with alpha keeps the chance of a single false discovery in the whole table at alpha.

    Args:
        p_values: float64 [m]; NaN for hypotheses that were not tested, which do not count.

    Returns:
        float64 [m], adjusted, NaN where they were NaN.
    """
    adjusted = np.full(len(p_values), np.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * p_values[order]))
    return adjusted


def borda_points(means: np.ndarray) -> np.ndarray:
    """Borda count: how many other systems a system beats on a dataset, a tie counting half, summed over datasets.

    Args:
        means: float64 [datasets, systems], higher is better, finite.

    Returns:
        float64 [systems], from 0 to ``datasets × (systems − 1)``.
    """
    points = np.zeros(means.shape[1])
    for row in means:
        _, place, equal = np.unique(row, return_inverse=True, return_counts=True)
        points += (np.cumsum(equal) - equal + (equal - 1) / 2)[place]
    return points
