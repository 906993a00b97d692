# SPDX-License-Identifier: Apache-2.0
"""Replacing a function of vLLM by a wrapper, once."""

import functools
from collections.abc import Callable
from typing import Any

_MARK = "__vllm_kvcompress__"


def wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by ``make(original)``, keeping static and class methods what they are.

    A second call for the same place does nothing.

    Raises:
        RuntimeError: vLLM has no such function; this plugin does not fit the installed version.
    """
    found = vars(owner).get(name)
    if found is None:
        raise RuntimeError(
            f"vllm-kvcompress does not fit the installed vLLM: {owner.__name__}.{name} is missing. "
            "Install a vLLM version from the compatibility table, or uninstall vllm-kvcompress."
        )
    kind = type(found) if isinstance(found, staticmethod | classmethod) else None
    original = found.__func__ if kind else found
    if hasattr(original, _MARK):
        return
    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, _MARK, True)
    setattr(owner, name, kind(wrapper) if kind else wrapper)
