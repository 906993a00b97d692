# SPDX-License-Identifier: Apache-2.0
"""Orientation, clamp and output weight against the oracle, and what each of them does."""

import numpy as np
import oracle
import pytest
import torch
from oracle import OracleConfig

from vllm_kvcompress.scoring import SCORERS, LayerTrace
from vllm_kvcompress.scoring.bacon import Bacon
from vllm_kvcompress.scoring.bacon_plus import BaconPlus
from vllm_kvcompress.scoring.snapkv import SnapKV
from vllm_kvcompress.testing.inputs import context, output_projections, random_prompt

IMAGES = ((1, 21), (25, 37), (40, 52), (58, 67))  # the last one ends in the window
LENGTH, WINDOW = 70, 8
ALL = {"grid": True, "clamp": True, "weight": "output"}


def scores(scorer, prompt, layers=3) -> torch.Tensor:
    """Final scores [L, Hkv, n], layer by layer."""
    trace, found = LayerTrace(), []
    for layer in range(layers):
        ctx = context([prompt], layer, scorer, trace, WINDOW)
        found.append(scorer.score(ctx).final[0, :, : LENGTH - WINDOW])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bacon-plus", {}),
        ("bacon-plus", {"mode": "rel", "kernel": 3, "pool": "max"}),
        ("bacon", ALL),
        ("bacon", {"grid": True}),
        ("snapkv", {"grid": True, "kernel": 7}),
        ("snapkv", {"clamp": True, "reduction": "max"}),
        ("mixkv", {"weight": "output"}),
    ],
)
def test_equals_the_oracle(name, options):
    prompt = random_prompt(1, LENGTH, IMAGES, layers=3)
    ctx = context([prompt], 0, SnapKV(), LayerTrace(), WINDOW)
    grids = [(first, (end - first) // width, width) for first, end, width, _ in
             ctx.grids[0].tolist()]  # fmt: skip
    cfg = OracleConfig(budget=12, window=WINDOW, scorer=name, **options)
    wo = output_projections(*prompt.q.shape[1::2])
    expected = oracle.scores(
        prompt.q, prompt.k, cfg, 8**-0.5, v=prompt.v, segments=IMAGES, grids=grids, wo=wo
    )
    found = scores(SCORERS[name](**options), prompt).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_bacon_plus_is_bacon_with_options():
    prompt = random_prompt(2, LENGTH, IMAGES, layers=3)
    assert scores(BaconPlus(), prompt).equal(scores(Bacon(**ALL), prompt))
    off = BaconPlus(grid=False, clamp=False, weight="none")
    assert scores(off, prompt).equal(scores(Bacon(), prompt))
    for option, value in (("grid", False), ("clamp", False), ("weight", "none")):
        assert not scores(BaconPlus(**{option: value}), prompt).equal(scores(BaconPlus(), prompt))


def test_ranks_agree_on_the_orientation():
    """What pools a rank's heads follows from the heads of all ranks."""
    prompt = random_prompt(3, LENGTH, IMAGES)
    ctx = context([prompt], 0, SnapKV(), LayerTrace(), WINDOW)
    for sign in (1, -1):
        ctx.mean_over_heads = lambda balance, sign=sign: sign * torch.ones_like(balance[:, 0])
        ctx._shared.clear()
        columns = SnapKV(grid=True).columns(ctx, ctx.output_grams.new_ones(1, 2, LENGTH))
        assert (columns.lines[0, :, 3] > 0).all() == (sign < 0)


def test_scores_stay_above_the_mean():
    prompt = random_prompt(4, LENGTH, IMAGES)
    plain = SnapKV().importance(context([prompt], 0, SnapKV(), LayerTrace(), WINDOW))
    scorer = SnapKV(clamp=True)
    clamped = scorer.importance(context([prompt], 0, scorer, LayerTrace(), WINDOW))
    n = LENGTH - WINDOW
    level = plain[..., :n].mean(2, keepdim=True)
    assert clamped[..., :n].allclose(torch.maximum(plain[..., :n], level))
