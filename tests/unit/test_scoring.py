# SPDX-License-Identifier: Apache-2.0
"""Scorers: published worked examples, an independent oracle, and what a batch must not change."""

import dataclasses
import math

import lcg
import numpy as np
import oracle
import pytest
import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import reference
from vllm_kvcompress.scoring import SCORERS, LayerTrace, ScoringContext
from vllm_kvcompress.scoring.bacon import Bacon
from vllm_kvcompress.scoring.snapkv import SnapKV

MODES = ("e", "el", "elt", "rel")
VARIANTS = [
    SnapKV(),
    SnapKV(kernel=1),
    SnapKV(kernel=7, pool="max"),
    SnapKV(kernel=3, reduction="max"),
    *(Bacon(mode=mode) for mode in MODES),
    Bacon(pool="max", reduction="max", local_k=3, trace_r=1, lambda_c=2.0, topk_frac=0.5),
    Bacon(mode="rel", trace_r=0),
    Bacon(trace_reduce="head_mean"),
    SnapKV(kernel=3, reduction="max", score_dtype="model"),
    Bacon(pool="max", score_dtype="model"),
]


def published(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def six_digits(values) -> object:
    """Equal to a published number, which has six decimals."""
    return pytest.approx(values, abs=6e-7)


def run(scorer, capacity: int = 4):
    """Scores of every layer of the worked example, [L][Hkv, n] base and final."""
    trace = LayerTrace()
    outputs = [
        scorer.score(lcg.layer_context(layer, capacity, trace)) for layer in range(lcg.LAYERS)
    ]
    cut = slice(0, lcg.NUM_SCORED)
    return [s.base[0, :, cut] for s in outputs], [s.final[0, :, cut] for s in outputs]


def kept(scores: torch.Tensor, capacity: int = 4) -> list[set[int]]:
    """Scored positions that each head of [Hkv, n] keeps, window left out."""
    heads, length = scores.shape
    chosen = kernels.select_tokens(
        scores[None],
        torch.full((1, heads), capacity),
        torch.tensor([length]),
        torch.tensor([length]),
        capacity,
    )
    return [set(row) for row in chosen[0].tolist()]


def batch_of(prompts, layer, window, capacity, trace, softcap=0.0, garbage=float("nan")):
    """A context of several requests; prompts are (q [L, Hq, P, D], k [L, Hkv, P, D]) arrays."""
    lengths = [k.shape[2] for _, k in prompts]
    num_kv_heads, head_size = prompts[0][1].shape[1], prompts[0][1].shape[3]
    keys = torch.full((len(prompts), num_kv_heads, max(lengths), head_size), garbage)
    for i, (_, k) in enumerate(prompts):
        keys[i, :, : lengths[i]] = torch.from_numpy(k[layer])
    queries = [torch.from_numpy(q[layer][:, -window:]).transpose(0, 1) for q, _ in prompts]
    return ScoringContext(
        layers=(layer,),
        stack=range(layer, layer + 1),
        prompt_lens=torch.tensor(lengths),
        capacity=torch.tensor(capacity),
        window=window,
        queries=torch.stack(queries),
        prompts=lcg.dense_prompts(keys, keys),
        scale=torch.full((len(prompts),), head_size**-0.5),
        softcap=softcap,
        trace=trace,
    )


def random_prompt(seed, length, num_q=4, num_kv=2, head_size=8, layers=3):
    rng = np.random.default_rng(seed)
    shape = (layers, num_q, length, head_size), (layers, num_kv, length, head_size)
    return tuple(rng.normal(size=s).astype(np.float32) * 1.5 for s in shape)


class TestWorkedExamples:
    def test_the_example_is_the_published_one(self):
        q, k, v = lcg.queries_keys_values()
        assert q[0, 0, 0].tolist() == six_digits(published(".388224 -.802941 -.673301 .767894"))
        assert q[2, 3, 11].tolist() == six_digits(
            published("-.352011 -1.773488 -1.913628 1.233876")
        )
        assert k[2, 1, 11].tolist() == six_digits(published("-.126720 .650810 1.823435 .310672"))
        assert v[2, 1, 11].tolist() == six_digits(published("-.220803 .001614 .022312 -1.755179"))

    def test_raw_window_attention(self):
        ctx = lcg.layer_context(0, 4, LayerTrace())
        mean, last = kernels.window_scores(
            ctx.window_queries, ctx.prompts, ctx.prompt_lens, ctx.scale
        )
        assert mean[0, 0].tolist() == six_digits(
            published(
                ".047371 .044446 .072657 .068259 .074041 .073890 .061643 .275325 .080156 0 0 0"
            )
        )
        assert mean[0, 1].tolist() == six_digits(
            published(
                ".068216 .116494 .059819 .136376 .125008 .169476 .035508 .046601 .049688 0 0 0"
            )
        )
        assert last.shape == mean.shape

    @pytest.mark.parametrize(
        ("layer", "head", "expected"),
        [
            (0, 0, ".032895 .046547 .061355 .066659 .070098 .110632 .113011 .098203 .083425"),
            (0, 1, ".048906 .076181 .101183 .121435 .105237 .102594 .085256 .060254 .026359"),
            (1, 0, ".043749 .063229 .079958 .083766 .079759 .085730 .103440 .086712 .073885"),
            (1, 1, ".056343 .117975 .128108 .105911 .104831 .109873 .055960 .045826 .035122"),
        ],
    )
    def test_window_score(self, layer, head, expected):
        base, final = run(SnapKV())
        assert base[layer][head].tolist() == six_digits(published(expected))
        assert final[layer].equal(base[layer])

    def test_window_kept_sets(self):
        base, _ = run(SnapKV())
        assert [kept(layer) for layer in base] == [
            [{5, 6, 7, 8}, {2, 3, 4, 5}],
            [{3, 5, 6, 7}, {1, 2, 3, 5}],
            [{2, 3, 4, 5}, {2, 3, 4, 6}],
        ]

    def test_max_pooling_and_its_tie(self):
        base, _ = run(SnapKV(pool="max"))
        values = [0.072657] * 2 + [0.074041] * 3 + [0.275325] * 4
        assert base[0][0].tolist() == six_digits(values)
        assert kept(base[0])[0] == {5, 6, 7, 8}

    def test_group_maximum_comes_before_pooling(self):
        base, _ = run(SnapKV(reduction="max"))
        assert base[0][0].tolist() == six_digits(
            published(".045793 .067430 .091914 .102496 .110252 .158078 .159946 .135462 .111819")
        )

    def test_bacon_gate_of_the_first_layer(self):
        """Without a trace, elt differs from el by the gate rho alone."""
        base, gated = run(Bacon(mode="elt"))
        _, plain = run(Bacon(mode="el"))
        ratio = (gated[0] - base[0]).sum(1) / (plain[0] - base[0]).sum(1)
        assert ratio.tolist() == pytest.approx([0.183311, 0.043143], rel=1e-4)

    @pytest.mark.parametrize(
        ("mode", "layer", "expected"),
        [
            ("elt", 0, (0.117145, 0.104657)),
            ("elt", 1, (0.054336, 0.224851)),
            ("elt", 2, (0.394122, 0.179304)),
            ("e", 1, (0.544680, 0.666763)),
            ("el", 1, (0.364514, 0.407985)),
        ],
    )
    def test_bacon_strength(self, mode, layer, expected):
        """lambda = (S - B) / V, with V put together by hand from the recorded evidence."""
        trace = LayerTrace()
        for i in range(layer + 1):
            scores = Bacon(mode=mode).score(lcg.layer_context(i, 4, trace))
        left = trace.extend(torch.empty(0, 1, lcg.NUM_KV_HEADS, lcg.LENGTH), 4)
        evidence = left[:, 0, :, : lcg.NUM_SCORED].double()
        value = evidence[layer].clone()
        if mode != "e":
            value += torch.from_numpy(oracle.pool1d(evidence[layer].numpy(), 5, "avg"))
        if mode == "elt" and layer:
            value += evidence[:layer].mean(0)
        gain = (scores.final - scores.base)[0, :, : lcg.NUM_SCORED].double()
        assert (gain.sum(1) / value.sum(1)).tolist() == pytest.approx(list(expected), rel=1e-4)

    def test_bacon_scores_of_the_second_layer(self):
        _, final = run(Bacon())
        assert final[1][1].tolist() == six_digits(
            published(".056666 .118837 .128902 .108601 .114109 .126902 .078345 .065544 .053378")
        )

    @pytest.mark.parametrize(
        ("mode", "layer", "expected"),
        [
            ("elt", 0, [{5, 6, 7, 8}, {2, 3, 4, 5}]),
            ("elt", 1, [{3, 5, 6, 7}, {1, 2, 4, 5}]),
            ("elt", 2, [{2, 3, 4, 5}, {2, 3, 4, 6}]),
            ("e", 1, [{5, 6, 7, 8}, {1, 2, 4, 5}]),
        ],
    )
    def test_bacon_kept_sets(self, mode, layer, expected):
        _, final = run(Bacon(mode=mode))
        assert kept(final[layer]) == expected

    @pytest.mark.parametrize("mode", MODES)
    def test_bacon_keeps_what_the_oracle_keeps(self, mode):
        q, k, _ = lcg.queries_keys_values()
        cfg = oracle.OracleConfig(budget=4 + lcg.WINDOW, scorer="bacon", window=3, mode=mode)
        expected = oracle.scores(q, k, cfg, lcg.SCALE)
        _, final = run(Bacon(mode=mode))
        for layer in range(lcg.LAYERS):
            best = [set(oracle.best_positions(row, 4).tolist()) for row in expected[layer]]
            assert kept(final[layer]) == best


class TestCalibration:
    """The micro example: one head, n = 8, pooling width 3, two traced layers."""

    base = ".10 .02 .02 .05 .01 .01 .20 .03"
    last = ".06 .02 .09 .10 .08 .01 .12 .03"
    traced = ("0 0 .04 .02 .06 0 0 .09", "0 0 .02 .04 .02 0 0 0")

    def scores(self, mode: str, traced=traced, last=last, topk_frac=2.0) -> torch.Tensor:
        base, last = (torch.tensor([[published(x)]]) for x in (self.base, last))
        evidence = (last - base).clamp_min(0)
        earlier = [torch.tensor([[published(x)]]) for x in traced]
        return reference.bacon_calibrate(
            base,
            evidence,
            torch.stack([*earlier, evidence]),
            torch.tensor([8]),
            torch.tensor([2]),
            trace_r=4,
            mode=mode,
            local_k=3,
            lambda_c=0.5,
            topk_frac=topk_frac,
        )[0]

    @pytest.mark.parametrize(
        ("mode", "expected", "top"),
        [
            ("e", ".1 .02 .100442 .107459 .090442 .01 .2 .03", {0, 2, 3, 6}),
            ("el", ".1 .040173 .115103 .147984 .105103 .030173 .2 .03", {2, 3, 4, 6}),
            ("elt", ".1 .037756 .126536 .159073 .124146 .027756 .2 .064244", {2, 3, 4, 6}),
            ("rel", ".1 .033719 .115755 .127300 .109115 .027247 .2 .03", {2, 3, 4, 6}),
        ],
    )
    def test_modes(self, mode, expected, top):
        scores = self.scores(mode)
        assert scores[0].tolist() == six_digits(published(expected))
        assert kept(scores) == [top]

    @pytest.mark.parametrize("mode", MODES)
    def test_no_evidence_changes_nothing_bit_for_bit(self, mode):
        scores = self.scores(mode, traced=(), last=self.base)
        assert scores[0].equal(torch.tensor(published(self.base)))

    def test_one_statistic_position_adds_nothing(self):
        """K = 1: the spread of one value is 0."""
        scores = self.scores("elt", traced=(), topk_frac=0.1)
        assert scores[0].equal(torch.tensor(published(self.base)))


class TestAgainstOracle:
    @pytest.mark.parametrize("scorer", VARIANTS, ids=str)
    @pytest.mark.parametrize(("num_q", "num_kv"), [(3, 3), (4, 2), (8, 1)])
    @pytest.mark.parametrize("length", [33, 100])
    def test_scores(self, scorer, num_q, num_kv, length):
        window = 16
        q, k = random_prompt(length, length, num_q, num_kv)
        options = {f.name: getattr(scorer, f.name) for f in dataclasses.fields(scorer)}
        cfg = oracle.OracleConfig(budget=window + 8, scorer=scorer.name, window=window, **options)
        expected = oracle.scores(q, k, cfg, k.shape[-1] ** -0.5)
        trace = LayerTrace()
        for layer in range(k.shape[0]):
            ctx = batch_of([(q, k)], layer, window, [8], trace)
            final = scorer.score(ctx).final[0, :, : length - window]
            np.testing.assert_allclose(final, expected[layer], rtol=2e-5, atol=1e-8)

    def test_a_window_of_one_row(self):
        q, k = random_prompt(5, 20)
        cfg = oracle.OracleConfig(budget=9, scorer="bacon", window=1)
        expected = oracle.scores(q, k, cfg, k.shape[-1] ** -0.5)
        final = Bacon().score(batch_of([(q, k)], 0, 1, [8], LayerTrace())).final
        np.testing.assert_allclose(final[0, :, :19], expected[0], rtol=2e-5)

    @pytest.mark.parametrize("scorer", [SnapKV(), Bacon()], ids=str)
    def test_softcap(self, scorer):
        """Capped logits equal plain logits of a model whose keys give the capped values."""
        window, cap = 8, 2.0
        q, k = random_prompt(11, 40, num_q=2, num_kv=2)
        logits = q.astype(np.float64) @ k.astype(np.float64).swapaxes(2, 3) * q.shape[-1] ** -0.5
        capped = cap * np.tanh(logits / cap)
        # queries that are the rows of the capped logits, keys that are unit vectors
        units = np.broadcast_to(np.eye(40), capped.shape)
        cfg = oracle.OracleConfig(budget=16, scorer=scorer.name, window=window)
        expected = oracle.scores(capped, units, cfg, 1.0)
        ctx = batch_of([(q, k)], 0, window, [8], LayerTrace(), softcap=cap)
        final = scorer.score(ctx).final[0, :, :32]
        np.testing.assert_allclose(final, expected[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["snapkv", "bacon", "mixkv"])
def test_scores_in_the_type_of_the_model(name):
    """Rounding moves no score by much, and makes some of them equal."""
    ctx = batch_of([random_prompt(3, 300)], 0, 8, [16], LayerTrace())
    ctx.queries = ctx.queries.bfloat16()
    exact = SCORERS[name](kernel=1).score(ctx).base[0, :, :292]
    ctx.trace = LayerTrace()
    scores = SCORERS[name](kernel=1, score_dtype="model").score(ctx)
    rounded = scores.base[0, :, :292]
    assert rounded.equal(rounded.bfloat16().float())
    # a logit z is rounded by up to z / 256 twice, and moves its probability by that
    largest = 8 * ctx.scale[0] * ctx.queries.float().abs().max() * ctx.keys.abs().max()
    torch.testing.assert_close(rounded, exact, rtol=0.01 + float(largest) / 256, atol=0)
    assert len(rounded.unique()) < len(exact.unique()) == exact.numel()
    if name == "bacon":
        final = scores.final[0, :, :292]
        assert final.equal(final.bfloat16().float())


def test_rounded_where_released_code_rounds():
    """SnapKV's lines in bfloat16: products, logits, probabilities and means, one after another."""
    dtype, window, length = torch.bfloat16, 8, 120
    q, k = (torch.from_numpy(x).to(dtype) for x in random_prompt(5, length))
    scorer = SnapKV(kernel=1, score_dtype="model")
    ctx = batch_of([(q.float().numpy(), k.float().numpy())], 0, window, [16], LayerTrace())
    ctx.queries = ctx.queries.to(dtype)
    found = scorer.score(ctx).base[0, :, : length - window]

    num_q, num_kv, size = len(q[0]), len(k[0]), q.shape[-1]
    keys = k[0].float().repeat_interleave(num_q // num_kv, dim=0)
    logits = (q[0, :, -window:].float() @ keys.mT).to(dtype) / math.sqrt(size)
    hidden = torch.ones(window, length, dtype=torch.bool).triu(length - window + 1)
    logits = logits.masked_fill(hidden, torch.finfo(dtype).min)
    probs = logits.softmax(-1, dtype=torch.float32).to(dtype)[..., : length - window]
    expected = probs.mean(1).view(num_kv, -1, length - window).mean(1).float()
    assert (found == expected).float().mean() > 0.99  # products are summed in another order
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


class TestDegenerateRows:
    @pytest.mark.parametrize("scorer", VARIANTS, ids=str)
    def test_constant_keys(self, scorer):
        """All logits equal: every row is uniform, nothing divides by zero, ties go left."""
        q, k = random_prompt(1, 40)
        k[:] = 0.5
        trace = LayerTrace()
        for layer in range(3):
            scores = scorer.score(batch_of([(q, k)], layer, 8, [4], trace))
            assert scores.final[:, :, :32].isfinite().all()
        unpooled = SnapKV(kernel=1).score(batch_of([(q, k)], 0, 8, [4], LayerTrace()))
        assert kept(unpooled.base[0, :, :32]) == [{0, 1, 2, 3}] * 2

    def test_one_scored_position(self):
        q, k = random_prompt(6, 9)
        scores = Bacon().score(batch_of([(q, k)], 0, 8, [1], LayerTrace()))
        assert scores.final[:, :, 0].isfinite().all()


class TestLayerTrace:
    def test_groups_see_the_end_of_earlier_ones(self):
        layers = torch.arange(7).view(7, 1)
        trace = LayerTrace()
        assert trace.extend(layers[:3], 2).equal(layers[:3])
        assert trace.extend(layers[3:4], 2).equal(layers[1:4])
        assert trace.extend(layers[4:], 2).equal(layers[2:])

    def test_no_reach_leaves_nothing(self):
        layers = torch.arange(4).view(4, 1)
        trace = LayerTrace()
        for group in layers.split(2):
            assert trace.extend(group, 0).equal(group)


def test_table_rows_are_frozen_dataclasses_under_their_own_name():
    for name, scorer in SCORERS.items():
        assert scorer.name == name
        with pytest.raises(dataclasses.FrozenInstanceError):
            scorer().name = "other"
