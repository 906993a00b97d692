# SPDX-License-Identifier: Apache-2.0
"""What no scorer of the table may do, whatever it scores."""

import dataclasses
import itertools

import pytest
import torch
from scorer_inputs import context, random_prompt, together

from vllm_kvcompress.scoring import SCORERS, LayerTrace, Need
from vllm_kvcompress.scoring.das import DAS, bases
from vllm_kvcompress.scoring.expected import Expected
from vllm_kvcompress.scoring.h2o import H2O
from vllm_kvcompress.scoring.mixkv import MixKV
from vllm_kvcompress.scoring.shiftkv import ShiftKV

EVERY_SCORER = [
    *(scorer() for name, scorer in SCORERS.items() if name != "shiftkv"),
    ShiftKV(proxies=12, groups=3),
    ShiftKV(proxies=12, groups=3, preset="paper", stat_ctx=10),
    ShiftKV(proxies=12, groups=3, llava_compat=True),
    *(MixKV(diversity=d) for d in ("flat", "attn", "keydiff", "vnorm", "knorm")),
    *(DAS(base=base) for base in bases() if base != "shiftkv"),
    DAS(base="shiftkv", base_options={"proxies": 12, "groups": 3}, reference="global"),
    H2O(variant="observed"),
    Expected(horizon=5, covariance=False, vnorm=False),
]
every_scorer = pytest.mark.parametrize("scorer", EVERY_SCORER, ids=str)

RAGGED = (
    random_prompt(0, 23, images=((2, 7), (7, 12))),
    random_prompt(1, 70, images=((1, 20), (25, 35), (40, 50))),  # 20 rows of instruction
    random_prompt(2, 41),
    random_prompt(8, 12, images=((0, 2),)),  # shorter than that
)


def num_meaningful(scorer, length: int, window: int = 8) -> int:
    """Columns below which every score counts."""
    return length - max(1, scorer.num_recent(window, 12))


@every_scorer
def test_a_batch_equals_batches_of_one(scorer):
    together, alone = LayerTrace(), [LayerTrace() for _ in RAGGED]
    for layer in range(2):
        both = scorer.score(context(RAGGED, layer, scorer, together))
        for i, prompt in enumerate(RAGGED):
            one = scorer.score(context([prompt], layer, scorer, alone[i]))
            end = num_meaningful(scorer, prompt.length)
            for got, want in zip(both, one, strict=True):
                assert got.dtype == torch.float32
                assert got.shape[:2] == (len(RAGGED), 2)
                assert not want[..., :end].isnan().any()
                torch.testing.assert_close(got[i, :, :end], want[0, :, :end], rtol=1e-5, atol=1e-7)


@every_scorer
@pytest.mark.parametrize("groups", [[4], [1, 3]], ids=str)
def test_layers_together_equal_layers_alone(scorer, groups):
    """Whatever the groups, and with rotations shared by all layers or not."""
    prompts = [
        random_prompt(10, 70, ((1, 20), (25, 35)), layers=4),
        random_prompt(11, 41, layers=4),
    ]
    trace = LayerTrace()
    alone = [scorer.score(context(prompts, layer, scorer, trace)) for layer in range(4)]
    whole = together([context(prompts, layer, scorer, LayerTrace()) for layer in range(4)])
    whole.projector.shared = len(groups) == 1
    edges = [0, *itertools.accumulate(groups)]
    parts = [scorer.score(whole.of_layers(*edge)) for edge in itertools.pairwise(edges)]
    for part in ("base", "final"):
        found = torch.cat([getattr(scores, part) for scores in parts])
        wanted = torch.cat([getattr(scores, part) for scores in alone])
        for i in range(2):
            end = num_meaningful(scorer, prompts[i].length)
            assert found[i::2, :, :end].equal(wanted[i::2, :, :end])


@every_scorer
def test_what_stands_after_a_prompt_does_not_matter(scorer):
    scores = [
        scorer.score(context(RAGGED, 0, scorer, LayerTrace(), garbage=garbage))
        for garbage in (0.0, float("nan"), float("inf"), -3e38)
    ]
    for i, prompt in enumerate(RAGGED):
        end = num_meaningful(scorer, prompt.length)
        for other in scores[1:]:
            assert other.base[i, :, :end].equal(scores[0].base[i, :, :end])
            assert other.final[i, :, :end].equal(scores[0].final[i, :, :end])


@every_scorer
@pytest.mark.parametrize(("num_q", "num_kv"), [(2, 2), (6, 2), (3, 1)])
def test_every_group_size(scorer, num_q, num_kv):
    prompt = random_prompt(3, 30, ((2, 9), (9, 18)), num_q=num_q, num_kv=num_kv)
    scores = scorer.score(context([prompt], 0, scorer, LayerTrace()))
    assert scores.final.shape == scores.base.shape == (1, num_kv, 30)


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


@every_scorer
def test_constant_prompt(scorer):
    """All keys and values equal: nothing divides by zero."""
    prompt = random_prompt(5, 40, ((2, 9), (9, 18)))
    for part in (prompt.k, prompt.v, prompt.hidden):
        part[:] = 0.5
    trace = LayerTrace()
    for layer in range(2):
        scores = scorer.score(context([prompt], layer, scorer, trace))
        assert not scores.final[..., :32].isnan().any()
        assert scores.base[..., :32].isfinite().all()


@every_scorer
def test_all_zero_prompt(scorer):
    prompt = random_prompt(6, 40, ((2, 9),))
    for part in (prompt.q, prompt.raw, prompt.k, prompt.v, prompt.hidden):
        part[:] = 0
    scores = scorer.score(context([prompt], 0, scorer, LayerTrace()))
    assert not scores.final[..., :32].isnan().any()


@every_scorer
def test_base_scores_can_be_counted(scorer):
    scores = scorer.score(context(RAGGED[1:2], 0, scorer, LayerTrace()))
    if scorer.countable:
        assert scores.base[..., :62].ge(0).all()
        assert scores.base[..., :62].isfinite().all()


@every_scorer
def test_shared_sets(scorer):
    final = scorer.score(context(RAGGED[1:2], 0, scorer, LayerTrace())).final[0, :, :62]
    assert final[0].equal(final[1]) == (scorer.shared_sets or scorer.name == "streaming")


@every_scorer
def test_bfloat16_inputs_are_computed_in_float32(scorer):
    def rounded(ctx, dtype):
        return dataclasses.replace(
            ctx,
            queries=ctx.queries.bfloat16().to(dtype),
            prompts=ctx.prompts._replace(pages=ctx.prompts.pages.bfloat16().to(dtype)),
        )

    low, high = (
        scorer.score(rounded(context(RAGGED[:1], 0, scorer, LayerTrace()), dtype)).final
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert low.dtype == torch.float32
    end = num_meaningful(scorer, RAGGED[0].length)
    assert low[..., :end].equal(high[..., :end])


@every_scorer
def test_needs_are_all_it_reads(scorer):
    """A context without what is not needed is enough."""
    ctx = context(RAGGED, 0, scorer, LayerTrace())
    missing = {
        Need.SEGMENTS: {"segment": None},
        Need.INSTRUCTION_QUERIES: {"instruction_len": None},
        Need.KEY_ATTENTION_SUMS: {"key_attention_sum": None},
        Need.HIDDEN_MOMENTS: {"hidden": None},
        Need.QUERY_MOMENTS: {"moments": None},
    }
    absent = {
        k: v for need, part in missing.items() if not scorer.needs & need for k, v in part.items()
    }
    lean = dataclasses.replace(ctx, **absent, trace=LayerTrace())
    if not scorer.needs & (Need.HIDDEN_MOMENTS | Need.QUERY_MOMENTS):
        lean.projector = None
    if not scorer.needs & Need.INSTRUCTION_QUERIES:
        lean.queries = lean.queries[:, -8:]
    if not scorer.needs & (Need.INSTRUCTION_QUERIES | Need.WINDOW_QUERIES):
        lean.queries = lean.queries[:, -1:] if scorer.needs & Need.LAST_QUERY else None
    assert scorer.score(lean).final.shape == scorer.score(ctx).final.shape


@every_scorer
def test_a_nan_key_spoils_its_own_head_only(scorer):
    if scorer.shared_sets:
        pytest.skip("one ranking for all heads")
    prompt = random_prompt(7, 40, ((2, 9), (9, 18)))
    spoiled = dataclasses.replace(prompt, k=prompt.k.copy())
    spoiled.k[0, 1, 3] = float("nan")
    scores = [
        scorer.score(context([p], 0, scorer, LayerTrace())).final[0, 0, :32]
        for p in (prompt, spoiled)
    ]
    assert scores[0].equal(scores[1])
