"""Reading ``instruction_templates.yaml``: what is put around a text before a model sees it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from errors import UserError
from retrieval_dataset import RetrievalDataset

SECTIONS = ("embedding_models", "dataset_instructions")
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

    def as_dict(self) -> dict[str, str]:
        """For ``config.json``."""
        return asdict(self)


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
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--instruction_templates: {path} cannot be read ({reason})") from None
    except yaml.YAMLError as error:
        raise UserError(f"--instruction_templates: {path} is not YAML ({' '.join(str(error).split())})") from None
    where = f"--instruction_templates: {path}"
    if not isinstance(content, dict) or not all(isinstance(content.get(section), dict) for section in SECTIONS):
        raise UserError(f"{where} must have the sections {' and '.join(SECTIONS)}")
    if unknown := [str(section) for section in content if section not in SECTIONS]:
        raise UserError(f"{where} has an unknown section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if problems := list(_problems(content)):
        more = [f"and {len(problems) - MOST_PROBLEMS} problems more"] if len(problems) > MOST_PROBLEMS else []
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems[:MOST_PROBLEMS] + more))
    return content


def _problems(content: dict[str, Any]) -> Iterator[str]:
    for section in SECTIONS:
        if "default" not in content[section]:
            yield f"{section} has no entry 'default'"
    for name, text in content["dataset_instructions"].items():
        if not isinstance(text, str) or not text.strip():
            yield f"dataset_instructions, {name}: must be a text"
    for name, entry in content["embedding_models"].items():
        if not isinstance(name, str):
            yield f"embedding_models, {name}: the name must be a text"
        elif not isinstance(entry, dict) or set(entry) != {"query", "document"}:
            yield f"embedding_models, {name}: must have 'query' and 'document' and nothing else"
        else:
            yield from _template_problems(f"embedding_models, {name}", entry)


def _template_problems(where: str, entry: dict[str, Any]) -> Iterator[str]:
    for part, allowed in (("query", {"text", "instruction"}), ("document", {"text"})):
        template = entry[part]
        found = set(PLACEHOLDER.findall(template)) if isinstance(template, str) else set()
        if "text" not in found:
            yield f"{where}: the {part} template must contain {{text}}, it is {template!r}"
        elif found - allowed:
            yield f"{where}: the {part} template has an unknown {{{min(found - allowed)}}}"


def known_name(model: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that a model goes by: its own, or the one with the same part after the last slash.

    So a local copy of a known model, ``/models/Qwen3-Embedding-8B``, is treated as that model.
    """
    if model in (names := list(names)):
        return model
    last = model.rstrip("/").rsplit("/", 1)[-1]
    return next((name for name in names if name.rsplit("/", 1)[-1] == last), None)


def templates_for(content: dict[str, Any], embedding_model: str, dataset_name: str) -> EmbeddingTemplates:
    """The templates of one model on one dataset.

    Args:
        content: from :func:`read_templates`.
        embedding_model: looked up with :func:`known_name`, then ``default``.
        dataset_name: looked up in ``dataset_instructions``, then ``default``.
    """
    entries = content["embedding_models"]
    entry = known_name(embedding_model, entries) or "default"
    instructions = content["dataset_instructions"]
    return EmbeddingTemplates(
        query=entries[entry]["query"],
        document=entries[entry]["document"],
        instruction=instructions.get(dataset_name, instructions["default"]),
        entry=entry,
    )


@dataclass(frozen=True)
class FilledTexts:
    """A dataset's texts as an embedding model reads them, and the templates they were filled into."""

    documents: list[str]
    queries: list[str]
    templates: EmbeddingTemplates


def fill_templates(templates: EmbeddingTemplates, dataset: RetrievalDataset) -> FilledTexts:
    """Put a dataset's texts into templates; a folder dataset's own instruction goes before the file's."""
    if dataset.instruction:
        templates = replace(templates, instruction=dataset.instruction)
    return FilledTexts(
        documents=[templates.fill_document(text) for text in dataset.documents],
        queries=[templates.fill_query(text) for text in dataset.queries],
        templates=templates,
    )
