# SPDX-License-Identifier: Apache-2.0
"""The oracle reproduces the published worked examples: scorers that know images, and proxies."""

from dataclasses import replace

import lcg
import numpy as np
import pytest
import torch
from oracle import OracleConfig, Prompt
from oracle.attention import by_group
from oracle.elite import elite_importance
from oracle.proxies import proxy_queries, proxy_votes, query_mass
from oracle.scorers import State, last_row, score_layers, shiftkv, subsidised, window_score
from worked import C4, PROMPT, SEGMENTS, SMALL, K, Q, close, numbers, rotate, sets, top


class TestAirCache:
    @pytest.mark.parametrize(
        ("layer", "elite", "scope", "rows"),
        [
            (0, 0.9, "head", "8 a 9 a"),
            (1, 0.9, "head", "8 9 8 9"),
            (2, 0.9, "head", "a a a 8"),
            (0, 0.6, "head", "8a a 9 9a"),
            (0, 0.9, "layer", "a a a a"),
            (0, 1.0, "head", "8 a 9 a"),
        ],
    )
    def test_elite_rows(self, layer, elite, scope, rows):
        assert sets([elite_importance(PROMPT, layer, elite, scope)[1]]) == [rows]

    def test_importance(self):
        score = by_group(elite_importance(PROMPT, 0, 0.9, "head")[0], 2)
        assert close(
            score[:, 2:8],
            ".077602 .236535 .292734 .148220 .134756 .045880"
            "| .041095 .096580 .206929 .437996 .012374 .005602",
        )
        assert not score[:, :2].any()
        assert not score[:, 8:].any()
        layer = by_group(elite_importance(PROMPT, 0, 0.9, "layer")[0], 2)[0]
        assert close(layer[2:8], ".093821 .084068 .258800 .112792 .058647 .264063")

    def test_prompt_ends_with_an_image(self):
        """Its last row stands in for text; no key counts twice."""
        prompt = replace(PROMPT, segments=[(2, 12)])
        importance, rows = elite_importance(prompt, 0, 0.9, "head")
        assert sets([rows]) == ["b b b b"]
        np.testing.assert_allclose(importance.sum(axis=1), 1)

    def test_many_instruction_len(self):
        """At most 256 text rows look back at the image."""
        rng = np.random.default_rng(0)
        q, k = rng.normal(size=(1, 1, 400, 4)), rng.normal(size=(1, 1, 400, 4))
        rows = Prompt(q, k, 0.5, segments=[(2, 5)]).instruction_len()
        assert (rows[0], rows[-1]) == (144, 399)


class TestShiftKV:
    MASS = numbers(
        ".40 .10 .20 .05 .05 .20 | .30 .10 .30 .10 .10 .10"
        "| .05 .50 .05 .10 .20 .10 | .10 .40 .10 .10 .20 .10"
    )[None]
    LAST = numbers(".10 .05 .30 .05 .40 .10")[None]

    @pytest.mark.parametrize(
        ("preset", "score", "best"),
        [
            ("paper", "1.10 2.05 1.30 1.05 1.40", "14"),
            ("released", "1.10 1.05 1.30 0.05 1.40", "24"),
        ],
    )
    def test_micro(self, preset, score, best):
        cfg = OracleConfig(budget=34, groups=2, tau=0.8, preset=preset)
        got = proxy_votes(self.MASS, self.LAST, cfg)
        assert close(got[0], score)
        assert top(got, 2) == best

    @pytest.mark.parametrize(
        ("preset", "tau", "best"),
        [
            ("paper", 0.95, "02678 12469"),
            ("released", 0.95, "0678a 12379"),
            ("paper", 0.80, "02479 3589a"),
            ("released", 0.80, "0278a 34589"),
        ],
    )
    def test_fixture(self, preset, tau, best):
        """Queries of the next layer stand in for proxies."""
        last = by_group(last_row(PROMPT, 0), 2)
        assert close(
            last[0],
            ".068924 .024717 .058739 .009230 .029735 .012957 .070960 .344342 .171424 .034662"
            " .161198 .013114",
        )
        cfg = OracleConfig(budget=34, groups=2, tau=tau, preset=preset)
        got = proxy_votes(query_mass(Q[1, :, :4], K[0], lcg.SCALE), last, cfg)
        assert top(got, 5) == best
        if (preset, tau) == ("released", 0.95):
            assert close(
                got[0],
                "2.068924 2.024717 2.058739 1.009230 2.029735 0.012957 2.070960 2.344342 2.171424"
                " 2.034662 2.161198",
            )

    @pytest.mark.parametrize(("tau", "floor", "least"), [(0.5, 1, 1), (0.6, 1, 2), (0.4, 0, 1)])
    def test_cover(self, tau, floor, least):
        """One group of one proxy: what reaches the goal exactly belongs to both covers."""
        mass, nobody = np.array([[[0.5, 0.25, 0.125, 0.125, 0]]]), np.zeros((1, 5))
        for cover, count in (("floor", floor), ("min", least)):
            cfg = OracleConfig(budget=34, groups=1, tau=tau, cover=cover)
            votes = proxy_votes(mass, nobody, cfg)[0]
            assert votes.tolist() == [1] * count + [0] * (4 - count)

    @pytest.mark.parametrize("stats", ["scalar", "feature"])
    @pytest.mark.parametrize("context", [0, 5])
    def test_proxies(self, stats, context):
        """Six proxies in two groups: noise around the inputs of the second layer, then RoPE."""
        hidden = np.random.default_rng(1).normal(size=(3, 12, 16)) + np.arange(16)
        prompt = replace(
            PROMPT,
            hidden=hidden,
            project=lambda layer, x: x.reshape(6, 4, 4).swapaxes(0, 1),
            positions=np.array([np.arange(12), np.arange(12) + 7, np.arange(12)]),
        )
        cfg = OracleConfig(
            budget=34, proxies=6, groups=2, gamma=3.0, stats=stats, stat_ctx=context, seed=5
        )
        x = torch.from_numpy(hidden[1][-context or None :])
        mean, std = (x.mean(), x.std()) if stats == "scalar" else (x.mean(0), x.std(0))
        noise = torch.randn(6, 16, generator=torch.Generator().manual_seed(1_000_008))
        proxies = (mean + 3 * std * noise.double()).numpy()
        positions = 18 + np.array([[2, 4, 6, 2, 4, 6]])
        expected = rotate(1, prompt.project(1, proxies), positions)
        np.testing.assert_allclose(proxy_queries(prompt, 1, cfg), expected, rtol=1e-9)

    def test_base(self):
        """adakv counts the window's score, which is none inside the window."""
        prompt = replace(
            PROMPT,
            hidden=np.random.default_rng(1).normal(size=(3, 12, 16)),
            project=lambda layer, x: x.reshape(8, 4, 4).swapaxes(0, 1),
        )
        scored = shiftkv(prompt, 0, replace(C4, proxies=8, groups=2), State(1, 4))
        assert scored.base.shape == scored.final.shape == (2, 11)
        assert np.array_equal(scored.base[:, :9], window_score(PROMPT, 0, C4))
        assert not scored.base[:, 9:].any()

    def test_parts_of_a_preset(self):
        cfg = OracleConfig(budget=34, groups=2, tau=0.8)
        paper = replace(cfg, cover="min", mix_last=False)
        expected = proxy_votes(self.MASS, self.LAST, replace(cfg, preset="paper"))
        assert np.array_equal(proxy_votes(self.MASS, self.LAST, paper), expected)
        mixed = proxy_votes(self.MASS, self.LAST, replace(cfg, mix_last=False))
        assert close(mixed[0], "1.10 1.05 1.30 1.05 1.40")


class TestDAS:
    CFG = OracleConfig(budget="20%", scorer="das", **SMALL)
    SCORE = numbers(".30 .10 .20 .06 .02 .04 .01 .03 .02")[None]
    THREE = ((0, 3), (3, 6), (6, 9))

    def test_micro(self):
        got = subsidised(self.SCORE, self.THREE, self.CFG)
        assert close(got[0], ".30 .10 .20 .18 .06 .12 .043333 .13 .086667")
        assert top(self.SCORE, 4) == "0123"
        assert top(got, 4) == "0237"

    def test_fixture(self):
        base = window_score(PROMPT, 1, C4)
        got = subsidised(base, SEGMENTS, self.CFG)
        assert np.array_equal(got[0], base[0])
        assert close(got[1, 2:8], ".128108 .105911 .104831 .142886 .072773 .059595")

    def test_unlike_sizes(self):
        """Every token counts once in what images got so far: (4*.2 + .05)/5 = .17."""
        score = np.array([[0.1, 0.3, 0.2, 0.2, 0.05]])
        got = subsidised(score, ((0, 4), (4, 9)), self.CFG)
        assert close(got[0], ".1 .3 .2 .2 .17")
        assert close(subsidised(score, ((0, 4), (4, 9)), replace(self.CFG, kmax=2.0))[0, 4], ".1")

    def test_identities(self):
        def changed(segments, **options):
            return not np.array_equal(
                subsidised(self.SCORE, segments, replace(self.CFG, **options)), self.SCORE
            )

        assert changed(self.THREE)
        assert not changed(self.THREE, eta=0.0)
        assert not changed(((0, 9),))
        # nobody stands before the first image, but the mean of all does
        assert not changed(((3, 6), (0, 3)))
        assert changed(((3, 6), (0, 3)), reference="global")

    def test_text_is_untouched(self):
        got = score_layers(PROMPT, self.CFG, 3, [4] * 3)
        text = [0, 1, 8]
        for layer, scored in enumerate(got):
            base = window_score(PROMPT, layer, C4)
            assert np.array_equal(scored.final[:, text], base[:, text])
            assert np.array_equal(scored.base, base)
