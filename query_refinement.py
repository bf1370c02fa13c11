"""The method (arXiv 2605.12487): move each query's vector until its own softmax agrees with the teacher's.

Tensors in, tensors out; knows no flag, file or dataset. ``refine_queries`` is also the library entry for a service
that has vectors and scores of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

KL_EPSILON = 1e-8
BETA_1, BETA_2, ADAM_EPSILON = 0.9, 0.999, 1e-8
# Every step reads all documents twice. On a CPU that is twice as fast when they stay in its caches.
CPU_BLOCK_BYTES = 1 << 23


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
    p = torch.softmax((scores / temperature).masked_fill(~known, -math.inf), dim=-1)
    return p.nan_to_num()  # a query without any score has no distribution, and is not moved


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

    Adam moves a coordinate by about ``lr`` a step whatever its size: the default is made for queries of unit length.
    Give normalised queries, or a larger ``lr`` for longer ones.

    Args:
        query_vectors: float32 [Q, D], as the embedding model gave them. One of length 0 has no direction and stays.
        document_vectors: float32 [Q, K, D], the scored documents of each query, of any length above 0. Rows without a
            score may hold anything.
        scores: float32 [Q, K], the teacher's; NaN where there is none. Such documents take no part. A query with
            fewer than two scores keeps its vector.
        lr: Adam's learning rate, in units of the query vector's coordinates.
        num_steps: gradient steps; 0 returns the queries as they are.
        teacher_temperature: divides the scores.
        student_temperature: divides the cosines.
        normalise_scores: min-max normalise each query's scores first.
        normalise_cosines: min-max normalise each query's cosines before their softmax, at every step.
        trajectory_every: also return losses, and the vectors at every so many steps.

    Arrays and other dtypes are taken too and turned into float32 tensors.

    Returns:
        Refinement.

    Raises:
        ValueError: shapes do not fit together, or a score is infinite; says what was expected.
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
    p = teacher_distribution(scores, known, temperature=teacher_temperature, normalise=normalise_scores)
    size = len(query_vectors)
    if query_vectors.device.type == "cpu":
        size = CPU_BLOCK_BYTES // max(1, document_vectors[0].nbytes) if size else 0
    with _one_thread(query_vectors.device):
        parts = (tensor.split(max(1, size)) for tensor in (query_vectors, document_vectors, p, known))
        return concatenate(
            [
                _refine_block(*block, lr, num_steps, student_temperature, normalise_cosines, trajectory_every)
                for block in zip(*parts, strict=True)
            ]
        )


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


def _refine_block(
    query_vectors: Tensor,
    document_vectors: Tensor,
    p: Tensor,
    known: Tensor,
    lr: float,
    num_steps: int,
    student_temperature: float,
    normalise_cosines: bool,
    trajectory_every: int | None,
) -> Refinement:
    """Refine queries [Q, D] towards the teacher's distribution p [Q, K] over their known [Q, K] documents."""
    moves = (known.sum(-1, keepdim=True) >= 2) & (query_vectors != 0).any(-1, keepdim=True)
    # What does not move goes through the arithmetic all the same; its vector is put back at the end.
    q = torch.where(moves, query_vectors, torch.ones_like(query_vectors))
    if not known.all():
        document_vectors = document_vectors.masked_fill(~known.unsqueeze(-1), 0.0)
    known = known | ~moves
    documents = normalize(document_vectors, dim=-1)
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
