# SPDX-License-Identifier: Apache-2.0
"""The methods by name: those of this package, and those that other packages bring.

A package offers methods by entry points of the group ``vllm_kvcompress.methods``, one for each
scorer, allocator, merge or preset, under the method's own name.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
import inspect
import re
from collections.abc import Iterable
from typing import Any

from vllm_kvcompress.allocation import ALLOCATORS, Allocator
from vllm_kvcompress.merging import MERGES, Merge
from vllm_kvcompress.presets import PRESETS, Preset
from vllm_kvcompress.scoring import SCORERS, Scorer

GROUP = "vllm_kvcompress.methods"
"""Of entry points."""

Method = Scorer | Allocator | Merge

_TABLES: tuple[tuple[type[Method], dict[str, Any]], ...] = (
    (Scorer, SCORERS),
    (Allocator, ALLOCATORS),
    (Merge, MERGES),
)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def outside_names() -> list[str]:
    """Names that installed packages offer; none of their code runs."""
    return sorted({entry.name for entry in importlib.metadata.entry_points(group=GROUP)})


@functools.cache
def load() -> tuple[str, ...]:
    """Add what installed packages offer to the tables; once per process.

    Returns:
        Why something was not added, in sentences; whoever asks for compression has to be told.
    """
    entries = importlib.metadata.entry_points(group=GROUP)
    reasons = []
    for entry in sorted(entries, key=lambda entry: (entry.name, entry.value)):
        try:
            add(entry.name, entry.load())
        except (ImportError, AttributeError, ValueError) as error:
            package = entry.dist.name if entry.dist is not None else "a package"
            reasons.append(
                f"{package} offers the method {entry.name!r} ({entry.value}), which cannot be "
                f"used: {error}. Update or uninstall {package}."
            )
    return tuple(reasons)


def add(name: str, found: Any) -> None:
    """Add a method or a :class:`Preset` to its table.

    Raises:
        ValueError: it is neither, or its name is not its own, taken or malformed.
    """
    if not _NAME.fullmatch(name) or name == "none":
        raise ValueError(
            "a name consists of lower-case letters, digits, hyphens and underscores, and is not "
            "none"
        )
    if isinstance(found, Preset):
        table: dict[str, Any] = PRESETS
    else:
        tables = [t for base, t in _TABLES if inspect.isclass(found) and issubclass(found, base)]
        if not tables or inspect.isabstract(found):
            raise ValueError("it is no Scorer, Allocator, Merge or Preset")
        (table,) = tables
        if vars(found).get("name") != name:
            raise ValueError(f"the class calls itself {vars(found).get('name')!r}")
    if table.get(name, found) is not found:
        raise ValueError("there is another method of this name")
    table[name] = found


def classes_of(scorer: str, allocator: str, merge: str) -> list[type[Method]]:
    """Those of a method; ``merge`` may be "none"."""
    found: list[type[Method]] = [SCORERS[scorer], ALLOCATORS[allocator]]
    return found if merge == "none" else [*found, MERGES[merge]]


def option_names(method: type[Method]) -> list[str]:
    return [field.name for field in dataclasses.fields(method)]


def needs_head_scores(method: str) -> bool:
    """Whether an allocator of "scorer+allocator+merge" takes a file of head scores."""
    names = method.split("+")
    return len(names) > 1 and "head_scores" in option_names(ALLOCATORS[names[1]])


def unknown(kind: str, name: str, table: Iterable[str], stands_alone: bool) -> str:
    """Why a part of a method is refused; a preset is no part of another method.

    Args:
        table: names that the part may have.
        stands_alone: the part is the whole method, so that it might be a preset as well.
    """
    if kind == "scorer" and name in PRESETS and not stands_alone:
        whole = PRESETS[name].settings["method"]
        return (
            f"unknown scorer {name!r}: it is a preset, which stands for {whole} and is given "
            f"alone; its scorer is {whole.split('+')[0]}. Valid: {', '.join(sorted(table))}."
        )
    known = {*table, *PRESETS} if kind == "scorer" and stands_alone else table
    return f"unknown {kind} {name!r}.{suggest(name, sorted(known))}"


def suggest(word: str, valid: list[str]) -> str:
    """``Did you mean 'x'?`` for the nearest valid word, and the list of all of them."""
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Valid: {', '.join(valid)}."
