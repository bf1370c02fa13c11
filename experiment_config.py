"""Every flag of an experiment, written down once: its default, its meaning, what it allows.

The commands, the batch runner, the README's table (held by a test) and each run's ``config.json`` all read this
dataclass. It knows no dataset, no model and no file: what a name stands for is checked in the room that owns it.
A command with flags of its own declares them in a dataclass of the same kind; the functions here read either.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from errors import UserError

# The refinement methods, and the flags that are about each.
METHOD_FLAGS = {
    "adam_kl": ("lr", "num_steps"),
    "refit": ("lr", "num_steps"),
    "rocchio": ("rocchio_alpha",),
    "ridge": ("ridge_lambda", "neutral_score"),
    "whitened_ridge": ("ridge_lambda", "neutral_score"),
    "centred_ridge": ("ridge_lambda", "neutral_score"),
}
# What a method fills in where the user set nothing: for refit from arXiv 2305.11744, as given by the protocol.
METHOD_DEFAULTS = {"refit": {"lr": 0.005}, "centred_ridge": {"neutral_score": 0.2}}
# What can be computed beside the original query, and the variants that belong to it: with a refined query comes its
# control, the scored documents put in the teacher's order and no other moved.
COMPUTED = {
    "optimized": ("reranked", "optimized_embeddings"),
    "hyde": ("hyde",),
    "optimized_hyde": ("reranked_hyde", "optimized_hyde_embeddings"),
    "gated_hyde": ("gated_hyde",),
}
SIMULATED_TEACHER = "gold-noisy"
OF_SIMULATED_TEACHER = ("teacher_flip_rate", "teacher_noise")
HERE = Path(__file__).resolve().parent
TRUE_WORDS = ("true", "1", "yes")
FALSE_WORDS = ("false", "0", "no")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a flag allows.

    Attributes:
        accepts: test of the value.
        allowed: the words that finish 'must be …'.
        names: the names there are, where they are few.
        several: the flag takes several words, kept as one text with commas between them.
    """

    accepts: Callable[[Any], bool]
    allowed: str
    names: tuple[str, ...] = ()
    several: bool = False


POSITIVE_NUMBER = Rule(lambda value: math.isfinite(value) and value > 0, "a finite number above 0")
SCORE = Rule(lambda value: 0 <= value <= 1, "a number from 0 to 1")
POSITIVE = Rule(lambda value: value >= 1, "a whole number, 1 or more")
NOT_NEGATIVE = Rule(lambda value: value >= 0, "a whole number, 0 or more")
NOT_EMPTY = Rule(lambda value: bool(value and value.strip()), "a name, not an empty text")
NOT_EMPTY_IF_SET = Rule(lambda value: value is None or bool(value.strip()), "a name, not an empty text")
NOT_BELOW_ZERO = Rule(lambda value: 0 <= value <= 1e6, "a number from 0 to 1,000,000")
PRIOR_STRENGTH = Rule(lambda value: 1e-6 <= value <= 1e9, "a number from 1e-6 to 1e9")
RATE = Rule(lambda value: 0 < value <= 1e6, "a number above 0, at most 1,000,000")
SHARE = Rule(lambda value: 0 <= value <= 1, "a share from 0 to 1, such as 0.05")
LONGEST_NAME = 240  # bytes; a file name may have 255
DEVICE = Rule(
    lambda value: bool(re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", value)), "auto, cpu, mps, cuda or cuda:N"
)


def folder_name(longest: int = LONGEST_NAME) -> Rule:
    """A rule for the name of one folder, or the beginning of one."""
    return Rule(
        lambda value: bool(re.fullmatch(r"[\w.+=,@-]+", value))
        and value not in (".", "..")
        and len(value.encode()) <= longest,
        f"the name of one folder (letters, digits and . _ - + = , @; at most {longest} bytes)",
    )


def one_of(*names: str) -> Rule:
    """A rule for a value that is one of ``names``."""
    return Rule(lambda value: value in names, "one of " + ", ".join(names), names)


def some_of(*names: str) -> Rule:
    """A rule for a value that is one or several of ``names``, with commas between them."""
    allowed = "one or several of " + ", ".join(names)
    return Rule(lambda value: set(value.split(",")) <= set(names), allowed, names, several=True)


def _are_prices(value: str | None) -> bool:
    try:
        numbers = [float(word) for word in value.split(",")] if value is not None else [0.0, 0.0]
    except ValueError:
        return False
    return len(numbers) == 2 and all(math.isfinite(number) and number >= 0 for number in numbers)


def is_store(value: str) -> bool:
    """Whether a text names a vector store: its kind, and a file or an address."""
    kind, _, place = value.partition(":")
    if not place.startswith(("http://", "https://")):
        return kind == "milvus" and place.endswith(".db")
    try:
        address = urlsplit(place)
        return kind == "milvus" and bool(address.hostname) and address.port != 0 and "@" not in address.netloc
    except ValueError:  # a port that is none
        return False


PRICES = Rule(_are_prices, "two numbers, 0 or more: the prices of input and of output", several=True)


def flag(default: Any, help: str, rule: Rule | None = None, *, changes_results: bool = True) -> Any:  # noqa: A002
    """Declare one flag: ``changes_results`` says whether two runs that differ in it may differ in their figures."""
    return dataclasses.field(
        default=default, metadata={"help": help, "rule": rule, "changes_results": changes_results}
    )


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """The flags of one run. Build it with :func:`parse_arguments` or :func:`build_config`, which check it."""

    # What is compared
    embedding_model: str = flag(
        "Qwen/Qwen3-Embedding-0.6B", "embedding model: a sentence-transformers name on the hub, or a folder", NOT_EMPTY
    )
    embedding_model_revision: str = flag("main", "branch, tag or commit of a hub model", NOT_EMPTY)
    dataset: str = flag(
        "RealScholarQuery",
        "Clinc150, Banking77, ArgKP21, NFCorpus, FollowIR, RealScholarQuery, Demo, or a folder of your own",
        NOT_EMPTY,
    )
    reranker_model: str = flag(
        "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
        "teacher: LiteLLM/NAME or NAME (language model behind BASE_URL: a call for each of --total_scores documents a "
        "query), OpenAI/NAME; free, run here: cross-encoder/NAME, CrossEncoder/NAME, CausalLM/NAME, "
        "jhu-clsp/FollowIR-7B, or a cross-encoder's folder; without a model: bm25, gold-noisy (simulated from labels)",
        NOT_EMPTY,
    )
    hyde_model: str | None = flag(
        None,
        "language model that writes HyDE passages (LiteLLM/NAME, OpenAI/NAME): --hyde_samples calls a query; "
        "optimized_hyde asks the teacher for scores of its own",
        NOT_EMPTY_IF_SET,
    )
    computation_types: str = flag(
        "all",
        "variants beside the original query, one or several; 'all' is the first three, without HyDE when there is no "
        "--hyde_model; gated_hyde (a heuristic of our own) refines original or HyDE, whichever fits the teacher better",
        some_of("optimized", "hyde", "optimized_hyde", "gated_hyde", "all"),
    )

    # The method
    refinement_method: str = flag(
        "adam_kl",
        "how scores move a query: adam_kl = gradient steps as in the paper, refit = as in ReFIT, rocchio, ridge = "
        "Bayesian regression, whitened_ridge = with the corpus' covariance, centred_ridge = with its mean, too",
        one_of(*METHOD_FLAGS),
    )
    lr: float = flag(
        1e-4, "learning rate of Adam, for adam_kl and refit; with refit the default is 0.005", RATE
    )
    num_steps: int = flag(
        100, "gradient steps a query, for adam_kl and refit; with 0 the scores move nothing", NOT_NEGATIVE
    )
    rocchio_alpha: float = flag(2.0, "how far rocchio moves a query, in its lengths", NOT_BELOW_ZERO)
    ridge_lambda: float = flag(
        3.0, "prior strength of the three ridges; the larger, the less a query moves", PRIOR_STRENGTH
    )
    neutral_score: float = flag(
        0.5, "score that the ridges take for neither relevant nor irrelevant (centred_ridge: 0.2 by default)", SCORE
    )
    prf_weight: float = flag(
        0.0,
        "pseudo relevance feedback with any method: pull each query by this much to what stands out among its next "
        "documents, then refine again; asks nobody; helps where a query has a hundred relevant documents or more, may "
        "hurt elsewhere; 0 is off, try 0.3",
        NOT_BELOW_ZERO,
    )
    prf_documents: int = flag(500, "how many of the next documents it looks at", POSITIVE)
    total_scores: int = flag(20, "documents a teacher scores for each query", POSITIVE)
    scores_from_top: int = flag(
        20, "how many of them are the first ranks; the others are drawn from the rest (at most --total_scores)",
        NOT_NEGATIVE,
    )
    feedback_rounds: int = flag(
        1,
        "spend --total_scores in so many rounds: after each the queries are refined and rank again, and the next round "
        "takes its share of --total_scores and --scores_from_top from what is not scored yet",
        POSITIVE,
    )
    optimize_with_gold: bool = flag(False, "teacher = the gold labels: an oracle, for reference")
    teacher_flip_rate: float = flag(0.1, "gold-noisy: share of labels that it gets wrong", SHARE)
    teacher_noise: float = flag(0.08, "gold-noisy: standard deviation of its scores around 0.1 and 0.9", NOT_BELOW_ZERO)
    refit: bool = flag(
        False,
        "ReFIT's preset: --refinement_method refit (min-max normalised scores, temperature 2), lr 0.005, its "
        "cross-encoder (unless you set these)",
    )
    random_seed: int = flag(
        42, "seed of the sampled ranks, of the order in groupwise questions, and of gold-noisy", NOT_NEGATIVE
    )

    # Language models and HyDE
    llm_score_mode: str = flag(
        "auto",
        "how a language model scores: yes_no = probability of a yes, verbalized = a number it says, groupwise = "
        "numbers for all sampled documents of a query in one call; auto = yes_no where the endpoint gives log "
        "probabilities, else verbalized for the whole run",
        one_of("auto", "yes_no", "verbalized", "groupwise"),
    )
    judge_max_characters: int = flag(16000, "a language model sees this much of a document", POSITIVE)
    hyde_samples: int = flag(1, "HyDE passages a query; their vectors are averaged", POSITIVE)
    hyde_average_query: bool = flag(
        False, "average the passages' vectors with the query's, as the original HyDE paper does"
    )
    max_failed_scores: float = flag(
        0.05, "share of scores that may be missing; above it the run ends and keeps the others", SHARE,
        changes_results=False,
    )
    llm_concurrency: int = flag(
        32, "calls in flight at once", Rule(lambda value: 1 <= value <= 1000, "a whole number from 1 to 1000"),
        changes_results=False,
    )
    llm_timeout: float = flag(120.0, "seconds a call may take", POSITIVE_NUMBER, changes_results=False)
    llm_max_retries: int = flag(
        6, "more tries of a call that failed but may get better (429, 5xx, dropped, timed out)", NOT_NEGATIVE,
        changes_results=False,
    )
    price_per_million: str | None = flag(
        None,
        "price of a million input and of a million output tokens, such as 0.15 0.6, for all language models of the "
        "run: adds the cost to the summary",
        PRICES, changes_results=False,
    )

    # Models: how they run
    embedder_batch_size: int = flag(
        10, "texts in an embedding batch (more when they are short); halved when memory runs out", POSITIVE,
        changes_results=False,
    )
    embedder_dtype: str = flag(
        "auto",
        "precision of the embedding model; auto = bfloat16 for the large models known here, else float32",
        one_of("auto", "float32", "bfloat16", "float16"),
    )
    embedder_max_tokens: int = flag(8192, "texts are cut to this many tokens, or to the model's own limit", POSITIVE)
    reranker_batch_size: int = flag(
        32, "query-document pairs in a batch of a local reranker", POSITIVE, changes_results=False
    )
    reranker_dtype: str = flag(
        "auto",
        "precision of a local reranker; auto = float32 for cross-encoders, bfloat16 for causal language models",
        one_of("auto", "float32", "bfloat16", "float16"),
    )
    reranker_max_tokens: int = flag(
        8192,
        "a local reranker's pairs are cut to this many tokens, or to the model's own limit",
        Rule(lambda value: value >= 16, "a whole number, 16 or more"),
    )
    trust_remote_code: bool = flag(
        False, "let a model run Python code that comes with it; read that code first", changes_results=False
    )
    device: str = flag(
        "auto", "auto (cuda, then mps, then cpu), cpu, mps, cuda or cuda:N", DEVICE, changes_results=False
    )

    # Large corpora
    vector_store: str | None = flag(
        None,
        "search the corpus where it lives, and never load it: milvus:FILE.db or milvus:http://HOST:PORT, filled by "
        "embed_all_documents.py; left out: every candidate is ranked by the cached vectors",
        Rule(
            lambda value: value is None or is_store(value),
            "milvus:FILE.db or milvus:http://HOST:PORT (a password goes into MILVUS_TOKEN in the environment)",
        ),
    )
    search_depth: int = flag(
        1000, "results a query in a --vector_store; metrics are those of a ranking that is cut there, and named so",
        Rule(lambda value: 1 <= value <= 16_384, "a whole number from 1 to 16384, the most that Milvus gives"),
    )
    raw_scores: str = flag(
        "all", "which rows raw score files have: all candidates of each query, only those scored, or no file",
        one_of("all", "scored", "none"), changes_results=False,
    )
    raw_scores_depth: int | None = flag(
        None, "of all, only so many first ranks of each query, beside the scored documents",
        Rule(lambda value: value is None or value >= 1, "a whole number, 1 or more"), changes_results=False,
    )

    # Files
    instruction_templates: str = flag(
        str(HERE / "instruction_templates.yaml"), "YAML with query and document templates and instructions", NOT_EMPTY
    )
    experiment_name: str | None = flag(
        None, "folder of the results in --output_dir; made from dataset, model and a hash when left out", folder_name(),
        changes_results=False,
    )
    output_dir: str = flag("output", "where results go", NOT_EMPTY, changes_results=False)
    cache_dir: str = flag(
        "cache", "where vectors, scores and passages are kept between runs", NOT_EMPTY, changes_results=False
    )
    data_dir: str = flag("data", "where datasets lie or are downloaded to", NOT_EMPTY, changes_results=False)
    save_tensors: bool = flag(
        False, "also save vectors, trajectories and losses (safetensors)", changes_results=False
    )

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants of the query that are measured, the original first."""
        asked = set(self.computation_types.split(","))
        if "all" in asked:
            asked |= {"optimized", "hyde", "optimized_hyde"} if self.hyde_model else {"optimized"}
        return ("embeddings", *(variant for name, own in COMPUTED.items() if name in asked for variant in own))

    @property
    def needs_teacher(self) -> bool:
        """Whether any variant is refined."""
        return not set(self.variants) <= {"embeddings", "hyde"}

    @property
    def needs_hyde(self) -> bool:
        """Whether any variant starts from hypothetical documents."""
        return any("hyde" in variant for variant in self.variants)

    @property
    def method_flags(self) -> dict[str, Any]:
        """The flags that the refinement method has, by name."""
        return {name: getattr(self, name) for name in METHOD_FLAGS[self.refinement_method]}

    @property
    def prices(self) -> tuple[float, ...] | None:
        """``price_per_million`` as numbers: input, output."""
        return tuple(map(float, self.price_per_million.split(","))) if self.price_per_million else None

    def result_flags(self) -> dict[str, Any]:
        """The flags that may change a figure of this run, by name: not those of other methods than its own."""
        flags = {f.name: getattr(self, f.name) for f in fields() if f.metadata["changes_results"]}
        ignored = ignored_flags(self.refinement_method, self.prf_weight)
        if self.vector_store is None:
            ignored |= {"vector_store", "search_depth"}
        return {name: value for name, value in flags.items() if name not in ignored}


def idle_flags(config: ExperimentConfig) -> list[str]:
    """The flags that were set to something else than their default and say nothing in this run."""
    ignored = ignored_flags(config.refinement_method, config.prf_weight)
    if config.optimize_with_gold or config.reranker_model != SIMULATED_TEACHER:
        ignored |= set(OF_SIMULATED_TEACHER)
    if config.vector_store is None:
        ignored |= {"search_depth"}
    if config.raw_scores != "all":
        ignored |= {"raw_scores_depth"}
    return [f.name for f in fields() if f.name in ignored and getattr(config, f.name) != f.default]


def ignored_flags(method: str, prf_weight: float) -> set[str]:
    """The flags that say nothing in a run with this refinement method and pseudo relevance feedback."""
    ignored = {name for own in METHOD_FLAGS.values() for name in own} - set(METHOD_FLAGS[method])
    return ignored if prf_weight else ignored | {"prf_documents"}


# What --refit fills in where the user set nothing.
REFIT_PRESET = {
    "refinement_method": "refit",
    "reranker_model": "cross-encoder/ms-marco-MiniLM-L-6-v2",
}


def fields(of: type = ExperimentConfig) -> tuple[dataclasses.Field, ...]:
    """All flags of a dataclass, in the order of ``--help``."""
    return dataclasses.fields(of)


@functools.cache
def _value_types(of: type) -> dict[str, type]:
    """By flag: ``str`` for ``str | None``, the annotation itself otherwise."""
    types_ = {}
    for name, hint in typing.get_type_hints(of).items():
        if isinstance(hint, types.UnionType):
            hint = next(option for option in typing.get_args(hint) if option is not type(None))
        types_[name] = hint
    return types_


def shown_default(field: dataclasses.Field) -> str:
    """The default of a flag as people read it, in ``--help`` and in the README."""
    if field.default is None:
        return "not set"
    return Path(field.default).name if field.name == "instruction_templates" else str(field.default)


def parse_value(field: dataclasses.Field, text: str, of: type = ExperimentConfig) -> Any:
    """Turn the text given for a flag into its value and check it.

    Raises:
        UserError: one line naming the flag, what was given and what is allowed.
    """
    kind, rule = _value_types(of)[field.name], field.metadata["rule"]
    if "\0" in text:
        raise UserError(f"--{field.name}: got {text!r}, must not contain a NUL character")
    if kind is bool:
        if text.lower() not in TRUE_WORDS + FALSE_WORDS:
            raise UserError(f"--{field.name}: got {text!r}, must be True or False")
        return text.lower() in TRUE_WORDS
    if rule and rule.several:
        text = ",".join(re.split(r"[,\s]+", text.strip()))
    try:
        value = kind(text)
    except ValueError:
        allowed = rule.allowed if rule else {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--{field.name}: got {text!r}, must be {allowed}") from None
    if rule and not rule.accepts(value):
        raise UserError(f"--{field.name}: got {text!r}, must be {rule.allowed}")
    return value


def parse_values(given: Mapping[str, str], of: type = ExperimentConfig) -> tuple[dict[str, Any], list[str]]:
    """The values of the flags of a dataclass that are among ``given``, and a line for each that is wrong."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field in fields(of):
        if field.name in given:
            try:
                values[field.name] = parse_value(field, given[field.name], of)
            except UserError as error:
                problems.append(str(error))
    return values, problems


def build_config(given: Mapping[str, str]) -> ExperimentConfig:
    """Make a config from the flags the user set (texts by name); presets fill only what is not among them.

    Raises:
        UserError: one line for each thing that is wrong, all at once.
    """
    values, problems = parse_values(given)
    if values.get("refit"):
        values = {**REFIT_PRESET, **values}
    method = values.get("refinement_method", "adam_kl")
    if values.get("refit") and method != "refit":
        problems.append(f"--refit: cannot be used with --refinement_method {method}; it means refit")
    values = {**METHOD_DEFAULTS.get(method, {}), **values}
    defaults = ExperimentConfig()
    total = values.get("total_scores", defaults.total_scores)
    if "scores_from_top" not in given:
        values["scores_from_top"] = min(defaults.scores_from_top, total)
    elif values.get("scores_from_top", 0) > total:
        problems.append(
            f"--scores_from_top: got {values['scores_from_top']}, must be at most --total_scores, which is {total}"
        )
    depth = values.get("search_depth", defaults.search_depth)
    if values.get("vector_store") and total > depth:
        problems.append(f"--search_depth: got {depth}, must be at least --total_scores, which is {total}")
    if (rounds := values.get("feedback_rounds", 1)) > total:
        problems.append(f"--feedback_rounds: got {rounds}, must be at most --total_scores, which is {total}")
    asked = values.get("computation_types", "all").split(",")
    if not values.get("hyde_model") and (needs := [name for name in asked if "hyde" in name]):
        problems.append(f"--computation_types: {needs[0]!r} needs --hyde_model, which is not set")
    if problems:
        raise UserError("\n".join(problems))
    return ExperimentConfig(**values)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line each, without the usage text; flags must be spelled out.

    Args:
        description: of the command.
        words: what the command takes beside flags, for ``--help``.
    """

    def __init__(self, description: str, words: str = "") -> None:
        super().__init__(description=description, usage=f"%(prog)s {words}[--flag VALUE ...]", allow_abbrev=False)

    def error(self, message: str) -> typing.NoReturn:
        """Raise the complaint for the command to show; argparse would print its usage first."""
        raise UserError(message)


def add_flags(
    parser: argparse.ArgumentParser,
    only: Iterable[str] | None = None,
    aliases: Mapping[str, str] | None = None,
    *,
    of: type = ExperimentConfig,
    axes: bool = False,
    defaults: Mapping[str, str] | None = None,
) -> None:
    """Add the flags of a dataclass to ``parser``; values stay texts until checked.

    Args:
        parser: of a command.
        only: names of the flags to add; None for all.
        aliases: flag to another option that means the same.
        of: the dataclass.
        axes: every flag takes several values; where it takes several words as one value, they have commas between them.
        defaults: what to show instead of the dataclass's default.
    """
    wanted = set(only) if only is not None else {f.name for f in fields(of)}
    for field in fields(of):
        if field.name not in wanted:
            continue
        options = [f"--{field.name}"] + ([aliases[field.name]] if aliases and field.name in aliases else [])
        kind, rule = _value_types(of)[field.name], field.metadata["rule"]
        names = "|".join(rule.names) if rule else ""
        default = (defaults or {}).get(field.name) or shown_default(field)
        how = {"nargs": "?", "const": "True"} if kind is bool else {}
        if axes:
            how = {"nargs": "*" if kind is bool else "+", "action": "append"}
        elif rule and rule.several:
            how = {"nargs": "+"}
        parser.add_argument(
            *options,
            dest=field.name,
            default=argparse.SUPPRESS,
            metavar=names or {bool: "True|False", int: "N", float: "X", str: "TEXT"}[kind],
            help=f"{field.metadata['help']} (default: {default})".replace("%", "%%"),
            **how,
        )


def parse_words(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, str | list[str]]:
    """Parse ``argv`` strictly and return what was set: a text, or a list of texts where the flag is an axis.

    Raises:
        UserError: naming the unknown flag and the nearest known one.
    """
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        lines = []
        # argparse lists a value behind an unknown flag as a word of its own
        for before, word in itertools.pairwise(["", *unknown]):
            if before.startswith("-") and not word.startswith("-"):
                continue
            name = word.split("=")[0]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            near = [option for option in known if option.endswith(name.replace("--", "_"))] or near
            hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the flags"
            lines.append(f"unknown {'flag' if word.startswith('-') else 'argument'} {word!r}; {hint}")
        raise UserError("\n".join(lines))
    return {name: _values(given) for name, given in vars(namespace).items()}


def _values(given: Any) -> str | list[str]:
    """The value of a flag, or those of an axis, which may be given several times (a switch without a word, too)."""
    if not isinstance(given, list):
        return given
    if any(isinstance(words, list) for words in given):
        return [word for words in given for word in words or ["True"]]
    return " ".join(given)


def command_words(given: Mapping[str, str]) -> list[str]:
    """Flags that were set, as the words of a command line that :func:`parse_words` reads back."""
    words = []
    for name in (field.name for field in fields() if field.name in given):
        value = given[name]
        words += [f"--{name}={value}"] if value.startswith("-") or not value else [f"--{name}", value]
    return words


def parse_arguments(description: str, argv: Sequence[str] | None = None) -> ExperimentConfig:
    """Read the command line of a script that takes every experiment flag."""
    parser = OneLineParser(description)
    add_flags(parser)
    return build_config(parse_words(parser, sys.argv[1:] if argv is None else argv))


def short_hash(value: Any) -> str:
    """Twelve hexadecimal digits over a JSON-able value; the same on every machine and in every process."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
