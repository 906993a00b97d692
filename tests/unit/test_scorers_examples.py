# SPDX-License-Identifier: Apache-2.0
"""Published worked examples of the scorers that look at what the prompt shows."""

import json

import lcg
import numpy as np
import pytest
import torch
from scorer_inputs import best, published, six_digits

from vllm_kvcompress.scoring import LayerTrace, Scores
from vllm_kvcompress.scoring.das import DAS
from vllm_kvcompress.scoring.elastic import Elastic
from vllm_kvcompress.scoring.h2o import H2O
from vllm_kvcompress.scoring.keydiff import KeyDiff
from vllm_kvcompress.scoring.mixkv import MixKV
from vllm_kvcompress.scoring.postvision import PostVision
from vllm_kvcompress.scoring.prefixkv import PrefixKV
from vllm_kvcompress.scoring.snapkv import SnapKV
from vllm_kvcompress.scoring.streaming import Streaming
from vllm_kvcompress.testing.inputs import (
    attention,
    context,
    group_mean,
    key_attention_sum,
    random_prompt,
)

LAST = lcg.LENGTH - 1


def run(scorer, layer: int, columns: int, **facts) -> tuple[torch.Tensor, torch.Tensor]:
    """Base and final scores [Hkv, columns] of one layer of the worked example."""
    base, final = scorer.score(lcg.layer_context(layer, 4, LayerTrace(), **facts))
    return base[0, :, :columns], final[0, :, :columns]


def sums_of(layer: int) -> torch.Tensor:
    q, k, _ = lcg.queries_keys_values()
    return torch.from_numpy(key_attention_sum(q[layer], k[layer], lcg.SCALE)).float()[None]


class TestMixKV:
    def test_parts(self):
        base, diversity = run(MixKV(diversity="keydiff"), 1, lcg.NUM_SCORED)
        assert diversity[0].tolist() == six_digits(
            published(".061874 .030702 .060306 .280488 .038733 0 .026915 .089653 .111557")
        )
        _, valued = run(MixKV(diversity="vnorm"), 1, lcg.NUM_SCORED)
        assert (valued - base)[0].tolist() == six_digits(
            published(".111954 .107433 .067044 .093130 .021807 .119011 0 .031996 .147851")
        )
        _, attended = run(MixKV(diversity="attn"), 1, lcg.NUM_SCORED)
        assert attended.equal(run(SnapKV(), 1, lcg.NUM_SCORED)[1])
        assert base.equal(attended)

    def test_key_norm(self):
        base, final = run(MixKV(diversity="knorm"), 1, lcg.NUM_SCORED)
        norm = -np.linalg.norm(lcg.queries_keys_values()[1][1][:, : lcg.NUM_SCORED], axis=-1)
        unit = (norm - norm.min(1)[:, None]) / np.ptp(norm, axis=1)[:, None]
        level = base.double().numpy().mean(1) / unit.mean(1)
        np.testing.assert_allclose(final - base, unit * level[:, None], rtol=2e-5, atol=1e-7)

    def test_head_wise(self):
        _, final = run(MixKV(), 1, lcg.NUM_SCORED)
        assert final[0].tolist() == six_digits(
            published(".137138 .142971 .129848 .197392 .089135 .164232 .088299 .112959 .199937")
        )
        assert final[1].tolist() == six_digits(
            published(".174465 .206307 .128865 .185560 .219092 .175405 .132884 .163025 .106338")
        )
        assert best(final, 4) == [{1, 3, 5, 8}, {1, 3, 4, 5}]

    @pytest.mark.parametrize(
        ("layer", "ratio"), [(0, (-0.005544, -0.026229)), (1, (0.197854, 0.036786))]
    )
    def test_ratio(self, layer, ratio):
        """The mean off-diagonal cosine, by brute force and from the scores."""
        k = lcg.queries_keys_values()[1][layer]
        unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
        cosines = (unit @ unit.swapaxes(1, 2)).sum((1, 2)) - lcg.LENGTH
        cosines /= lcg.LENGTH * (lcg.LENGTH - 1)
        assert cosines.tolist() == six_digits(ratio)
        _, diversity = run(MixKV(diversity="keydiff"), layer, lcg.NUM_SCORED)
        _, importance = run(MixKV(diversity="vnorm"), layer, lcg.NUM_SCORED)
        _, mixed = run(MixKV(), layer, lcg.NUM_SCORED)
        weight = torch.from_numpy(cosines).clamp(0, 1)[:, None]
        expected = weight * diversity + (1 - weight) * importance
        np.testing.assert_allclose(mixed, expected, rtol=2e-5)

    def test_negative_ratio_leaves_importance_alone(self):
        _, final = run(MixKV(), 0, lcg.NUM_SCORED)
        assert final.equal(run(MixKV(diversity="vnorm"), 0, lcg.NUM_SCORED)[1])
        assert best(final, 4) == [{3, 6, 7, 8}, {1, 3, 4, 6}]

    def test_flat(self):
        _, final = run(MixKV(diversity="flat"), 1, lcg.NUM_SCORED)
        _, diversity = run(MixKV(diversity="keydiff"), 1, lcg.NUM_SCORED)
        _, importance = run(MixKV(diversity="vnorm"), 1, lcg.NUM_SCORED)
        torch.testing.assert_close(final, 0.33 * (diversity + importance))
        assert best(final, 4) == [{0, 3, 7, 8}, {0, 1, 2, 3}]

    @pytest.mark.parametrize(
        ("layer", "kept"),
        [(0, [{0, 6, 7, 8}, {1, 3, 4, 6}]), (1, [{0, 3, 7, 8}, {0, 1, 3, 4}])],
    )
    def test_table(self, layer, kept, tmp_path):
        path = tmp_path / "ratios.json"
        table = {f"{layer}-1-key": [0.2, 0.4], f"{layer}-0-key": [0.8]}
        # released tables tell the redundancy of values, too
        path.write_text(json.dumps(table | {f"{layer}-{head}-value": [0.1] for head in (0, 1)}))
        _, final = run(MixKV(ratio_table=str(path)), layer, lcg.NUM_SCORED)
        assert best(final, 4) == kept

    def test_heads_of_a_later_rank_and_missing_heads(self, tmp_path, caplog):
        path = tmp_path / "ratios.json"
        path.write_text(json.dumps({"1-1-key": [0.8], "1-0-key": [0.1]}))
        scorer = MixKV(ratio_table=str(path))
        _, final = run(scorer, 1, lcg.NUM_SCORED, first_head=1)
        whole = tmp_path / "whole.json"
        whole.write_text(json.dumps({"1-0-key": [0.8], "1-1-key": [0.3]}))
        assert final[0].equal(run(MixKV(ratio_table=str(whole)), 1, lcg.NUM_SCORED)[1][0])
        assert final[1].equal(run(MixKV(), 1, lcg.NUM_SCORED)[1][1])
        run(scorer, 1, lcg.NUM_SCORED, first_head=1)
        assert [record.getMessage() for record in caplog.records] == [
            f"{path} has no ratio for layer 1, KV heads [2]: computed from each prompt"
        ]


class TestDAS:
    micro = ".30 .10 .20 .06 .02 .04 .01 .03 .02"

    def factors(self, scorer, scores, segment) -> torch.Tensor:
        """Subsidised scores [n] of one head; the context has a fixed score underneath."""

        class Fixed:
            def score(self, ctx):
                return Scores(scores[None, None], scores[None, None])

        object.__setattr__(scorer, "scorer", Fixed())
        ctx = lcg.layer_context(0, 4, LayerTrace())
        ctx.prompt_lens = torch.tensor([len(scores)])
        ctx.num_recent = torch.tensor([0])
        ctx.positions = torch.arange(len(scores))
        ctx.segment = torch.tensor([segment])
        ctx.num_segments = 3
        base, final = scorer.score(ctx)
        assert base[0, 0].equal(scores)
        return final[0, 0]

    def test_micro_example(self):
        scores = torch.tensor(published(self.micro))
        segment = [0, 0, 0, 1, 1, 1, 2, 2, 2]
        final = self.factors(DAS(), scores, segment)
        assert final.tolist() == six_digits(
            published(".30 .10 .20 .18 .06 .12 .043333 .13 .086667")
        )
        assert best(scores[None], 4) == [{0, 1, 2, 3}]
        assert best(final[None], 4) == [{0, 2, 3, 7}]

    def test_identities(self):
        scores = torch.tensor(published(self.micro))
        three = [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert self.factors(DAS(eta=0.0), scores, three).equal(scores)
        assert self.factors(DAS(kmax=1.0), scores, three).equal(scores)
        assert self.factors(DAS(), scores, [0] * 9).equal(scores)
        assert self.factors(DAS(), scores, [-1] * 9).equal(scores)

    def test_global_reference(self):
        final = self.factors(
            DAS(reference="global", kmax=4.0),
            torch.tensor(published(self.micro)),
            [0] * 3 + [1] * 6,
        )
        mean = 0.78 / 9
        assert final[3:].tolist() == six_digits(
            [s * mean / 0.03 for s in published(self.micro)[3:]]
        )
        assert final[:3].tolist() == six_digits(published(self.micro)[:3])

    def test_text_between_images_and_infinite_scores(self):
        """Neither counts, and both stay as they are."""
        scores = torch.tensor([float("inf"), 0.3, 9.0, 0.1, 0.1, 7.0])
        final = self.factors(DAS(), scores, [0, 0, -1, 1, 2, -1])
        assert final.tolist() == pytest.approx([np.inf, 0.3, 9.0, 0.2, 0.5 / 3, 7.0])

    def test_fixture(self):
        facts = {"segment": torch.tensor([lcg.SEGMENT]), "num_segments": 2}
        base, final = run(DAS(), 1, 8, **facts)
        assert final[0].equal(base[0])
        assert final[1, 2:].tolist() == six_digits(
            published(".128108 .105911 .104831 .142886 .072773 .059595")
        )

    def test_goes_on_top_of_other_scores(self):
        facts = {
            "segment": torch.tensor([lcg.SEGMENT]),
            "num_segments": 2,
            "instruction_len": torch.tensor([lcg.TEXT_ROWS]),
        }
        base, final = run(DAS(base="postvision"), 0, 8, **facts)
        plain = run(PostVision(), 0, 8, **facts)[1]
        assert base.equal(plain)
        first, second = plain[:, 2:5].mean(1), plain[:, 5:8].mean(1)
        factor = ((first + second) / 2 / second).clamp(1, 8)
        torch.testing.assert_close(final[:, 5:8], plain[:, 5:8] * factor[:, None])
        assert final[:, :5].equal(plain[:, :5])


class TestH2O:
    def test_sums(self):
        base, final = run(H2O(), 0, lcg.LENGTH, key_attention_sum=sums_of(0))
        assert final[0].tolist() == six_digits(
            published(
                "2.862675 1.731760 1.920264 1.175784 .816472 .520604 .832917 1.218692 .314196 "
                ".333380 .260141 .013114"
            )
        )
        assert final[0].sum() == pytest.approx(12)
        assert base.equal(final)
        assert best(final[:, : lcg.NUM_SCORED], 4) == [{0, 1, 2, 7}, {0, 1, 2, 3}]

    def test_observed(self):
        _, final = run(H2O(variant="observed"), 0, lcg.LENGTH, key_attention_sum=sums_of(0))
        assert final[0].tolist() == six_digits(
            published(
                ".238556 .157433 .192026 .130643 .102059 .074372 .138820 .243738 .078549 .111127 "
                ".130071 .013114"
            )
        )

    def test_text_that_competes_ranks_above_images(self):
        segment = torch.full((1, lcg.LENGTH), -1)
        segment[0, :6] = 0
        scorer = H2O(text_prior=True, text_hard_cap=True)
        _, final = run(scorer, 0, lcg.LENGTH, key_attention_sum=sums_of(0), segment=segment)
        plain = sums_of(0)[0]
        assert final[:, :6].equal(plain[:, :6])
        assert best(final[:, : lcg.NUM_SCORED], 2) == [
            {6 + i for i in head} for head in best(plain[:, 6 : lcg.NUM_SCORED], 2)
        ]
        assert best(final[:, : lcg.NUM_SCORED], 4)[0] == {6, 7, 8, 0}

    def test_recent_tokens(self):
        assert H2O().num_recent(window=32, kept=100) == 32
        assert H2O(recent_share=0.25).num_recent(window=32, kept=101) == 25


class TestKeyDiff:
    def test_scores_and_kept_sets(self):
        base, final = run(KeyDiff(), 0, lcg.LENGTH)
        assert final[0].tolist() == six_digits(
            published(
                ".325192 -.883268 -.166828 -.709878 -.894806 -.867953 .407396 .775044 .318234 "
                "-.892071 -.049113 -.718771"
            )
        )
        assert base.equal(final + 1)
        kept = [others | {LAST} for others in best(final[:, :LAST], 4)]
        assert kept == [{0, 6, 7, 8, LAST}, {2, 6, 7, 8, LAST}]
        assert best(final, 5) == [{0, 6, 7, 8, 10}, {0, 2, 6, 7, 8}]
        assert KeyDiff().num_recent(window=3, kept=5) == 1


class TestStreaming:
    def test_kept_set(self):
        _, final = run(Streaming(sinks=4), 0, lcg.LENGTH)
        assert best(final[:, :LAST], 5) == [{0, 1, 2, 3, 10}] * 2
        assert Streaming().num_recent(window=3, kept=6) == 1


class TestSharedSets:
    def test_ranks(self):
        """The ranking that the released code of Elastic Cache misses."""
        sums = torch.tensor(published("9 .5 .9 .2 .8 .1 .3 5 0 0 0 0"))
        heads = torch.stack([sums - 0.05, sums + 0.05])
        base, final = run(Elastic(), 0, 8, key_attention_sum=heads[None])
        assert best(final[:, :7], 4) == [{0, 1, 2, 4}] * 2
        assert final[0].equal(final[1])
        assert base[0].tolist() == pytest.approx(sums[:8].tolist())

    @pytest.mark.parametrize("layer", range(lcg.LAYERS))
    def test_fixture(self, layer):
        _, final = run(PrefixKV(), layer, lcg.LENGTH, key_attention_sum=sums_of(layer))
        assert best(final[:, :LAST], 5) == [{0, 1, 2, 3, 4}] * 2

    def test_sinks(self):
        base, final = run(
            Elastic(sinks=2), 0, 8, key_attention_sum=torch.arange(24.0).view(1, 2, 12)
        )
        assert final[0].tolist() == [np.inf, np.inf, *range(8, 14)]
        assert base[0].tolist() == list(range(6, 14))
        assert run(Elastic(), 0, 8, key_attention_sum=torch.zeros(1, 2, 12))[1][0, 0] == np.inf

    def test_mean_goes_over_all_ranks(self):
        facts = {"key_attention_sum": sums_of(0), "mean_over_heads": lambda x: x.mean(1) + x[:, 0]}
        base, _ = run(Elastic(), 0, lcg.LENGTH, **facts)
        assert base[1].equal((sums_of(0).mean(1) + sums_of(0)[:, 0])[0])


class TestPostVision:
    def test_scores(self):
        base, final = run(
            PostVision(), 0, lcg.LENGTH, instruction_len=torch.tensor([lcg.TEXT_ROWS])
        )
        assert final[0].tolist() == six_digits(
            published(
                ".329528 .165663 .286212 .312121 .250552 .262454 .317126 1.155514 .314196 .333380 "
                ".260141 .013114"
            )
        )
        assert base.equal(final)

    def test_softcap(self):
        """Capped logits equal plain logits of queries and keys that give the capped values."""
        ctx = lcg.layer_context(0, 4, LayerTrace(), instruction_len=torch.tensor([4]), softcap=0.5)
        q, k, _ = lcg.queries_keys_values()
        logits = q[0].reshape(2, 2, 12, 4) @ k[0].swapaxes(1, 2)[:, None] * lcg.SCALE
        capped = 0.5 * np.tanh(logits.reshape(4, 12, 12) / 0.5)
        probs = attention(capped, np.stack([np.eye(12)] * 2), 1.0)[:, -4:]
        final = PostVision().score(ctx).final[0]
        np.testing.assert_allclose(final, group_mean(probs.sum(1), 2), rtol=1e-5)

    def test_long_instruction(self):
        """More rows than are looked at at once, beside a prompt that has few."""
        prompts = [random_prompt(0, 60, ((3, 10),)), random_prompt(1, 30, ((2, 25),))]
        ctx = context(prompts, 0, PostVision(), LayerTrace())
        for i, (prompt, rows) in enumerate(zip(prompts, (50, 5), strict=True)):
            probs = attention(prompt.q[0], prompt.k[0], 8**-0.5)[:, -rows:]
            expected = group_mean(probs.sum(1), 2)
            final = PostVision().score(ctx).final[i, :, : prompt.length]
            np.testing.assert_allclose(final, expected, rtol=1e-5, atol=1e-7)

    def test_recent_tokens(self):
        """A tenth of what a head keeps, which only its budget tells: for certain one."""
        assert [PostVision().num_recent(3, kept) for kept in (1, 19, 30, 40)] == [1, 1, 1, 1]
        assert PostVision.recent_fraction == 0.1
