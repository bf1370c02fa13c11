"""The method against plain automatic differentiation, and the laws it obeys."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import query_refinement
from experiment_config import METHOD_FLAGS, build_config
from query_refinement import METHODS, corpus_statistics, min_max, pseudo_feedback, refine_queries

REFIT = {"method": "refit"}


def plain_refinement(q0, documents, scores, lr=1e-4, num_steps=100, refit=False):
    """One query, autograd and torch's Adam: the definition, word for word."""
    keep = ~scores.isnan()
    documents, scores = documents[keep], scores[keep]
    q = q0.clone().requires_grad_(True)
    adam = torch.optim.Adam([q], lr=lr)
    if refit:
        scores = (scores - scores.min()) / (scores.max() - scores.min()) / 2
    p = torch.softmax(scores, -1)
    losses = []
    for _ in range(num_steps):
        cosines = torch.nn.functional.cosine_similarity(q[None], documents)
        if refit:
            cosines = (cosines - cosines.amin()) / (cosines.amax() - cosines.amin())
        s = torch.softmax(cosines, -1)
        loss = (p * torch.log((p + 1e-8) / (s + 1e-8))).sum()
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    return q.detach(), losses


def problem(n_queries=7, n_documents=20, dimension=48, seed=0, missing=0.0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.nn.functional.normalize(torch.randn(n_queries, dimension, generator=generator), dim=-1)
    documents = torch.randn(n_queries, n_documents, dimension, generator=generator) + queries[:, None]
    scores = torch.rand(n_queries, n_documents, generator=generator) * 3
    scores[torch.rand(scores.shape, generator=generator) < missing] = float("nan")
    return queries, documents, scores


CORPUS = corpus_statistics(torch.nn.functional.normalize(problem(50)[1].flatten(0, 1), dim=-1))
every_method = pytest.mark.parametrize("method", [{"method": name, "corpus": CORPUS} for name in METHODS], ids=METHODS)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_equals_autograd_and_adam(missing):
    queries, documents, scores = problem(missing=missing)
    refined = refine_queries(queries, documents, scores)
    for i in range(len(queries)):
        expected, _ = plain_refinement(queries[i], documents[i], scores[i])
        assert torch.allclose(refined.vectors[i], expected, atol=1e-6)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_refit_equals_autograd_through_the_min_max_normalisation(missing):
    queries, documents, scores = problem(missing=missing)
    refined = refine_queries(queries, documents, scores, lr=0.005, num_steps=50, **REFIT)
    for i in range(len(queries)):
        expected, _ = plain_refinement(queries[i], documents[i], scores[i], lr=0.005, num_steps=50, refit=True)
        assert torch.allclose(refined.vectors[i], expected, atol=2e-4)


def test_refit_gradient_of_equal_minima_is_autograds():
    queries, documents, scores = problem(n_queries=1, n_documents=5)
    documents[0, 1] = documents[0, 0]  # two documents share the lowest or highest cosine, or neither: all are tried
    for low in (True, False):
        order = torch.argsort(torch.nn.functional.cosine_similarity(queries, documents[0]), descending=not low)
        tied = documents.clone()
        tied[0, order[1]] = tied[0, order[0]]
        one_step = refine_queries(queries, tied, scores, lr=0.005, num_steps=1, **REFIT).vectors[0]
        expected, _ = plain_refinement(queries[0], tied[0], scores[0], lr=0.005, num_steps=1, refit=True)
        assert torch.allclose(one_step, expected, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(
    n_queries=st.integers(2, 9),
    n_documents=st.integers(2, 25),
    dimension=st.integers(3, 70),
    seed=st.integers(0, 10_000),
    missing=st.sampled_from([0.0, 0.2, 0.6]),
    method=st.sampled_from(METHODS),
)
def test_batched_equals_one_by_one(n_queries, n_documents, dimension, seed, missing, method):
    queries, documents, scores = problem(n_queries, n_documents, dimension, seed, missing)
    options = {"method": method, "corpus": corpus_statistics(documents.flatten(0, 1))}
    together = refine_queries(queries, documents, scores, **options).vectors
    for i in range(n_queries):
        alone = refine_queries(queries[i : i + 1], documents[i : i + 1], scores[i : i + 1], **options).vectors[0]
        assert (together[i] - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("trajectory_every", [None, 10])
def test_a_query_set_larger_than_a_block_is_refined_as_in_one(monkeypatch, trajectory_every):
    queries, documents, scores = problem(n_queries=23, missing=0.2)
    whole = refine_queries(queries, documents, scores, trajectory_every=trajectory_every)
    monkeypatch.setattr(query_refinement, "CPU_BLOCK_BYTES", 5 * documents[0].nbytes + 8)
    blocks = refine_queries(queries, documents, scores, trajectory_every=trajectory_every)
    assert torch.allclose(blocks.vectors, whole.vectors, atol=1e-6)
    assert blocks.steps == whole.steps
    if trajectory_every:
        assert torch.allclose(blocks.losses, whole.losses, atol=1e-6)
        assert torch.allclose(blocks.trajectory, whole.trajectory, atol=1e-6)


@every_method
def test_a_missing_score_is_a_document_left_out(method):
    queries, documents, scores = problem(n_queries=1, missing=0.4)
    keep = ~scores[0].isnan()
    with_gaps = refine_queries(queries, documents, scores, **method).vectors
    without = refine_queries(queries, documents[:, keep], scores[:, keep], **method).vectors
    assert torch.allclose(with_gaps, without, atol=1e-6)
    documents[scores.isnan()] = float("nan")
    assert torch.equal(refine_queries(queries, documents, scores, **method).vectors, with_gaps)


@every_method
def test_fewer_than_two_scores_keep_the_query_to_the_bit(method):
    options = method
    queries, documents, scores = problem(n_queries=3)
    scores[0] = float("nan")
    scores[1, 1:] = float("nan")
    refined = refine_queries(queries, documents, scores, trajectory_every=10, **options)
    assert torch.equal(refined.vectors[:2], queries[:2])
    assert not torch.equal(refined.vectors[2], queries[2])
    assert refined.losses[:, :2].abs().max() == 0
    assert refined.vectors.isfinite().all()


@every_method
def test_the_order_of_documents_does_not_matter(method):
    queries, documents, scores = problem(missing=0.2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    shuffled = refine_queries(queries, documents[:, order], scores[:, order], **method).vectors
    assert torch.allclose(refine_queries(queries, documents, scores, **method).vectors, shuffled, atol=2e-6)


@every_method
def test_lengths_of_documents_do_not_matter(method):
    queries, documents, scores = problem()
    longer = documents * torch.linspace(0.1, 30, 20)[None, :, None]
    expected = refine_queries(queries, documents, scores, **method).vectors
    assert torch.allclose(refine_queries(queries, longer, scores, **method).vectors, expected, atol=3e-6)


def test_no_steps_leave_every_query_where_it_was():
    queries, documents, scores = problem()
    assert torch.equal(refine_queries(queries, documents, scores, num_steps=0).vectors, queries)


def test_inputs_are_not_changed():
    queries, documents, scores = problem(missing=0.3)
    copies = queries.clone(), documents.clone(), scores.clone()
    refine_queries(queries, documents, scores)
    assert torch.equal(queries, copies[0])
    assert torch.equal(documents, copies[1])
    assert np.array_equal(scores, copies[2], equal_nan=True)


def test_trajectory_and_losses():
    queries, documents, scores = problem()
    refined = refine_queries(queries, documents, scores, num_steps=25, trajectory_every=10)
    assert refined.steps == (0, 10, 20, 25)
    assert torch.equal(refined.trajectory[0], queries)
    assert torch.equal(refined.trajectory[-1], refined.vectors)
    assert torch.allclose(
        refined.trajectory[1], refine_queries(queries, documents, scores, num_steps=10).vectors, atol=1e-7
    )
    _, expected = plain_refinement(queries[0], documents[0], scores[0], num_steps=25)
    assert refined.losses.shape == (26, 7)
    assert np.allclose(refined.losses[:-1, 0], expected, atol=1e-6)
    assert (refined.losses[-1] < refined.losses[0]).all()


def test_refined_vectors_can_go_on_into_autograd():
    queries, documents, scores = problem()
    layer = torch.nn.Linear(48, 2)
    layer(refine_queries(queries, documents, scores).vectors).sum().backward()
    assert layer.weight.grad is not None


def test_shapes_that_do_not_fit_are_told():
    queries, documents, scores = problem()
    for wrong in ((queries, documents[:6], scores), (queries[0], documents, scores), (queries, documents, scores[0])):
        with pytest.raises(ValueError, match=r"expected query_vectors \[Q, D\].* got \[") as caught:
            refine_queries(*wrong)
        assert str(list(wrong[1].shape)) in str(caught.value)


def test_arrays_of_other_types_are_taken():
    queries, documents, scores = problem()
    expected = refine_queries(queries, documents, scores).vectors
    for convert in (lambda t: t.double(), lambda t: t.numpy(), lambda t: t.numpy().astype(np.float64), lambda t: t.tolist()):
        found = refine_queries(convert(queries), convert(documents), convert(scores)).vectors
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, atol=1e-6)


def test_numbers_that_are_none_do_not_spread():
    queries, documents, scores = problem(n_queries=4, missing=0.3)
    expected = refine_queries(queries, documents, scores).vectors
    documents[scores.isnan()] = float("nan")
    queries[3] = 0
    found = refine_queries(queries, documents, scores).vectors
    assert torch.allclose(found[:3], expected[:3], atol=1e-6)
    assert torch.equal(found[3], torch.zeros(48))
    scores[0, 0] = float("inf")
    with pytest.raises(ValueError, match="infinity"):
        refine_queries(queries, documents, scores)


def test_the_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    refine_queries(*problem())
    with pytest.raises(ValueError, match="infinity"):
        refine_queries(*problem()[:2], torch.full((7, 20), float("inf")))
    assert torch.get_num_threads() == before


# --- Methods without steps ---


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def plain_method(name, q, documents, scores, alpha=2.0, lam=3.0, neutral=0.5):
    """One query in double precision, inverting what the formula inverts."""
    keep = ~np.isnan(scores)
    d, s = unit(documents[keep].astype(float)), scores[keep].astype(float)
    if name == "rocchio":
        w = s - s.mean()
        return q + alpha * sum(wi * di for wi, di in zip(w, d, strict=True)) / np.abs(w).sum()
    w = np.eye(len(q)) if name == "ridge" else CORPUS.whitening.numpy().astype(float)
    if name == "centred_ridge":
        d = d - 0.5 * CORPUS.mean.numpy()
        r = 2 * (s - neutral) - d @ q
    else:
        r = 2 * (s - neutral) - (d @ q - (d @ q).mean())
    x = d @ w
    m = np.mean(np.diag(x @ x.T))
    return q + w @ x.T @ np.linalg.inv(x @ x.T / m + lam * np.eye(len(d))) @ r / m


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("name", METHODS[2:])
def test_methods_without_steps_are_their_formulas(name, missing):
    queries, documents, scores = problem(missing=missing)
    options = {"rocchio_alpha": 1.7, "ridge_lambda": 0.8, "neutral_score": 0.4}
    refined = refine_queries(queries, documents, scores, method=name, corpus=CORPUS, **options).vectors
    for i in range(len(queries)):
        expected = plain_method(name, *(t[i].numpy() for t in (queries, documents, scores)), 1.7, 0.8, 0.4)
        assert np.allclose(refined[i], expected, atol=3e-6)


@pytest.mark.parametrize("name", METHODS[2:])
def test_without_strength_the_query_stays(name):
    queries, documents, scores = problem(missing=0.2)
    options = {"rocchio_alpha": 0.0} if name == "rocchio" else {"ridge_lambda": 1e9}
    refined = refine_queries(queries, documents, scores, method=name, corpus=CORPUS, **options).vectors
    assert torch.allclose(refined, queries, atol=1e-7)


def test_equal_scores_move_what_the_formulas_say():
    queries, documents, _ = problem()
    equal = torch.full((7, 20), 0.7)
    assert torch.equal(refine_queries(queries, documents, equal, method="rocchio").vectors, queries)
    # A ridge evens the cosines out; with equal cosines and neutral scores nothing is left to say.
    same = documents[:, :1].expand(-1, 20, -1)
    assert torch.allclose(refine_queries(queries, same, equal, method="ridge", neutral_score=0.7).vectors, queries, atol=1e-6)
    moved = refine_queries(queries, documents, equal, method="ridge", neutral_score=0.7).vectors
    cosines = [torch.nn.functional.cosine_similarity(q[:, None], documents, dim=-1) for q in (queries, moved)]
    assert (cosines[1].std(1) < cosines[0].std(1)).all()
    # The gradient methods draw all documents towards the same cosine, too.
    moved = refine_queries(queries, documents, equal, lr=1e-2).vectors
    assert (torch.nn.functional.cosine_similarity(moved[:, None], documents, dim=-1).std(1) < cosines[0].std(1)).all()


def test_normalised_scores_have_no_unit():
    queries, documents, scores = problem(missing=0.2)
    options = {"method": "ridge", "normalise_scores": True}
    expected = refine_queries(queries, documents, scores, **options).vectors
    assert torch.allclose(refine_queries(queries, documents, 50 * scores - 7, **options).vectors, expected, atol=1e-6)
    scaled = min_max(scores, ~scores.isnan())
    assert torch.allclose(refine_queries(queries, documents, scaled, method="ridge").vectors, expected, atol=1e-6)
    equal = torch.full((7, 20), 4.0)  # say nothing, so they count as neutral
    neutral = refine_queries(queries, documents, torch.full((7, 20), 0.5), method="ridge").vectors
    assert torch.allclose(refine_queries(queries, documents, equal, **options).vectors, neutral, atol=1e-6)


@pytest.mark.parametrize("name", METHODS[2:])
def test_a_method_without_steps_has_one_in_its_trajectory(name):
    queries, documents, scores = problem(missing=0.2)
    refined = refine_queries(queries, documents, scores, method=name, corpus=CORPUS, trajectory_every=10)
    assert refined.steps == (0, 1)
    assert torch.equal(refined.trajectory[0], queries) and torch.equal(refined.trajectory[1], refined.vectors)
    first = refine_queries(queries, documents, scores, num_steps=1, trajectory_every=1).losses[0]
    assert refined.losses.shape == (2, 7) and torch.allclose(refined.losses[0], first, atol=1e-6)
    assert (refined.losses[1] < refined.losses[0]).float().mean() > 0.7


def test_statistics_of_a_corpus():
    documents = torch.nn.functional.normalize(problem(30)[1].flatten(0, 1) * torch.linspace(0.2, 3, 48), dim=-1)
    found = corpus_statistics(documents)
    assert torch.allclose(found.mean, documents.mean(0), atol=1e-6)
    variances, directions = np.linalg.eigh(np.cov(documents.numpy().T, bias=True))
    expected = directions @ np.diag((0.7 * variances / variances.mean() + 0.3) ** -0.25) @ directions.T
    assert np.allclose(found.whitening, expected, atol=1e-4)
    assert torch.allclose(corpus_statistics(documents, share=0.0).whitening, torch.eye(48), atol=1e-6)
    one = corpus_statistics(documents[:1])  # no variance at all
    assert one.whitening.isfinite().all()


def test_pseudo_feedback_is_its_formula():
    queries, pool, scores = problem(n_documents=60, missing=0.3)
    pool, there = torch.nn.functional.normalize(pool, dim=-1), ~scores.isnan()
    there[6] = False
    there[5, 1:] = False
    found = pseudo_feedback(queries, pool, there)
    for i in range(5):
        d, q = pool[i][there[i]].double().numpy(), queries[i].double().numpy()
        cosines = d @ unit(q)
        labels = (cosines >= cosines.mean() + 1.5 * cosines.std()).astype(float)
        assert labels.any()
        assert np.allclose(found[i], (labels - labels.mean()) @ d / np.sqrt(labels.sum()), atol=1e-5)
    assert found[5].abs().max() == found[6].abs().max() == 0  # one document, and none


@every_method
def test_the_librarys_defaults_are_those_of_the_flags(method):
    flags = build_config({"refinement_method": method["method"]}).method_flags
    expected = refine_queries(*problem(), **method, **flags).vectors
    assert torch.equal(refine_queries(*problem(), **method).vectors, expected)


def test_wrong_methods_are_told():
    assert tuple(METHOD_FLAGS) == METHODS
    with pytest.raises(ValueError, match="unknown method 'lasso'; there are adam_kl, refit, rocchio"):
        refine_queries(*problem(), method="lasso")
    with pytest.raises(ValueError, match=r"centred_ridge needs corpus, which corpus_statistics\(documents\) gives"):
        refine_queries(*problem(), method="centred_ridge")
