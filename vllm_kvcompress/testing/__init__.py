# SPDX-License-Identifier: Apache-2.0
"""Checks for methods that other packages bring: call ``check_scorer`` from their tests."""

from typing import Any

from vllm_kvcompress.scoring import Scorer
from vllm_kvcompress.testing.checks import CHECKS

__all__ = ["CHECKS", "check_scorer"]


def check_scorer(scorer: type[Scorer], **options: Any) -> None:
    """Hold a scorer against what every scorer owes; docs/adding-a-method.md says why.

    It scores small random prompts on the CPU, within seconds and without vLLM.

    Args:
        scorer: the class.
        options: to make it with; call again for others.

    Raises:
        AssertionError: lists every check that failed.
    """
    made = scorer(**options)
    faults = []
    for check in CHECKS:
        try:
            check(made)
        except AssertionError as error:
            faults.append(f"  - {check.__name__}: {error}")
    if faults:
        raise AssertionError("\n".join([f"{scorer.__name__} is no sound scorer:", *faults]))
