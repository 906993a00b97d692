# SPDX-License-Identifier: Apache-2.0
"""The oracle reproduces the published worked examples: allocators, budgets, pages and merges."""

import json
from dataclasses import replace

import numpy as np
import pytest
from oracle import OracleConfig, adakv_capacities, apportion, page_plan
from oracle.allocators import (
    aircache_shares,
    prefix_sizes,
    pyramid,
    skewness,
    sparsemm,
    sparsity,
    vlcache_sizes,
)
from oracle.attention import key_attention_sum
from oracle.config import budget_of
from oracle.plan import head_pages
from oracle.scorers import post_vision_rows, window_score
from worked import C4, PROMPT, SMALL, close, kept, numbers


class TestPyramid:
    @pytest.mark.parametrize(
        ("limit", "beta", "official", "exact"),
        [
            (100, 20, [16, 11, 6, 1], [16, 11, 5, 0]),
            (100, 4, [14, 10, 6, 2], [14, 10, 6, 2]),
            (12, 4, [12, 10, 8, 6], [12, 9, 7, 4]),
            # a short prompt is not compressed in any layer
            (8, 20, [8, 8, 8, 8], [8, 8, 8, 8]),
        ],
    )
    def test_small(self, limit, beta, official, exact):
        cfg = OracleConfig(budget=12, window=4, allocator="pyramid", beta=beta)
        assert pyramid(4, 8, limit, replace(cfg, rounding="official")) == official
        assert pyramid(4, 8, limit, cfg) == exact

    @pytest.mark.parametrize(
        ("budget", "layers", "first", "last", "mean"),
        [
            (64, 28, 63, 9, 36.0),
            (64, 32, 63, 1, 32.0),
            (64, 48, 63, 16, 39.5),
            (128, 28, 188, 26, 107.0),
            (128, 32, 188, 33, 110.5),
            (128, 48, 188, 47, 117.5),
            (256, 28, 437, 32, 234.5),
            (256, 32, 437, 34, 235.5),
            (256, 48, 437, 14, 225.5),
        ],
    )
    def test_overspend(self, budget, layers, first, last, mean):
        cfg = OracleConfig(budget=budget, allocator="pyramid", rounding="official")
        counts = pyramid(layers, budget - 32, 10_000, cfg)
        assert (counts[0], counts[-1], np.mean(counts)) == (first, last, mean)
        exact = pyramid(layers, budget - 32, 10_000, replace(cfg, rounding="exact"))
        assert sum(exact) == (budget - 32) * layers
        if (budget, layers) == (64, 28):
            assert exact[:6] + exact[-3:] == [62, 60, 58, 56, 53, 51, 6, 4, 2]


class TestAdaKV:
    BASE = numbers(
        ".40 .03 .029 .028 .027 .026 .025 .024 .023 .022"
        "| .14 .12 .035 .034 .033 .032 .031 .0305 .01 .01"
    )

    @pytest.mark.parametrize(
        ("normalize", "alpha", "official", "exact"),
        [
            (False, 0.0, [2, 8], [2, 8]),
            (False, 0.2, [3, 7], [3, 7]),
            (False, 0.5, [3, 6], [4, 6]),
            (True, 0.0, [3, 7], [3, 7]),
            (True, 0.2, [3, 7], [3, 7]),
            (True, 0.5, [4, 6], [4, 6]),
        ],
    )
    def test_counts(self, normalize, alpha, official, exact):
        cfg = OracleConfig(budget=37, alpha=alpha, normalize=normalize)
        assert adakv_capacities(self.BASE, replace(cfg, rounding="official")) == official
        assert adakv_capacities(self.BASE, cfg) == exact

    def test_fixture(self):
        base = window_score(PROMPT, 1, C4)
        assert adakv_capacities(base, replace(C4, alpha=0.0)) == [3, 5]
        cfg = replace(C4, allocator="adakv", alpha=0.5)
        assert kept(cfg, 9)[1] == "3567 1235"
        assert kept(replace(cfg, scorer="bacon"), 9)[1] == "3567 1245"


class TestSparseMM:
    SIGMA = ((0, 0.1, 0.3, 0.2), (0.05, 0.05, 0.1, 0.2))
    CFG = OracleConfig(budget=42, allocator="sparsemm", head_scores=SIGMA)

    def test_counts(self):
        official = replace(self.CFG, rounding="official")
        assert sparsemm(2, 2, 10, 100, self.CFG) == [[5, 19], [4, 12]]
        assert sparsemm(2, 2, 10, 100, official) == [[5, 19], [5, 12]]
        assert sparsemm(2, 2, 10, 12, self.CFG) == [[8, 12], [8, 12]]
        assert sum(map(sum, sparsemm(2, 2, 10, 12, official))) == 34

    @pytest.mark.parametrize(("share", "least", "rest"), [(32, 3, 3248), (96, 9, 9744)])
    def test_real_sizes(self, share, least, rest):
        """28 layers of 28 query heads in 4 groups; one head that gets all of the rest."""
        sigma = np.zeros((28, 28))
        sigma[3, 9] = 1
        counts = sparsemm(28, 4, share, 100_000, replace(self.CFG, head_scores=sigma))
        assert counts[3][1] == least + rest
        assert counts[0] == [least] * 4

    def test_table_file(self, tmp_path):
        """Keys decide, not their order; a list counts as its mean."""
        table = {
            f"{i}-{h}": [2 * x, 0] for i, row in enumerate(self.SIGMA) for h, x in enumerate(row)
        }
        file = tmp_path / "heads.json"
        file.write_text(json.dumps(dict(reversed(table.items()))))
        cfg = replace(self.CFG, head_scores=str(file))
        assert sparsemm(2, 2, 10, 100, cfg) == [[5, 19], [4, 12]]
        with pytest.raises(ValueError, match="head_scores"):
            sparsemm(3, 2, 10, 100, cfg)


class TestAirCache:
    CFG = OracleConfig(budget="50%", scorer="aircache", allocator="aircache", **SMALL)

    def test_kept(self):
        assert close(skewness(np.array([1.0, 2, 3, 4, 10])), "1.697056")
        assert close(aircache_shares(PROMPT, self.CFG) / 2, ".511074 .251723 .737204")
        visual = [
            " ".join(head.strip("018ab9") for head in layer.split()) for layer in kept(self.CFG)
        ]
        assert visual == ["345 345", "36 23", "4567 2567"]

    @pytest.mark.parametrize(
        ("statistic", "shares"),
        [
            ("strength", ".945444 1.006891 1.047665"),
            ("skewness", "1.098850 0 1.901150"),
        ],
    )
    def test_statistics(self, statistic, shares):
        assert close(aircache_shares(PROMPT, replace(self.CFG, statistic=statistic)), shares)

    def test_at_least_one(self):
        """A layer without skew still keeps one visual token."""
        layers = kept(replace(self.CFG, statistic="skewness"))
        assert [len(layer.split()[0]) - 6 for layer in layers] == [3, 1, 5]

    def test_degenerate(self):
        assert aircache_shares(replace(PROMPT, segments=[(2, 4)]), self.CFG) is None
        assert skewness(np.ones(5)) == 0


class TestPrefixKV:
    @pytest.mark.parametrize(
        ("total", "level", "sizes"),
        [
            (6, 0.55, [2, 4]),
            (7, 0.67, [2, 5]),
            (8, 0.70, [2, 6]),
            (9, 0.79, [3, 6]),
            (10, 0.80, [3, 7]),
            (11, 0.88, [4, 7]),
        ],
    )
    def test_search(self, total, level, sizes):
        priority = numbers(
            ".50 .20 .10 .08 .05 .04 .02 .01 | .15 .14 .13 .13 .12 .12 .11 .10",
        )
        assert prefix_sizes(priority, total) == (sizes, pytest.approx(level))

    def test_left_over_slots(self):
        """Both layers step at one level: the lower one gets the slot that is left."""
        assert prefix_sizes(np.ones((2, 4)), 5)[0] == [3, 2]

    def test_fixture(self):
        priority = np.stack([key_attention_sum(PROMPT, layer).mean(axis=0) for layer in range(3)])
        assert prefix_sizes(priority, 18) == ([6, 6, 6], pytest.approx(0.813638, abs=6e-7))
        cfg = OracleConfig(budget=6, scorer="prefixkv", allocator="prefixkv", **SMALL)
        assert set(kept(cfg)) == {"01234b 01234b"}


class TestVLCache:
    @pytest.mark.parametrize(
        ("threshold", "gamma", "sizes"),
        [
            (0.01, ".041667 .095238 .101190", [6, 6, 6]),
            (0.1, ".357143 .434524 .488095", [7, 6, 5]),
        ],
    )
    def test_fixture(self, threshold, gamma, sizes):
        cfg = OracleConfig(
            budget=6, scorer="postvision", allocator="vlcache", threshold=threshold, **SMALL
        )
        rows = post_vision_rows(PROMPT, cfg)
        got = np.array([sparsity(PROMPT, layer, rows, threshold) for layer in range(3)])
        assert close(got, gamma)
        assert vlcache_sizes(got, 6, 12) == sizes
        assert [len(layer.split()[0]) for layer in kept(cfg)] == sizes


def test_apportion_floats():
    """A float that is an integer but for rounding is that integer."""
    assert apportion([0.1 * 3 * 10, 2.9999999999999996, 1.0], 7, 0, 9) == [3, 3, 1]


class TestBudget:
    """One prompt of 40 tokens with images at 4..10 and 20..28, blocks of 8."""

    SEGMENTS = ((4, 10), (20, 28))
    VISUAL = np.zeros(40, dtype=bool)
    VISUAL[4:10] = VISUAL[20:28] = True

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"budget": 12}, (12, 4, 8, 36, 4)),
            ({"budget": "31%"}, (13, 4, 9, 36, 4)),
            # a ratio never means less than a block or the window and one token
            ({"budget": "1%"}, (8, 4, 4, 36, 4)),
            ({"budget": "1%", "window": 9}, (10, 9, 1, 31, 9)),
            ({"budget": 12, "scorer": "keydiff"}, (12, 4, 8, 36, 1)),
            ({"budget": 15, "scorer": "h2o", "recent_share": 0.5}, (15, 4, 11, 36, 7)),
            ({"budget": 5, "scorer": "aircache"}, (31, 26, 5, 14, 1)),
            ({"budget": 99, "scorer": "aircache"}, (40, 26, 14, 14, 1)),
            # halves go to the even number
            ({"budget": "25%", "scorer": "aircache"}, (30, 26, 4, 14, 1)),
            ({"budget": "25%", "scorer": "das", "window": 16}, (32, 30, 2, 10, 16)),
            ({"budget": "1%", "scorer": "aircache"}, (27, 26, 1, 14, 1)),
            ({"budget": "50%", "scorer": "das", "window": 16}, (35, 30, 5, 10, 16)),
            ({"budget": 30, "scorer": "h2o", "text_prior": True}, (30, 26, 4, 14, 4)),
            # all text stays, though it alone exceeds the budget
            ({"budget": 20, "scorer": "h2o", "text_prior": True}, (26, 26, 0, 14, 4)),
            (
                {"budget": 20, "scorer": "h2o", "text_prior": True, "text_hard_cap": True},
                (20, 4, 16, 36, 4),
            ),
        ],
    )
    def test_numbers(self, options, expected):
        cfg = OracleConfig(**({"window": 4, "block_size": 8} | options))
        assert budget_of(self.VISUAL, cfg)[:5] == expected

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"budget": 12}, (2, True, 4)),
            ({"budget": 39}, (5, False, 4)),
            # the window alone fills two blocks
            ({"budget": 13, "window": 12}, (2, True, 12)),
            ({"budget": 5, "scorer": "aircache"}, (4, True, 26)),
            ({"budget": 8, "scorer": "aircache"}, (5, False, 26)),
        ],
    )
    def test_plan(self, options, expected):
        cfg = OracleConfig(**({"window": 4, "block_size": 8} | options))
        assert page_plan(40, cfg, segments=self.SEGMENTS)[2:] == expected

    def test_no_visual_token(self):
        cfg = OracleConfig(budget="10%", scorer="aircache", block_size=8)
        assert not page_plan(400, cfg).compressed

    def test_overspend_counts(self):
        """The official pyramid keeps 68 tokens of 64: one block more."""
        cfg = OracleConfig(budget=64, allocator="pyramid", block_size=16, rounding="official")
        assert page_plan(1600, cfg, layers=28).uniform == 5
        assert page_plan(1600, replace(cfg, rounding="exact"), layers=28).uniform == 4

    def test_pages(self):
        """K of 10, 20, 30 and 40 tokens in blocks of 8, behind a tail of 3."""
        tokens = [[10, 20], [30, 40]]
        cfg = OracleConfig(budget=25, window=4, block_size=8, allocator="adakv")
        plan = page_plan(83, cfg)
        assert plan == (10, 3, 3, True, 1)
        assert head_pages(tokens, plan, cfg) == [[2, 4], [2, 4]]
        assert head_pages(tokens, plan, replace(cfg, allocator="vlcache")) == [[2, 2], [4, 4]]
        sparse = replace(cfg, allocator="sparsemm")
        assert head_pages(tokens, plan, sparse) == [[1, 2], [4, 5]]
