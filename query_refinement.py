"""The method (arXiv 2605.12487): move each query's vector until its own softmax agrees with the teacher's.

Tensors in, tensors out; knows no flag, file or dataset. ``refine_queries`` is also the library entry for a service
that has vectors and scores of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

KL_EPSILON = 1e-8
BETA_1, BETA_2, ADAM_EPSILON = 0.9, 0.999, 1e-8
# Every step reads all documents twice. On a CPU that is twice as fast when they fit into its last cache.
CPU_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Refinement:
    """What refinement gives back.

    Attributes:
        vectors: float32 [Q, D], the refined queries.
        losses: float32 [num_steps + 1, Q], KL(teacher ‖ student) before each step and after the last (in nats), or
            None when no trajectory was asked for. 0 for a query that is not moved.
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


def min_max(values: Tensor, known: Tensor) -> Tensor:
    """Scale each row's known values to [0, 1]; a row of equal values becomes 0. [Q, K] in and out."""
    low = values.masked_fill(~known, math.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~known, -math.inf).amax(-1, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (values - low) / spread, 0.0)


def teacher_distribution(
    scores: Tensor, known: Tensor, *, temperature: float = 1.0, normalise: bool = False
) -> Tensor:
    """``p = softmax(scores / temperature)`` over the known scores, [Q, K]; 0 where a score is not known."""
    scores = scores.masked_fill(~known, 0.0)
    if normalise:
        scores = min_max(scores, known)
    return torch.softmax((scores / temperature).masked_fill(~known, -math.inf), dim=-1)


def cosine_gradient(p: Tensor, cosines: Tensor, known: Tensor, temperature: float, normalise: bool) -> tuple:
    """The loss and its derivative by the cosines, written out.

    With ``s = softmax(z / T)`` and ``L = Σ p·log((p + ε) / (s + ε))``: ``∂L/∂s = −p / (s + ε)`` and
    ``∂L/∂z = s ⊙ (∂L/∂s − Σ s·∂L/∂s) / T``. ``z`` is the cosines ``c`` themselves, or ``(c − min) / (max − min)``.
    Through the latter, ``∂L/∂c = (∂L/∂z − [c is min]·Σ (1 − z)·∂L/∂z − [c is max]·Σ z·∂L/∂z) / (max − min)``, the
    bracketed terms shared evenly among equal minima and among equal maxima.

    Args:
        p: teacher's distribution, float32 [Q, K].
        cosines: float32 [Q, K].
        known: bool [Q, K].
        temperature: of the student's softmax.
        normalise: min-max normalise the cosines first.

    Returns:
        loss float32 [Q] and derivative float32 [Q, K].
    """
    logits = min_max(cosines, known) if normalise else cosines
    s = torch.softmax((logits / temperature).masked_fill(~known, -math.inf), dim=-1)
    loss = (p * torch.log((p + KL_EPSILON) / (s + KL_EPSILON))).sum(-1)
    by_s = -p / (s + KL_EPSILON)
    gradient = s * (by_s - (s * by_s).sum(-1, keepdim=True)) / temperature
    if normalise:
        low = cosines.masked_fill(~known, math.inf).amin(-1, keepdim=True)
        high = cosines.masked_fill(~known, -math.inf).amax(-1, keepdim=True)
        at_low, at_high = (cosines == low) & known, (cosines == high) & known
        through_low = ((1 - logits) * gradient).sum(-1, keepdim=True) / at_low.sum(-1, keepdim=True)
        through_high = (logits * gradient).sum(-1, keepdim=True) / at_high.sum(-1, keepdim=True)
        gradient = gradient - at_low * through_low - at_high * through_high
        gradient = torch.where(high > low, gradient / (high - low), 0.0)
    return loss, gradient


def in_cache_sized_blocks(refine: Callable[..., Refinement]) -> Callable[..., Refinement]:
    """Let ``refine`` work on as many queries at a time as a CPU's cache holds; nothing else changes."""

    @functools.wraps(refine)
    def refine_blocks(query_vectors: Tensor, document_vectors: Tensor, scores: Tensor, **options: Any) -> Refinement:
        tensors, size = (query_vectors, document_vectors, scores), document_vectors.nbytes
        lengths = {len(tensor) for tensor in tensors}
        if query_vectors.device.type != "cpu" or size <= CPU_BLOCK_BYTES or len(lengths) > 1:
            return refine(*tensors, **options)
        rows = max(1, CPU_BLOCK_BYTES * len(query_vectors) // size)
        blocks = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
        return concatenate([refine(*block, **options) for block in blocks])

    return refine_blocks


@in_cache_sized_blocks
@torch.no_grad()
def refine_queries(
    query_vectors: Tensor,
    document_vectors: Tensor,
    scores: Tensor,
    *,
    lr: float = 1e-4,
    num_steps: int = 100,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    normalise_scores: bool = False,
    normalise_cosines: bool = False,
    trajectory_every: int | None = None,
) -> Refinement:
    """Refine all queries at once, on the device of the inputs.

    ``p = softmax(scores)``; ``num_steps`` steps of Adam (betas 0.9 and 0.999, eps 1e-8) on
    ``L = KL(p ‖ softmax(cos(q, d)))`` from ``q = query_vectors``; only ``q`` moves. Adam works on each coordinate
    alone, so a query's result does not depend on which others are refined with it. Source: arXiv 2605.12487; ReFIT
    (arXiv 2305.11744) is ``normalise_scores=True, normalise_cosines=True, teacher_temperature=2, lr=0.005``.

    Args:
        query_vectors: float32 [Q, D], as the embedding model gave them; none is zero.
        document_vectors: float32 [Q, K, D], the scored documents of each query, of any length above 0. Rows without a
            score may hold anything finite.
        scores: float32 [Q, K], the teacher's; NaN where there is none. Such documents take no part. A query with
            fewer than two scores keeps its vector.
        lr: Adam's learning rate, in units of the query vector's coordinates.
        num_steps: gradient steps; 0 returns the queries as they are.
        teacher_temperature: divides the scores.
        student_temperature: divides the cosines.
        normalise_scores: min-max normalise each query's scores first.
        normalise_cosines: min-max normalise each query's cosines before their softmax, at every step.
        trajectory_every: also return losses, and the vectors at every so many steps.

    Returns:
        Refinement.

    Raises:
        ValueError: shapes do not fit together; says which were expected.
    """
    n_queries, dimension = query_vectors.shape
    if scores.ndim != 2 or document_vectors.shape != (n_queries, scores.shape[1], dimension):
        raise ValueError(
            f"query_vectors {tuple(query_vectors.shape)} need document_vectors [{n_queries}, K, {dimension}] and "
            f"scores [{n_queries}, K], got {tuple(document_vectors.shape)} and {tuple(scores.shape)}"
        )
    known = ~scores.isnan()
    moves = known.sum(-1, keepdim=True) >= 2
    # A query that is not moved gets two equal scores on the way, so that no NaN arises; its vector is put back below.
    known = torch.where(moves, known, torch.ones_like(known))
    scores = torch.where(moves, scores, torch.zeros_like(scores))
    p = teacher_distribution(scores, known, temperature=teacher_temperature, normalise=normalise_scores)
    documents = normalize(document_vectors.float(), dim=-1)

    q = query_vectors.float().clone()
    first_moment, second_moment = torch.zeros_like(q), torch.zeros_like(q)
    losses, steps, trajectory = [], [], []

    for step in range(num_steps + 1):
        length = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        # [Q, 1, D] × [Q, D, K]: the row-vector form is several times faster on a CPU than documents @ q.
        cosines = torch.matmul(q.unsqueeze(1), documents.transpose(1, 2)).squeeze(1) / length
        loss, by_cosine = cosine_gradient(p, cosines, known, student_temperature, normalise_cosines)
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
