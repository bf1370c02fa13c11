"""The statistics of the report, against scipy and against their own laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from significance import (
    LEAST_RESAMPLES,
    MOST_RESAMPLES,
    bootstrap_interval,
    borda_points,
    holm,
    randomisation_test,
    resamples_for,
)


def differences(n, columns=3, seed=0):
    random = np.random.default_rng(seed)
    return np.round(random.normal(0.04, 0.1, (n, columns)), 6)


def mean_of(x, axis):
    return x.mean(axis=axis)


@pytest.mark.parametrize("n", [2, 5, 10, 13])
def test_the_exact_paired_test_is_scipys(n):
    values = differences(n)
    expected = stats.permutation_test((values,), mean_of, permutation_type="samples", n_resamples=np.inf).pvalue
    np.testing.assert_allclose(randomisation_test(values), expected, rtol=0, atol=1e-12)


def test_the_drawn_paired_test_is_scipys_within_monte_carlo_error():
    values = differences(60, columns=4)
    ours = randomisation_test(values, 50_000)
    theirs = stats.permutation_test(
        (values,), mean_of, permutation_type="samples", n_resamples=50_000, rng=np.random.default_rng(1)
    ).pvalue
    error = 5 * np.sqrt(theirs * (1 - theirs) / 50_000) * np.sqrt(2) + 2 / 50_000
    assert (np.abs(ours - theirs) < error).all(), (ours, theirs)
    assert 0.0001 < ours.max() < 1


def test_drawing_agrees_with_going_through_all_patterns():
    values = differences(14, columns=5, seed=3)
    exact, drawn = randomisation_test(values, 2**14), randomisation_test(values, 2**14 - 2)
    np.testing.assert_allclose(exact, drawn, atol=5 * np.sqrt(0.25 / 2**14))


def test_the_bootstrap_interval_is_scipys_within_monte_carlo_error():
    values = differences(80, columns=2, seed=5)
    low, high = bootstrap_interval(values, 20_000)
    for column in range(2):
        theirs = stats.bootstrap(
            (values[:, column],), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
        ).confidence_interval
        assert low[column] == pytest.approx(theirs.low, abs=6e-4)
        assert high[column] == pytest.approx(theirs.high, abs=6e-4)


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(4)
    low, high = bootstrap_interval(random.normal(0.3, 1, (50, 400)), 2_000)
    assert 0.91 < ((low < 0.3) & (high > 0.3)).mean() < 0.98


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([0.01, np.nan, 0.03], [0.02, np.nan, 0.03]),
        ([np.nan], [np.nan]),
    ],
)
def test_holm_on_known_figures(p, adjusted):
    np.testing.assert_allclose(holm(np.array(p)), adjusted, rtol=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.999))
@settings(max_examples=200, deadline=None)
def test_holm_rejects_what_the_step_down_procedure_rejects(p, alpha):
    rejected = set()
    for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[i] * (len(p) - step) > alpha:
            break
        rejected.add(i)
    assert set(np.flatnonzero(holm(np.array(p)) <= alpha)) == rejected


def test_two_equal_systems_differ_significantly_in_one_case_of_twenty():
    random = np.random.default_rng(11)
    systems = random.beta(2, 3, (50, 1)) + random.normal(0, 0.05, (2, 50, 200))
    found = (randomisation_test(systems[1] - systems[0]) < 0.05).mean()
    assert 0.02 <= found <= 0.08


@given(st.integers(0, 1000), st.integers(2, 30))
@settings(max_examples=30, deadline=None)
def test_laws_of_the_paired_test(seed, n):
    values = differences(n, columns=3, seed=seed)
    p = randomisation_test(values, 999)
    assert ((p > 0) & (p <= 1)).all()
    np.testing.assert_array_equal(randomisation_test(-values, 999), p)  # it is two-sided
    np.testing.assert_array_equal(randomisation_test(values * 1024, 999), p)
    for column in range(3):  # columns together equal one by one
        np.testing.assert_array_equal(randomisation_test(values[:, [column]], 999), p[column])


def test_queries_without_a_difference_and_missing_ones_change_nothing():
    values = differences(9, columns=1)
    p = randomisation_test(values)
    assert (randomisation_test(np.concatenate([values, np.zeros((60, 1))])) == p).all()
    assert (randomisation_test(np.concatenate([values, np.full((60, 1), np.nan)])) == p).all()
    low, high = bootstrap_interval(np.concatenate([differences(80, 1), np.full((5, 1), np.nan)]))
    expected = bootstrap_interval(differences(80, 1))
    np.testing.assert_allclose((low, high), expected, atol=2e-3)  # other resamples


def test_equal_figures_and_too_few_queries():
    assert randomisation_test(np.zeros((30, 2))).tolist() == [1.0, 1.0]
    assert np.isnan(randomisation_test(np.ones((1, 2)))).all()
    assert np.isnan(bootstrap_interval(np.ones((1, 2)))).all()
    assert np.array(bootstrap_interval(np.full((9, 1), 0.25))).ravel().tolist() == [0.25, 0.25]
    assert randomisation_test(np.empty((5, 0))).shape == (0,)


@pytest.mark.parametrize("cells", [64, 5_000])
def test_pieces_that_fit_into_memory_change_nothing(monkeypatch, cells):
    values = differences(41, columns=7)
    whole = randomisation_test(values, 3_000), *bootstrap_interval(values, 3_000)
    monkeypatch.setattr("significance.CHUNK_CELLS", cells)
    monkeypatch.setattr("significance.CHUNK_COLUMNS", 2)
    for one, other in zip(whole, (randomisation_test(values, 3_000), *bootstrap_interval(values, 3_000)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_there_are_enough_resamples_for_the_correction():
    for tests in (1, 90, 600, 3_000):
        assert tests / (1 + resamples_for(tests)) < 0.05
        assert LEAST_RESAMPLES <= resamples_for(tests) <= MOST_RESAMPLES


def test_borda_counts_who_is_beaten():
    means = np.array([[0.1, 0.2, 0.3], [0.5, 0.4, 0.5]])
    assert borda_points(means).tolist() == [0 + 1.5, 1 + 0, 2 + 1.5]
    assert borda_points(means).sum() == 2 * 3  # each pair of systems gives one point on each dataset
