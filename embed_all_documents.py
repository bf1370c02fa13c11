"""Fill the vector cache ahead of time: the vectors and keys that runs would make, so that the runs embed nothing.

    python embed_all_documents.py --datasets Clinc150 FollowIR --embedding_models Qwen/Qwen3-Embedding-8B --gpus 0 1 2 3

Each dataset and model is embedded by a process of its own; where there are more places on GPUs than that, several
processes share the work on one. A killed one loses its last piece. With --executor ray all nodes of a Ray cluster do.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from cache_utils import slug
from dataset_loaders import check_dataset_name, load_dataset
from devices import SlotFlags, Slots, check_slot_flags, choose_device, find_slots
from errors import RunError, UserError, problems_of, run_command
from experiment_config import (
    ExperimentConfig,
    OneLineParser,
    add_flags,
    build_config,
    command_words,
    fields,
    parse_values,
    parse_words,
)
from grid_file import PLURALS
from instruction_templates import fill_templates, read_templates, templates_for
from job_runner import Beginning, Job, JobRunner, Outcome, last_line
from local_processes import LocalProcesses
from ray_cluster import check_for_ray, joined
from run_log import start_logging
from run_setup import check_cache, check_embedder, make_embedder
from store_filling import fill_store
from vector_store import VectorStore, check_store

AXES = ("dataset", "embedding_model")
FLAGS = (
    "embedding_model_revision",
    "embedder_batch_size",
    "embedder_dtype",
    "embedder_max_tokens",
    "trust_remote_code",
    "device",
    "instruction_templates",
    "cache_dir",
    "data_dir",
    "vector_store",
)


def main() -> None:
    """Embed each dataset's documents and queries with each model."""
    slot_flags, given = read_command(sys.argv[1:])
    configs = [build_config(own) for own in given]
    check_all(configs, slot_flags)
    if slot_flags.executor == "ray":
        embed_on_cluster(configs, slot_flags)
    else:
        embed_here(configs, given, slot_flags)
    if configs[0].vector_store:
        fill(configs)


def read_command(argv: Sequence[str]) -> tuple[SlotFlags, list[dict[str, str]]]:
    """The places, and the flags of each dataset with each model.

    Raises:
        UserError: a line for each thing that is wrong.
    """
    parser = OneLineParser(
        "Embed documents and queries of datasets into the cache, ahead of the runs that need them."
    )
    add_flags(parser, AXES, PLURALS, axes=True)
    add_flags(parser, FLAGS, aliases={"embedder_batch_size": "--batch_size"})
    add_flags(parser, of=SlotFlags)
    words = parse_words(parser, argv)
    defaults = {field.name: field.default for field in fields() if field.name in AXES}
    axes = [words.pop(name, [default]) for name, default in defaults.items()]
    slot_values, problems = parse_values(words, SlotFlags)
    problems += check_slot_flags(slot_values)
    shared = {name: words[name] for name in FLAGS if name in words}
    given = [dict(zip(defaults, values, strict=True)) | shared for values in dict.fromkeys(itertools.product(*axes))]
    for own in given:
        problems += [problem for problem in parse_values(own)[1] if problem not in problems]
    if problems:
        raise UserError("\n".join(problems))
    return SlotFlags(**slot_values), given


def check_all(configs: Sequence[ExperimentConfig], flags: SlotFlags) -> None:
    """Say at once what is wrong with any of them.

    Raises:
        UserError: a line each.
    """
    checks = [partial(check, config) for config in configs for check in (check_embedder, check_cache)]
    checks += [partial(check_dataset_name, dataset) for dataset in {config.dataset for config in configs}]
    checks += [partial(read_templates, path) for path in {config.instruction_templates for config in configs}]
    if store := configs[0].vector_store:
        checks.append(partial(check_store, store, must_exist=False))
    if flags.executor == "ray":
        checks.append(partial(check_for_ray, [config.device for config in configs]))
    if problems := problems_of(checks):
        raise UserError("\n".join(problems))
    if store:
        VectorStore(store).close()  # that it cannot be opened is told now, and not when all is embedded


def embed_here(
    configs: Sequence[ExperimentConfig], given: Sequence[Mapping[str, str]], slot_flags: SlotFlags
) -> None:
    """Embed on this machine, in this process where there is only one thing to do."""
    slots = find_slots(slot_flags, wants_gpu=configs[0].device in ("auto", "cuda"))
    if len(configs) == 1 and slots.parallel == 1:
        if slots.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = slots.gpus[0]
        embed(configs[0])
    else:
        embed_in_slots(given, configs[0].cache_dir, slots)


def embed(config: ExperimentConfig) -> None:
    """Embed one dataset with one model, in this process."""
    start_logging()
    prompts = read_templates(config.instruction_templates)
    device = choose_device(config.device)
    dataset = load_dataset(config.dataset, config.data_dir)
    texts = fill_templates(templates_for(prompts, config.embedding_model, dataset), dataset)
    embedder = make_embedder(config, device)

    started = time.perf_counter()
    if embedder.must_embed(texts):
        embedder.load()
    embedder.fill_cache(texts.documents, "document")
    embedder.fill_cache(texts.queries, "query")
    counts = embedder.counts
    print(
        f"{dataset.name}, {embedder.source.name}: {counts['embedded']} texts embedded, {counts['cached']} were there, "
        f"{time.perf_counter() - started:.1f} s; vectors: {embedder.cache.folder}"
    )


def fill(configs: Sequence[ExperimentConfig]) -> None:
    """Put what is embedded into the vector store."""
    start_logging()
    with VectorStore(configs[0].vector_store) as store:
        for config in configs:
            started = time.perf_counter()
            prompts = read_templates(config.instruction_templates)
            corpus = fill_store(store, config, make_embedder(config, "cpu"), prompts)
            print(
                f"{corpus.dataset}, {config.embedding_model}: {corpus.documents} documents in {store.spec}, "
                f"{time.perf_counter() - started:.1f} s; collection: {corpus.collection}"
            )


def embed_on_cluster(configs: Sequence[ExperimentConfig], flags: SlotFlags) -> None:
    """Embed each dataset with each model on all nodes of a Ray cluster, one after the other.

    Raises:
        UserError: the cluster cannot be joined.
        RunError: some of them failed.
    """
    from ray_embedding import embed_dataset

    start_logging()
    failed: list[UserError] = []
    with joined(flags.ray_address) as ray:
        for config in configs:
            try:
                print(embed_dataset(ray, config, flags), flush=True)
            except UserError as error:
                failed.append(type(error)(f"{config.dataset}, {config.embedding_model}: {error}"))
    if len(failed) == 1 == len(configs):
        raise failed[0]
    if failed:
        raise RunError("\n".join(map(str, failed)))


def embed_in_slots(given: Sequence[Mapping[str, str]], cache_dir: str, slots: Slots) -> None:
    """Embed each dataset with each model in processes of their own.

    Raises:
        RunError: some of them failed.
        KeyboardInterrupt: the user stopped the work.
    """
    places = min(slots.parallel, len(slots.gpus))  # without a GPU one process takes all cores
    jobs = {}
    for i in range(max(places, len(given))):
        own = given[i % len(given)]
        copy = f" ({i // len(given) + 1})" if places > len(given) else ""
        flags = {name: value for name, value in own.items() if name != "vector_store"}  # filled when all is embedded
        command = (sys.executable, str(Path(__file__).resolve()), *command_words(flags))
        job = Job(f"{own['dataset']}, {own['embedding_model']}{copy}", command)
        jobs[job] = f"embed-{slug(own['dataset'])}-{slug(own['embedding_model'])}-{i + 1}.log"
    logs = Path(cache_dir) / "logs"

    def begin(job: Job) -> Beginning:
        logs.mkdir(parents=True, exist_ok=True)
        return Beginning((logs / jobs[job],))

    def describe(job: Job, outcome: Outcome) -> str:
        return f"{job.name}  {outcome.reason or f'{outcome.seconds:.1f} s'}"

    with LocalProcesses(slots) as processes:
        runner = JobRunner(list(jobs), processes, begin, describe, unit="job")
        outcomes = runner.run()
    for outcome in outcomes.values():
        if outcome.state == "completed":
            print(last_line(outcome.log))
    if runner.interrupted:
        raise KeyboardInterrupt
    if failed := {job.name: outcome for job, outcome in outcomes.items() if outcome.state == "failed"}:
        lines = [f"{name}: {outcome.reason} (log: {outcome.log})" for name, outcome in failed.items()]
        raise RunError("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
