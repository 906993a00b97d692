# SPDX-License-Identifier: Apache-2.0
"""When two answers, or two kept sets, are the same up to what 16 bits and another order of sums do.

Exact equality is asked for wherever it can be had. It cannot be where a different kernel shape
rounds differently and two candidates are as good as equal: then the two must be as good as equal.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import oracle
from oracle import OracleConfig

from gpucheck.watch import ScoredPrompt

SCORE_GAP = 1e-4  # relative; float32 scores against float64
NEAR_TIE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Log-probabilities this close may change places: some units in the last place of a logit."""


class Answer(Protocol):
    """A finished completion; log-probabilities are of the chosen tokens."""

    token_ids: list[int]
    logprobs: list[float]


def assert_same_tokens(got: Sequence[Answer], stock: Sequence[Answer], dtype: str) -> int:
    """Equal token ids, request by request; returns how many answers parted at a near tie.

    At the first step that differs, both engines have seen the same tokens: the log-probabilities
    of their own choices must be as good as equal. What follows is another text.
    """
    parted = 0
    for number, (a, b) in enumerate(zip(got, stock, strict=True)):
        assert len(a.token_ids) == len(b.token_ids), f"request {number}: lengths differ"
        steps = [i for i, token in enumerate(a.token_ids) if token != b.token_ids[i]]
        end = steps[0] + 1 if steps else len(a.token_ids)
        parted += bool(steps)
        pairs = zip(a.logprobs[:end], b.logprobs[:end], strict=True)
        worst = max(abs(x - y) for x, y in pairs)
        assert worst <= NEAR_TIE[dtype], (
            f"request {number}: {a.token_ids} against {b.token_ids}; log-probabilities differ by "
            f"{worst:.3g} up to token {end}"
        )
    return parted


def expected_kept(prompt: ScoredPrompt, config: OracleConfig) -> oracle.KeptSets:
    """Kept sets by the float64 reference, from the queries and keys that the device had."""
    return oracle.kept_sets(prompt.queries, prompt.keys, config, prompt.scale)


def assert_same_kept(
    got: oracle.KeptSets, prompt: ScoredPrompt, config: OracleConfig
) -> tuple[int, int]:
    """Every layer and head keeps what the reference keeps; returns how many sets, and near ties.

    Args:
        got: [L][Hkv] positions, as the pages hold them.
    """
    expected = expected_kept(prompt, config)
    final = oracle.scores(prompt.queries, prompt.keys, config, prompt.scale)
    ties = total = 0
    for layer, heads in enumerate(expected):
        for head, wanted in enumerate(heads):
            found = np.asarray(got[layer][head])
            where = f"layer {layer} head {head}"
            assert (np.diff(found) > 0).all(), f"{where}: positions are not ascending"
            missing, extra = np.setdiff1d(wanted, found), np.setdiff1d(found, wanted)
            total += 1
            if len(missing) == len(extra) == 0:
                continue
            ties += 1
            scores = final[layer, head]
            what = f"{where}: kept {extra} instead of {missing}"
            ranked = len(missing) == len(extra) and max(*missing, *extra) < len(scores)
            assert ranked, f"{what}; {len(found)} tokens and not {len(wanted)}, or protected ones"
            gap = scores[missing].max() / scores[extra].min() - 1
            assert gap <= SCORE_GAP, f"{what}; relative gap {gap:.2g}"
    return total, ties
