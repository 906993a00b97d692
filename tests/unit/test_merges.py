# SPDX-License-Identifier: Apache-2.0
"""Merges: published numbers, plain loops over random prompts, and what must stay as it was."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merge_cases import merged, plain, prompts

from vllm_kvcompress.merging import MERGES
from vllm_kvcompress.merging.elastic import Elastic
from vllm_kvcompress.merging.lookm import LookM
from vllm_kvcompress.merging.recycle import Recycle

EVERY_MERGE = [
    *(LookM(merge_mode=mode) for mode in ("pivot", "avg", "weighted")),
    Elastic(),
    Elastic(sinks=3),
    Recycle(),
    Recycle(bins=3),
]


def joined_by_similarity(prompt, head, kept) -> dict[int, list[tuple[int, float]]]:
    """Target -> what joins it, with its cosine."""
    unit = prompt.keys[head] / np.linalg.norm(prompt.keys[head], axis=1, keepdims=True)
    joined = {c: [] for c in kept}
    for e in set(range(prompt.in_pages)) - set(kept):
        cosines = [float(unit[e] @ unit[c]) for c in kept]
        if cosines:
            joined[kept[int(np.argmax(cosines))]].append((e, max(cosines)))
    return joined


def joined_by_distance(prompt, kept, sinks) -> dict[int, list[int]]:
    anchors = [c for c in kept if c >= sinks and c != prompt.length - 1]
    joined = {c: [] for c in kept}
    for e in set(range(prompt.in_pages)) - set(kept):
        if anchors:
            joined[min(anchors, key=lambda c: (abs(c - e), c))].append(e)
    return joined


def recycled(prompt, head, bins) -> tuple[int, list[list[int]]]:
    """Tokens that the head keeps, and the tokens of each of its bins."""
    ranked = prompt.ranked(head)
    slots, pinned = prompt.slots[head], prompt.in_pages - int(prompt.competes.sum())

    def contents(num_kept: int, joint: bool) -> list[list[int]]:
        gone = [t for t in sorted(ranked[num_kept:]) if prompt.segment[t] >= 0]
        gone = [t for t in gone if prompt.competes[t]]
        segments = sorted({prompt.segment[t] for t in gone})
        groups = [[t for t in gone if prompt.segment[t] == m] for m in segments]
        if joint:
            return [gone] if gone else []
        runs = [np.array_split(group, min(bins, len(group))) for group in groups]
        return [run.tolist() for group in runs for run in group]

    joint = slots - pinned <= len(contents(0, joint=False))
    if joint and slots - pinned < 2:
        return slots, []
    num_kept = next(j for j in range(slots + 1) if j + len(contents(j, joint)) == slots)
    return num_kept, contents(num_kept, joint)


class TestPublishedNumbers:
    KEYS = ((1, 0), (0, 1), (0.8, 0.6), (0.6, 0.8), (1, 0.1))
    VALUES = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5))

    @pytest.mark.parametrize(
        ("mode", "keys", "values"),
        [
            ("avg", [[0.933333, 0.233333], [0.3, 0.9]], [[3, 3], [3, 3]]),
            ("pivot", [[0.966667, 0.116667], [0.15, 0.95]], [[2, 2], [2.5, 2.5]]),
            ("weighted", [[0.878346, 0.193168], [0.24, 0.82]], [[2.791729] * 2, [2.6, 2.6]]),
        ],
    )
    def test_lookm(self, mode, keys, values):
        prompt = plain(self.KEYS, self.VALUES, 2, final=[9, 8, 0, 0, 0])
        kept, [[(got_keys, got_values)]] = merged(LookM(merge_mode=mode), [prompt])
        assert kept == [[[0, 1]]]
        np.testing.assert_allclose(got_keys, keys, atol=6e-7)
        np.testing.assert_allclose(got_values, values, atol=6e-7)

    def test_elastic(self):
        positions = np.arange(8)[:, None] * np.ones(2)
        prompt = plain(positions, 10 * positions, 5, final=[9, 0.5, 0.9, 0.2, 0.8, 0.1, 0.3, 9])
        kept, [[(keys, values)]] = merged(Elastic(), [prompt])
        assert kept == [[[0, 1, 2, 4, 7]]]
        assert keys[:, 0].tolist() == [0, 1, 2.5, 5, 7]
        assert values[:, 1].tolist() == [0, 10, 25, 50, 70]

    SCORES = (0.30, 0.10, 0.20, 0.18, 0.06, 0.12, 0.043333, 0.13, 0.086667)
    IMAGES = (0, 0, 0, 1, 1, 1, 2, 2, 2)

    def test_recycle_one_bin_per_image(self):
        """Unit vectors as values, so that each bin shows its weights."""
        unit = np.eye(9)
        prompt = plain(unit, 2 * unit, 4, final=self.SCORES, segment=self.IMAGES)
        kept, [[(keys, values)]] = merged(Recycle(), [prompt])
        assert kept == [[[0]]]
        expected = np.zeros((4, 9))
        expected[0, 0] = 1
        expected[1, 1:3] = 0.333333, 0.666667
        expected[2, 3:6] = 0.5, 0.166667, 0.333333
        expected[3, 6:9] = 0.166667, 0.5, 0.333333
        np.testing.assert_allclose(keys, expected, atol=6e-6)
        np.testing.assert_allclose(values, 2 * expected, atol=6e-6)

    def test_recycle_two_dropped_tokens(self):
        """Only two tokens are in the bin: everything but 6 and 8 of the last image is text."""
        keys, values = np.zeros((9, 2)), np.zeros((9, 2))
        keys[6], keys[8], values[6], values[8] = (1, 0), (0, 1), (2, 0), (0, 4)
        scores = np.array([9.0] * 6 + [0.043333, 9, 0.086667])
        segment = [-1] * 6 + [0, -1, 0]
        _, [[(got_keys, got_values)]] = merged(
            Recycle(), [plain(keys, values, 8, final=scores, segment=segment)]
        )
        np.testing.assert_allclose(got_keys[-1], [0.333333, 0.666667], atol=6e-6)
        np.testing.assert_allclose(got_values[-1], [0.666667, 2.666667], atol=2e-5)


class TestAgainstLoops:
    @given(prompts(), st.sampled_from(["pivot", "avg", "weighted"]))
    def test_lookm(self, prompt, mode):
        kept, [entries] = merged(LookM(merge_mode=mode), [prompt])
        for head, positions in enumerate(kept[0]):
            joined = joined_by_similarity(prompt, head, positions)
            for rows, got in zip(
                (prompt.keys[head], prompt.values[head]), entries[head], strict=True
            ):
                for slot, c in enumerate(positions):
                    add = {
                        "avg": lambda e, cosine, c=c, rows=rows: rows[e],
                        "pivot": lambda e, cosine, c=c, rows=rows: (rows[e] + rows[c]) / 2,
                        "weighted": lambda e, cosine, c=c, rows=rows: rows[e] * cosine,
                    }[mode]
                    mean = np.mean([rows[c], *(add(*pair) for pair in joined[c])], axis=0)
                    np.testing.assert_allclose(got[slot], mean, rtol=1e-4, atol=1e-5)
                    if not joined[c]:
                        assert np.array_equal(got[slot], rows[c])

    @given(prompts(), st.integers(0, 4))
    def test_elastic(self, prompt, sinks):
        kept, [entries] = merged(Elastic(sinks=sinks), [prompt])
        for head, positions in enumerate(kept[0]):
            joined = joined_by_distance(prompt, positions, sinks)
            for rows, got in zip(
                (prompt.keys[head], prompt.values[head]), entries[head], strict=True
            ):
                for slot, c in enumerate(positions):
                    mean = rows[[c, *joined[c]]].mean(0)
                    np.testing.assert_allclose(got[slot], mean, rtol=1e-4, atol=1e-5)
                    if not joined[c]:
                        assert np.array_equal(got[slot], rows[c])

    @given(prompts(), st.integers(1, 4))
    def test_recycle(self, prompt, bins):
        kept, [entries] = merged(Recycle(bins=bins), [prompt])
        for head, positions in enumerate(kept[0]):
            num_kept, contents = recycled(prompt, head, bins)
            assert len(positions) == num_kept
            assert num_kept + len(contents) == prompt.slots[head]
            for rows, got in zip(
                (prompt.keys[head], prompt.values[head]), entries[head], strict=True
            ):
                assert np.array_equal(got[:num_kept], rows[positions])
                for slot, members in enumerate(contents, num_kept):
                    weights = prompt.final[head, members]
                    weights = weights if weights.sum() else np.ones(len(members))
                    mean = np.average(rows[members], axis=0, weights=weights)
                    np.testing.assert_allclose(got[slot], mean, rtol=1e-4, atol=1e-5)


class TestProperties:
    @pytest.mark.parametrize("merge", EVERY_MERGE, ids=str)
    @given(pair=st.tuples(prompts(), prompts()))
    def test_two_prompts_equal_two_batches_of_one(self, merge, pair):
        kept, both = merged(merge, list(pair), garbage=float("nan"))
        for i, prompt in enumerate(pair):
            [alone_kept], [alone] = merged(merge, [prompt])
            assert kept[i] == alone_kept
            for got, want in zip(both[i], alone, strict=True):
                for x, y in zip(got, want, strict=True):
                    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("merge", EVERY_MERGE, ids=str)
    @given(prompt=prompts())
    def test_the_same_result_twice(self, merge, prompt):
        _, [once] = merged(merge, [prompt])
        _, [again] = merged(merge, [prompt])
        for one, two in zip(once, again, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(one, two, strict=True))

    @pytest.mark.parametrize("merge", EVERY_MERGE, ids=str)
    @given(prompt=prompts())
    def test_slots_for_everything_change_nothing(self, merge, prompt):
        """A bin may hold a single token, which then stands behind the others, as it was."""
        prompt.slots = [prompt.in_pages] * len(prompt.slots)
        [kept], [entries] = merged(merge, [prompt])
        for head, got in enumerate(entries):
            order = kept[head] + sorted(set(range(prompt.in_pages)) - set(kept[head]))
            assert np.array_equal(got[0], prompt.keys[head, order])
            assert np.array_equal(got[1], prompt.values[head, order])

    @given(prompts())
    def test_the_tail_block_is_no_source(self, prompt):
        """Entries do not depend on what stands behind the full blocks."""
        other = dataclasses.replace(prompt, keys=prompt.keys.copy(), values=prompt.values.copy())
        other.keys[:, prompt.in_pages :] = 1e6
        other.values[:, prompt.in_pages :] = 1e6
        for merge in EVERY_MERGE:
            _, [one] = merged(merge, [prompt])
            _, [two] = merged(merge, [other])
            for got, want in zip(two, one, strict=True):
                assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True))


class TestDegenerate:
    def test_equal_keys_join_the_lowest(self):
        ones = np.ones((6, 2))
        prompt = plain(ones, np.arange(6)[:, None] * ones, 3, final=[0, 5, 5, 5, 0, 0])
        _, [[(_, values)]] = merged(LookM(merge_mode="avg"), [prompt])
        assert values[:, 0].tolist() == [(1 + 0 + 4 + 5) / 4, 2, 3]

    def test_equal_distances_join_the_lower(self):
        rows = np.arange(6)[:, None] * np.ones(2)
        prompt = plain(rows, rows, 2, final=[0, 5, 0, 5, 0, 0])
        kept, [[(keys, _)]] = merged(Elastic(sinks=0), [prompt])
        assert kept == [[[1, 3]]]
        assert keys[:, 0].tolist() == [1, 4]

    def test_no_anchor_merges_nothing(self):
        rows = np.arange(6)[:, None] * np.ones(2)
        prompt = plain(rows, rows, 3, final=[9, 9, 0, 0, 0, 9])
        kept, [[(keys, _)]] = merged(Elastic(sinks=2), [prompt])
        assert kept == [[[0, 1, 5]]]
        assert keys[:, 0].tolist() == [0, 1, 5]

    def test_the_last_token_in_the_tail_block_leaves_anchors_alone(self):
        rows = np.arange(6)[:, None] * np.ones(2)
        prompt = plain(rows, rows, 2, final=[9, 0, 0, 9, 0, 0])
        prompt.in_pages = 4
        _, [[(keys, _)]] = merged(Elastic(), [prompt])
        assert keys[:, 0].tolist() == [0, 2]

    @pytest.mark.parametrize(
        ("slots", "num_kept", "num_bins"), [(1, 1, 0), (2, 1, 1), (3, 2, 1), (4, 1, 3), (5, 2, 3)]
    )
    def test_small_budgets_get_fewer_bins(self, slots, num_kept, num_bins):
        """Three images: a bin each, one for all of them, or none."""
        unit = np.eye(9)
        scores, images = TestPublishedNumbers.SCORES, TestPublishedNumbers.IMAGES
        prompt = plain(unit, unit, slots, final=scores, segment=images)
        kept, [[(keys, _)]] = merged(Recycle(), [prompt])
        assert len(kept[0][0]) == num_kept
        assert (keys[num_kept:] > 0).sum(0).tolist() == [
            int(t not in kept[0][0] and num_bins > 0) for t in range(9)
        ]

    @pytest.mark.parametrize("scores", [[0.0] * 9, [float("nan")] * 9])
    def test_scores_that_say_nothing_weigh_alike(self, scores):
        unit = np.eye(9)
        prompt = plain(unit, unit, 4, final=scores, segment=[0] * 9)
        kept, [[(keys, _)]] = merged(Recycle(), [prompt])
        assert kept == [[[0, 1, 2]]]
        np.testing.assert_allclose(keys[3], [0] * 3 + [1 / 6] * 6, rtol=1e-6)

    def test_a_prompt_without_images_has_no_bins(self):
        rows = np.arange(8)[:, None] * np.ones(2)
        kept, [[(keys, _)]] = merged(Recycle(), [plain(rows, rows, 3, final=np.arange(8))])
        assert kept == [[[5, 6, 7]]]
        assert keys[:, 0].tolist() == [5, 6, 7]

    @pytest.mark.parametrize(
        ("merge", "options"),
        [(LookM, {"merge_mode": "max"}), (Elastic, {"sinks": -1}), (Recycle, {"bins": 0})],
    )
    def test_bad_options(self, merge, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            merge(**options)


def test_table_rows_are_frozen_dataclasses_under_their_own_name():
    for name, merge in MERGES.items():
        assert merge.name == name
        with pytest.raises(dataclasses.FrozenInstanceError):
            merge().name = "other"
