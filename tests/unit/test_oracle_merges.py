# SPDX-License-Identifier: Apache-2.0
"""The oracle reproduces the published worked examples of merges, and keeps its own rules."""

import numpy as np
import pytest
from oracle import OracleConfig, merged_entries, select
from oracle.config import budget_of
from oracle.merges import bin_entries, elastic, lookm, recycle
from oracle.plan import choose
from oracle.scorers import Scored
from worked import PROMPT, K, V, close, numbers


class TestLookM:
    KEYS = numbers("1 0 | 0 1 | .8 .6 | .6 .8 | 1 .1")
    VALUES = numbers("1 1 | 2 2 | 3 3 | 4 4 | 5 5")

    @pytest.mark.parametrize(
        ("mode", "keys", "values"),
        [
            ("avg", ".933333 .233333 | .3 .9", "3 3 | 3 3"),
            ("pivot", ".966667 .116667 | .15 .95", "2 2 | 2.5 2.5"),
            ("weighted", ".878346 .193168 | .24 .82", "2.791729 2.791729 | 2.6 2.6"),
        ],
    )
    def test_example(self, mode, keys, values):
        got = lookm(self.KEYS, self.VALUES, np.array([0, 1]), np.array([2, 3, 4]), mode)
        assert close(got.keys, keys)
        assert close(got.values, values)

    def test_text_prior(self):
        cfg = OracleConfig(
            budget=5, scorer="h2o", text_prior=True, recent_share=0.4, window=2, block_size=1
        )
        visual = np.zeros(8, dtype=bool)
        visual[2:6] = True
        budget = budget_of(visual, cfg)
        assert (budget.recent, budget.capacity) == (2, 1)
        scored = Scored(numbers(".9 .8 .6 .1 .7 .3")[None], None)
        order, _ = choose(scored, 0, budget.candidates, budget.kept, 8, (), cfg)
        assert sorted(order) == [0, 1, 4, 6, 7]


class TestElastic:
    def test_example(self):
        cfg = OracleConfig(budget=5, scorer="elastic", window=1, block_size=1)
        scored = Scored(numbers("inf .5 .9 .2 .8 .1 .3")[None], None)
        order, _ = choose(scored, 0, np.arange(8) < 7, 5, 8, (), cfg)
        assert sorted(order) == [0, 1, 2, 4, 7]
        keys = np.arange(8.0)[:, None]
        got = elastic(keys, 10 * keys, np.array([1, 2, 4]), np.array([3, 5, 6]))
        assert got.keys.ravel().tolist() == [1, 2.5, 5]
        assert got.values.ravel().tolist() == [10, 25, 50]

    @pytest.mark.parametrize(("block_size", "end"), [(5, 10), (6, 11)])
    def test_anchors(self, block_size, end):
        """Neither the sink nor the last token, and nothing of the tail, takes part."""
        cfg = OracleConfig(
            budget=6, scorer="elastic", merge="elastic", window=1, block_size=block_size
        )
        selection = select(PROMPT, cfg)
        entries = merged_entries(PROMPT, selection, cfg)
        for layer, head in np.ndindex(3, 2):
            kept = selection.kept[layer][head]
            anchors = kept[(kept > 0) & (kept < end)]
            assert entries[layer][head].positions.tolist() == anchors.tolist()

    def test_no_anchor(self):
        none = np.zeros(0, dtype=np.int64)
        assert len(elastic(K[0, 0], V[0, 0], none, np.arange(5)).positions) == 0


class TestRecycle:
    SCORE = np.array([90, 30, 60, 54, 18, 36, 13, 39, 26]) / 300
    ORDER = np.argsort(-SCORE, kind="stable")
    IMAGES = (np.arange(3), np.arange(3, 6), np.arange(6, 9))

    def test_example(self):
        count, bins = recycle(self.ORDER, 0, 4, self.SCORE, self.IMAGES, 1)
        assert self.ORDER[:count].tolist() == [0]
        assert [part.members.tolist() for part in bins] == [[1, 2], [3, 4, 5], [6, 7, 8]]
        assert close(bins[0].weights, ".333333 .666667")
        assert close(bins[1].weights, ".5 .166667 .333333")
        assert close(bins[2].weights, ".166667 .5 .333333")

    def test_entries(self):
        count, bins = recycle(np.array([7, 8, 6]), 0, 2, self.SCORE, [np.array([6, 8])], 1)
        assert count == 1
        assert close(bins[0].weights, ".333333 .666667")
        keys, values = np.zeros((9, 2)), np.zeros((9, 2))
        keys[6], keys[8], values[6], values[8] = (1, 0), (0, 1), (2, 0), (0, 4)
        got = bin_entries(keys, values, bins)
        assert got.positions.tolist() == [8]
        assert close(got.keys[0], ".333333 .666667")
        assert close(got.values[0], ".666667 2.666667")

    @pytest.mark.parametrize(
        ("room", "pinned", "per_segment", "count", "members"),
        [
            # one bin for all images, then none
            (3, 0, 1, 2, [[1, 3, 4, 5, 6, 7, 8]]),
            (2, 0, 1, 1, [[1, 2, 3, 4, 5, 6, 7, 8]]),
            (1, 0, 1, 1, []),
            (3, 2, 1, 3, []),
            (4, 2, 1, 3, [[1, 4, 5, 6, 7, 8]]),
            # bins of near-equal length
            (7, 0, 2, 1, [[1], [2], [3, 4], [5], [6, 7], [8]]),
            # a bin of one token is that token; an image that is gone leaves no bin
            (8, 0, 1, 5, [[1], [4], [6, 8]]),
            (9, 0, 1, 7, [[4], [6]]),
        ],
    )
    def test_room(self, room, pinned, per_segment, count, members):
        got = recycle(self.ORDER, pinned, room, self.SCORE, self.IMAGES, per_segment)
        assert got[0] == count
        assert [part.members.tolist() for part in got[1]] == members

    def test_no_weight(self):
        _, bins = recycle(self.ORDER, 0, 4, np.zeros(9), self.IMAGES, 1)
        assert close(bins[1].weights, ".333333 .333333 .333333")

    def test_text_only(self):
        count, bins = recycle(self.ORDER, 2, 4, self.SCORE, (), 1)
        assert (count, bins) == (4, [])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scorer": "streaming", "allocator": "adakv"}, "adakv"),
        ({"scorer": "elastic", "allocator": "adakv"}, "adakv"),
        ({"scorer": "prefixkv", "allocator": "sparsemm"}, "sparsemm"),
        ({"merge": "elastic"}, "elastic"),
        ({"scorer": "keydiff", "merge": "recycle"}, "recycle"),
        ({"scorer": "aircache", "candidates": "all"}, "aircache"),
        ({"scorer": "das", "base": "das"}, "base"),
        ({"scorer": "das", "base": "prefixkv", "allocator": "adakv"}, "adakv"),
    ],
)
def test_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        OracleConfig(budget=64, **options)
