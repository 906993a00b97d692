# SPDX-License-Identifier: Apache-2.0
"""What no scorer of the table may do, whatever it scores; the checks are those for others, too."""

import dataclasses

import pytest
import torch

from vllm_kvcompress.scoring import SCORERS, LayerTrace, Need
from vllm_kvcompress.scoring.bacon import Bacon
from vllm_kvcompress.scoring.das import DAS, bases
from vllm_kvcompress.scoring.expected import Expected
from vllm_kvcompress.scoring.h2o import H2O
from vllm_kvcompress.scoring.mixkv import MixKV
from vllm_kvcompress.scoring.shiftkv import ShiftKV
from vllm_kvcompress.scoring.snapkv import SnapKV
from vllm_kvcompress.testing import CHECKS
from vllm_kvcompress.testing.inputs import context, random_prompt

EVERY_SCORER = [
    *(scorer() for name, scorer in SCORERS.items() if name != "shiftkv"),
    ShiftKV(proxies=12, groups=3),
    ShiftKV(proxies=12, groups=3, preset="paper", stat_ctx=10),
    ShiftKV(proxies=12, groups=3, llava_compat=True),
    SnapKV(grid=True, pool="max"),
    SnapKV(clamp=True, weight="output"),
    Bacon(grid=True, mode="rel", clamp=True),
    *(MixKV(diversity=d) for d in ("flat", "attn", "keydiff", "vnorm", "knorm")),
    *(DAS(base=base) for base in bases() if base != "shiftkv"),
    DAS(base="shiftkv", base_options={"proxies": 12, "groups": 3}, reference="global"),
    H2O(variant="observed"),
    Expected(horizon=5, covariance=False, vnorm=False),
]
LONG = random_prompt(1, 70, images=((1, 20), (25, 35), (40, 50)))
every_scorer = pytest.mark.parametrize("scorer", EVERY_SCORER, ids=str)


@every_scorer
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(scorer, check):
    check(scorer)


@every_scorer
def test_shared_sets_are_told(scorer):
    final = scorer.score(context([LONG], 0, scorer, LayerTrace())).final[0, :, :62]
    assert final[0].equal(final[1]) == (scorer.shared_sets or scorer.name == "streaming")


@every_scorer
def test_query_heads_of_a_group_are_interchangeable(scorer):
    """A mean over them, for every scorer: swapping two changes nothing."""
    if scorer.needs & Need.HIDDEN_MOMENTS:
        pytest.skip("proxies come from the projection's own heads")
    prompt = random_prompt(4, 30, ((2, 9), (9, 18)))
    order = [1, 0, 3, 2]
    swapped = dataclasses.replace(prompt, q=prompt.q[:, order], raw=prompt.raw[:, order])
    scores = [
        scorer.score(context([p], 0, scorer, LayerTrace())).final[0, :, :22]
        for p in (prompt, swapped)
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-7)
