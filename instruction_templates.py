"""Reading ``instruction_templates.yaml``: what is put around a text before a model sees it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from errors import UserError
from retrieval_dataset import DatasetFacts, RetrievalDataset

AnyDataset = RetrievalDataset | DatasetFacts  # a name, a task type, an instruction

SECTIONS = ("embedding_models", "dataset_instructions")
# A file of one's own may leave these out and gets those of the shipped file.
PROMPT_SECTIONS = ("judge_prompts", "hyde_prompts", "causal_rerankers")
JUDGE_NEEDED = {"task", "yes_no", "verbalized"}
JUDGE_MORE = ("groupwise", "groupwise_document", "groupwise_repair")  # taken from the shipped file where left out
SHIPPED = Path(__file__).resolve().parent / "instruction_templates.yaml"
MOST_PROBLEMS = 3
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class EmbeddingTemplates:
    """What an embedding model gets for a query and for a document.

    Attributes:
        query: template with ``{text}`` and perhaps ``{instruction}``.
        document: template with ``{text}``.
        instruction: the dataset's instruction, filled into ``query``.
        entry: the entry of the file they come from.
    """

    query: str
    document: str
    instruction: str
    entry: str

    def fill_query(self, text: str) -> str:
        """The query as it is embedded."""
        return _fill(self.query, text=text, instruction=self.instruction)

    def fill_document(self, text: str) -> str:
        """The document as it is embedded."""
        return _fill(self.document, text=text)


def _fill(template: str, **values: str) -> str:
    """Replace placeholders in one pass, so that braces in the values stay as they are."""
    if template == "{text}":
        return values["text"]  # the same object: a corpus is not held twice
    return PLACEHOLDER.sub(lambda match: values[match.group(1)], template)


def read_templates(path: str | Path) -> dict[str, Any]:
    """Read and check a template file.

    Raises:
        UserError: naming the file, the entry and what is wrong with it.
    """
    where = f"--instruction_templates: {path}"
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where} cannot be read ({reason})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(section), dict) for section in SECTIONS):
        raise UserError(f"{where} must have the sections {' and '.join(SECTIONS)}")
    try:
        str(content).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a surrogate pair, which is no character") from None
    every = SECTIONS + PROMPT_SECTIONS
    if unknown := [str(section) for section in content if section not in every]:
        raise UserError(f"{where} has an unknown section {unknown[0]!r}; there are {', '.join(every)}")
    problems = [problem for section in content for problem in CHECKS[section](content[section])]
    if problems:
        more = [f"and {len(problems) - MOST_PROBLEMS} problems more"] if len(problems) > MOST_PROBLEMS else []
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems[:MOST_PROBLEMS] + more))
    missing = [section for section in PROMPT_SECTIONS if section not in content]
    if missing or not set(JUDGE_MORE) <= set(content["judge_prompts"]):
        shipped = read_templates(SHIPPED)
        content |= {section: shipped[section] for section in missing}
        content["judge_prompts"] = shipped["judge_prompts"] | content["judge_prompts"]
    return content


def _model_problems(section: dict[Any, Any]) -> Iterator[str]:
    if "default" not in section:
        yield "embedding_models has no entry 'default'"
    for name, entry in section.items():
        where = f"embedding_models, {name}"
        if not isinstance(name, str):
            yield f"{where}: the name must be a text"
        elif not isinstance(entry, dict) or set(entry) != {"query", "document"}:
            yield f"{where}: must have 'query' and 'document' and nothing else"
        else:
            yield from _template_problem(f"{where}: the query template", entry["query"], {"text"}, {"instruction"})
            yield from _template_problem(f"{where}: the document template", entry["document"], {"text"})


def _instruction_problems(section: dict[Any, Any]) -> Iterator[str]:
    if "default" not in section:
        yield "dataset_instructions has no entry 'default'"
    for name, text in section.items():
        if not isinstance(text, str) or not text.strip():
            yield f"dataset_instructions, {name}: must be a text"


def _judge_problems(section: Any) -> Iterator[str]:
    if not isinstance(section, dict) or not JUDGE_NEEDED <= set(section) <= {*JUDGE_NEEDED, *JUDGE_MORE}:
        needed, more = (" and ".join(map(repr, names)) for names in (sorted(JUDGE_NEEDED), JUDGE_MORE))
        yield f"judge_prompts must have {needed}, may have {more}, and nothing else"
        return
    yield from _template_problem("judge_prompts, task", section["task"], {"instruction"})
    for mode in ("yes_no", "verbalized"):
        yield from _template_problem(f"judge_prompts, {mode}", section[mode], {"query", "document"}, {"task"})
    placeholders = ({"query", "documents"}, {"task"}), ({"number", "document"},), ({"problem"},)
    for name, allowed in zip(JUDGE_MORE, placeholders, strict=True):
        if name in section:
            yield from _template_problem(f"judge_prompts, {name}", section[name], *allowed)


def _hyde_problems(section: Any) -> Iterator[str]:
    if not isinstance(section, dict) or "default" not in section:
        yield "hyde_prompts has no entry 'default'"
        return
    for name, template in section.items():
        yield from _template_problem(f"hyde_prompts, {name}", template, {"query"}, {"instruction"})


def _causal_problems(section: Any) -> Iterator[str]:
    if not isinstance(section, dict) or "default" not in section:
        yield "causal_rerankers has no entry 'default'"
        return
    for name, entry in section.items():
        where = f"causal_rerankers, {name}"
        if not isinstance(entry, dict) or set(entry) != {"prompt", "task", "no_task", "yes", "no"}:
            yield f"{where}: must have 'prompt', 'task', 'no_task', 'yes' and 'no' and nothing else"
            continue
        yield from _template_problem(f"{where}: the prompt", entry["prompt"], {"query", "document"}, {"task"})
        yield from _template_problem(f"{where}: the task", entry["task"], set(), {"instruction"})
        yield from _template_problem(f"{where}: no_task", entry["no_task"], set())
        for word in ("yes", "no"):
            if not isinstance(entry[word], list) or not all(isinstance(w, str) and w for w in entry[word] or [None]):
                yield f"{where}: {word!r} must be a list of words in quotes"


CHECKS = {
    "embedding_models": _model_problems,
    "dataset_instructions": _instruction_problems,
    "judge_prompts": _judge_problems,
    "hyde_prompts": _hyde_problems,
    "causal_rerankers": _causal_problems,
}


def _template_problem(
    where: str, template: Any, needed: Collection[str], allowed: Collection[str] = ()
) -> Iterator[str]:
    if not isinstance(template, str):
        yield f"{where} must be a text, it is {template!r}"
        return
    found = set(PLACEHOLDER.findall(template))
    if missing := sorted(set(needed) - found):
        yield f"{where} must contain {{{missing[0]}}}, it is {template!r}"
    elif unknown := sorted(found - set(needed) - set(allowed)):
        yield f"{where} has an unknown {{{unknown[0]}}}"


def known_name(model: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that a model goes by: its own, or the one with the same part after the last slash.

    So a local copy of a known model, ``/models/Qwen3-Embedding-8B``, is treated as that model.
    """
    if model in (names := list(names)):
        return model
    last = model.rstrip("/").rsplit("/", 1)[-1]
    return next((name for name in names if name.rsplit("/", 1)[-1] == last), None)


def _instruction(content: dict[str, Any], dataset: AnyDataset) -> str:
    """A dataset's instruction: a folder dataset's own, else the file's, else its default."""
    instructions = content["dataset_instructions"]
    return dataset.instruction or instructions.get(dataset.name, instructions["default"])


def templates_for(content: dict[str, Any], embedding_model: str, dataset: AnyDataset) -> EmbeddingTemplates:
    """The templates of one model on one dataset.

    Args:
        content: from :func:`read_templates`.
        embedding_model: looked up with :func:`known_name`, then ``default``.
        dataset: for its instruction.
    """
    entries = content["embedding_models"]
    entry = known_name(embedding_model, entries) or "default"
    return EmbeddingTemplates(
        query=entries[entry]["query"],
        document=entries[entry]["document"],
        instruction=_instruction(content, dataset),
        entry=entry,
    )


@dataclass(frozen=True)
class FilledTexts:
    """A dataset's texts as an embedding model reads them, and the templates they were filled into."""

    documents: list[str]
    queries: list[str]
    templates: EmbeddingTemplates


def fill_templates(
    templates: EmbeddingTemplates, dataset: RetrievalDataset, with_documents: bool = True
) -> FilledTexts:
    """Put a dataset's texts into templates; without its documents where these need not be embedded."""
    return FilledTexts(
        documents=[templates.fill_document(text) for text in dataset.documents] if with_documents else [],
        queries=[templates.fill_query(text) for text in dataset.queries],
        templates=templates,
    )


# --- Prompts of teachers and of HyDE ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgePrompts:
    """What a language model is asked about a query and a document.

    Attributes:
        yes_no, verbalized: templates with ``{query}``, ``{document}`` and perhaps ``{task}``.
        groupwise: template with ``{query}``, ``{documents}`` and perhaps ``{task}``.
        groupwise_document: what ``{documents}`` has for each, with ``{number}`` and ``{document}``.
        groupwise_repair: what is said of an answer that is none, with ``{problem}``.
        task: what stands for ``{task}``; empty for search datasets.
    """

    yes_no: str
    verbalized: str
    groupwise: str
    groupwise_document: str
    groupwise_repair: str
    task: str

    def fill(self, mode: str, query: str, document: str) -> str:
        """The prompt for one pair; ``mode`` is "yes_no" or "verbalized"."""
        return _fill(getattr(self, mode), task=self.task, query=query, document=document)

    def fill_group(self, query: str, documents: Sequence[str]) -> str:
        """The prompt for all documents of a query, numbered from 1."""
        numbered = [
            _fill(self.groupwise_document, number=str(number), document=document)
            for number, document in enumerate(documents, 1)
        ]
        return _fill(self.groupwise, task=self.task, query=query, documents="\n\n".join(numbered))

    def fill_repair(self, problem: str) -> str:
        """What is said of an answer to the prompt for a group that is none."""
        return _fill(self.groupwise_repair, problem=problem)


@dataclass(frozen=True)
class HydePrompt:
    """What a language model is asked for a hypothetical document: a template with ``{query}``, and the instruction."""

    template: str
    instruction: str

    def fill(self, query: str) -> str:
        """The prompt for one query."""
        return _fill(self.template, query=query, instruction=self.instruction)


@dataclass(frozen=True)
class CausalPrompt:
    """How a causal reranker is asked, and which next tokens are its answers.

    Attributes:
        prompt: template with ``{query}``, ``{document}`` and perhaps ``{task}``.
        task: what stands for ``{task}``.
        yes, no: the answer words, each one token.
    """

    prompt: str
    task: str
    yes: tuple[str, ...]
    no: tuple[str, ...]

    def fill(self, query: str, document: str) -> str:
        """The prompt for one pair."""
        return _fill(self.prompt, task=self.task, query=query, document=document)


def _task(template: str, otherwise: str, content: dict[str, Any], dataset: AnyDataset) -> str:
    """What tells a teacher its task; only classification datasets do."""
    if dataset.task_type != "classification":
        return otherwise
    return _fill(template, instruction=_instruction(content, dataset))


def judge_prompts(content: dict[str, Any], dataset: AnyDataset) -> JudgePrompts:
    """The judge's prompts on one dataset."""
    section = content["judge_prompts"]
    named = {name: section[name] for name in ("yes_no", "verbalized", *JUDGE_MORE)}
    return JudgePrompts(**named, task=_task(section["task"], "", content, dataset))


def hyde_prompt(content: dict[str, Any], dataset: AnyDataset) -> HydePrompt:
    """The prompt for hypothetical documents of one dataset."""
    section = content["hyde_prompts"]
    return HydePrompt(section.get(dataset.name, section["default"]), _instruction(content, dataset))


def causal_prompt(content: dict[str, Any], model: str, dataset: AnyDataset) -> CausalPrompt:
    """The prompt of one causal reranker, looked up with :func:`known_name`, on one dataset."""
    section = content["causal_rerankers"]
    entry = section[known_name(model, section) or "default"]
    task = _task(entry["task"], entry["no_task"], content, dataset)
    return CausalPrompt(entry["prompt"], task, tuple(entry["yes"]), tuple(entry["no"]))
