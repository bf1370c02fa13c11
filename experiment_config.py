"""Every flag of an experiment, written down once: its default, its meaning, what it allows.

The commands, the batch runner, the README's table (held by a test) and each run's ``config.json`` all read this
dataclass. It knows no dataset, no model and no file: what a name stands for is checked in the room that owns it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
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

from errors import UserError

HERE = Path(__file__).resolve().parent
TRUE_WORDS = ("true", "1", "yes")
FALSE_WORDS = ("false", "0", "no")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a flag allows: a test of the value, the words that finish 'must be …', and the names where they are few."""

    accepts: Callable[[Any], bool]
    allowed: str
    names: tuple[str, ...] = ()


POSITIVE_NUMBER = Rule(lambda value: math.isfinite(value) and value > 0, "a finite number above 0")
POSITIVE = Rule(lambda value: value >= 1, "a whole number, 1 or more")
NOT_NEGATIVE = Rule(lambda value: value >= 0, "a whole number, 0 or more")
NOT_EMPTY = Rule(lambda value: bool(value and value.strip()), "a name, not an empty text")
FOLDER_NAME = Rule(
    lambda value: value is None or (bool(re.fullmatch(r"[\w.+=,@-]+", value)) and value not in (".", "..")),
    "the name of one folder (letters, digits and . _ - + = , @)",
)


def one_of(*names: str) -> Rule:
    """A rule for a value that is one of ``names``."""
    return Rule(lambda value: value in names, "one of " + ", ".join(names), names)


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
        "teacher that scores the sampled documents: cross-encoder/NAME, or a folder with a cross-encoder (this version "
        "cannot ask language models)",
        NOT_EMPTY,
    )
    hyde_model: str | None = flag(None, "language model that writes HyDE passages (not in this version)")
    computation_types: str = flag(
        "all",
        "variants beside the original query; 'all' leaves HyDE out when there is no --hyde_model",
        one_of("optimized", "hyde", "optimized_hyde", "all"),
    )

    # The method
    lr: float = flag(1e-4, "learning rate of Adam", POSITIVE_NUMBER)
    num_steps: int = flag(100, "gradient steps a query; 0 leaves every query where it was", NOT_NEGATIVE)
    total_scores: int = flag(20, "documents a teacher scores for each query", POSITIVE)
    scores_from_top: int = flag(
        20, "how many of them are the first ranks; the others are drawn from the rest (at most --total_scores)",
        NOT_NEGATIVE,
    )
    optimize_with_gold: bool = flag(False, "teacher = the gold labels: an oracle, for reference")
    refit: bool = flag(
        False,
        "ReFIT's preset: min-max normalised scores, temperature 2, lr 0.005, its cross-encoder (unless you set these)",
    )
    random_seed: int = flag(42, "seed of the sampled ranks", NOT_NEGATIVE)

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
    trust_remote_code: bool = flag(
        False, "let a model run Python code that comes with it; read that code first", changes_results=False
    )
    device: str = flag("auto", "auto (cuda, then mps, then cpu), cpu, mps, cuda or cuda:N", changes_results=False)

    # Files
    instruction_templates: str = flag(
        str(HERE / "instruction_templates.yaml"), "YAML with query and document templates and instructions", NOT_EMPTY
    )
    experiment_name: str | None = flag(
        None, "folder of the results in --output_dir; made from dataset, model and a hash when left out", FOLDER_NAME,
        changes_results=False,
    )
    output_dir: str = flag("output", "where results go", NOT_EMPTY, changes_results=False)
    cache_dir: str = flag("cache", "where vectors are kept between runs", NOT_EMPTY, changes_results=False)
    data_dir: str = flag("data", "where datasets lie or are downloaded to", NOT_EMPTY, changes_results=False)
    save_tensors: bool = flag(
        False, "also save vectors, trajectories and losses (safetensors)", changes_results=False
    )

    def result_flags(self) -> dict[str, Any]:
        """The flags that may change a figure, by name."""
        return {f.name: getattr(self, f.name) for f in fields() if f.metadata["changes_results"]}


# What --refit fills in where the user set nothing (arXiv 2305.11744, as given by the protocol).
REFIT_PRESET = {"lr": 0.005, "reranker_model": "cross-encoder/ms-marco-MiniLM-L-6-v2"}


def fields() -> tuple[dataclasses.Field, ...]:
    """All flags, in the order of ``--help``."""
    return dataclasses.fields(ExperimentConfig)


def _value_type(field: dataclasses.Field) -> type:
    """``str`` for ``str | None``, the annotation itself otherwise."""
    hint = typing.get_type_hints(ExperimentConfig)[field.name]
    if isinstance(hint, types.UnionType):
        return next(option for option in typing.get_args(hint) if option is not type(None))
    return hint


def shown_default(field: dataclasses.Field) -> str:
    """The default of a flag as people read it, in ``--help`` and in the README."""
    if field.default is None:
        return "not set"
    return Path(field.default).name if field.name == "instruction_templates" else str(field.default)


def parse_value(field: dataclasses.Field, text: str) -> Any:
    """Turn the text given for a flag into its value and check it.

    Raises:
        UserError: one line naming the flag, what was given and what is allowed.
    """
    kind, rule = _value_type(field), field.metadata["rule"]
    if kind is bool:
        if text.lower() not in TRUE_WORDS + FALSE_WORDS:
            raise UserError(f"--{field.name}: got {text!r}, must be True or False")
        return text.lower() in TRUE_WORDS
    try:
        value = kind(text)
    except ValueError:
        allowed = rule.allowed if rule else {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--{field.name}: got {text!r}, must be {allowed}") from None
    if rule and not rule.accepts(value):
        raise UserError(f"--{field.name}: got {text!r}, must be {rule.allowed}")
    return value


def build_config(given: Mapping[str, str]) -> ExperimentConfig:
    """Make a config from the flags the user set (texts by name); presets fill only what is not among them.

    Raises:
        UserError: one line for each thing that is wrong, all at once.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for field in fields():
        if field.name in given:
            try:
                values[field.name] = parse_value(field, given[field.name])
            except UserError as error:
                problems.append(str(error))
    if values.get("refit"):
        values = {**REFIT_PRESET, **values}
    defaults = ExperimentConfig()
    total = values.get("total_scores", defaults.total_scores)
    if "scores_from_top" not in given:
        values["scores_from_top"] = min(defaults.scores_from_top, total)
    elif values.get("scores_from_top", 0) > total:
        problems.append(
            f"--scores_from_top: got {values['scores_from_top']}, must be at most --total_scores, which is {total}"
        )
    if values.get("computation_types") in ("hyde", "optimized_hyde") and not values.get("hyde_model"):
        problems.append(f"--computation_types: {values['computation_types']!r} needs --hyde_model, which is not set")
    if problems:
        raise UserError("\n".join(problems))
    return ExperimentConfig(**values)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line each, without the usage text."""

    def error(self, message: str) -> typing.NoReturn:
        """Raise the complaint for the command to show; argparse would print its usage first."""
        raise UserError(message)


def add_flags(
    parser: argparse.ArgumentParser, only: Iterable[str] | None = None, aliases: Mapping[str, str] | None = None
) -> None:
    """Add the flags of the dataclass (all, or ``only`` some) to ``parser``; values stay texts until checked."""
    wanted = set(only) if only is not None else {f.name for f in fields()}
    for field in fields():
        if field.name not in wanted:
            continue
        options = [f"--{field.name}"] + ([aliases[field.name]] if aliases and field.name in aliases else [])
        is_switch, rule = _value_type(field) is bool, field.metadata["rule"]
        names = "|".join(rule.names) if rule else ""
        parser.add_argument(
            *options,
            dest=field.name,
            default=argparse.SUPPRESS,
            metavar=names or {bool: "True|False", int: "N", float: "X", str: "TEXT"}[_value_type(field)],
            help=f"{field.metadata['help']} (default: {shown_default(field)})".replace("%", "%%"),
            **({"nargs": "?", "const": "True"} if is_switch else {}),
        )


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, str]:
    """Parse ``argv`` strictly and return what was set, as texts.

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
    return vars(namespace)


def parse_arguments(description: str, argv: Sequence[str] | None = None) -> ExperimentConfig:
    """Read the command line of a script that takes every experiment flag."""
    parser = OneLineParser(description=description, usage="%(prog)s [--flag VALUE ...]", allow_abbrev=False)
    add_flags(parser)
    return build_config(parse_flags(parser, sys.argv[1:] if argv is None else argv))


def short_hash(value: Any) -> str:
    """Eight hexadecimal digits over a JSON-able value; the same on every machine and in every process."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
