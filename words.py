"""How values, texts and names are written for people: in tables, pictures and logs. Knows nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

SHORTEST_NAME, SHORTEST_VALUE = 6, 12  # of the parts of a label that must be cut
BARE = ("dataset", "model", "query")
NOTHING = 5e-7  # result files have six digits


def shown(value: Any) -> str:
    """A setting; different numbers give different texts."""
    if value is None:
        return "none"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


def one_line(text: str) -> str:
    """A text as one line of letters that can be shown, whatever it holds."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def clip(text: str, longest: int) -> str:
    """One line, with an ellipsis where something is left out."""
    text = one_line(text)
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def labels(names: Sequence[Mapping[str, str]], longest: int) -> list[str]:
    """Short labels that tell things apart.

    Of several names only those parts stand in the labels that are needed to tell all of them apart; where a label is
    too long all the same, names of settings are cut, then values; and where two would then look the same, they are
    numbered.

    Args:
        names: of each thing, values by setting; those of ``BARE`` stand there without their setting's name.
        longest: letters of a label, about.
    """
    there_are = list(dict.fromkeys(tuple(name.items()) for name in names))
    needed = list(dict.fromkeys(key for name in names for key in name))
    for key in sorted(reversed(needed), key=lambda key: key in BARE):  # settings go first, the last of them foremost
        fewer = [other for other in needed if other != key]
        if len(there_are) > 1 and fewer and _tells_apart(there_are, fewer):
            needed = fewer
    found: dict[tuple, str] = {}
    taken: dict[str, int] = {}
    for own in there_are:
        label = _cut([(key, value) for key, value in own if key in needed], longest)
        taken[label] = taken.get(label, 0) + 1
        found[own] = label if taken[label] == 1 else f"{label} ({taken[label]})"
    return [found[tuple(name.items())] for name in names]


def _tells_apart(names: Sequence[tuple[tuple[str, str], ...]], keys: Collection[str]) -> bool:
    """Whether each name has a part that another has not: what another merely lacks tells nobody anything."""
    parts = [frozenset(part for part in own if part[0] in keys) for own in names]
    if len({len(own) for own in parts}) == 1:
        return len(set(parts)) == len(parts)
    return not any(own <= other for own, other in itertools.permutations(parts, 2))


def phrases(settings: Mapping[str, str]) -> list[str]:
    """Settings as "name value"."""
    return [f"{name} {value}" for name, value in settings.items()]


def _cut(parts: Sequence[tuple[str, str]], longest: int) -> str:
    """The parts as one text, names and values shortened as far as it must be and may be."""
    name_room, value_room = 40, 60
    while True:
        texts = [
            clip(value, value_room) if key in BARE else f"{clip(key, name_room)} {clip(value, value_room)}"
            for key, value in parts
        ]
        text = ", ".join(texts)
        if len(text) <= longest or value_room <= SHORTEST_VALUE:
            return text
        if name_room > SHORTEST_NAME:
            name_room -= 1
        else:
            value_room -= 1


def number(value: float) -> str:
    """Four digits."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def signed(value: float) -> str:
    """Four digits with a sign, unless it is nothing."""
    return "-" if math.isnan(value) else "0.0000" if abs(value) < NOTHING else f"{value:+.4f}"


def percent(value: float) -> str:
    """A share as a percentage with a sign."""
    return "-" if math.isnan(value) else "0.0" if abs(value) < NOTHING else f"{100 * value:+.1f}"


def p_value(value: float) -> str:
    """Three digits, or that it is smaller than they can say."""
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def counted(number: int, what: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
