# SPDX-License-Identifier: Apache-2.0
"""Which models are served, and what engines are refused, read from the rules that refuse.

Run as ``vllm-kvcompress models``; ``--markdown`` prints docs/compatibility.md.
"""

import argparse
import collections
import string
import sys
from collections.abc import Sequence

from vllm_kvcompress.adapter import compatibility, model_table
from vllm_kvcompress.adapter.symbols import END_TO_END_VERSIONS
from vllm_kvcompress.tools.methods import table

_INTRODUCTION = """\
# Compatibility

Printed by `vllm-kvcompress models --markdown` from the code; do not edit. What works together is in
[conflicts](conflicts.md), with what is refused later than at start.

## Refused engines

These show in the configuration: the server stops before it loads anything, with all reasons in one
message, which is the last thing that it prints.

"""

_PROPERTIES = """
## Refused models

So do these properties of models. Where only a layer or the checkpoint shows one, the engine stops
when it builds the layer.

"""

_MODELS = """
## Models of vLLM {version}

Every architecture of vLLM's registry that generates text; pooling models and drafters are left out.
A row follows from vLLM's source of the architecture and the rules above: *full* is plain causal
attention; *sliding windows where configured* stay as they are, and the full layers beside them are
compressed. Many multimodal models take any language model: they are served if that is.

- **ran**: a test in `tests/integration` serves a small checkpoint of it.
- **by reading**: nobody has run it with compression; its sources show nothing that is refused.

| | {statuses} |
|---|{dashes}|
{counts}
"""


class _PlainValues(string.Formatter):
    """Values of a rule's text, which no engine has given, by their flags."""

    def get_value(self, key, args, kwargs):
        return {"block_size": "BLOCK_SIZE"}.get(key, key.upper())


def generated_page() -> str:
    """docs/compatibility.md, as it has to be."""
    plain = _PlainValues()
    engines = [
        (_first_upper(rule.feature), plain.format(rule.advice))
        for rule in compatibility.ENGINE_RULES
    ]
    properties = [
        (_first_upper(rule.feature), plain.format(rule.reason), plain.format(rule.advice))
        for rule in compatibility.MODEL_RULES
    ]
    tables = {
        "Text models": model_table.rows(model_table.text_models()),
        "Multimodal models": model_table.rows(model_table.multimodal_models()),
    }
    counts = "\n".join(
        f"| {title.lower()} | {' | '.join(_counts(rows))} |" for title, rows in tables.items()
    )
    parts = [
        _INTRODUCTION + table(("feature", "what to change"), engines),
        _PROPERTIES + table(("property", "reason", "what to change"), properties),
        _MODELS.format(
            version=END_TO_END_VERSIONS[-1],
            statuses=" | ".join(model_table.STATUSES),
            dashes="---|" * (len(model_table.STATUSES) - 1) + "---",
            counts=counts,
        ),
    ]
    header = [name.replace("_", " ") for name in model_table.Row._fields]
    for title, rows in tables.items():
        lines = [(f"`{row.architecture}`", *row[1:]) for row in rows]
        parts.append(f"\n### {title}\n\n{table(header, lines)}")
    return "".join(parts)


def describe() -> str:
    """The list for terminals."""
    rows = [
        row
        for modules in (model_table.text_models(), model_table.multimodal_models())
        for row in model_table.rows(modules)
    ]
    return "\n".join(
        f"{row.architecture}: {row.served} ({row.attention})"
        + (f"; {row.remark}" if row.remark else "")
        for row in rows
    )


def _counts(rows: Sequence[model_table.Row]) -> list[str]:
    """How many rows there are of each status."""
    counts = collections.Counter(row.served for row in rows)
    return [str(counts[status]) for status in model_table.STATUSES]


def _first_upper(text: str) -> str:
    return text[0].upper() + text[1:]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vllm-kvcompress models", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print docs/compatibility.md")
    if parser.parse_args(argv).markdown:
        print(generated_page(), end="")
    else:
        print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
