# SPDX-License-Identifier: Apache-2.0
"""What there is to choose from, read from the methods themselves: nothing here can go stale.

Run as ``vllm-kvcompress methods``; ``--markdown`` prints docs/methods.md.
"""

import argparse
import dataclasses
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_kvcompress.allocation import ALLOCATORS, Allocator, Scope
from vllm_kvcompress.budget import Candidates
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.merging import MERGES, Merge
from vllm_kvcompress.presets import PRESETS
from vllm_kvcompress.prompt import MAX_INSTRUCTION_LEN
from vllm_kvcompress.registry import Method, load, needs_head_scores
from vllm_kvcompress.scoring import SCORERS, Need, Scorer
from vllm_kvcompress.tools.refused import axes, products, refused_combinations

_NEEDS = {
    Need.KEYS: "keys",
    Need.VALUES: "values",
    Need.WINDOW_QUERIES: "queries of the window",
    Need.INSTRUCTION_QUERIES: "queries of the instruction",
    Need.LAST_QUERY: "last query",
    Need.SEGMENTS: "image segments",
    Need.LAYER_TRACE: "scores of earlier layers",
    Need.KEY_ATTENTION_SUMS: "attention of all rows",
    Need.HIDDEN_MOMENTS: "hidden states of all rows",
    Need.QUERY_MOMENTS: "queries of all rows, before RoPE",
    Need.GRIDS: "grids of images",
    Need.OUTPUT_GRAMS: "output projections",
}

_TOTALS = {
    Scope.UNIFORM: "B for every head",
    Scope.LAYER: "Hkv*B per layer",
    Scope.STATIC: "L*Hkv*B per prompt",
    Scope.MODEL: "L*Hkv*B per prompt",
}

_DECIDES = {
    Scope.UNIFORM: "static",
    Scope.STATIC: "static",
    Scope.LAYER: "layer by layer",
    Scope.MODEL: "deferred",
}

_COUNTS = {
    Candidates.ALL: "all tokens",
    Candidates.VISUAL: "visual tokens; all text stays",
    Candidates.AFTER_TEXT: "all tokens; text comes first",
}

_FORMULAS = ("published", "reconstruction in part", "reconstruction")

_INTRODUCTION = """\
# Methods

Printed by `vllm-kvcompress methods --markdown` from the code; do not edit.

    --kv-compression PRESET
    --kv-compression SCORER[+ALLOCATOR[+MERGE]]

A scorer says which prompt tokens matter, an allocator how many each layer and head keeps, a merge
what becomes of the others. Without an allocator it is `uniform`; without a merge, dropped tokens
are gone.
"""

_PRESETS = """\
## Presets

Published systems with their settings, and `bacon-plus`, which is ours. What you give yourself, on
the command line or in `--kv-compression-config`, wins; without any budget it is {budget} tokens. A
name that is both is the preset; `NAME+uniform` is the bare scorer.
"""

_PROPERTIES = """\
## Properties

With default options.

- **Needs** are stored or read only for methods that ask for them.
- **Budget**: what `B` counts; for allocators the total that they share out.
- **Decides**: *static* budgets follow from the length of the prompt. *Deferred* ones are known once
  all layers have been scored.
- **Prefix cache**: how much of a prompt that is going to be compressed a cache hit may spare,
  besides the kept blocks, which are always computed again. A combination gets the least of its
  parts.
- **Cost**: floating-point operations per prompt, on top of reading once what is needed.
- **Formula**: *reconstruction* means our proposal, because the publication gives none. Where
  released code differs, or details are left open, the notes under [details](#details) say what we
  do.

`L` layers, `Hq` and `Hkv` query and KV heads, `D` their size, `d` the model's hidden size, `P`
prompt tokens, `W` tokens of the window, `I` tokens of the instruction (the text after the last
image, {instruction} at most), `C` kept tokens per head.
"""

_REFUSED = """\
## Refused combinations

Every scorer was combined with every allocator, every merge and every value of `candidates`: of
these {tried} combinations {served} are served. The others, by reason:
"""


class Row(NamedTuple):
    """Properties of a method, in words."""

    method: str
    kind: str
    needs: str
    budget: str
    decides: str
    prefix_cache: str
    cost: str
    source: str
    formula: str


def options_of(method: type[Method]) -> list[str]:
    """``name=default`` of each option, the default as --kv-compression-config takes it."""
    return [f"{f.name}={json.dumps(_default(f))}" for f in dataclasses.fields(method)]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def summary_of(method: type[Method]) -> str:
    """First line of the docstring."""
    return (inspect.getdoc(method) or "").splitlines()[0].partition(" Source: ")[0]


def needs_of(method: type[Method]) -> Need:
    if issubclass(method, Merge):
        needs = Need.KEYS | Need.VALUES
        return needs | Need.SEGMENTS if method.needs_segments else needs
    return method.needs


def prefix_cache_of(needs: Need) -> str:
    """How much of a prompt that is compressed may come from the prefix cache."""
    if needs.all_rows:
        return "nothing"
    if Need.INSTRUCTION_QUERIES in needs:
        return "all before the instruction"
    if Need.WINDOW_QUERIES in needs:
        return "all before the window"
    return "all before the last token" if Need.LAST_QUERY in needs else "everything"


def row_of(method: type[Method]) -> Row:
    needs = needs_of(method)
    formula = _formula_of(method)
    words = ", ".join(word for need, word in _NEEDS.items() if need in needs) or "nothing"
    cache = prefix_cache_of(needs)
    if issubclass(method, Scorer):
        kind, budget, decides = "scorer", _budget_of(method()), ""
    elif issubclass(method, Allocator):
        kind, budget, decides = "allocator", _TOTALS[method.scope], _DECIDES[method.scope]
    else:
        kind, budget, decides = "merge", "inside the kept blocks", ""
    return Row(
        method.name, kind, words, budget, decides, cache, method.cost, method.source, formula
    )


def _formula_of(method: type[Method]) -> str:
    if not method.reconstruction:
        return _FORMULAS[0]
    return _FORMULAS[1] if issubclass(method, Allocator) else _FORMULAS[2]


def _budget_of(scorer: Scorer) -> str:
    """What competes, and which of the last tokens are kept anyway."""
    if scorer.visual_only:
        return _COUNTS[Candidates.VISUAL]
    window, kept = KVCompressionConfig.window, 100 * KVCompressionConfig.window
    recent = {1: "the last one", window: "the window"}[scorer.num_recent(window, kept)]
    if scorer.recent_fraction:
        recent = f"the last {100 * scorer.recent_fraction:g} %"
    return f"all tokens, {recent} included"


def _tables() -> Iterator[tuple[str, type[Method]]]:
    for kind, table in (("Scorer", SCORERS), ("Allocator", ALLOCATORS), ("Merge", MERGES)):
        yield from ((kind, method) for method in table.values())


def describe() -> str:
    """The list for terminals."""
    lines = ["Presets:"]
    for name, preset in PRESETS.items():
        lines += [f"  {name}: {_meaning(name)}", f"    source: {preset.source}"]
    title = ""
    for kind, method in _tables():
        if kind != title:
            title = kind
            lines += ["", f"{kind}s:"]
        row = row_of(method)
        lines += [
            f"  {method.name}: {summary_of(method)}",
            f"    options: {', '.join(options_of(method)) or 'none'}",
            f"    needs: {row.needs}",
            f"    source: {row.source} ({row.formula})",
        ]
    return "\n".join(lines)


def _meaning(preset: str) -> str:
    """The flags that a preset stands for."""
    settings = dict(PRESETS[preset].settings)
    flags = [f"--kv-compression {settings.pop('method')}"]
    flags += [f"--kv-{key} {settings.pop(key)}" for key in ("budget", "window") if key in settings]
    if settings:
        flags.append(f"--kv-compression-config '{json.dumps(settings)}'")
    return " ".join(flags)


def markdown(head_scores: str) -> str:
    """docs/methods.md.

    Args:
        head_scores: a file of head scores, for methods that cannot be without.
    """
    rows = [row_of(method) for _, method in _tables()]
    refused = refused_combinations(head_scores)
    refused_rows = [
        [*map(_choice, names, axes().values()), reason]
        for reason, where in refused.reasons.items()
        for names in products(where)
    ]
    parts = [
        _INTRODUCTION,
        _PRESETS.format(budget=KVCompressionConfig.budget),
        table(
            ("preset", "stands for", "the budget counts", "source", "formulas"),
            [_preset_row(name, head_scores) for name in PRESETS],
        ),
        _PROPERTIES.format(instruction=MAX_INSTRUCTION_LEN),
        table(
            [name.replace("_", " ") for name in Row._fields],
            [(f"`{row.method}`", *(cell.replace("*", r"\*") for cell in row[1:])) for row in rows],
        ),
        _REFUSED.format(tried=refused.tried, served=refused.served),
        table((*axes(), "reason"), refused_rows),
        "## Details\n\nOptions are given by name in `--kv-compression-config`.\n",
    ]
    for kind, method in _tables():
        options = ", ".join(f"`{option}`" for option in options_of(method)) or "none"
        text = inspect.getdoc(method)
        parts.append(
            f"### {kind} `{method.name}`\n\n```text\n{text}\n```\n\nDefaults: {options}.\n"
        )
    return "\n".join(parts)


def _preset_row(name: str, head_scores: str) -> tuple[str, ...]:
    raw: dict[str, Any] = {"method": name}
    if needs_head_scores(PRESETS[name].settings["method"]):
        raw["head_scores"] = head_scores
    config = KVCompressionConfig.parse(raw)
    parts = (config.scoring, config.allocation, config.merging)
    formulas = {_formula_of(type(part)) for part in parts if part is not None}
    worst = [word for word in _FORMULAS if word in formulas][-1]
    return (
        f"`{name}`",
        f"`{_meaning(name)}`",
        _COUNTS[config.candidates],
        PRESETS[name].source,
        worst,
    )


def _choice(names: tuple[str, ...], axis: tuple[str, ...]) -> str:
    return "any" if names == axis else ", ".join(f"`{name}`" for name in names)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; cells have no bars."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vllm-kvcompress methods", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print docs/methods.md")
    args = parser.parse_args(argv)
    faults = load()
    print(generated_page() if args.markdown else describe() + "\n", end="")
    print(*faults, sep="\n", end="", file=sys.stderr)
    return 1 if faults else 0


def generated_page() -> str:
    """docs/methods.md, as it has to be."""
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.json"
        scores.write_text('{"0-0": [1.0]}')
        return markdown(str(scores))


if __name__ == "__main__":
    sys.exit(main())
