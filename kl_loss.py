"""What gradient descent makes small: how far the query's softmax over its documents is from the teacher's.

Tensors in, tensors out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KL_EPSILON = 1e-8


def min_max(values: Tensor, known: Tensor, equal: float = 0.0) -> Tensor:
    """Scale each row's known values to [0, 1]; a row of equal values becomes ``equal``. [Q, K] in and out."""
    low = values.masked_fill(~known, math.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~known, -math.inf).amax(-1, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (values - low) / spread, equal)


def teacher_distribution(scores: Tensor, known: Tensor, temperature: float = 1.0) -> Tensor:
    """``p = softmax(scores / temperature)`` over the known scores, [Q, K]; 0 where a score is not known."""
    p = torch.softmax((scores / temperature).masked_fill(~known, -math.inf), dim=-1)
    return p.nan_to_num()  # a query without any score has no distribution, and is not moved


def loss_and_gradient(p: Tensor, cosines: Tensor, known: Tensor, normalise: bool) -> tuple[Tensor, Tensor]:
    """The loss and its derivative by the cosines, written out.

    With ``s = softmax(z)`` and ``L = Σ p·log((p + ε) / (s + ε))``: ``∂L/∂s = −p / (s + ε)`` and
    ``∂L/∂z = s ⊙ (∂L/∂s − Σ s·∂L/∂s)``. ``z`` is the cosines ``c`` themselves, or ``(c − min) / (max − min)``.
    Through the latter, ``∂L/∂c = (∂L/∂z − [c is min]·Σ (1 − z)·∂L/∂z − [c is max]·Σ z·∂L/∂z) / (max − min)``, the
    bracketed terms shared evenly among equal minima and among equal maxima.

    Args:
        p: teacher's distribution, float32 [Q, K].
        cosines: float32 [Q, K].
        known: bool [Q, K].
        normalise: min-max normalise the cosines first.

    Returns:
        loss float32 [Q] and derivative float32 [Q, K].
    """
    logits = min_max(cosines, known) if normalise else cosines
    s = torch.softmax(logits.masked_fill(~known, -math.inf), dim=-1)
    loss = (p * torch.log((p + KL_EPSILON) / (s + KL_EPSILON))).sum(-1)
    by_s = -p / (s + KL_EPSILON)
    gradient = s * (by_s - (s * by_s).sum(-1, keepdim=True))
    if normalise:
        low = cosines.masked_fill(~known, math.inf).amin(-1, keepdim=True)
        high = cosines.masked_fill(~known, -math.inf).amax(-1, keepdim=True)
        at_low, at_high = (cosines == low) & known, (cosines == high) & known
        through_low = ((1 - logits) * gradient).sum(-1, keepdim=True) / at_low.sum(-1, keepdim=True)
        through_high = (logits * gradient).sum(-1, keepdim=True) / at_high.sum(-1, keepdim=True)
        gradient = gradient - at_low * through_low - at_high * through_high
        gradient = torch.where(high > low, gradient / (high - low), 0.0)
    return loss, gradient
