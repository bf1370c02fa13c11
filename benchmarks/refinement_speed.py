"""Refinement of many queries at once against plain loops in the same process, and the methods against each other.

    python benchmarks/refinement_speed.py [--queries 150] [--documents 20] [--repeats 3]

At 384 and at 4,096 dimensions: our batched loop of the paper's method against one Adam loop a query, with the largest
difference of the two results; then each method without steps against our batched loop, and against a plain batched one:
the gradient written out for all queries at once, without keeping documents in the processor's caches.
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

from query_refinement import METHODS, corpus_statistics, refine_queries

LR, STEPS, EPSILON = 1e-4, 100, 1e-8


def plain_refinement(q0: Tensor, documents: Tensor, scores: Tensor) -> Tensor:
    """One query with autograd and torch's Adam, as one would first write it."""
    q = q0.clone().requires_grad_(True)
    adam = torch.optim.Adam([q], lr=LR)
    p = torch.softmax(scores, dim=-1)
    for _ in range(STEPS):
        s = torch.softmax(torch.nn.functional.cosine_similarity(q[None], documents), dim=-1)
        loss = (p * torch.log((p + EPSILON) / (s + EPSILON))).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return q.detach()


def plain_batch(q: Tensor, documents: Tensor, scores: Tensor) -> Tensor:
    """All queries at once with the gradient and Adam written out, as one would next write it."""
    documents = torch.nn.functional.normalize(documents, dim=-1)
    p = torch.softmax(scores, dim=-1)
    first, second = torch.zeros_like(q), torch.zeros_like(q)
    for step in range(1, STEPS + 1):
        length = q.norm(dim=-1, keepdim=True)
        cosines = torch.bmm(documents, q.unsqueeze(-1)).squeeze(-1) / length
        s = torch.softmax(cosines, dim=-1)
        by_s = -p / (s + EPSILON)
        by_cosine = s * (by_s - (s * by_s).sum(-1, keepdim=True))
        gradient = torch.bmm(by_cosine.unsqueeze(1), documents).squeeze(1) / length
        gradient = gradient - (by_cosine * cosines).sum(-1, keepdim=True) * q / length**2
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        q = q - LR * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + EPSILON)
    return q


def best_seconds(work: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """The quickest of ``repeats`` calls, and the result."""
    seconds, result = [], None
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def main() -> None:
    """Measure all at two dimensions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=150)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[384, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{args.queries} queries x {args.documents} documents, {STEPS} steps, {threads} threads for the plain loops")
    for dimension in args.dimensions:
        torch.manual_seed(0)
        queries = torch.nn.functional.normalize(torch.randn(args.queries, dimension), dim=-1)
        documents = torch.randn(args.queries, args.documents, dimension) / dimension**0.5 + queries[:, None]
        scores = torch.rand(args.queries, args.documents)
        inputs = (queries, documents, scores)
        corpus = corpus_statistics(torch.nn.functional.normalize(documents.flatten(0, 1), dim=-1))
        plain, one_by_one = best_seconds(
            lambda inputs=inputs: torch.stack([plain_refinement(*own) for own in zip(*inputs, strict=True)]), 1
        )
        # On one thread like ours: with two, waiting for each other costs it more than they bring.
        torch.set_num_threads(1)
        batch, _ = best_seconds(lambda inputs=inputs: plain_batch(*inputs), args.repeats)
        torch.set_num_threads(threads)
        ours, together = best_seconds(lambda inputs=inputs: refine_queries(*inputs).vectors, args.repeats)
        difference = (together - one_by_one).abs().max()
        print(
            f"{dimension} dimensions: one by one {plain:.2f} s, plain batch {batch:.2f} s, batched {ours:.3f} s: "
            f"{plain / ours:.0f} x; largest difference {difference:.1e}"
        )
        for method in METHODS[1:]:
            seconds, _ = best_seconds(
                lambda inputs=inputs, method=method, corpus=corpus: refine_queries(
                    *inputs, method=method, corpus=corpus
                ).vectors,
                args.repeats + 3,
            )
            print(
                f"  {method:<15} {1000 * seconds:7.1f} ms: {batch / seconds:6.1f} x as fast as the plain batch of the "
                f"paper's, {ours / seconds:5.1f} x as ours"
            )


if __name__ == "__main__":
    main()
