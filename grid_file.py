"""Reading a grid file: named grids of flags with their values, and what to leave out. Starts nothing.

    shared: {optimize_with_gold: true}         # flags of all grids
    grids:
      rates:                                   # a name; every list is an axis
        datasets: [Demo, Clinc150]
        lr: [1e-4, 1e-3]
        exclude: [{dataset: Demo, lr: 1e-3}]   # of this grid alone
    exclude:                                   # of all grids
      - {dataset: Clinc150, lr: [1e-2, 1e-3]}

A run is left out when, for every flag of one item under ``exclude``, it has the value or one of the values.
"""

from __future__ import annotations

import collections
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from errors import UserError
from experiment_config import fields, parse_value

# Other names of the two flags that every grid has as axes.
PLURALS = {"dataset": "--datasets", "embedding_model": "--embedding_models"}
NOT_SET = ("", "null", "~")  # the flag is not given
SECTIONS = ("grids", "shared", "exclude")

Axes = dict[str, list[str | None]]  # flag to the words given for each of its values; None: not given


@dataclass(frozen=True)
class Cells:
    """A grid as it was given.

    Attributes:
        axes: the flags that are set.
        exclusions: a run is left out when, for every flag of one of them, its value is among the ones named.
        where: what to say before a problem with it.
    """

    axes: Axes
    exclusions: Sequence[Axes] = ()
    where: str = ""


class _TextLoader(yaml.SafeLoader):
    """Takes all scalars as the texts that they are, so that flags read them as from a command line.

    (YAML would take 1e-4 for a text and 1.0e-4 for a number.) A key that occurs twice is a mistake.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """A mapping with its merges (``<<``)."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if repeated := [key for key, times in collections.Counter(keys).items() if times > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{repeated[0]!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


_TextLoader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}


def read_grid_file(path: str, names: Sequence[str]) -> list[Cells]:
    """Read the grids of a YAML file: all of them, or those named.

    Raises:
        UserError: a line for each thing that is wrong.
    """
    where = f"--grid: {path}"
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_TextLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not isinstance(content.get("grids"), dict) or not content["grids"]:
        raise UserError(f"{where} must have a section 'grids' with a name for each grid")
    if unknown := [section for section in content if section not in SECTIONS]:
        raise UserError(f"{where} has an unknown section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    grids, problems = content["grids"], []
    if odd := [name for name in grids if not re.fullmatch(r"[^\s,]+", name)]:
        raise UserError(f"{where}: {odd[0]!r} is no name of a grid, which is one word without commas")
    if unknown := [name for name in names if name not in grids]:
        raise UserError(f"--only: {path} has no grid {unknown[0]!r}; there are {', '.join(grids)}")
    shared = _read_axes(content.get("shared") or {}, f"{where}, shared", problems)
    exclusions = _read_exclusions(content.get("exclude") or [], f"{where}, exclude", problems)
    cells = []
    for name in names or grids:
        grid = dict(grids[name]) if isinstance(grids[name], dict) else grids[name]
        own = grid.pop("exclude", None) if isinstance(grid, dict) else None
        axes = _read_axes(grid or {}, f"{where}, {name}", problems)
        own_exclusions = _read_exclusions(own or [], f"{where}, {name}, exclude", problems)
        cells.append(Cells(shared | axes, [*exclusions, *own_exclusions], f"grid {name}: "))
    if problems:
        raise UserError("\n".join(problems))
    return cells


def _read_axes(section: Any, where: str, problems: list[str]) -> Axes:
    """Flags with a value or a list of values; a list in a list is several words of one value."""
    if not isinstance(section, dict):
        problems.append(f"{where}: must hold flags with their values, found {section!r}")
        return {}
    axes: Axes = {}
    known = [field.name for field in fields()]
    singular = {plural.removeprefix("--"): name for name, plural in PLURALS.items()}
    for key, given in section.items():
        name = singular.get(key, key)
        if name in axes:
            problems.append(f"{where}: {name} is given twice, also as {key}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(f"{where}: unknown flag {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        values = given if isinstance(given, list) else [given]
        values = [",".join(map(str, value)) if isinstance(value, list) else value for value in values]
        if not values or any(isinstance(value, dict) for value in values):
            problems.append(f"{where}: {key} must be a value or a list of values, found {given!r}")
            continue
        axes[name] = [None if value in NOT_SET else value for value in values]
    return axes


def _read_exclusions(section: Any, where: str, problems: list[str]) -> list[Axes]:
    if not isinstance(section, list):
        problems.append(f"{where}: must be a list, each of its items flags with values, found {section!r}")
        return []
    conditions = [_read_axes(item, where, problems) for item in section]
    by_name = {field.name: field for field in fields()}
    for name, text in ((name, text) for own in conditions for name, texts in own.items() for text in texts if text):
        try:
            parse_value(by_name[name], text)
        except UserError as error:
            problems.append(f"{where}: {error}")
    return conditions
