"""Refinement: move each query's vector so that it agrees with the teacher about the documents that were scored.

``adam_kl`` is the method of arXiv 2605.12487, gradient steps until the query's own softmax agrees with the teacher's;
the others are classical or our own, and cost one small product or solve. Tensors in, tensors out; knows no flag, file
or dataset. ``refine_queries`` is also the library entry for a service that has vectors and scores of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kl_loss import loss_and_gradient, min_max, teacher_distribution

METHODS = ("adam_kl", "refit", "rocchio", "ridge", "whitened_ridge", "centred_ridge")
PAPER_LR, REFIT_LR, REFIT_TEMPERATURE = 1e-4, 0.005, 2.0
NEUTRAL, CENTRED_NEUTRAL = 0.5, 0.2  # scores that say neither
BETA_1, BETA_2, ADAM_EPSILON = 0.9, 0.999, 1e-8
# Every step reads all documents twice. On a CPU that is twice as fast when they stay in its caches.
CPU_BLOCK_BYTES = 1 << 23
WHITENING_SHARE = 0.7  # of the corpus' own variances in the whitening; the rest takes all directions for equal
STATISTICS_DOCUMENTS = 100_000  # at most; evenly spaced over a larger corpus
CENTRE_SHARE = 0.5  # of the corpus' mean that centred_ridge takes from the documents
PSEUDO_THRESHOLD = 1.5  # standard deviations over its pool's mean from which a document is taken for relevant


# From queries [Q, D], documents [Q, K, D], scores [Q, K] and which are known [Q, K] to refined queries.
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Refinement:
    """What refinement gives back.

    Attributes:
        vectors: float32 [Q, D], the refined queries.
        losses: float32 [num_steps + 1, Q], KL(teacher ‖ student) before each step and after the last (in nats), or
            None when no trajectory was asked for. 0 for a query that is not moved. Methods without steps have one.
        steps: the steps at which ``trajectory`` was taken, first 0, last ``num_steps``; empty without a trajectory.
        trajectory: float32 [len(steps), Q, D], or None.
    """

    vectors: Tensor
    losses: Tensor | None = None
    steps: tuple[int, ...] = ()
    trajectory: Tensor | None = None

    def cpu(self) -> Refinement:
        """Move everything to main memory."""
        return Refinement(*(value.cpu() if isinstance(value, Tensor) else value for value in vars(self).values()))


def concatenate(parts: Sequence[Refinement]) -> Refinement:
    """Join the refinements of consecutive queries, made with the same arguments."""
    with_trajectory = parts[0].losses is not None
    return Refinement(
        vectors=torch.cat([part.vectors for part in parts]),
        losses=torch.cat([part.losses for part in parts], dim=1) if with_trajectory else None,
        steps=parts[0].steps,
        trajectory=torch.cat([part.trajectory for part in parts], dim=1) if with_trajectory else None,
    )


@torch.no_grad()
def refine_queries(
    query_vectors: Tensor,
    document_vectors: Tensor,
    scores: Tensor,
    *,
    method: str = "adam_kl",
    lr: float | None = None,
    num_steps: int = 100,
    rocchio_alpha: float = 2.0,
    ridge_lambda: float = 3.0,
    neutral_score: float | None = None,
    corpus: CorpusStatistics | None = None,
    normalise_scores: bool = False,
    trajectory_every: int | None = None,
) -> Refinement:
    """Refine all queries at once, on the device of the inputs.

    A query's result does not depend on which others are refined with it, nor on the order of its documents. The
    formulas stand with the methods below; ``adam_kl`` is the paper's (arXiv 2605.12487), ``refit`` that of ReFIT
    (arXiv 2305.11744). Refined vectors are not of unit length.

    Args:
        query_vectors: float32 [Q, D]; give them unit length, for which all defaults are made. One of length 0 has no
            direction and stays.
        document_vectors: float32 [Q, K, D], the scored documents of each query, of any length above 0. Rows without a
            score may hold anything.
        scores: float32 [Q, K], the teacher's; NaN where there is none. Such documents take no part. A query with
            fewer than two scores keeps its vector.
        method: one of ``METHODS``.
        lr: learning rate of Adam, for ``adam_kl`` (None: 1e-4) and ``refit`` (None: 0.005). Adam moves a coordinate by
            about ``lr`` a step whatever its size.
        num_steps: of Adam; 0 moves nothing.
        rocchio_alpha: how far ``rocchio`` goes, in lengths of the query.
        ridge_lambda: strength of the ridges' prior, above 0; the larger, the less a query moves.
        neutral_score: the score that the ridges take for neither relevant nor irrelevant; None: 0.5, with
            ``centred_ridge`` 0.2.
        corpus: from :func:`corpus_statistics`, for ``whitened_ridge`` and ``centred_ridge``.
        normalise_scores: min-max normalise each query's scores first: for a teacher whose scores are no shares from 0
            to 1, which the ridges expect. ``refit`` always does.
        trajectory_every: also return losses, and the vectors at every so many steps.

    Arrays and other dtypes are taken too and turned into float32 tensors.

    Returns:
        Refinement.

    Raises:
        ValueError: shapes do not fit together, a score is infinite, the method is unknown or lacks the corpus; says
            what was expected.
    """
    tensors = [torch.as_tensor(value).float() for value in (query_vectors, document_vectors, scores)]
    query_vectors, document_vectors, scores = tensors
    shapes = [list(tensor.shape) for tensor in tensors]
    if query_vectors.ndim != 2 or scores.ndim != 2 or shapes[1] != [shapes[0][0], shapes[2][1], shapes[0][1]]:
        raise ValueError(
            "expected query_vectors [Q, D], document_vectors [Q, K, D] and scores [Q, K], got "
            + ", ".join(map(str, shapes))
        )
    if scores.isinf().any():
        raise ValueError("scores hold infinity; use NaN for a document without a score")
    known = ~scores.isnan()
    if lr is None:
        lr = REFIT_LR if method == "refit" else PAPER_LR
    if neutral_score is None:
        neutral_score = CENTRED_NEUTRAL if method == "centred_ridge" else NEUTRAL
    if normalise_scores or method == "refit":
        scores = min_max(scores, known, equal=neutral_score)
    if method in ("adam_kl", "refit"):
        settings = {"lr": lr, "num_steps": num_steps, "refit": method == "refit", "trajectory_every": trajectory_every}
        refine = partial(_descend, **settings)
    else:
        form = _formula(method, rocchio_alpha, ridge_lambda, neutral_score, corpus)
        refine = partial(_jump, form=form, trajectory=bool(trajectory_every))
    size = len(query_vectors)
    if query_vectors.device.type == "cpu":
        size = CPU_BLOCK_BYTES // max(1, document_vectors[0].nbytes) if size else 0
    with _one_thread(query_vectors.device):
        parts = (tensor.split(max(1, size)) for tensor in (query_vectors, document_vectors, scores, known))
        return concatenate([refine(*block) for block in zip(*parts, strict=True)])


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Keep the many small operations of a block on one core.

    Two threads would save a third of the time on an idle machine, and cost ten to a hundred times as much as soon as
    another process wants a core: threads wait for each other at each of some thousand operations.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _formula(
    method: str, rocchio_alpha: float, ridge_lambda: float, neutral_score: float, corpus: CorpusStatistics | None
) -> Form:
    """The formula of a method without steps; arguments as for :func:`refine_queries`."""
    if method == "rocchio":
        return partial(rocchio, alpha=rocchio_alpha)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    form = partial(ridge, ridge_lambda=ridge_lambda, neutral_score=neutral_score)
    if method == "ridge":
        return form
    if corpus is None:
        raise ValueError(f"{method} needs corpus, which corpus_statistics(documents) gives")
    centre = CENTRE_SHARE * corpus.mean if method == "centred_ridge" else None
    return partial(form, whitening=corpus.whitening, centre=centre)


def _can_move(query_vectors: Tensor, known: Tensor) -> Tensor:
    """Which queries have a direction and two scores, bool [Q, 1]."""
    return (known.sum(-1, keepdim=True) >= 2) & (query_vectors != 0).any(-1, keepdim=True)


def _zero_unknown(document_vectors: Tensor, known: Tensor) -> Tensor:
    return document_vectors if known.all() else document_vectors.masked_fill(~known.unsqueeze(-1), 0.0)


# --- In one step -----------------------------------------------------------------------------------------------------


def rocchio(queries: Tensor, documents: Tensor, scores: Tensor, known: Tensor, *, alpha: float) -> Tensor:
    """``q̂ + α·Σ wᵢ d̂ᵢ / Σ|wᵢ|`` with ``w = s − mean(s)``: Rocchio (1971) with graded feedback.

    Equal scores move nothing.

    Args:
        queries: float32 [Q, D], ``q̂``.
        documents: float32 [Q, K, D]; zeros where nothing is known.
        scores: float32 [Q, K], anything where nothing is known.
        known: bool [Q, K].
        alpha: as ``rocchio_alpha`` of :func:`refine_queries`.

    Returns:
        float32 [Q, D].
    """
    # From the lowest on: a mean of equal scores may differ from them in its last bit, which the sum would blow up.
    lowest = scores.masked_fill(~known, math.inf).amin(-1, keepdim=True)
    weights = _centred(scores - lowest, known)
    weights = weights / weights.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return queries + alpha * _row_products(weights, normalize(documents, dim=-1))


def ridge(
    queries: Tensor,
    documents: Tensor,
    scores: Tensor,
    known: Tensor,
    *,
    ridge_lambda: float,
    neutral_score: float,
    whitening: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """Bayesian linear regression of the scores on the documents, with the query as prior mean.

    With unit documents ``D`` [K, D], cosines ``c = D q̂`` and ``r = 2·(s − neutral) − (c − mean(c))``, what the scores
    say beyond the cosines: ``q̂ + Dᵀ (D Dᵀ + λ I)⁻¹ r``, the mean of the posterior (Bishop 2006, section 3.3, in its
    dual form). With a whitening ``W``, ``X = D W`` and ``m = mean(diag(X Xᵀ))``: ``q̂ + W Xᵀ (X Xᵀ / m + λ I)⁻¹ r / m``,
    a prior under which directions in which the whole corpus varies count less. With a centre ``μ`` [D], documents are
    ``D − μ`` throughout, and the cosines are not centred over the scored ones: ``r = 2·(s − neutral) − (D − μ) q̂``.

    Arguments are those of :func:`rocchio` and of :func:`refine_queries`; returns float32 [Q, D].
    """
    tiny = torch.finfo(documents.dtype).tiny
    # Documents are as long as they came: what has K values a query is brought to unit length instead.
    gram = documents @ documents.mT
    per_length = gram.diagonal(dim1=1, dim2=2).clamp_min(tiny).rsqrt() * known
    if centre is not None:
        documents = documents * per_length.unsqueeze(2) - centre * known.unsqueeze(2)
        gram, per_length = documents @ documents.mT, known.float()
    expected = torch.matmul(queries.unsqueeze(1), documents.mT).squeeze(1) * per_length
    if centre is None:
        expected = _centred(expected, known)
    residuals = (2 * (scores - neutral_score) - expected) * known
    seen = documents
    if whitening is not None:
        seen = documents @ whitening
        gram = seen @ seen.mT
    gram = gram * per_length.unsqueeze(1) * per_length.unsqueeze(2)
    size = gram.diagonal(dim1=1, dim2=2).sum(-1) / known.sum(-1).clamp_min(1)
    size = size.clamp_min(tiny).unsqueeze(-1)
    # K numbers a query: solved on the CPU in double precision, which every device's tensors can come to.
    system = (gram / size.unsqueeze(-1)).cpu().double()
    system.diagonal(dim1=1, dim2=2).add_(ridge_lambda)
    weights = torch.linalg.solve(system, residuals.cpu().double()).float().to(queries.device)
    step = _row_products(weights / size * per_length, seen)
    return queries + (step if whitening is None else step @ whitening.mT)


@dataclass(frozen=True)
class CorpusStatistics:
    """How a corpus lies in its space.

    Attributes:
        mean: float32 [D].
        whitening: float32 [D, D], symmetric: evens out, by about half, how much the corpus varies in each direction.
            ``U diag((a·Λ/mean(Λ) + 1 − a)^(−1/4)) Uᵀ`` from its covariance ``U Λ Uᵀ``, ``a = 0.7``.
    """

    mean: Tensor
    whitening: Tensor


def corpus_statistics(
    document_vectors: Tensor, share: float = WHITENING_SHARE, device: str | torch.device | None = None
) -> CorpusStatistics:
    """Mean and whitening of a corpus.

    Args:
        document_vectors: float32 [N, D], of unit length; at most ``STATISTICS_DOCUMENTS`` of them are looked at.
        share: ``a``; 0 makes the whitening the identity.
        device: where to compute and to leave the result; None for that of the vectors.
    """
    documents = document_vectors[:: -(-len(document_vectors) // STATISTICS_DOCUMENTS)].to(device)
    mean = documents.mean(0)
    covariance = documents.mT @ documents / len(documents) - torch.outer(mean, mean)
    variances, directions = torch.linalg.eigh(covariance.cpu().double())
    variances = variances.clamp_min(0)
    scale = share * variances / variances.mean().clamp_min(torch.finfo(torch.float32).tiny) + 1 - share
    whitening = ((directions * scale**-0.25) @ directions.mT).to(torch.float32)
    return CorpusStatistics(mean, whitening.to(documents.device))


@torch.no_grad()
def pseudo_feedback(query_vectors: Tensor, pool_vectors: Tensor, there: Tensor) -> Tensor:
    """Where the documents that stand out in a query's ranking lie, beside the others near the top; no teacher is asked.

    Of a pool, the first documents of the ranking that nobody has scored, those count as relevant whose cosine is more
    than 1.5 standard deviations over the pool's mean: ``f = Σ (lⱼ − mean(l))·d̂ⱼ / √(Σ l)`` with labels ``l`` of 1 and
    0. Ours; pseudo relevance feedback goes back to Attar and Fraenkel (1977).

    Args:
        query_vectors: float32 [Q, D].
        pool_vectors: float32 [Q, P, D], of unit length.
        there: bool [Q, P], False where a query's pool has fewer documents.

    Returns:
        float32 [Q, D]; 0 where nothing stands out.
    """
    cosines = torch.matmul(normalize(query_vectors, dim=-1).unsqueeze(1), pool_vectors.mT).squeeze(1)
    over = _centred(cosines, there)
    count = there.sum(-1, keepdim=True).clamp_min(1)
    deviation = ((over**2).sum(-1, keepdim=True) / count).sqrt()
    labels = ((over > PSEUDO_THRESHOLD * deviation) & there).float()
    weights = _centred(labels, there) / labels.sum(-1, keepdim=True).clamp_min(1).sqrt()
    return _row_products(weights, pool_vectors)


def _centred(values: Tensor, known: Tensor) -> Tensor:
    """Known values less their mean, [Q, K]; 0 for the others."""
    values = values.masked_fill(~known, 0.0)
    mean = values.sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp_min(1)
    return (values - mean) * known


def _row_products(weights: Tensor, documents: Tensor) -> Tensor:
    """``Σ wᵢ dᵢ`` of each query: [Q, K] and [Q, K, D] to [Q, D]."""
    return torch.matmul(weights.unsqueeze(1), documents).squeeze(1)


def _jump(
    query_vectors: Tensor, document_vectors: Tensor, scores: Tensor, known: Tensor, form: Form, trajectory: bool
) -> Refinement:
    """Refine queries [Q, D] by a formula."""
    moves = _can_move(query_vectors, known)
    documents = _zero_unknown(document_vectors, known)
    scores = scores.masked_fill(~known, 0.0)
    vectors = torch.where(moves, form(query_vectors, documents, scores, known), query_vectors)
    if not trajectory:
        return Refinement(vectors)
    p = teacher_distribution(scores, known)
    unit = normalize(documents, dim=-1)
    unit_queries = (normalize(q, dim=-1).unsqueeze(1) for q in (query_vectors, vectors))
    cosines = (torch.matmul(q, unit.mT).squeeze(1) for q in unit_queries)
    losses = [loss_and_gradient(p, own, known | ~moves, normalise=False)[0] for own in cosines]
    return Refinement(
        vectors=vectors,
        losses=torch.stack([torch.where(moves.squeeze(-1), loss, 0.0) for loss in losses]),
        steps=(0, 1),
        trajectory=torch.stack([query_vectors, vectors]),
    )


# --- By gradient descent ---------------------------------------------------------------------------------------------


def _descend(
    query_vectors: Tensor,
    document_vectors: Tensor,
    scores: Tensor,
    known: Tensor,
    lr: float,
    num_steps: int,
    refit: bool,
    trajectory_every: int | None,
) -> Refinement:
    """Refine queries [Q, D] by ``num_steps`` steps of Adam on ``KL(p ‖ softmax(cos(q, d)))``; only ``q`` moves.

    ``p = softmax(scores)``. With ``refit``, scores (normalised already) are divided by a temperature of 2, and cosines
    are min-max normalised. Adam works on each coordinate alone, so a batch is as good as one query at a time.
    """
    moves = _can_move(query_vectors, known)
    p = teacher_distribution(scores, known, REFIT_TEMPERATURE if refit else 1.0)
    documents = normalize(_zero_unknown(document_vectors, known), dim=-1)
    # What does not move goes through the arithmetic all the same; its vector is put back at the end.
    q = torch.where(moves, query_vectors, torch.ones_like(query_vectors))
    known = known | ~moves
    first_moment, second_moment = torch.zeros_like(q), torch.zeros_like(q)
    losses, steps, trajectory = [], [], []

    for step in range(num_steps + 1):
        length = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        # [Q, 1, D] × [Q, D, K]: the row-vector form is several times faster on a CPU than documents @ q.
        cosines = torch.matmul(q.unsqueeze(1), documents.transpose(1, 2)).squeeze(1) / length
        loss, by_cosine = loss_and_gradient(p, cosines, known, refit)
        if trajectory_every:
            losses.append(torch.where(moves.squeeze(-1), loss, 0.0))
            if step % trajectory_every == 0 or step == num_steps:
                steps.append(step)
                trajectory.append(torch.where(moves, q, query_vectors))
        if step == num_steps:
            break
        # cos_i = d̂_i·q / |q|, so ∂L/∂q = (Σ g_i·d̂_i) / |q| − (Σ g_i·cos_i)·q / |q|²
        along_q = -(by_cosine * cosines).sum(-1, keepdim=True) / length**2
        gradient = torch.baddbmm((q * along_q).unsqueeze(1), (by_cosine / length).unsqueeze(1), documents).squeeze(1)
        # Adam (Kingma and Ba 2015). Written out because importing torch.optim costs more than refining 1,000 queries.
        first_moment.lerp_(gradient, 1 - BETA_1)
        second_moment.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
        spread = second_moment.div(1 - BETA_2 ** (step + 1)).sqrt_().add_(ADAM_EPSILON)
        q.addcdiv_(first_moment, spread, value=-lr / (1 - BETA_1 ** (step + 1)))

    return Refinement(
        vectors=torch.where(moves, q, query_vectors),
        losses=torch.stack(losses) if losses else None,
        steps=tuple(steps),
        trajectory=torch.stack(trajectory) if trajectory else None,
    )
