"""Language-model teacher and HyDE against a local endpoint of 100 ms: time of the calls, and of a second run.

    python benchmarks/teacher_calls.py [--dataset ArgKP21] [--data_dir data] [--latency 0.1] [--concurrency 32]

The floor is calls x latency / concurrency. The plain implementation takes one query after the other and asks for its
documents with ten calls in flight; it is timed on a part of the calls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from llm_endpoint import KEY, MODEL  # noqa: E402

PLAIN_IN_FLIGHT, PLAIN_QUERIES = 10, 25


def run(arguments: argparse.Namespace, folder: str, url: str, *flags: str) -> tuple[float, dict]:
    """One run of the script: wall seconds, and its summary."""
    command = [sys.executable, str(ROOT / "embedding_adaptation.py"), "--experiment_name", "run", *flags]
    for name in ("dataset", "data_dir", "embedding_model"):
        command += [f"--{name}", getattr(arguments, name)]
    command += ["--cache_dir", f"{folder}/cache", "--output_dir", folder]
    started = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "BASE_URL": url, "API_KEY": KEY}
    )
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - started, json.loads(Path(folder, "run", "summary.json").read_text())


async def plain(url: str, queries: int, documents: int) -> float:
    """Seconds a call of the plain implementation."""
    import openai

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        limit = asyncio.Semaphore(PLAIN_IN_FLIGHT)

        async def ask(query: int, document: int) -> None:
            async with limit:
                messages = [{"role": "user", "content": f"Is document {document} relevant to query {query}?"}]
                await client.chat.completions.create(
                    model=MODEL, messages=messages, max_tokens=2, temperature=0, logprobs=True, top_logprobs=20
                )

        started = time.perf_counter()
        for query in range(queries):
            await asyncio.gather(*(ask(query, document) for document in range(documents)))
        return (time.perf_counter() - started) / (queries * documents)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="ArgKP21")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--embedding_model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--latency", type=float, default=0.1)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="second runs, of which the quickest counts")
    arguments = parser.parse_args()
    endpoint = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "llm_endpoint.py"), "--latency", str(arguments.latency)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{int(endpoint.stdout.readline())}"
    teacher = ["--reranker_model", MODEL, "--hyde_model", MODEL, "--computation_types", "optimized", "hyde"]
    teacher += ["--llm_concurrency", str(arguments.concurrency)]
    with tempfile.TemporaryDirectory() as folder:
        run(arguments, folder, url, "--optimize_with_gold")  # embeds the documents and queries
        _, first = run(arguments, folder, url, *teacher)
        second = min(run(arguments, folder, url, *teacher) for _ in range(arguments.repeats))
        gold = min(run(arguments, folder, url, "--optimize_with_gold")[0] for _ in range(arguments.repeats))
        per_call = asyncio.run(plain(url, PLAIN_QUERIES, 20))
    endpoint.stdin.close()
    for stage, role in (("write passages", "hyde"), ("teacher scores", "teacher")):
        calls, seconds = first["language_models"][role]["calls"], first["seconds"][stage]
        floor = calls * arguments.latency / arguments.concurrency
        print(f"{stage}: {calls} calls in {seconds:.2f} s, the floor is {floor:.2f} s: ratio {seconds / floor:.2f}")
        print(f"  plain implementation, {PLAIN_IN_FLIGHT} calls in flight: {per_call * calls:.1f} s for as many calls")
    asked = sum(usage["calls"] for usage in second[1]["language_models"].values())
    print(f"second run: {asked} calls, {second[0]:.2f} s; with the gold labels as teacher {gold:.2f} s")


if __name__ == "__main__":
    main()
