# SPDX-License-Identifier: Apache-2.0
"""How a symbol of vLLM that we build on is described; the list is in ``symbols.py``."""

import enum
from typing import NamedTuple


class Use(enum.Enum):
    """How a symbol is used, which says what may not change about it."""

    HELD = "a class or an object: it has these attributes"
    CALLED = "a function: it has these parameters in this order, and needs no others"
    WRAPPED = "a function that we wrap: it has these parameters in this order; we pass on the rest"
    REPLACED = "a function that we override: these are all its parameters, self or cls included"


class Symbol(NamedTuple):
    """Something of vLLM.

    Attributes:
        module: where it is found; it may be imported there.
        name: qualified name inside the module.
        use: how we use it.
        relies_on: names of attributes or parameters, see ``use``.
        reason: what it is good for.
        returns: the annotated result, where its shape matters.
    """

    module: str
    name: str
    use: Use
    relies_on: tuple[str, ...]
    reason: str
    returns: str | None = None


class Call(NamedTuple):
    """A call inside vLLM whose form we rely on.

    Attributes:
        module, caller: function that contains the call.
        callee: last name of what is called.
        keywords: passed by keyword.
        reason: what it is good for.
    """

    module: str
    caller: str
    callee: str
    keywords: tuple[str, ...]
    reason: str


def symbols_of(module: str, *rows: tuple) -> tuple[Symbol, ...]:
    """Symbols of one module; names are given as one string, separated by spaces."""
    return tuple(Symbol(module, name, use, tuple(names.split()), *rest)
                 for name, use, names, *rest in rows)  # fmt: skip
