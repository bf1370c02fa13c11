"""Refinement of many queries at once against one Adam loop a query, in the same process.

    python benchmarks/refinement_speed.py [--queries 150] [--documents 20] [--repeats 3]

Prints the ratio at 384 and at 4,096 dimensions, and the largest difference between the two results.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from query_refinement import refine_queries


def plain_refinement(q0: Tensor, documents: Tensor, scores: Tensor) -> Tensor:
    """One query with autograd and torch's Adam, as one would first write it."""
    q = q0.clone().requires_grad_(True)
    adam = torch.optim.Adam([q], lr=1e-4)
    p = torch.softmax(scores, dim=-1)
    for _ in range(100):
        s = torch.softmax(torch.nn.functional.cosine_similarity(q[None], documents), dim=-1)
        loss = (p * torch.log((p + 1e-8) / (s + 1e-8))).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return q.detach()


def best_seconds(work: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """The quickest of ``repeats`` calls, and the result."""
    seconds, result = [], None
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def main() -> None:
    """Measure both at two dimensions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=150)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.queries} queries x {args.documents} documents, 100 steps, {torch.get_num_threads()} threads")
    for dimension in (384, 4096):
        torch.manual_seed(0)
        queries = torch.nn.functional.normalize(torch.randn(args.queries, dimension), dim=-1)
        documents = torch.randn(args.queries, args.documents, dimension) / dimension**0.5 + queries[:, None]
        scores = torch.rand(args.queries, args.documents)
        inputs = queries, documents, scores
        fast, together = best_seconds(lambda inputs=inputs: refine_queries(*inputs).vectors, args.repeats)
        slow, one_by_one = best_seconds(
            lambda inputs=inputs: torch.stack([plain_refinement(*query) for query in zip(*inputs, strict=True)]),
            args.repeats,
        )
        difference = (together - one_by_one).abs().max().item()
        print(
            f"{dimension:5d} dimensions: one loop a query {slow:.2f} s, all at once {fast:.3f} s, "
            f"ratio {slow / fast:.0f}; largest difference {difference:.1e}"
        )


if __name__ == "__main__":
    main()
