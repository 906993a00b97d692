# SPDX-License-Identifier: Apache-2.0
"""docs/wraps.md names every function of vLLM that the adapter wraps or replaces, and no other."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "wraps.md").read_text()
SOURCES = "\n".join(
    path.read_text() for path in sorted((REPOSITORY / "vllm_kvcompress/adapter").glob("*.py"))
)


def rows(where: str) -> set[str]:
    """Names in the first column of the table's rows whose second column starts so."""
    found = re.findall(rf"^\| ([^|]*) \| {where}[^|]* \|", PAGE, re.MULTILINE)
    return {name.rpartition(".")[2] for cell in found for name in re.findall(r"`([\w.]+)`", cell)}


def test_wrapped_functions():
    wrapped = set(re.findall(r"\bwrap\(\s*[\w.]+,\s*\"(\w+)\"", SOURCES))
    assert wrapped
    assert rows("class") | rows("module") == wrapped


def test_changed_objects():
    replaced = set(re.findall(r"(\w+)(?:\"\])? = MethodType\(", SOURCES))
    adopted = set(re.findall(r"assert type\(\w+\) is (\w+)", SOURCES))
    assert SOURCES.count("MethodType(") == len(replaced)
    assert SOURCES.count(".__class__ = ") == len(adopted)
    assert rows("one object") == replaced | adopted
