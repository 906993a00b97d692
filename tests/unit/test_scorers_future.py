# SPDX-License-Identifier: Apache-2.0
"""Scorers that stand in for queries of tokens not decoded yet: worked examples and statistics."""

import lcg
import numpy as np
import pytest
import torch
from scorer_inputs import best, published, six_digits

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import cover_votes
from vllm_kvcompress.scoring import LayerTrace
from vllm_kvcompress.scoring.base import HiddenMoments, QueryMoments
from vllm_kvcompress.scoring.expected import Expected
from vllm_kvcompress.scoring.proxies import mean_and_deviation, standard_normal
from vllm_kvcompress.scoring.shiftkv import ShiftKV
from vllm_kvcompress.scoring.snapkv import SnapKV
from vllm_kvcompress.testing.inputs import Maker, context, random_prompt, rotation

LAST = lcg.LENGTH - 1


class Recorder:
    """A query projector that returns given proxies and remembers what it was asked for."""

    def __init__(self, proxies: torch.Tensor) -> None:
        self.proxies = proxies

    def project(self, layers: range, hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        self.hidden, self.offsets = hidden, offsets
        return self.proxies


class TestShiftKV:
    own = torch.tensor([[published(".10 .05 .30 .05 .40 .10")]])
    masses = torch.tensor(
        [
            published(".70 .20 .50 .15 .15 .30"),
            published(".15 .90 .15 .20 .40 .20"),
        ]
    )[None, None]

    def test_micro_example_of_the_paper(self):
        votes = cover_votes(self.masses, torch.tensor([6]), 0.8, "min")
        final = (votes + self.own)[0]
        assert final[0].tolist() == six_digits(published("1.10 2.05 1.30 1.05 1.40 2.10"))
        assert best(final[:, :5], 2) == [{1, 4}]

    def test_micro_example_of_the_release(self):
        masses = self.masses + self.own[:, :, None]
        assert (masses / 3)[0, 0, 0, :5].tolist() == six_digits(
            published(".266667 .083333 .266667 .066667 .183333")
        )
        final = (cover_votes(masses, torch.tensor([5]), 0.8, "floor") + self.own)[0]
        assert final[0, :5].tolist() == six_digits(published("1.10 1.05 1.30 .05 1.40"))
        assert best(final[:, :5], 2) == [{2, 4}]

    def test_cover_may_be_empty_and_ties_go_left(self):
        masses = torch.tensor([0.25, 0.25, 0.25, 0.25, 0, 0])[None, None, None]
        end = torch.tensor([4])
        assert cover_votes(masses, end, 0.2, "floor")[0, 0].tolist() == [0] * 6
        assert cover_votes(masses, end, 0.5, "floor")[0, 0].tolist() == [1, 1, 0, 0, 0, 0]
        assert cover_votes(masses, end, 0.5, "min")[0, 0].tolist() == [1, 1, 0, 0, 0, 0]
        assert cover_votes(masses, end, 0.6, "min")[0, 0].tolist() == [1, 1, 1, 0, 0, 0]

    def test_ties_go_left_in_a_long_prompt(self):
        votes = cover_votes(torch.ones(1, 1, 1, 4096), torch.tensor([4096]), 0.5, "min")[0, 0]
        assert votes[:2048].eq(1).all()
        assert votes[2048:].eq(0).all()

    def fixture(self, **options) -> tuple[torch.Tensor, torch.Tensor]:
        q = torch.from_numpy(lcg.queries_keys_values()[0][1]).float()
        one = torch.ones(1, 1)
        facts = {
            "hidden": HiddenMoments(torch.tensor([12]), one, one, one),
            "projector": Recorder(q[:, :4].transpose(0, 1)[None]),
        }
        scorer = ShiftKV(proxies=4, groups=2, **options)
        base, final = scorer.score(lcg.layer_context(0, 6, LayerTrace(), **facts))
        return base[0], final[0]

    def test_fixture_scores(self):
        base, final = self.fixture()
        assert final[0, :LAST].tolist() == six_digits(
            published(
                "2.068924 2.024717 2.058739 1.009230 2.029735 .012957 2.070960 2.344342 2.171424 "
                "2.034662 2.161198"
            )
        )
        assert base.equal(SnapKV().score(lcg.layer_context(0, 6, LayerTrace())).base[0])
        _, only_last = self.fixture(tau=0.0, cover="floor")
        assert only_last[0].tolist() == six_digits(
            published(
                ".068924 .024717 .058739 .009230 .029735 .012957 .070960 .344342 .171424 .034662 "
                ".161198 .013114"
            )
        )

    @pytest.mark.parametrize(
        ("preset", "tau", "kept"),
        [
            ("paper", 0.95, [{0, 2, 6, 7, 8}, {1, 2, 4, 6, 9}]),
            ("released", 0.95, [{0, 6, 7, 8, 10}, {1, 2, 3, 7, 9}]),
            ("paper", 0.8, [{0, 2, 4, 7, 9}, {3, 5, 8, 9, 10}]),
            ("released", 0.8, [{0, 2, 7, 8, 10}, {3, 4, 5, 8, 9}]),
        ],
    )
    def test_fixture_kept_sets(self, preset, tau, kept):
        _, final = self.fixture(preset=preset, tau=tau)
        assert best(final[:, :LAST], 5) == kept

    def test_options_override_the_preset(self):
        paper = {"stats": "feature", "cover": "min", "mix_last": False}
        assert self.fixture(**paper)[1].equal(self.fixture(preset="paper")[1])
        assert not self.fixture(cover="min")[1].equal(self.fixture()[1])

    def test_statistics(self):
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * 2 + 5
        sums = HiddenMoments(torch.tensor([20]), x.sum(0)[None], x.square().sum(0)[None], x[-1:])
        mean, deviation = mean_and_deviation(sums, per_feature=False)
        torch.testing.assert_close(mean, x.mean()[None, None])
        torch.testing.assert_close(deviation, x.std()[None, None])
        mean, deviation = mean_and_deviation(sums, per_feature=True)
        torch.testing.assert_close(mean, x.mean(0)[None])
        torch.testing.assert_close(deviation, x.std(0)[None])

    def test_statistics_of_one_token(self):
        x = torch.tensor([[1.0, 3.0]])
        sums = HiddenMoments(torch.tensor([1]), x, x.square(), x)
        assert mean_and_deviation(sums, per_feature=True)[1].tolist() == [[0, 0]]

    @pytest.mark.parametrize("stats", ["scalar", "feature"])
    def test_proxies(self, stats):
        """What the projection is asked for: mean + gamma * deviation * noise, and offsets."""
        prompt = random_prompt(0, 30)
        scorer = ShiftKV(proxies=12, groups=3, gamma=2.5, stats=stats, seed=7)
        ctx = context([prompt], 1, scorer, LayerTrace())
        ctx.projector = Recorder(torch.randn(1, 12, 4, 8))
        scorer.score(ctx)
        assert ctx.projector.offsets.tolist() == [3, 6, 9, 12] * 3
        x = torch.from_numpy(prompt.hidden[1])
        mean, deviation = (x.mean(), x.std()) if stats == "scalar" else (x.mean(0), x.std(0))
        noise = torch.randn(12, 6, generator=torch.Generator().manual_seed(7 + 1_000_003))
        torch.testing.assert_close(ctx.projector.hidden[0], mean + 2.5 * deviation * noise)

    def test_proxies_are_of_the_type_of_the_queries(self, monkeypatch):
        """Tensor cores do not multiply float32 numbers without loss."""
        scorer = ShiftKV(proxies=4, groups=2)
        ctx = context([random_prompt(0, 30)], 0, scorer, LayerTrace())
        ctx.queries = ctx.queries.bfloat16()
        types, original = [], kernels.group_attention_sum

        def recorded(queries, *args):
            types.append(queries.dtype)
            return original(queries, *args)

        monkeypatch.setattr(kernels, "group_attention_sum", recorded)
        scorer.score(ctx)
        assert types == [torch.bfloat16] * 2

    def test_noise_depends_on_layer_and_seed_alone(self):
        device = torch.device("cpu")
        noise = standard_normal(3, 2, 8, 5, device)
        assert standard_normal(3, 2, 8, 5, device) is noise
        assert not standard_normal(3, 1, 8, 5, device).equal(noise)
        assert not standard_normal(4, 2, 8, 5, device).equal(noise)

    def test_statistics_over_the_last_tokens(self):
        assert ShiftKV().stats_from(700) == 0
        assert ShiftKV(stat_ctx=512).stats_from(700) == 188
        assert ShiftKV(stat_ctx=512).stats_from(100) == 0

    def test_first_layers_of_llava(self):
        prompt = random_prompt(0, 30)
        scorer = ShiftKV(llava_compat=True)
        ctx = context([prompt], 1, scorer, LayerTrace())
        ctx.projector = Recorder(torch.randn(1, 16, 4, 8))
        scorer.score(ctx)
        assert ctx.projector.offsets.tolist() == list(range(1, 17))
        assert ctx.projector.hidden.equal(torch.from_numpy(prompt.hidden[1][-1]).expand(1, 16, 6))


class TestExpected:
    def fixture(self, **options) -> torch.Tensor:
        q = torch.from_numpy(lcg.queries_keys_values()[0][0]).float()[:, 2:]
        facts = {
            "moments": QueryMoments(torch.tensor([10]), q.sum(1)[None], (q.mT @ q)[None]),
            "projector": Maker(np.empty(0), [LAST]),
        }
        scorer = Expected(sinks=2, horizon=4, **options)
        assert scorer.stats_from(lcg.LENGTH) == 2
        base, final = scorer.score(lcg.layer_context(0, 4, LayerTrace(), **facts))
        assert base[0, :, :2].eq(0).all()
        assert final[0, :, :2].isposinf().all()
        assert base[..., 2:].equal(final[..., 2:])
        return final[0]

    def test_the_rotation_of_the_example(self):
        mean = sum(rotation(p, 4) for p in range(12, 16)) / 4
        assert mean[0].tolist() == six_digits([0.282088, 0, -0.381122, 0])
        assert mean[3].tolist() == six_digits([0, 0.134582, 0, 0.990839])

    def test_scores_and_kept_sets(self):
        final = self.fixture()
        assert final[0, 2:].tolist() == six_digits(
            published(
                ".206146 .220631 .244505 .102711 .370534 .343639 .169788 .173479 .171792 .089108"
            )
        )
        assert final[1, 2:].tolist() == six_digits(
            published(
                ".096187 .459436 .256108 .176128 .211365 .169278 .124211 .226459 .109412 .164628"
            )
        )
        assert best(final[:, :LAST], 5) == [{0, 1, 4, 6, 7}, {0, 1, 3, 4, 9}]

    def test_mean_alone(self):
        final = self.fixture(covariance=False, vnorm=False)
        assert final[0, 2:].tolist() == six_digits(
            published(
                ".110812 .104589 .085921 .098068 .112010 .121691 .091410 .083174 .091988 .100337"
            )
        )

    def test_epsilon(self):
        norm = torch.from_numpy(np.linalg.norm(lcg.queries_keys_values()[2][0], axis=-1)).float()
        gain = (self.fixture(epsilon=0.5) - self.fixture())[:, 2:]
        torch.testing.assert_close(gain, 0.5 * norm[:, 2:], rtol=1e-5, atol=1e-6)

    def test_horizon_in_several_pieces(self):
        """More offsets, and more keys, than are looked at at once."""
        prompt = random_prompt(1, 2100, num_q=2, num_kv=1, size=4)
        scorer = Expected(horizon=150)
        final = scorer.score(context([prompt], 0, scorer, LayerTrace())).final[0, 0]
        q = prompt.raw[0, :, 4:].astype(np.float64)
        turn = sum(rotation(prompt.length + p, 4) for p in range(150)) / 150
        expected = 0
        for head in q:
            spread = turn @ np.cov(head.T, bias=True) @ turn.T
            k = prompt.k[0, 0, 4:].astype(np.float64)
            logits = k @ turn @ head.mean(0) / 2 + np.einsum("td,de,te->t", k, spread, k) / 8
            expected = expected + np.exp(logits) / np.exp(logits).sum() / 2
        expected = expected * np.linalg.norm(prompt.v[0, 0, 4:], axis=-1)
        np.testing.assert_allclose(final[4:], expected, rtol=2e-4)
